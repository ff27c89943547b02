"""How similar images are to what a backbone knows, measured without its source images.

Batch-norm layers remember the mean and variance of everything they were trained on, and the source classifier says
what it takes new images for: both are compared with what the new images do. A network of random weights is the control.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.compute import Compute, exact, own_draws
from finetune.config.card import View
from finetune.config.facts import ResponseFacts, ShiftFacts
from finetune.config.measures import Measure, Proportion
from finetune.data.loading import normalize
from finetune.errors import BackboneError
from finetune.features.extraction import look_at_all
from finetune.features.layer_profile import DEPTH_GRID, cross_validate, proportion
from finetune.metrics.distances import ROWS_PER_COMPONENT, Gaussian, class_prototypes, emd_similarity, frechet_to
from finetune.metrics.intervals import percentiles
from finetune.models.backbones import Backbone
from finetune.models.frozen import FrozenBackbone
from finetune.models.layers import BatchNorm
from finetune.models.weights import check_sha256

BATCH = 32
RESAMPLES = 200
"""Samples of the images, for the intervals."""
NAMED = 3
"""Source classes named."""
COMPONENTS = 64
"""Directions of the source that a Frechet distance sums over, at most."""
LENGTH = 2048**0.5
"""Root mean square length of the source's features in an earth mover's distance: about that of the 2,048 features
that its gamma was chosen for."""
MOST_WAYS = 300_000
"""Pairs of a class and a source class that the earth mover's distance is solved for, in seconds."""


@torch.inference_mode()
def measure_shift(
    backbone: Backbone, crops: np.ndarray, view: View, *, compute: Compute, seed: int
) -> tuple[ShiftFacts, ...]:
    """How far images move the inputs of each stage's batch norms from their running statistics.

    Per channel, (mean - running mean)^2 / running variance and |log (variance / running variance)|, averaged over the
    channels of a stage. The first is without the bias of few images: the variance that their mean has by sampling is
    taken off. It is 0 on average for the images of pretraining.

    Args:
        backbone: in evaluation mode, unfused.
        crops: (N, H, W, 3) uint8.
        view: how they are normalised.
        compute: where the backbone is.
        seed: of the intervals' resampling.

    Returns:
        One row per stage that has batch norm, from the stem; none without batch norm.
    """
    norms = [(name, module) for name, module in backbone.named_modules() if _has_statistics(module)]
    sums: dict[str, list[torch.Tensor]] = {name: [] for name, _ in norms}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].float().flatten(2) if inputs[0].ndim > 2 else inputs[0].float()[..., None]  # (B, C, P)
            second = x.square().mean(2) + module.eps  # type: ignore[operator]  # eps on both sides, so that a dead channel has ratio 1
            sums[name].append(torch.stack([x.mean(2), second], dim=1).cpu())  # (B, 2, C)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    try:
        for first in range(0, len(crops), BATCH):
            backbone(normalize(torch.from_numpy(crops[first : first + BATCH]).to(compute.device), view))
    finally:
        for handle in handles:
            handle.remove()
    by_stage: dict[int, list[torch.Tensor]] = {}
    for name, module in norms:
        if sum(map(len, sums[name])) != len(crops):  # never called, or for several places at once
            continue
        moments = torch.cat(sums[name]).double()  # (N, 2, C)
        known = exact(torch.stack([module.running_mean, module.running_var + module.eps])).cpu()  # type: ignore[arg-type, operator]
        stage = backbone.stage_of[f"{name}.running_mean"]
        by_stage.setdefault(stage, []).append(torch.cat([moments, known[None]]))  # the last row is the source
    return tuple(_stage_shift(backbone.stages[stage], by_stage[stage], seed) for stage in sorted(by_stage))


def _stage_shift(stage: str, layers: Sequence[torch.Tensor], seed: int) -> ShiftFacts:
    every = torch.cat(list(layers), dim=2)  # (N + 1, 2, C): channels of all layers side by side
    moments, (mean, variance) = every[:-1], every[-1]
    first, second = moments[:, 0], moments[:, 1]  # (N, C)

    def sampling(weights: torch.Tensor) -> torch.Tensor:
        """The variance of the weighted mean of each channel: (R, N) to (R, C)."""
        between = (weights @ first.square() - (weights @ first).square()).clamp(min=0.0)
        squares = weights.square().sum(1, keepdim=True)  # 1 / n for even weights, about 2 / n for resampled ones
        return between * squares / (1 - squares).clamp(min=1e-12)

    def moved(weights: torch.Tensor) -> torch.Tensor:
        return (((weights @ first - mean).square() - sampling(weights)) / variance).mean(1)

    def stretched(weights: torch.Tensor) -> torch.Tensor:
        spread = (weights @ second - (weights @ first).square()).clamp(min=1e-12)
        return (spread / variance).log().abs().mean(1)

    n = len(moments)
    return ShiftFacts(
        stage=stage, mean=_measure(moved, n, seed, least=0.0), spread=_measure(stretched, n, seed, least=0.0)
    )


