"""What frozen features say of the images: probe, neighbours, depths, similarity, handedness; measured once, remembered.

The same images, roles, weights and view give the same answers, so these are kept beside the features and a second look
costs no arithmetic. Samples are drawn by content, so neither names nor order of files matter.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.compute import Compute
from finetune.config.backbone_names import cache_folder
from finetune.config.card import View
from finetune.config.facts import ChiralityFacts, Findings, NeighbourFacts, ProbeFacts, ProfileFacts, SimilarityFacts
from finetune.config.imbalance import hides_classes
from finetune.config.measures import Proportion
from finetune.data.decoding import center_crop
from finetune.data.loading import ImageStore
from finetune.data.splits import draw_sample
from finetune.features.cache import FeatureCache
from finetune.features.extraction import look_at_all
from finetune.features.flip_test import measure_chirality, sided_classes
from finetune.features.layer_profile import (
    FOLDS,
    NEIGHBOURS,
    cross_validate,
    measure_profile,
    neighbours_left_out,
    proportion,
)
from finetune.features.learning_curve import measure_curve
from finetune.features.probing import Probe, fit_probe, knn_predict, sweep_probe
from finetune.features.similarity import (
    measure_control,
    measure_distances,
    measure_response,
    measure_shift,
    source_logits,
)
from finetune.features.timing import time_training
from finetune.metrics.classification import balanced_accuracy, macro_f1
from finetune.metrics.intervals import paired_difference
from finetune.models.backbones import Backbone
from finetune.models.frozen import FrozenBackbone
from finetune.planning.advisor import partial_depth, similarity_of_probes, similarity_of_shift
from finetune.runs.folder import write_whole

FORMAT = "13"
"""Part of the key; raised when what is measured, or how, changes."""
LEAST_VAL = 100
"""With fewer val images, penalties are chosen by cross-validation on the training images."""
PROBE_BYTES = 10**9
"""Of the features that a probe is solved on; where all of a role would take more, a part is drawn, class by class."""
PROFILE_IMAGES, CONTROL_IMAGES, SHIFT_IMAGES, MIRROR_IMAGES, RESPONSE_IMAGES = 1500, 300, 128, 300, 2000
"""Most training images (or of another role) that each measure looks at."""
LOST_BY_MIRROR = 0.1
"""Share of val images that a probe may at most lose on their mirror images for a flip to be safe."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What there is to measure on."""

    backbone: Backbone
    freeze: Callable[[], FrozenBackbone]
    cache: FeatureCache
    store: ImageStore
    digests: Sequence[str]
    files: Sequence[str]
    """Digest of the file of every item; another than its own where it is one of several frames."""
    labels: torch.Tensor
    """(N,) of every item."""
    roles: Sequence[str]
    classes: Sequence[str]
    view: View
    compute: Compute
    split_digest: str
    seed: int
    batch_size: int
    """Images per training step, for the timing."""

    def rows(self, role: str, *, most: int | None = None) -> list[int]:
        """Items that play `role`, all or some: which, and in which order, depends on their bytes and the seed alone."""
        return self.ordered([index for index, own in enumerate(self.roles) if own == role])[:most]

    def ordered(self, rows: Sequence[int]) -> list[int]:
        """`rows` in an order that depends on their bytes and the seed alone."""
        return sorted(rows, key=lambda index: _rank(self.seed, self.digests[index]))

    def one_of_each_file(self, rows: Sequence[int]) -> list[int]:
        """`rows` with the first frame alone of every file: near copies would answer for those that are left out."""
        seen, kept = set[str](), []
        for index in rows:
            if self.files[index] == self.digests[index] or self.files[index] not in seen:
                kept.append(index)
            seen.add(self.files[index])
        return kept

    def features(self, rows: Sequence[int], depth: int = -1) -> torch.Tensor:
        """(N, D) of items at a depth."""
        return self.cache.features([self.digests[index] for index in rows], depth)

    def crops(self, rows: Sequence[int]) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        return np.stack([center_crop(self.store.get(index), self.view.size_pixels) for index in rows])


