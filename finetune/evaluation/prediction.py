"""Prediction: probabilities of images under a run's final model, view by view or averaged.

An image is decoded once, however many views are taken of it.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from finetune.data.decoding import decode
from finetune.data.loading import ImageStore, normalize
from finetune.data.sources import read_bytes
from finetune.errors import BackboneError, RecipeError, RunError
from finetune.evaluation.views import average_views, check_crops, list_crops, permitted_views, unmirror
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.models.regularization import random_pieces, sample_predictions
from finetune.recipe.plan import Plan
from finetune.recipe.runs import RunFolder
from finetune.recipe.shelf import read_zoo
from finetune.scores.calibration import apply_temperature, log_probabilities

BATCH = 64
"""Most images read at once."""
MOST_CROPS = 640
"""Most crops per forward pass, of the size the network was trained on; fewer where they are larger."""
_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError)
"""What networks raise at images of a size they cannot take."""


def load_final(run: RunFolder, backbone: Backbone | None = None) -> Classifier:
    """The classifier a run ended with, in eval mode on the CPU.

    Args:
        run: a run whose stages are done.
        backbone: the run's pretrained backbone where it is loaded already; used (and changed) as it is.

    Raises:
        BackboneError: if the backbone's card is not at hand, or its weights are not those of the plan.
        RunError: if the run has no plan.
    """
    if run.file("ensemble.json").exists():
        from finetune.evaluation.ensembles import load_ensemble  # which loads its members by this very function

        return load_ensemble(run)  # type: ignore[return-value]
    plan = run.plan
    if backbone is None:
        backbone = load_backbone(plan.backbone, zoo=read_zoo(), pretrained=plan.pretrained and not plan.stages)
        if not plan.stages and backbone.digest != plan.weights_digest:
            raise BackboneError(
                f"{plan.backbone} now has weights {backbone.digest[:12]}, but {run.path} was made with "
                f"{plan.weights_digest[:12]}. Put the card it was made with first in FINETUNE_ZOO."
            )
    probe = load_file(run.file("probe.safetensors")) if not plan.stages else {"weight": None, "bias": None}
    head = make_head(
        backbone.num_features,
        len(plan.classes),
        kind=plan.head.kind,
        hidden=plan.head.hidden,
        activation=plan.head.activation,
        init="small" if plan.stages else "probe",  # what is drawn is overwritten below
        dropout=plan.head.dropout,
        drop_connect=plan.head.drop_connect,
        weight=probe["weight"],
        bias=probe["bias"],
    )
    classifier = Classifier(backbone, head)
    if plan.stages:
        classifier.load_state_dict(load_file(run.final_weights()))
    return classifier.eval().to(memory_format=torch.channels_last)


class Viewer:
    """A classifier made ready to look at images in certain views."""

    def __init__(self, classifier: Classifier, plan: Plan, views: str) -> None:
        """Move the classifier to its device, and make the networks that other image sizes need.

        A run made on a GPU is judged on the CPU where there is none.

        Raises:
            RecipeError: if `views` is unknown, or the classifier cannot look at images of such sizes.
        """
        device = plan.hardware.devices if torch.cuda.is_available() else "cpu"
        assert device is not None
        self.device = device
        self.precision = plan.hardware.precision
        self.view = plan.view
        self.views = views
        self.crops = list_crops(views, self.view.size_pixels)
        check_crops(self.crops, self.view)
        self.num_classes = len(plan.classes)
        self.mirror_classes = plan.data.mirror_classes(plan.classes)
        self.images_at_once = max(1, min(BATCH, MOST_CROPS // len(self.crops)))
        """Images to read and judge together; bounds memory."""
        self._scales = sorted({crop.scale_pixels(self.view) for crop in self.crops}, reverse=True)
        classifier.to(device).eval()
        if any(crop.place == "whole" for crop in self.crops):
            _check_takes_any_size(classifier, self.view.size_pixels)
        sizes = {crop.size_pixels for crop in self.crops}
        self._networks = {size: _network_for(classifier, size, self.view.size_pixels) for size in sizes}

    def read(self, store: ImageStore, index: int) -> list[np.ndarray]:
        """The V crops (H, W, 3) uint8 of item `index`, decoded once.

        Views at the store's scale alone are cut from what the store gives. Otherwise the file is decoded at the largest
        scale needed, and the other scales are resized down from that with the same antialiasing: the store's pixels
        would have to be enlarged, and would be blurred.

        Raises:
            BadImage: if the file holds no readable image.
            OSError: if the file cannot be read.
        """
        if self._scales == [self.view.shorter_pixels]:
            images = {self._scales[0]: store.get(index)}
        else:
            images = _decode_at_scales(read_bytes(store.items[index]), self._scales, self.view.interpolation)
        return [crop.cut(images[crop.scale_pixels(self.view)], self.view) for crop in self.crops]

    @torch.inference_mode()
    def judge(self, pictures: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        """Probabilities (V, B, K) in float32 on the CPU, from the crops of B images; before any temperature.

        They are of the image as it is: what a mirrored view says of left counts for right.
        """
        alike: dict[tuple[int | None, tuple[int, ...]], list[tuple[int, int]]] = {}
        for row, crops in enumerate(pictures):
            for column, (crop, pixels) in enumerate(zip(self.crops, crops, strict=True)):
                alike.setdefault((crop.size_pixels, pixels.shape), []).append((row, column))
        answers = torch.empty(len(pictures), len(self.crops), self.num_classes)  # (B, V, K)
        for (size, shape), places in alike.items():
            at_once = max(1, MOST_CROPS * self.view.size_pixels**2 // (shape[0] * shape[1]))
            for start in range(0, len(places), at_once):
                rows, columns = zip(*places[start : start + at_once], strict=True)
                stacked = np.stack([pictures[row][column] for row, column in zip(rows, columns, strict=True)])
                answers[list(rows), list(columns)] = self._look(self._networks[size], stacked)
        return unmirror(answers.transpose(0, 1), self.views, self.mirror_classes)

    def _look(self, network: nn.Module, crops: np.ndarray) -> torch.Tensor:
        with self.autocast():
            logits = network(self.images(crops))
        return logits.float().softmax(1).cpu()

    def images(self, crops: np.ndarray) -> torch.Tensor:
        """Crops (B, H, W, 3) as the network takes them: (B, 3, H, W), normalised, on its device."""
        return normalize(torch.from_numpy(crops).to(self.device), self.view)

    def autocast(self) -> Any:
        """The precision of the plan, as a context."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = kinds.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device, dtype=dtype, enabled=self.precision in kinds)


