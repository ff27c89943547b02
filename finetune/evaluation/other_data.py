"""Judging elsewhere: a finished run, or a backbone with the classifier it came with, on images of another folder.

Nothing is fitted here and nothing is written. What a run was fitted on is told beside its scores, and so is how many
of the images it may have seen, for scores on other images are only worth something if they are others.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.compute import Machine
from finetune.config.backbone_names import read_zoo
from finetune.config.card import Card, View
from finetune.config.facts import BadFile
from finetune.config.other_data import BackboneElsewhere, FittedOn, FittedTemperature, RunElsewhere, RunFittedOn, Seen
from finetune.config.plan import Plan
from finetune.config.recipe import DataSpec
from finetune.config.scores import Temperature
from finetune.data.dataset import ALL, BAD, Dataset
from finetune.data.digests import digest_images
from finetune.data.frames import each_frame, open_images
from finetune.data.items import Item
from finetune.data.loading import ImageStore
from finetune.data.sources import Source, open_source
from finetune.errors import BackboneError, DataError, FinetuneError, RecipeError, RunError, nearest
from finetune.evaluation.compare import selection_flags
from finetune.inference.loading import load_final
from finetune.inference.predict import predict_probabilities, temper
from finetune.inference.tta import average_views, permitted_views, view_crops
from finetune.inference.tta_views import BATCH
from finetune.metrics.classification import score_predictions
from finetune.models.backbones import Backbone, load_backbone
from finetune.process import as_guest
from finetune.runs.folder import RunFolder

SOURCE_VIEWS = ("center", "five", "ten")


@as_guest()
def evaluate_elsewhere(run: RunFolder, data: Path, *, views: str | None = None) -> RunElsewhere:
    """How a finished run does on other images; the run folder stays as it is.

    Its class folders (or labels in a table) bear names of the run's classes, to the letter. Where the images name a
    test part, only that is judged.

    Args:
        run: trained and judged.
        data: a folder of class folders, a table, or parquet shards; one class is enough.
        views: other views than those the run was judged in.

    Raises:
        RunError: if the run is not finished.
        DataError: if there are no images, or one has a class the run does not know, or is broken and the run's recipe
            says to fail there.
    """
    plan, known = run.plan, run.scores
    if not run.final_weights().exists():
        raise RunError(f"{run.path} is not trained to its end. `finetune resume {run.path}` goes on.")
    source = open_source(Path(data).expanduser(), is_learned=False)
    source = each_frame(source) if plan.view.frame == "each" else source
    columns = _columns_by_name(source, plan.classes, f"the run {run.path}")
    dataset, role = _read_images(source, plan.view, plan.data)
    dataset.refuse_bad("Mend them or take them away.")
    images = dataset.indices(role)
    views, fallback = permitted_views(views or known.views, plan.data.allowed_changes)
    rows = predict_probabilities(load_final(run), dataset.store, images, plan, views, plan.evaluate.average)
    fitted = known.temperature if plan.evaluate.calibrate else None
    tempered = temper(rows, (fitted and fitted.value) or 1.0)
    return RunElsewhere(
        run=str(run.path),
        **_what_was_judged(dataset, role, Path(data), plan.classes, columns),
        views=views,
        views_note=fallback,
        scores=score_predictions(tempered, _labels(dataset, role, columns), plan.classes),
        own_test=known.test.top1 if known.test else None,
        fitted_on=_fitted_on(run, plan, fitted),
        seen=_count_seen(plan, dataset, images),
    )


@as_guest()
def evaluate_backbone(name: str, data: Path, *, views: str = "center") -> BackboneElsewhere:
    """How a zoo backbone does with the classifier its weights came with, untrained by us.

    Class folders bear a name among the card's classes, one of the names between its commas where only one class has
    it (`goldfish`), or the class's number. All of the source's classes compete, also those without images here.

    Args:
        name: a card, a timm name, or `torchvision/NAME`.
        data: a folder of class folders, a table, or parquet shards; one class is enough.
        views: one of `SOURCE_VIEWS`; you must know whether mirror images are of the same class.

    Raises:
        RecipeError: if `views` are others.
        BackboneError: if the backbone cannot be had or came without a classifier.
        DataError: if there are no images, or a class is none of the card's.
    """
    if views not in SOURCE_VIEWS:
        raise RecipeError(f"views: {views!r} is not for a source classifier; take {', '.join(SOURCE_VIEWS)}.")
    backbone = load_backbone(name, zoo=read_zoo()).eval()
    card = backbone.card
    if backbone.source_head is None:
        raise BackboneError(f"backbone {name} has no source classifier, so it names no classes. Train a head for it.")
    source = open_source(Path(data).expanduser(), is_learned=False)
    columns = _source_columns(source, card)
    dataset, role = _read_images(source, card.view(), DataSpec(root=str(data)))
    logits = source_view_logits(backbone, dataset.store, dataset.indices(role), views=views)  # (V, N, C)
    classes = card.classes or tuple(str(number) for number in range(logits.shape[2]))
    scores = score_predictions(average_views(logits.softmax(dim=2)), _labels(dataset, role, columns), classes)
    present = tuple(row for row in scores.per_class if row.n)
    return BackboneElsewhere(
        backbone=card.name,
        **_what_was_judged(dataset, role, Path(data), classes, columns),
        num_source_classes=len(classes),
        views=views,
        scores=scores.model_copy(update={"per_class": present, "confusion": None}),  # a million counts, nearly all 0
        fitted_on=FittedOn(weights=card.pretrained_on, chosen_by_val=()),
    )


@torch.inference_mode()
def source_view_logits(backbone: Backbone, store: ImageStore, indices: Sequence[int], *, views: str) -> torch.Tensor:
    """Logits (V, N, C) of the source classifier, in float32, by view (in the order of `view_names`) and image.

    They are those of plain timm and torchvision bit for bit on a CPU: the crops of one image are a batch, in the
    memory format and the arithmetic of torchvision's transforms. Either changes the last digits, and so does what else
    is in a batch; over fifty layers that is 2e-5. So an image's logits depend on no other image.

    Args:
        backbone: in eval mode, with its source classifier.
        store: gives the images in the view of the backbone's card.
        indices: N items of the store.
        views: one of `SOURCE_VIEWS`.
    """
    device = Machine.here().device
    backbone.to(device).to(memory_format=torch.contiguous_format)
    parts = []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(indices), BATCH):
            for image in pool.map(store.get, indices[start : start + BATCH]):
                crops = np.stack(view_crops(image, store.view.size_pixels, views))
                images = _plainly_normalized(torch.from_numpy(crops).to(device), store.view)
                parts.append(backbone.source_logits(images).float().cpu())
    return torch.stack(parts, dim=1)


def _plainly_normalized(crops: torch.Tensor, view: View) -> torch.Tensor:
    """(V, H, W, 3) uint8 as (V, 3, H, W), rounded step by step as torchvision does; `normalize` is faster."""
    mean, std = (torch.tensor(row, device=crops.device).view(3, 1, 1) for row in (view.mean, view.std))
    images = crops.permute(0, 3, 1, 2).contiguous().float()
    return images.mul_(1 / 255).sub_(mean).div_(std)


def _read_images(source: Source, view: View, spec: DataSpec) -> tuple[Dataset, str]:
    """The images, faulty ones named, and the role of those to judge: `test` where the source names it, else all.

    Raises:
        DataError: if none can be read.
    """
    role = "test" if "test" in source.items.counts() else ALL
    dataset = Dataset(source if role == ALL else source.of_role(role), spec, 0)
    dataset.see(view)
    dataset.roles = tuple(own if own == BAD else role for own in dataset.roles)
    dataset.drop(dataset.find_faults(dataset.indices(role)))
    if not dataset.indices(role):
        why = next(iter(dataset.bad.values()))
        raise DataError(f"none of the {len(dataset.bad)} images in {source.root} can be read: {why}.")
    return dataset, role


def _labels(dataset: Dataset, role: str, columns: Mapping[str, int]) -> torch.Tensor:
    by_label = torch.tensor([columns[name] for name in dataset.classes])
    return by_label[dataset.labels(role)]


def _columns_by_name(source: Source, classes: Sequence[str], whose: str) -> dict[str, int]:
    """By class of the images, its column among `classes`; the same name, capitals and all."""
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise _unknown(source, {name: nearest(name, classes) for name in unknown}, whose, classes)
    return {name: classes.index(name) for name in source.classes}


def _source_columns(source: Source, card: Card) -> dict[str, int]:
    """By class of the images, the output of the source classifier: by name, by one of its names, or by number."""
    classes = [unicodedata.normalize("NFC", name).strip() for name in card.classes]
    if classes and len(classes) != card.num_classes:
        raise BackboneError(f"the card of {card.name} names {len(classes)} classes for {card.num_classes} outputs.")
    columns: dict[str, int] = {}
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        for part in {piece.strip() for piece in name.split(",")}:
            parts.setdefault(part, []).append(number)
    faults: dict[str, str] = {}
    for name in source.classes:
        number = int(name) if name.isascii() and name.isdecimal() else card.num_classes
        if name in classes:
            columns[name] = classes.index(name)
        elif len(shared := parts.get(name, [])) == 1:
            columns[name] = shared[0]
        elif shared:
            faults[name] = f"It is the name of outputs {', '.join(map(str, shared))}; name the folder by the number."
        elif number < card.num_classes:
            columns[name] = number
        else:
            faults[name] = nearest(name, parts)
    if faults:
        raise _unknown(source, faults, f"the source classifier of {card.name}", classes)
    return columns


def _unknown(source: Source, hints: Mapping[str, str], whose: str, classes: Sequence[str]) -> DataError:
    shown = " ".join(f"{name!r} is none. {hint}".strip() for name, hint in list(hints.items())[:5])
    known = f"{', '.join(classes[:8])}{' ...' if len(classes) > 8 else ''}" if classes else "numbers only"
    return DataError(
        f"{source.root}: {len(hints)} of {len(source.classes)} classes are no classes of {whose} ({known}). {shown} "
        "Rename them to the letter, capitals and all, or take them away."
    )


def _what_was_judged(
    dataset: Dataset, role: str, data: Path, classes: Sequence[str], columns: Mapping[str, int]
) -> dict[str, Any]:
    present = set(_labels(dataset, role, columns).tolist())
    return {
        "data": str(data),
        "role": role,
        "n": len(dataset.indices(role)),
        "classes": {name: classes[column] for name, column in columns.items()},
        "missing_classes": tuple(name for column, name in enumerate(classes) if column not in present),
        "bad_images": tuple(
            BadFile(name=dataset.items[index].name, reason=why) for index, why in sorted(dataset.bad.items())
        ),
        "warnings": tuple(dataset.source.warnings),
    }


def _fitted_on(run: RunFolder, plan: Plan, temperature: Temperature | None) -> RunFittedOn:
    probe, applied = run.facts.probe, None
    if temperature is not None and temperature.value:
        applied = FittedTemperature(role="calibration", value=temperature.value, n=temperature.n)
    return RunFittedOn(
        root=plan.data.root,
        split_digest=plan.split_digest,
        weights="train, val and calibration" if plan.is_refit else "train",
        constants="train" if plan.data.normalize.startswith("channel") else plan.data.normalize,
        chosen_by_val=tuple(selection_flags(plan, probe_chosen_by=probe.chosen_by if probe else "val")),
        temperature=applied,
    )


def _count_seen(plan: Plan, dataset: Dataset, images: Sequence[int]) -> Seen:
    """How many of the images are, byte for byte, among all those of the run; None where these are not at hand."""
    try:
        theirs = open_images(plan.data).items
    except FinetuneError as fault:
        return Seen(note=f"whether the run has seen these images cannot be told: {fault}")
    sizes = {_size(dataset.items[index]) for index in images}
    alike = [item for item in theirs if None in sizes or _size(item) in {*sizes, None}]  # the others need not be read
    known = set(digest_images(alike))
    count = sum(dataset.files[index] in known for index in images)
    note = f"{count} of {len(images)} images are among those the run was made from, so the scores flatter it"
    return Seen(n=count, note=note if count else None)


def _size(item: Item) -> int | None:
    """Bytes of a file; None in a shard, whose rows have none of their own, and where there is no file."""
    return item.file.stat().st_size if item.row is None and item.file.is_file() else None
