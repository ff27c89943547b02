"""Viewing: networks made ready to look at images in certain views, and what they say of the crops.

An image is decoded once, however many views are taken of it.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from finetune.compute import Compute
from finetune.config.card import View
from finetune.config.plan import Plan
from finetune.data.decoding import ImageFacts, Scaling, decode_sizes, scaling
from finetune.data.items import Item
from finetune.data.loading import ImageStore, normalize
from finetune.data.sources import read_bytes
from finetune.errors import RecipeError
from finetune.inference.ensemble_model import Ensemble
from finetune.inference.tta import check_crops, list_crops, mirror, permitted_views, unmirror
from finetune.metrics.selection import average
from finetune.models.backbones import Backbone
from finetune.models.classifier import Classifier
from finetune.planning.micro_batch import PASS_PIXELS

BATCH = 64
"""Most images read at once."""
MOST_CROPS = 640
"""Most crops in memory at once, of the size the network was trained on."""
CROPS_PER_PASS = {"cpu": 64, "cuda": 640, "mps": 64}
"""Most crops per forward pass, of the size the network was trained on; fewer where they are larger. On a CPU the
activations of more are given back to the kernel (see `compute.KEEP_BYTES`): ten crops then cost twenty centres; and
from 112 px on there are fewer, as `passes` says."""
_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError)
"""What networks raise at images of a size they cannot take."""


class Viewer:
    """A classifier made ready to look at images in certain views."""

    def __init__(self, classifier: Classifier, plan: Plan, views: str, view: View | None = None) -> None:
        """Move the classifier to its device, and make the networks that other image sizes need.

        A run made on a GPU is judged on the CPU where there is none.

        Args:
            classifier: in eval mode from now on.
            plan: says the device, the precision and the classes.
            views: as in `list_crops`.
            view: of the classifier, where it is not the plan's.

        Raises:
            RecipeError: if `views` is unknown, or the classifier cannot look at images of such sizes.
        """
        self.compute = Compute.of(plan.hardware, or_cpu=True)
        self.view = view or plan.view
        self.views = views
        self.crops = list_crops(views, self.view.size_pixels)
        check_crops(self.crops, self.view)
        self.num_classes = len(plan.classes)
        self.mirror_classes = plan.data.mirror_classes(plan.classes)
        self.images_at_once = max(1, min(BATCH, MOST_CROPS // len(self.crops)))
        """Images to read and judge together; bounds memory."""
        most = CROPS_PER_PASS[self.compute.device] * self.view.size_pixels**2
        self._pixels_per_pass = min(most, PASS_PIXELS) if self.compute.device == "cpu" else most
        self._scales = sorted({crop.scale_pixels(self.view) for crop in self.crops}, reverse=True)
        classifier.to(self.compute.device).eval()
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
        if self._scales == [self.view.shorter_pixels] and scaling(store.view) == scaling(self.view):
            return self._cut({self._scales[0]: store.get(index)})
        return self.read_file(store.items[index])[0]

    def read_file(self, item: Item) -> tuple[list[np.ndarray], ImageFacts]:
        """As `read`, of an image in no store, and what its file said of itself; errors as there."""
        (pixels,), facts = decode_sizes(read_bytes(item), [_framed(self.wanted, item)])
        return self.cut(pixels, facts), facts

    @property
    def wanted(self) -> Scaling:
        """What is to be decoded: an image as large as any view needs it."""
        return scaling(self.view)._replace(shorter_pixels=self._scales[0])

    def cut(self, pixels: np.ndarray, facts: ImageFacts) -> list[np.ndarray]:
        """The V crops of an image that is decoded as `wanted`, from a file of such facts."""
        return self._cut(_at_scales(pixels, facts, self._scales, self.view.interpolation))

    def _cut(self, images: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        scales = [crop.scale_pixels(self.view) for crop in self.crops]
        mirrored = {scale for crop, scale in zip(self.crops, scales, strict=True) if crop.is_mirrored}
        mirrors = {scale: mirror(images[scale]) for scale in mirrored}
        return [
            crop.cut((mirrors if crop.is_mirrored else images)[scale], self.view)
            for crop, scale in zip(self.crops, scales, strict=True)
        ]

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
            at_once = max(1, self._pixels_per_pass // (shape[0] * shape[1]))
            for start in range(0, len(places), at_once):
                rows, columns = zip(*places[start : start + at_once], strict=True)
                stacked = np.stack([pictures[row][column] for row, column in zip(rows, columns, strict=True)])
                answers[list(rows), list(columns)] = self._look(self._networks[size], stacked)
        return unmirror(answers.transpose(0, 1), self.views, self.mirror_classes)

    def _look(self, network: nn.Module, crops: np.ndarray) -> torch.Tensor:
        with self.compute.autocast():
            logits = network(self.images(crops))
        return logits.float().softmax(1).cpu()

    def images(self, crops: np.ndarray) -> torch.Tensor:
        """Crops (B, H, W, 3) as the network takes them: (B, 3, H, W), normalised, on its device."""
        return normalize(torch.from_numpy(crops).to(self.compute.device), self.view)


class MixedViewer:
    """An average of networks made ready to look at images, each network in the view that it was trained in.

    A file is decoded once for all of them (see `decode_sizes`). Every member sees the pixels, and is given the batches,
    that it would see and be given alone; so the average is that of its answers. The first crop is everybody's first,
    and so on: ten crops are ten of each member's own size. They are named after the plan's view.
    """

    def __init__(self, ensemble: Ensemble, plan: Plan, views: str) -> None:
        """Make a `Viewer` of each member; arguments and errors as there."""
        self.view, self.views = plan.view, views
        self.crops = list_crops(views, self.view.size_pixels)
        self._average, self._weights = ensemble.average, ensemble.weights.tolist()
        pairs = zip(ensemble.members, ensemble.views, strict=True)
        self._viewers = [Viewer(member, plan, views, view) for member, view in pairs]  # type: ignore[arg-type]
        self.num_classes, self.images_at_once = self._viewers[0].num_classes, self._viewers[0].images_at_once
        looks = [(view.size_pixels, scaling(view)) for view in ensemble.views]  # constants change no pixel
        distinct = list(dict.fromkeys(looks))
        self._places = [distinct.index(one) for one in looks]
        self._cutters = [self._viewers[looks.index(one)] for one in distinct]

    def read(self, store: ImageStore, index: int) -> list[np.ndarray]:
        """The V crops of item `index` for each size and scale that members look at, one after the other.

        Raises:
            As `Viewer.read`.
        """
        return self.read_file(store.items[index])[0]

    def read_file(self, item: Item) -> tuple[list[np.ndarray], ImageFacts]:
        """As `Viewer.read_file`."""
        wanted = [_framed(viewer.wanted, item) for viewer in self._cutters]
        images, facts = decode_sizes(read_bytes(item), wanted)
        pairs = zip(self._cutters, images, strict=True)
        return [crop for viewer, pixels in pairs for crop in viewer.cut(pixels, facts)], facts

    def judge(self, pictures: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        """Probabilities (V, B, K) in float32 on the CPU, averaged over members; before any temperature."""
        count, said = len(self.crops), []
        for viewer, place in zip(self._viewers, self._places, strict=True):
            said.append(viewer.judge([crops[place * count : (place + 1) * count] for crops in pictures]))
        rows = torch.stack(said)  # (M, V, B, K)
        return average(rows.flatten(1, 2), self._average, self._weights).view(rows.shape[1:])


def _framed(wanted: Scaling, item: Item) -> Scaling:
    """What is wanted of a file, of the frame of it that an item is."""
    return wanted if item.frame is None else wanted._replace(frame=item.frame)


AnyViewer = Viewer | MixedViewer


def open_viewer(classifier: Classifier, plan: Plan, views: str, view: View | None = None) -> AnyViewer:
    """What looks at images with this classifier; of an ensemble whose members look at them differently, with each.

    Arguments and errors as `Viewer`.
    """
    if isinstance(classifier, Ensemble) and classifier.is_mixed:
        return MixedViewer(classifier, plan, views)
    return Viewer(classifier, plan, views, view)


def refuse_views(plan: Plan, backbone: Backbone) -> None:
    """Look whether the planned views can be taken at all; better before a training than after it.

    Raises:
        RecipeError: if a view is no view, is too large for what is decoded, or of a size the network cannot take.
    """
    views, _ = permitted_views(plan.evaluate.views, plan.data.allowed_changes)
    if views != "center":
        head = nn.Linear(backbone.num_features, len(plan.classes))
        Viewer(Classifier(copy.deepcopy(backbone), head), plan, views)


def _at_scales(
    pixels: np.ndarray, facts: ImageFacts, scales: Sequence[int], interpolation: str
) -> dict[int, np.ndarray]:
    """One image by the length of its shorter side, from its pixels (H, W, 3) at the first of `scales`, which fall."""
    largest, images = Image.fromarray(pixels), {scales[0]: pixels}
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