def refuse_views(plan: Plan, backbone: Backbone) -> None:
    """Look whether the planned views can be taken at all; better before a training than after it.

    Raises:
        RecipeError: if a view is no view, is too large for what is decoded, or of a size the network cannot take.
    """
    views, _ = permitted_views(plan.evaluate.views, plan.data.allowed_changes)
    if views != "center":
        head = nn.Linear(backbone.num_features, len(plan.classes))
        Viewer(Classifier(copy.deepcopy(backbone), head), plan, views)


def predict_views(
    classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan, views: str
) -> torch.Tensor:
    """Probabilities (N, V, K) of every view, in float32 on the CPU; before any temperature.

    Views are named and ordered as `view_names(views, plan.view.size_pixels)`; mirrored ones speak of the image as it
    is.

    Raises:
        BadImage: if a file holds no readable image.
        OSError: if a file cannot be read.
        RecipeError: if `views` is unknown, or the classifier cannot look at images of such sizes.
    """
    viewer = Viewer(classifier, plan, views)
    answers = [torch.empty(0, len(viewer.crops), viewer.num_classes)]
    answers += [said.transpose(0, 1) for said in predict_in_batches(viewer, store, indices)]
    return torch.cat(answers)


def predict_probabilities(
    classifier: Classifier,
    store: ImageStore,
    indices: Sequence[int],
    plan: Plan,
    views: str,
    how: str = "probability",
) -> torch.Tensor:
    """Probabilities (N, K), averaged over views, in float32 on the CPU; before any temperature.

    Args:
        classifier: moved to the device of the plan.
        store: where the images come from.
        indices: items of the store.
        plan: of the run.
        views: as in `list_crops`.
        how: as in `average_views`.

    Raises:
        As `predict_views`.
    """
    viewer = Viewer(classifier, plan, views)
    answers = [torch.empty(0, viewer.num_classes)]
    for said in predict_in_batches(viewer, store, indices):  # averaged at once: 50 views would fill memory
        answers.append(average_views(said, how))
    return torch.cat(answers)


def predict_in_batches(viewer: Viewer, store: ImageStore, indices: Sequence[int]) -> Iterator[torch.Tensor]:
    """Probabilities (V, B, K) of every view of a few images after the other, as `Viewer.judge` gives them."""
    for pictures in _pictures(viewer, store, indices):
        yield viewer.judge(pictures)