def measure(
    material: Material, *, for_advice: bool, for_flips: bool, for_training: bool = True
) -> tuple[Probe, Findings]:
    """The probe and what was found.

    Args:
        material: what to measure on.
        for_advice: also measure depths, control, source response and timing, which only the choice of a strategy needs.
        for_flips: also ask whether mirroring shows.
        for_training: also measure similarity, which belongs beside any training; `for_advice` implies it.
    """
    compute = material.compute
    named = [FORMAT, material.backbone.digest, material.view.digest, compute.precision, material.split_digest]
    named += [compute.device, str(compute.threads), str(PROBE_BYTES)]  # what is timed depends on the first
    named += material.classes  # their names may tell sides
    named.append(material.backbone.card.statistics_sha256 or "")
    key = hashlib.sha256(
        json.dumps([*named, material.seed, material.batch_size, for_advice, for_flips, for_training]).encode()
    ).hexdigest()[:32]
    if (known := _recall(key)) is not None:
        return known
    probe, findings = _probe(material)
    if for_advice:
        profile = _profile(material)
        similarity = _similarity(material, findings, is_whole=True)
        found = {"similarity": similarity, "profile": profile, **_timing(material, profile)}
        findings = findings.model_copy(update=found)
    elif for_training:
        findings = findings.model_copy(update={"similarity": _similarity(material, findings, is_whole=False)})
    if for_flips:
        findings = findings.model_copy(update={"chirality": _chirality(material, probe)})
    tensors = {"weight": probe.weight, "bias": probe.bias}
    tensors["solution"] = torch.tensor(
        [probe.l2, probe.objective, probe.gradient_norm, probe.iterations], dtype=torch.float64
    )
    note = {"findings": findings.model_dump_json()}
    material.cache.keep(lambda: write_whole(_file(key), lambda temporary: save_file(tensors, temporary, metadata=note)))
    return probe, findings


def _file(key: str) -> Path:
    return cache_folder() / "findings" / f"{key}.safetensors"


def _recall(key: str) -> tuple[Probe, Findings] | None:
    from safetensors import safe_open

    try:
        path = _file(key)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as handle:
            findings = Findings.model_validate_json(handle.metadata()["findings"])
        l2, objective, norm, steps = tensors["solution"].tolist()
        weight, bias = tensors["weight"], tensors["bias"]
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError, ValueError):
        return None  # not there, of another version, or damaged: measure again
    probe = Probe(weight=weight, bias=bias, l2=l2, objective=objective, gradient_norm=norm, iterations=int(steps))
    return probe, findings