def measure_control(
    backbone: Backbone,
    crops: np.ndarray,
    labels: torch.Tensor,
    view: View,
    *,
    num_classes: int,
    compute: Compute,
    seed: int,
) -> Proportion:
    """Accuracy of a cross-validated probe on the same network with random weights: what pretraining has to beat.

    Its batch norms take their statistics from the images themselves, or activations would die out on the way up.
    """
    device = compute.device
    with own_draws(seed, device):
        control = backbone.random_twin().to(device).to(memory_format=torch.channels_last)
    norms = [module for module in control.modules() if _has_statistics(module)]
    for norm in norms:
        norm.momentum = 1.0  # type: ignore[assignment]
        norm.train()
    if norms:
        with torch.no_grad():
            control(normalize(torch.from_numpy(crops[: 2 * BATCH]).to(device), view))
    frozen = FrozenBackbone(control.eval(), size_pixels=view.size_pixels, device=device)
    features = look_at_all(frozen, crops, view, compute)[-1]
    found = cross_validate(features, labels, num_classes=num_classes, seed=seed, grid=DEPTH_GRID)
    return proportion(found.predictions == labels)


def measure_response(logits: torch.Tensor, classes: Sequence[str], *, seed: int) -> ResponseFacts:
    """What the source classifier takes the images for, from its logits (N, C)."""
    logs = logits.double().log_softmax(1)
    probabilities, energy = logs.exp(), -logits.double().logsumexp(1)

    def effective(weights: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(weights @ probabilities).sum(1).exp()

    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    top = counts.topk(min(NAMED, len(counts)))
    names = list(classes) or [f"class {k}" for k in range(logits.shape[1])]
    return ResponseFacts(
        num_classes=logits.shape[1],
        effective=_measure(effective, len(logits), seed),
        confidence=_measure(lambda weights: weights @ probabilities.amax(1), len(logits), seed),
        energy=_measure(lambda weights: weights @ energy, len(logits), seed),
        named=tuple((names[int(k)], int(n) / len(logits)) for n, k in zip(top.values, top.indices, strict=True) if n),
    )


@torch.inference_mode()
def source_logits(backbone: Backbone, features: torch.Tensor) -> torch.Tensor:
    """What the source classifier makes of pooled features (N, D): (N, C)."""
    head = backbone.source_head
    assert head is not None
    head = head.to(features.device)
    return torch.cat([head(rows) for rows in features.split(1024)])


def measure_distances(
    features: torch.Tensor, labels: torch.Tensor, statistics: Path, num_classes: int, *, sha256: str | None = None
) -> tuple[float | None, float | None]:
    """Frechet distance and earth mover's similarity of features to those of the source's own images.

    The first is `frechet_to`, its bias removed: near 0 for more images of the source, in variances of the source. The
    second is `emd_similarity` between class means, 1 for the same. Its scale: features are divided by the root mean
    square length of the source's and multiplied by `LENGTH`, so that gamma means the same for every backbone. The
    source was seen in the card's own view; in another one the distance holds the change of view, too.

    Args:
        features: (N, D), pooled, by the backbone of the card.
        labels: (N,), integers in [0, num_classes).
        statistics: the file that `finetune zoo add --statistics` wrote.
        num_classes: K.
        sha256: what the file has to hash to.

    Returns:
        None in the place of a distance that cannot be had: the first from fewer than four images, the second where
        the source's images had no classes or there are more than `MOST_WAYS` pairs of classes.

    Raises:
        BackboneError: if the file is missing, damaged or no such file, or of a backbone of another width.
    """
    try:
        if sha256:
            check_sha256(statistics, sha256)
        source = load_file(statistics)
        known = Gaussian(
            mean=source["mean"].double(), covariance=source["covariance"].double(), n=int(source["images"])
        )
        means, weights = source["class_means"].double(), source["class_weights"].double()
    except (SafetensorError, OSError, KeyError) as fault:
        raise BackboneError(
            f"{statistics} holds no statistics of a source ({fault}). `finetune zoo add --statistics` writes it again."
        ) from fault
    if len(known.mean) != features.shape[1]:
        raise BackboneError(
            f"{statistics} is of {len(known.mean)} features, the backbone gives {features.shape[1]}. "
            "`finetune zoo add --statistics` writes it again."
        )
    distance, similarity = None, None
    if len(features) >= ROWS_PER_COMPONENT:
        most = min(COMPONENTS, known.n // ROWS_PER_COMPONENT)
        distance = frechet_to(features, known, components=most).value
    own, shares = class_prototypes(features, labels, num_classes=num_classes)
    if 0 < len(means) * len(own) <= MOST_WAYS:
        length = float((known.mean.square().sum() + known.covariance.trace()).sqrt())
        scale = LENGTH / length if length > 0 else 1.0
        similarity = emd_similarity(own * scale, shares, means * scale, weights)
    return distance, similarity


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None


def _measure(
    statistic: Callable[[torch.Tensor], torch.Tensor], n: int, seed: int, *, least: float = -math.inf
) -> Measure:
    """A statistic of weights of images (R, N) that sum to 1, with its reflected bootstrap interval.

    Reflected, because these statistics are biased in small samples, and resampling adds the same bias again: Davison &
    Hinkley, Bootstrap Methods and their Application, 1997, section 5.2. Where the bias exceeds the noise, the interval
    is drawn out to the value itself; neither goes below `least`, the smallest value that there can be.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    weights = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full((RESAMPLES, n), 1 / n, dtype=torch.float64)
    )
    value = float(statistic(torch.full((1, n), 1 / n, dtype=torch.float64))[0])
    low, high = percentiles(statistic(weights))
    low, high = 2 * value - high, 2 * value - low
    return Measure(value=max(least, value), low=max(least, min(low, value)), high=max(high, value, least), n=n)