def predict_draws(
    classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan, *, draws: int = 20, seed: int = 0
) -> torch.Tensor:
    """Probabilities (N, S, K) of centre views under S draws of the dropout in the head; their mean is the answer.

    Gal and Ghahramani, ICML 2016, https://arxiv.org/abs/1506.02142; see `sample_predictions`. The backbone is still: a
    finished run is loaded without the noise it had there.

    Raises:
        RunError: if nothing in the classifier is random in training.
        ValueError: if `draws` is less than 1.
    """
    answers = [torch.empty(0, draws, len(plan.classes))]
    answers += [drawn.transpose(0, 1) for drawn in draw_in_batches(classifier, store, indices, plan, draws, seed)]
    return torch.cat(answers)


def draw_in_batches(
    classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan, draws: int, seed: int
) -> Iterator[torch.Tensor]:
    """Probabilities (S, B, K) of a few images after the other, as `predict_draws` gives them all at once.

    The backbone, which is still, looks at an image once; the head alone is passed S times.
    """
    if not random_pieces(classifier.head):
        raise RunError(
            "the head of this run has no dropout, so draws of it would all be the same. Train with head.dropout "
            "or head.drop_connect above 0, or judge it without draws."
        )
    viewer = Viewer(classifier, plan, "center")
    for number, pictures in enumerate(_pictures(viewer, store, indices)):
        with torch.inference_mode(), viewer.autocast():
            features = classifier.backbone(viewer.images(np.stack([crop for crops in pictures for crop in crops])))
            drawn = sample_predictions(classifier.head, features, draws, seed + number)
        yield drawn.cpu()


def _pictures(viewer: Viewer, store: ImageStore, indices: Sequence[int]) -> Iterator[list[list[np.ndarray]]]:
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(indices), viewer.images_at_once):
            yield list(pool.map(partial(viewer.read, store), indices[start : start + viewer.images_at_once]))


def _decode_at_scales(data: bytes, scales: Sequence[int], interpolation: str) -> dict[int, np.ndarray]:
    """Pixels (H, W, 3) of one image by the length of its shorter side; `scales` fall."""
    pixels, facts = decode(data, shorter_pixels=scales[0], interpolation=interpolation)
    largest = Image.fromarray(pixels)
    images = {scales[0]: pixels}
    for scale in scales[1:]:
        # by the size of the file, so that each has the very shape that decoding it alone would give
        longer = int(scale * max(facts.width, facts.height) / min(facts.width, facts.height))
        size = (scale, longer) if facts.width <= facts.height else (longer, scale)
        images[scale] = np.array(largest.resize(size, Image.Resampling[interpolation.upper()]))
    return images


def _network_for(classifier: Classifier, size: int | None, own_size: int) -> nn.Module:
    """The classifier for images of `size`: itself where it takes them, else with position embeddings interpolated."""
    if size in (None, own_size):
        return classifier
    if (fault := _refusal(classifier, (size, size))) is None:
        return classifier
    # All weights but those that are resized are shared: several sizes need the memory of one.
    twin = copy.deepcopy(classifier, {id(parameter): parameter for parameter in classifier.parameters()})
    if hasattr(twin.backbone.model, "set_input_size"):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how timm itself calls torch to interpolate
                twin.backbone.model.set_input_size(img_size=(size, size))  # type: ignore[operator]
            fault = _refusal(twin, (size, size))
        except _REFUSALS as error:
            fault = error
        if fault is None:
            return twin
    name = classifier.backbone.card.name
    raise RecipeError(
        f"views: {name} was trained on {own_size} px and cannot look at {size} px ({_short(fault)}). Choose views of "
        f"{own_size} px, such as ten or multiscale, or name sizes it can take, such as center/{2 * own_size}."
    )


def _check_takes_any_size(classifier: Classifier, own_size: int) -> None:
    pools = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    sizes = [piece.output_size for piece in classifier.modules() if isinstance(piece, pools)]
    if grids := [size for size in sizes if size not in (1, (1, 1))]:
        found: object = f"it pools to {grids[0]} places and not to one"
    else:
        found = _refusal(classifier, (own_size + 3, own_size + own_size // 2 + 1))
    if found is not None:
        raise RecipeError(
            f"views: whole images have many sizes, and {classifier.backbone.card.name} does not take any size and pool "
            f"over it ({_short(found)}). Use ten or multiscale, which crop every image to {own_size} px."
        )


def _refusal(network: nn.Module, shape: tuple[int, int]) -> Exception | None:
    """What the network raises at images (H, W); None where it answers."""
    try:
        with torch.inference_mode():
            network(next(network.parameters()).new_zeros(1, 3, *shape))
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as fault:
        return fault
    return None


def _short(fault: object) -> str:
    return " ".join(str(fault).split())[:120] or type(fault).__name__


def temper(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities (N, K) at another temperature; averages are tempered as log p."""
    return apply_temperature(log_probabilities(probabilities), temperature).softmax(1).float()
