"""What each depth of a frozen backbone knows of the classes: three probes per stage, side by side.

The last features of a network serve its source task; for other images an earlier stage may tell more. Logistic
regression is judged on val, or by cross-validation where val is small; ridge regression and nearest neighbours leave
one image out at a time, exactly, so every image counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from finetune.config.facts import DepthFacts, ProfileFacts
from finetune.config.measures import Proportion
from finetune.features.logistic import scale_of, solver_threads
from finetune.features.penalties import L2_GRID, Part, choose_penalty
from finetune.features.probing import TEMPERATURE
from finetune.metrics.shares import wilson

FOLDS = 5
NEIGHBOURS = 10
"""k of the nearest neighbours; fewer where images are fewer."""
DEPTH_GRID = (1e-3, 1e-2, 0.1, 1.0)
"""Penalties of the logistic probes by depth: coarser than the final probe's, for there is one sweep per stage."""
RIDGE_GRID = tuple(10.0**power for power in range(-3, 5))
"""Penalties of ridge regression, per image, on standardised features."""


@dataclass(frozen=True, kw_only=True)
class CrossValidated:
    """The penalty that cross-validation chose, and what it says of images that were left out."""

    l2: float
    predictions: torch.Tensor
    """(N,) classes, each by a probe that never saw the image."""
    log_loss: float
    """Mean over images, in nats."""
    at_edge: bool
    """The penalty is the least or greatest of several."""


