"""Conformal sets: the classes an image may have, so that the true one is among them as often as was promised.

Split conformal prediction (Angelopoulos & Bates, 2021, https://arxiv.org/abs/2107.07511) with the score 1 - p(label)
of Sadinle, Lei & Wasserman, JASA 2019, https://arxiv.org/abs/1609.00451. Its sets are the smallest that keep the
promise if the probabilities are right, need no random number and no parameter, and are told in one sentence: every
class at least this probable. Adaptive sets (APS, Romano et al., NeurIPS 2020) spread the promise more evenly over
easy and hard images, but are larger, and are exact only if drawn at random; here a hard image may get an empty set.

The promise holds on average over images like the calibration images, not for every class, and not for images of
another kind. It needs calibration images that served nothing else: pass probabilities as they are before the
temperature, if that was fitted on the same images.
"""

import math

import torch

from finetune.config.scores import SetScores
from finetune.metrics.classification import decide
from finetune.metrics.intervals import bootstrap_mean
from finetune.metrics.shares import wilson

EVERYTHING = 1.0
"""The threshold that no class exceeds: every set holds all classes."""
_ROUNDING = 1e-9
"""100 * 0.55 is 55.00000000000001 in floats, and its ceiling would be 56."""


def fit_threshold(probabilities: torch.Tensor, labels: torch.Tensor, coverage: float) -> float:
    """The largest 1 - p that a class in a set may have; `EVERYTHING` where there are too few images to promise.

    The ceil((n + 1) coverage)-th smallest of the n scores 1 - p(label). Sets then hold the true class of a new image
    with a probability of at least `coverage`, and at most 1 / (n + 1) more where no two scores are equal.

    Args:
        probabilities: (N, K) of the calibration images.
        labels: (N,), integers in [0, K).
        coverage: the share of images whose set shall hold the true class, in (0, 1).

    Raises:
        ValueError: if `coverage` is not in (0, 1), or the shapes do not match.
    """
    scores = 1 - _own(probabilities, labels)  # (N,)
    rank = _rank(len(scores), coverage)
    return EVERYTHING if rank > len(scores) else float(scores.sort().values[rank - 1])


def least_images(coverage: float) -> int:
    """The fewest calibration images with which `coverage` can be promised by less than all classes: 9 for 0.9."""
    count = max(1, math.floor(coverage / (1 - coverage)) - 1)
    while _rank(count, coverage) > count:
        count += 1
    return count


def prediction_set(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which classes are in the set of each image: (N, K) bool, from probabilities (N, K).

    A row may be all False: then no class is probable enough, and the image is unlike those of calibration.
    """
    return 1 - probabilities.detach().cpu().double() <= threshold


def expected_range(num_calibration: int, coverage: float, confidence: float = 0.95) -> tuple[float, float]:
    """Between what the coverage of one fitted threshold lies, over endlessly many test images.

    Calibration images are a sample, so a threshold covers a little more or less than was promised: by a Beta
    distribution (Vovk, ACML 2012; Angelopoulos & Bates, section 3.2). (1, 1) where there are too few images.
    """
    from scipy.special import betaincinv

    rank = _rank(num_calibration, coverage)
    if rank > num_calibration:
        return 1.0, 1.0
    tail = (1 - confidence) / 2
    low, high = (float(betaincinv(rank, num_calibration + 1 - rank, part)) for part in (tail, 1 - tail))
    return low, high


def describe(
    probabilities: torch.Tensor, labels: torch.Tensor, threshold: float, *, coverage: float, num_calibration: int
) -> SetScores:
    """What the sets of some images are like: `coverage` with Wilson's interval, `mean_size` with a bootstrap one.

    Args:
        probabilities: (N, K) of images that the threshold was not fitted on, N at least 1.
        labels: (N,), integers in [0, K).
        threshold: by `fit_threshold`.
        coverage: what was promised.
        num_calibration: images that the threshold was fitted on.

    Raises:
        ValueError: if the shapes do not match.
    """
    _own(probabilities, labels)
    sets, labels = prediction_set(probabilities, threshold), labels.detach().cpu().long()
    held, sizes = sets.gather(1, labels[:, None])[:, 0], sets.sum(dim=1)
    is_single = sizes == 1
    right = decide(probabilities.detach().cpu()) == labels  # the one class of a single set is the most probable
    return SetScores(
        promised=coverage,
        threshold=threshold,
        num_calibration=num_calibration,
        coverage=wilson(int(held.sum()), len(labels)),
        expected=expected_range(num_calibration, coverage),
        mean_size=bootstrap_mean(sizes, seed=0),
        largest=int(sizes.max()),
        single=int(is_single.sum()),
        single_right=int((is_single & right).sum()),
        empty=int((sizes == 0).sum()),
        note=_note(threshold, coverage, num_calibration, int((sizes == 0).sum())),
    )


def _note(threshold: float, coverage: float, num_calibration: int, num_empty: int) -> str | None:
    least = least_images(coverage)
    if num_calibration < least:
        return (
            f"{num_calibration} calibration images cannot promise {100 * coverage:g} %, which takes {least}; "
            "so every set holds all classes"
        )
    if threshold >= EVERYTHING:
        return "some calibration images are given no chance for their own class, so every set holds all classes"
    if num_empty:
        return f"{num_empty} sets are empty: no class is as probable there as calibration asks"
    return None


def _rank(num: int, coverage: float) -> int:
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie in (0, 1), got {coverage}.")
    return max(1, math.ceil((num + 1) * coverage - _ROUNDING))


def _own(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The probability of the label of each image, (N,) in float64."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"probabilities (N, K) and labels (N,) are needed, got shapes {shapes}.")
    return probabilities.detach().cpu().double().gather(1, labels.detach().cpu().long()[:, None])[:, 0]