def probe_rows(material: Material, role: str) -> list[int]:
    """The images of a role that a probe is solved or judged on: all, or those whose features fit in `PROBE_BYTES`."""
    rows, most = material.rows(role), max(1, PROBE_BYTES // (4 * material.backbone.num_features))
    if len(rows) <= most:
        return rows
    return draw_sample(rows, material.labels.tolist(), material.digests, most=most, seed=material.seed)


def _probe(material: Material) -> tuple[Probe, Findings]:
    num_classes = len(material.classes)
    parts = {role: (rows := probe_rows(material, role), material.labels[rows]) for role in ("train", "val")}
    left_out: tuple[Proportion | None, Proportion | None] = (None, None)
    train, val = ((material.features(rows), labels) for rows, labels in parts.values())
    if len(val[1]) >= LEAST_VAL:
        probe, choice = sweep_probe(*train, *val, num_classes=num_classes)
        chosen_by, at_edge = "val", choice.at_edge
        right = probe.logits(val[0]).argmax(1) == val[1]
        curve = measure_curve(
            *train, num_classes=num_classes, l2=probe.l2, seed=material.seed, right=right, val=(val[0], val[1])
        )
    else:
        alone = material.one_of_each_file(parts["train"][0])
        known, labels = material.features(alone), material.labels[alone]
        found = cross_validate(known, labels, num_classes=num_classes, seed=material.seed)
        probe = fit_probe(*train, num_classes=num_classes, l2=found.l2)
        chosen_by, at_edge = "cross-validation", found.at_edge
        near = neighbours_left_out(known, labels, num_classes=num_classes, k=min(NEIGHBOURS, len(labels) - 1))
        right, folds = found.predictions == labels, min(FOLDS, len(labels))
        curve = measure_curve(
            known, labels, num_classes=num_classes, l2=found.l2, seed=material.seed, right=right, folds=folds
        )
        left_out = (proportion(right), proportion(near == labels))
    k = min(NEIGHBOURS, len(train[1]))
    votes = knn_predict(*train, val[0], num_classes=num_classes, k=k)
    logits = probe.logits(val[0])
    said = logits.softmax(1)
    return probe, Findings(
        probe=ProbeFacts(
            train=proportion(probe.logits(train[0]).argmax(1) == train[1]),
            val=proportion(logits.argmax(1) == val[1]),
            log_loss=float(F.cross_entropy(logits, val[1])),
            l2=probe.l2,
            l2_at_edge=at_edge,
            chosen_by=chosen_by,
            left_out=left_out[0],
            balanced_accuracy=balanced_accuracy(said, val[1]),
            macro_f1=macro_f1(said, val[1]),
        ),
        knn=NeighbourFacts(val=proportion(votes == val[1]), k=k, left_out=left_out[1]),
        learning_curve=curve,
    )


def _profile(material: Material) -> ProfileFacts:
    rows = material.one_of_each_file(material.rows("train"))[:PROFILE_IMAGES]
    judges = material.rows("val", most=PROFILE_IMAGES)
    depths = [*range(len(material.backbone.stages) - 1), -1]
    return measure_profile(
        [material.features(rows, depth) for depth in depths],
        material.labels[rows],
        material.backbone.stages,
        val=([material.features(judges, depth) for depth in depths], material.labels[judges])
        if len(judges) >= LEAST_VAL
        else None,
        num_classes=len(material.classes),
        seed=material.seed,
    )


def _similarity(material: Material, findings: Findings, *, is_whole: bool) -> SimilarityFacts:
    """The number and what it follows from; where the whole is asked for, also what else a person would look at."""
    assert findings.probe is not None and findings.knn is not None
    rows = material.rows("train", most=SHIFT_IMAGES)
    shift = measure_shift(
        material.backbone, material.crops(rows), material.view, compute=material.compute, seed=material.seed
    )
    shares = (findings.probe.left_out or findings.probe.val, findings.knn.left_out or findings.knn.val)
    value, low, high = (
        similarity_of_shift([stage.mean for stage in shift])
        if shift
        else similarity_of_probes(*shares, _guessed(material))
    )
    beside = _beside_similarity(material) if is_whole else {}
    return SimilarityFacts(value=value, low=low, high=high, shift=shift, **beside)


def _guessed(material: Material) -> float:
    """Accuracy without a look at the images: evenly or, where classes are uneven, always the largest one."""
    counts = material.labels[material.rows("train")].bincount(minlength=len(material.classes)).tolist()
    return max(counts) / sum(counts) if hides_classes(counts) else 1 / len(counts)


def _beside_similarity(material: Material) -> dict[str, Any]:
    """Control, source response, and distances from the source's features where the card has them."""
    backbone, seed = material.backbone, material.seed
    rows = material.rows("train", most=RESPONSE_IMAGES)
    seen, found = material.features(rows), dict[str, Any]()
    if backbone.source_head is not None:
        found["response"] = measure_response(source_logits(backbone, seen), backbone.card.classes, seed=seed)
    if (statistics := backbone.card.statistics) is not None:
        found["frechet"], found["emd"] = measure_distances(
            seen, material.labels[rows], statistics, len(material.classes), sha256=backbone.card.statistics_sha256
        )
    rows = rows[:CONTROL_IMAGES]
    found["control"] = measure_control(
        backbone,
        material.crops(rows),
        material.labels[rows],
        material.view,
        num_classes=len(material.classes),
        compute=material.compute,
        seed=seed,
    )
    return found


def _timing(material: Material, profile: ProfileFacts) -> dict[str, Any]:
    rows, stages = material.rows("train", most=material.batch_size), len(material.backbone.stages)
    forward, timing = time_training(
        material.backbone,
        material.crops(rows),
        material.view,
        num_classes=len(material.classes),
        depths=sorted({partial_depth(stages, profile), stages}),
        batch_size=min(material.batch_size, len(material.rows("train"))),
        compute=material.compute,
    )
    return {"forward_images_per_second": forward, "timing": timing}


def _chirality(material: Material, probe: Probe) -> ChiralityFacts:
    """Whether mirroring shows, and whether it costs the probe: twins such as b and d hide from the first question."""
    frozen = material.freeze()

    def mirrored(rows: Sequence[int]) -> torch.Tensor:
        crops = np.ascontiguousarray(material.crops(rows)[:, :, ::-1])
        return look_at_all(frozen, crops, material.view, material.compute)[-1]

    unique = {material.digests[index]: index for index in material.rows("train", most=MIRROR_IMAGES)}
    rows = list(unique.values())
    found = measure_chirality(material.features(rows), mirrored(rows), seed=material.seed)
    judges = material.rows("val", most=MIRROR_IMAGES)
    labels = material.labels[judges]
    plain = probe.logits(material.features(judges)).argmax(1) == labels
    turned = probe.logits(mirrored(judges)).argmax(1) == labels
    lost = paired_difference(int((plain & ~turned).sum()), int((turned & ~plain).sum()), len(labels))
    is_safe = found.is_safe
    if is_safe and lost.high > LOST_BY_MIRROR:
        is_safe = None
    if lost.low > 0 and lost.value > LOST_BY_MIRROR:
        is_safe = False
    sided = sided_classes(material.classes)
    return ChiralityFacts(
        share=found.share,
        lost=lost,
        is_safe=False if sided else is_safe,
        sided=sided,
    )


def _rank(seed: int, digest: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest()