def assign_folds(labels: torch.Tensor, *, seed: int, folds: int = FOLDS) -> torch.Tensor:
    """(N,) fold of each image, each class spread evenly; depends on order only through the seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[by_class] = torch.arange(len(labels)) % folds
    return fold


def cross_validate(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    seed: int,
    grid: Sequence[float] = L2_GRID,
    folds: int = FOLDS,
) -> CrossValidated:
    """The probe's penalty with the smallest log loss over images left out, fold by fold.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.
        seed: of the folds.
        grid: penalties to try.
        folds: parts that the images are divided into; fewer where images are fewer.

    Raises:
        ValueError: as `choose_penalty`, or if there are fewer than two images.
    """
    if len(labels) < 2:
        raise ValueError(f"cross-validation needs at least two images, got {len(labels)}.")
    folds = min(folds, len(labels))
    fold = assign_folds(labels, seed=seed, folds=folds)
    outs = [fold == part for part in range(folds)]
    predictions = torch.zeros_like(labels)
    with solver_threads(features, num_classes):
        parts = [
            Part(features[~out], labels[~out], (features[out], labels[out]), num_classes=num_classes) for out in outs
        ]
        choice = choose_penalty(parts, grid)
        for part, out in zip(parts, outs, strict=True):
            predictions[out] = part.predict(choice.l2)
    return CrossValidated(
        l2=choice.l2,
        predictions=predictions,
        log_loss=choice.losses[choice.l2] / len(labels),
        at_edge=choice.at_edge,
    )


def ridge_left_out(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, grid: Sequence[float] = RIDGE_GRID
) -> tuple[torch.Tensor, float]:
    """Classes (N,) of each image by a ridge regression on all others, and the penalty that makes fewest mistakes.

    One-vs-rest least squares onto {-1, +1}, as the few-shot probe of Dosovitskiy et al., ICLR 2021,
    https://arxiv.org/abs/2010.11929. Leaving one out needs no second fit: the residual of image i without it is its
    residual with it over 1 - h_ii (Allen, Technometrics 1974), h the hat matrix. Of equals the stronger penalty wins.

    Args:
        features: (N, D), raw; columns are scaled as for the probe.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.
        grid: penalties, per image.

    Raises:
        ValueError: if lengths differ or there are fewer than two images.
    """
    if len(features) != len(labels) or len(labels) < 2:
        raise ValueError(f"ridge needs two images or more, a label each; got {len(features)} and {len(labels)}.")
    x = features.double()
    x = (x - x.mean(0)) / scale_of(x)
    y = 2 * F.one_hot(labels, num_classes).double() - 1  # (N, K)
    center = y.mean(0)
    if len(x) <= x.shape[1]:
        squares, left = torch.linalg.eigh(x @ x.T)  # (R,), (N, R)
    else:
        squares, right = torch.linalg.eigh(x.T @ x)
        left = x @ right / squares.clamp(min=1e-12 * float(squares.max())).sqrt()
    squares = squares.clamp(min=0)
    along, energy = left.T @ (y - center), left.square()  # (R, K), (N, R)
    best = (-1, grid[0], labels)
    for l2 in sorted(grid, reverse=True):
        shrink = squares / (squares + l2 * len(x))  # (R,)
        fitted = left @ (shrink[:, None] * along) + center
        leverage = energy @ shrink + 1 / len(x)  # the mean is fitted too
        out = y - (y - fitted) / (1 - leverage).clamp(min=1e-9)[:, None]
        predicted = out.argmax(1)
        if (hits := int((predicted == labels).sum())) > best[0]:
            best = (hits, l2, predicted)
    return best[2], best[1]


def neighbours_left_out(features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, k: int) -> torch.Tensor:
    """Classes (N,) of each image by the votes of its k nearest others, weighted by exp(cosine / 0.07).

    Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978.

    Raises:
        ValueError: if lengths differ, or k is not in [1, N - 1].
    """
    if len(features) != len(labels) or not 1 <= k < len(labels):
        raise ValueError(f"k must lie in 1 to N - 1 with a label each; got k={k}, {len(features)}, {len(labels)}.")
    known = F.normalize(features.float(), dim=1)
    one_hot = F.one_hot(labels, num_classes).float()
    answers = []
    for first in range(0, len(known), 1024):
        near = known[first : first + 1024] @ known.T  # (B, N)
        rows = torch.arange(len(near))
        near[rows, first + rows] = -2.0  # an image is no neighbour of itself
        best = near.topk(k, dim=1)
        votes = ((best.values - 1) / TEMPERATURE).exp()
        answers.append((one_hot[best.indices] * votes[..., None]).sum(1).argmax(1))
    return torch.cat(answers)


def measure_profile(
    depths: Sequence[torch.Tensor],
    labels: torch.Tensor,
    stages: Sequence[str],
    *,
    val: tuple[Sequence[torch.Tensor], torch.Tensor] | None,
    num_classes: int,
    seed: int,
) -> ProfileFacts:
    """Accuracy of three probes on the features of every depth.

    Args:
        depths: (N, D_k) training features of each depth k, from the stem to the top.
        labels: (N,).
        stages: the name of each depth.
        val: features of each depth and labels that judge the logistic probes; None cross-validates instead.
        num_classes: K.
        seed: of the folds.
    """
    rows, hits = [], []
    for k, (features, stage) in enumerate(zip(depths, stages, strict=True)):
        if val is None:
            found = cross_validate(features, labels, num_classes=num_classes, seed=seed, grid=DEPTH_GRID)
            right = found.predictions == labels
        else:
            with solver_threads(features, num_classes):
                part = Part(features, labels, (val[0][k], val[1]), num_classes=num_classes)
                right = part.predict(choose_penalty([part], DEPTH_GRID).l2) == val[1]
        ridge, _ = ridge_left_out(features, labels, num_classes=num_classes)
        near = neighbours_left_out(features, labels, num_classes=num_classes, k=min(NEIGHBOURS, len(labels) - 1))
        hits.append(right)
        rows.append(
            DepthFacts(
                stage=stage,
                width=features.shape[1],
                probe=proportion(right),
                ridge=proportion(ridge == labels),
                neighbours=proportion(near == labels),
            )
        )
    best_depth = max(range(len(rows)), key=lambda k: (rows[k].probe.value, k))
    gains = hits[best_depth].double() - hits[-1].double()  # (N,) in {-1, 0, 1}: the same images, so their noise cancels
    return ProfileFacts(
        depths=tuple(rows),
        num_images=len(labels),
        judged="cross-validation" if val is None else "val",
        best=best_depth,
        lead=float(gains.mean()),
        lead_error=float(gains.std(correction=0)) / len(gains) ** 0.5,
    )


def proportion(right: torch.Tensor) -> Proportion:
    """The share of true values in `right` (N,) bool, with its interval."""
    return wilson(int(right.sum()), len(right))
