"""The probe on all labelled images, once its penalty is chosen; and what folds say of images that were left out.

A probe that is solved on val and calibration too can be judged by neither. Where val is small, its temperature and its
conformal threshold come from cross-fitting: each image is answered by a probe on the other folds, of the same penalty
(cross-conformal prediction: Vovk, Annals of Mathematics and Artificial Intelligence 2015,
https://arxiv.org/abs/1208.0806). Solved once and remembered beside the features, as all that is measured.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.config.backbone_names import cache_folder
from finetune.data.splits import draw_sample, labelled_rows
from finetune.features.layer_profile import FOLDS, assign_folds
from finetune.features.measuring import PROBE_BYTES, Material
from finetune.features.probing import Probe, fit_probe
from finetune.models.heads import HELD_OUT
from finetune.runs.folder import write_whole

FORMAT = "3"
"""Part of the key; raised when what is solved, or how, changes."""
MOST_ANSWERS = 10_000
"""Images that are answered by a probe of the other folds; more would tell no more of a temperature."""


@dataclass(frozen=True, kw_only=True)
class RefitProbe:
    """The probe that a run ends on, and out-of-fold answers."""

    probe: Probe
    rows: tuple[int, ...]
    """The images that it was solved on."""
    logits: torch.Tensor
    """(N, K) in float32 of `judged`, each by a probe that saw neither the image, nor a copy, nor another frame."""
    judged: tuple[int, ...]
    """The images that were answered so; none where no folds are made."""


def refit_probe(material: Material, held_out: Probe, *, makes_folds: bool) -> RefitProbe | None:
    """The probe with the penalty of `held_out` on all labelled images; None where there are none but for training.

    Args:
        material: where features are.
        held_out: of the training images.
        makes_folds: also answer each image by a probe that never saw it.
    """
    if len(labelled_rows(material.roles, material.files)) <= len(material.rows("train")):
        return None
    rows = labelled_probe_rows(material)
    path = _file(material, held_out.l2, makes_folds)
    if (known := _recall(path, rows, len(material.classes))) is not None:
        return known
    features, labels = material.features(rows), material.labels[rows]
    probe = fit_probe(features, labels, num_classes=len(material.classes), l2=held_out.l2, start=held_out)
    judged, logits = torch.empty(0, dtype=torch.long), torch.empty(0, len(material.classes))
    if makes_folds:
        files = [material.files[row] for row in rows]
        judged, logits = cross_fit(
            features, labels, files, num_classes=len(material.classes), l2=held_out.l2, seed=material.seed
        )
    found = RefitProbe(probe=probe, rows=tuple(rows), logits=logits, judged=tuple(rows[at] for at in judged.tolist()))
    material.cache.keep(
        lambda: write_whole(path, lambda temporary: save_file(_tensors(probe, judged, logits), temporary))
    )
    return found


def labelled_probe_rows(material: Material) -> list[int]:
    """All labelled images in the order of their content, or those whose features fit in `PROBE_BYTES`."""
    rows = material.ordered(labelled_rows(material.roles, material.files))
    most = max(1, PROBE_BYTES // (4 * material.backbone.num_features))
    if len(rows) <= most:
        return rows
    return draw_sample(rows, material.labels.tolist(), material.digests, most=most, seed=material.seed)


def cross_fit(
    features: torch.Tensor, labels: torch.Tensor, files: Sequence[str], *, num_classes: int, l2: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images were answered, (N,), and the logits (N, K) of each by a probe on the folds without it.

    Images of one file fall into one fold. An image whose class no other fold knows is not answered: the probe that is
    shipped does know it. Nor are images beyond the first `MOST_ANSWERS`.

    Args:
        features: (M, D), raw.
        labels: (M,), integers in [0, num_classes).
        files: (M,), a hash of the file of each image.
        num_classes: K.
        l2: penalty.
        seed: of the folds.

    Raises:
        ValueError: as `fit_probe`.
    """
    first: dict[str, int] = {}
    for at, file in enumerate(files):
        first.setdefault(file, at)
    parts = min(FOLDS, len(first))
    if parts < 2:
        return torch.empty(0, dtype=torch.long), torch.empty(0, num_classes)
    folds = dict(zip(first, assign_folds(labels[[*first.values()]], seed=seed, folds=parts).tolist(), strict=True))
    fold = torch.tensor([folds[file] for file in files])
    wanted = torch.arange(len(labels)) < MOST_ANSWERS
    answers = torch.zeros(len(labels), num_classes)
    for part in range(parts):
        inside = fold != part
        asked = ~inside & wanted & torch.isin(labels, labels[inside])
        wanted &= inside | asked
        if asked.any():
            probe = fit_probe(features[inside], labels[inside], num_classes=num_classes, l2=l2)
            answers[asked] = probe.logits(features[asked]).float()
    judged = wanted.nonzero()[:, 0]
    return judged, answers[judged]


def probe_tensors(held_out: Probe | None, refit: RefitProbe | None) -> dict[str, torch.Tensor]:
    """What `probe.safetensors` holds: `weight` (K, D) and `bias` (K,) of the last probe, and of the one before it."""
    if held_out is None:
        return {}
    named = {"": held_out} if refit is None else {"": refit.probe, HELD_OUT: held_out}
    return {
        f"{prefix}{name}": tensor.float()
        for prefix, probe in named.items()
        for name, tensor in (("weight", probe.weight), ("bias", probe.bias))
    }


def _file(material: Material, l2: float, makes_folds: bool) -> Path:
    named = [FORMAT, material.backbone.digest, material.view.digest, material.compute.precision, material.split_digest]
    numbers = [torch.get_num_threads(), PROBE_BYTES, MOST_ANSWERS, material.seed, l2, makes_folds]
    key = hashlib.sha256(json.dumps(["refit", *named, material.compute.device, *numbers]).encode()).hexdigest()[:32]
    return cache_folder() / "findings" / f"{key}.safetensors"


def _tensors(probe: Probe, judged: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    solved = torch.tensor([probe.l2, probe.objective, probe.gradient_norm, probe.iterations], dtype=torch.float64)
    return {"weight": probe.weight, "bias": probe.bias, "solution": solved, "judged": judged, "logits": logits}


def _recall(path: Path, rows: Sequence[int], num_classes: int) -> RefitProbe | None:
    try:
        found = load_file(path)
        l2, objective, norm, steps = found["solution"].tolist()
        weight, bias, logits = found["weight"], found["bias"], found["logits"].reshape(-1, num_classes)
        judged = tuple(rows[at] for at in found["judged"].tolist())
    except (OSError, SafetensorError, KeyError, ValueError, IndexError):
        return None  # not there, of another version, or damaged: solve it again
    probe = Probe(weight=weight, bias=bias, l2=l2, objective=objective, gradient_norm=norm, iterations=int(steps))
    return RefitProbe(probe=probe, rows=tuple(rows), logits=logits, judged=judged)
