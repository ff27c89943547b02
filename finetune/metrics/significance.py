"""Comparison: whether two classifiers differ on the same images, how small a difference could show, and what seeds do.

Two accuracies with overlapping intervals may still differ, for both looked at the same images: only images on which
one alone is right tell them apart. So everything here is paired.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, mean, stdev
from types import MappingProxyType
from typing import TypeVar

import torch

from finetune.config.comparison import Seeds
from finetune.config.measures import Measure
from finetune.config.scores import Paired
from finetune.metrics.classification import decide
from finetune.metrics.intervals import bootstrap_mean, mean_of_differences, paired_difference

P = TypeVar("P", bound=Paired)
LEVEL = 0.05
"""Share of comparisons of equal classifiers that may be taken for a difference."""
POWER = 0.8
"""Share of true differences that a comparison shall find."""


def mcnemar(only_first: int, only_second: int) -> float:
    """How probable at least so uneven a division is if both classifiers are equally good: the exact two-sided p.

    McNemar, Psychometrika 1947, https://doi.org/10.1007/BF02295996, by the binomial distribution. The exact test errs
    less often than its level says; five against none is 0.0625.

    Args:
        only_first: images that the first classifier alone gets right.
        only_second: images that the second classifier alone gets right.

    Raises:
        ValueError: if a count is negative.
    """
    from scipy.special import bdtr

    if min(only_first, only_second) < 0:
        raise ValueError(f"counts of images must not be negative, got {only_first} and {only_second}.")
    fewer = min(only_first, only_second)
    return min(1.0, 2 * float(bdtr(fewer, only_first + only_second, 0.5)))


def adjust(p_values: Sequence[float]) -> list[float]:
    """The p values of several comparisons at once, so that together they err no more often than one (Holm, 1979).

    Scandinavian Journal of Statistics 6:65-70, https://www.jstor.org/stable/4615733. They come back in their order.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def answered_right(
    kind: type[P],
    first: torch.Tensor,
    second: torch.Tensor,
    labels: torch.Tensor,
    beside: Mapping[str, Measure] = MappingProxyType({}),
) -> P:
    """First minus second in accuracy, and in balanced accuracy, on the same images, with paired 95 % intervals.

    Args:
        kind: what the two are.
        first: probabilities (N, K).
        second: the same of the other.
        labels: (N,).
        beside: what else `kind` is told, by the name of its field.
    """
    right, other_right = decide(first) == labels, decide(second) == labels
    alone, other_alone, counts = (
        rows.bincount(minlength=first.shape[1])
        for rows in (labels[right & ~other_right], labels[~right & other_right], labels)
    )
    counted, seen = (int(alone.sum()), int(other_alone.sum())), counts > 0
    balanced = mean_of_differences(alone[seen].tolist(), other_alone[seen].tolist(), counts[seen].tolist())
    only = {f"only_{side}_right": count for side, count in zip(kind.SIDES, counted, strict=True)}
    told = _difference(paired_difference(*counted, len(labels)))
    return kind.model_validate({**told, "balanced": _difference(balanced), **only, **beside})


def _difference(found: Measure) -> dict[str, float]:
    return {"difference": found.value, "low": found.low, "high": found.high, "n": found.n}


def mean_difference(first: torch.Tensor, second: torch.Tensor, seed: int = 0) -> Measure:
    """The mean of first minus second over the same images, with its bootstrap interval; such as of log losses.

    Args:
        first: (N,), of each image.
        second: (N,), of the same images in the same order.
        seed: decides what is drawn.

    Raises:
        ValueError: if the lengths differ, or there is nothing.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"values of the same images are needed, got shapes {tuple(first.shape)}, {tuple(second.shape)}."
        )
    return bootstrap_mean(first.double() - second.double(), seed)


def images_needed(only_first: int, only_second: int, n: int, difference: float = 0.01) -> int:
    """About how many test images would show a true `difference` between two classifiers that differ as these do.

    At `LEVEL`, two-sided, and `POWER`: Connor, Biometrics 1987, 43:207-211, https://doi.org/10.2307/2531961. What
    counts is the share of images on which one alone is right; where it is below `difference`, `difference` is taken.

    Args:
        only_first: images that the first classifier alone gets right.
        only_second: images that the second classifier alone gets right.
        n: all images.
        difference: of the two accuracies, in (0, 1].

    Raises:
        ValueError: if counts or `difference` are out of range.
    """
    if n < 1 or min(only_first, only_second) < 0 or only_first + only_second > n:
        raise ValueError(f"{only_first} + {only_second} discordant pairs do not fit into {n} pairs.")
    if not 0 < difference <= 1:
        raise ValueError(f"difference must lie in (0, 1], got {difference}.")
    return math.ceil(_needed((only_first + only_second) / n, difference))


def smallest_difference(n: int, discordance: float) -> float:
    """The smallest true difference of two accuracies that `n` test images would show, at `LEVEL` and with `POWER`.

    The other way round from `images_needed`; 1 where no difference would.

    Args:
        n: test images.
        discordance: share of images on which one classifier alone is right. Before there are two, the sum of both
            error rates bounds it from above; similar classifiers share most of their errors.

    Raises:
        ValueError: if `n` is not positive, or `discordance` is not in [0, 1].
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"n >= 1 and a discordance in [0, 1] are needed, got {n} and {discordance}.")
    if _needed(discordance, 1.0) > n:
        return 1.0
    hidden, shown = 0.0, 1.0
    for _ in range(60):
        middle = (hidden + shown) / 2
        hidden, shown = (hidden, middle) if _needed(discordance, middle) <= n else (middle, shown)
    return shown


def aggregate_seeds(values: Sequence[float]) -> Seeds:
    """Mean, spread and the interval of the mean of one score over seeds.

    The interval speaks of what another seed would give on average; of other test images it says nothing if all runs
    were judged on the same.

    Raises:
        ValueError: if there is no value.
    """
    from scipy.special import stdtrit

    if not values:
        raise ValueError("a mean over seeds needs at least one value.")
    center, num = mean(values), len(values)
    if num == 1:
        return Seeds(mean=center, spread=None, low=None, high=None, n=1)
    spread = stdev(values)
    half = float(stdtrit(num - 1, 1 - LEVEL / 2)) * spread / math.sqrt(num)
    return Seeds(mean=center, spread=spread, low=center - half, high=center + half, n=num)


def _needed(discordance: float, difference: float) -> float:
    discordance = max(discordance, difference)  # two accuracies cannot differ by more than the images that tell
    at_level, at_power = NormalDist().inv_cdf(1 - LEVEL / 2), NormalDist().inv_cdf(POWER)
    root = at_level * math.sqrt(discordance) + at_power * math.sqrt(discordance - difference**2)
    return (root / difference) ** 2
