"""In which order backbones are to be chosen, by what each came to, and the reason in words.

A probe decides as far as it can: on the same images a difference must exceed chance. What it does not tell apart is
ordered by measures that use no fit of their own, made comparable by z-scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch

from finetune.config.facts import RankRow
from finetune.features.layer_profile import FOLDS
from finetune.metrics.intervals import paired_difference
from finetune.metrics.transferability import rank_agreement

NAMED = 3
"""Classes told by name in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one candidate came to, before it is compared with others."""

    row: RankRow
    right: torch.Tensor
    """(N,) bool: images that the probe named rightly when they were left out."""
    log_loss: float
    hits: int
    misses: int


def order_rows(seen: Sequence[Seen]) -> list[RankRow]:
    """Rows in the order of choice, with what each is behind and which are tied."""
    by_probe = sorted(seen, key=lambda one: (-one.row.probe.value, one.log_loss, one.row.name))
    best = by_probe[0]
    tied: list[RankRow] = []
    rest: list[RankRow] = []
    for one in by_probe:
        only_best, only_this = int((best.right & ~one.right).sum()), int((one.right & ~best.right).sum())
        behind = paired_difference(only_best, only_this, len(one.right))
        is_tied = behind.low <= 0
        update = {"behind": behind, "is_tied": is_tied}
        (tied if is_tied else rest).append(one.row.model_copy(update=update))
    if len(tied) > 1:
        scores = mean_z_scores([_deciding(tied, row) for row in tied])
        tied = [row.model_copy(update={"tie_score": score}) for row, score in zip(tied, scores, strict=True)]
        tied.sort(key=lambda row: -(row.tie_score or 0.0))  # stable: equals stay in the order of the probe
    return [*tied, *rest]


def _deciding(tied: Sequence[RankRow], row: RankRow) -> list[float]:
    values = [row.neighbours.value, row.logme]
    return [*values, row.leep] if row.leep is not None and all(one.leep is not None for one in tied) else values


def mean_z_scores(values: Sequence[Sequence[float]]) -> list[float]:
    """Of rows of measures, the mean over measures of how many deviations each lies above the rows' mean.

    A measure that is the same in all rows says nothing and counts 0.
    """
    columns = [(fmean(column), pstdev(column)) for column in zip(*values, strict=True)]
    return [
        fmean(
            (value - mean) / spread if spread > 1e-12 else 0.0
            for value, (mean, spread) in zip(row, columns, strict=True)
        )
        for row in values
    ]


def measure_agreement(rows: Sequence[RankRow]) -> dict[tuple[str, str], float]:
    """Spearman's correlation of each two measures that all rows have; empty for fewer than three rows."""
    scores = {
        "probe": [row.probe.value for row in rows],
        "k-NN": [row.neighbours.value for row in rows],
        "LogME": [row.logme for row in rows],
        "H-score": [row.h_score for row in rows],
        "LEEP": [math.nan if row.leep is None else row.leep for row in rows],
        "NCE": [math.nan if row.nce is None else row.nce for row in rows],
    }
    return rank_agreement({name: own for name, own in scores.items() if all(map(math.isfinite, own))})


def explain(rows: Sequence[RankRow], num_images: int) -> str:
    """The rule, what it gave, and what the source classifiers say of the images."""
    first, tied = rows[0], [row for row in rows if row.is_tied]
    if len(rows) == 1:
        return f"{first.name} is the only backbone that could look at the images. {_told(first)}".strip()
    most = max(tied, key=lambda row: row.probe.value)
    said = (
        f"A probe judges first: logistic regression on frozen features, in {min(FOLDS, num_images)} folds of "
        f"{num_images} training images. It is right most often with {most.name}, on {100 * most.probe.value:.1f} %; "
    )
    if len(tied) == 1:
        said += "every other is behind by more than chance on the same images (paired 95 % intervals). "
    else:
        others = _listed([row.name for row in tied if row is not most])
        measures = "k-NN, LogME and LEEP" if all(row.leep is not None for row in tied) else "k-NN and LogME"
        scores = _listed([f"{row.name} {row.tie_score:+.2f}" for row in tied])
        said += (
            f"on the same images {others} cannot be told from it (paired 95 % intervals). Among these the mean of the "
            f"z-scores of {measures} decides: {scores}. "
        )
    said += f"So {first.name} is chosen."
    headed = [row for row in rows if row.leep is not None]
    if not headed:
        return said
    knows = max(headed, key=lambda row: -math.inf if row.leep is None else row.leep)
    if knows is first:
        return f"{said} Its source classes also tell these classes best (LEEP). {_told(first)}".strip()
    return f"{said} The source classes of {knows.name} tell these best (LEEP), {_yet(knows)}. {_told(knows)}".strip()


def _yet(row: RankRow) -> str:
    if row.is_tied:
        return "but its other measures are lower"
    low, high = 100 * row.behind.low, 100 * row.behind.high
    return f"but its probe is {100 * row.behind.value:.1f} points behind the best [{low:.1f}, {high:.1f}]"


def _told(row: RankRow) -> str:
    """What the source classifier takes the images for."""
    if not row.taken_for:
        return ""
    parts = [f"{own} for {source} ({100 * share:.0f} %)" for own, source, share in row.taken_for[:NAMED]]
    return f"Most often it takes {_listed(parts)}."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
