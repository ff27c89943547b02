"""Predictions: probabilities of images under a run's final model, one view or several."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from finetune.data.decoding import BadImage
from finetune.data.loading import ImageStore, normalize
from finetune.data.sources import IMAGE_SUFFIXES, Item
from finetune.errors import BackboneError, DataError
from finetune.evaluation.views import average_views, unmirror, view_crops, view_names
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.recipe.plan import Plan
from finetune.recipe.runs import RunFolder
from finetune.recipe.shelf import read_zoo
from finetune.scores.calibration import apply_temperature, log_probabilities

BATCH = 64
"""Images per forward pass, each in all its views."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one image; `fault` instead where the image cannot be read."""

    name: str
    label: str | None
    probability: float | None
    """Of `label`, after temperature scaling."""
    probabilities: dict[str, float]
    """Of every class."""
    fault: str | None = None


def load_final(run: RunFolder, backbone: Backbone | None = None) -> Classifier:
    """The classifier a run ended with, in eval mode on the CPU.

    Args:
        run: a run whose stages are done.
        backbone: the run's pretrained backbone where it is loaded already; used (and changed) as it is.

    Raises:
        BackboneError: if the backbone's card is not at hand, or its weights are not those of the plan.
        RunError: if the run has no plan.
    """
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


def predict(run: RunFolder, paths: Sequence[Path]) -> list[Prediction]:
    """Predictions for image files, and for the images in folders, in the order of their names.

    Raises:
        DataError: if a path does not exist or no image is found.
    """
    plan, scores = run.plan, run.read_json("scores.json")
    names = list(find_images(paths))
    items = [Item(name=str(path), label=0, role=None, file=path) for path in names]
    store = ImageStore(items, plan.view, limit_bytes=0)
    faults: dict[int, str] = {}
    for index in range(len(items)):
        try:
            store.get(index)
        except BadImage as fault:
            faults[index] = str(fault)
        except OSError as fault:
            faults[index] = fault.strerror or str(fault)
    good = [index for index in range(len(items)) if index not in faults]
    temperature = (scores.get("temperature") or {}).get("value") or 1.0
    rows = predict_probabilities(load_final(run), store, good, plan, scores["views"])
    rows = temper(rows, temperature)
    by_index = dict(zip(good, rows, strict=True))
    return [_prediction(items[i].name, plan, by_index.get(i), faults.get(i)) for i in range(len(items))]


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among `paths`, and the images below the folders among them, sorted."""
    found = 0
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist.")
        inside = path.rglob("*") if path.is_dir() else ()
        below = sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        below = below if path.is_dir() else [path]
        found += len(below)
        yield from below
    if not found:
        raise DataError(
            f"no images under {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}."
        )


@torch.inference_mode()
def predict_probabilities(
    classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan, views: str
) -> torch.Tensor:
    """Probabilities (N, K), averaged over views, in float32 on the CPU; before any temperature.

    A run made on a GPU is judged on the CPU where there is none.
    """
    device = plan.hardware.devices if torch.cuda.is_available() else "cpu"
    assert device is not None
    classifier.to(device).eval()
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    precision, count = plan.hardware.precision, len(view_names(views))
    mirror_classes = plan.data.mirror_classes(plan.classes)
    answers = [torch.empty(0, len(plan.classes))]
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(indices), BATCH):
            pixels = list(pool.map(store.get, indices[start : start + BATCH]))
            crops = np.stack([crop for image in pixels for crop in view_crops(image, plan.view.size_pixels, views)])
            images = normalize(torch.from_numpy(crops).to(device), plan.view)
            with torch.autocast(device, dtype=kinds.get(precision, torch.bfloat16), enabled=precision in kinds):
                logits = classifier(images)
            probabilities = logits.float().softmax(1).cpu().view(len(pixels), count, -1)  # (B, V, K)
            answers.append(average_views(unmirror(probabilities.transpose(0, 1), views, mirror_classes)))
    return torch.cat(answers)


def temper(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities (N, K) at another temperature; averages are tempered as log p."""
    return apply_temperature(log_probabilities(probabilities), temperature).softmax(1).float()


def _prediction(name: str, plan: Plan, row: torch.Tensor | None, fault: str | None) -> Prediction:
    if row is None:
        return Prediction(name=name, label=None, probability=None, probabilities={}, fault=fault)
    shares = {label: round(float(value), 6) for label, value in zip(plan.classes, row, strict=True)}
    label = max(shares, key=shares.__getitem__)
    return Prediction(name=name, label=label, probability=shares[label], probabilities=shares)
