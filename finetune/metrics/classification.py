"""Scores of class probabilities: what a run reports, each number with its interval and its n.

Every function takes probabilities (N, K), rows summing to one, and labels (N,) in [0, K), and works in
float64. The decision is the class of the largest probability, the first of them on a tie, in every
score alike; so the top-1 accuracy is always the trace of the confusion matrix over N.
"""

from collections.abc import Sequence

import torch

from finetune.config.measures import Measure, Proportion
from finetune.config.scores import ClassScore, SplitScores
from finetune.metrics.intervals import bootstrap, bootstrap_mean, mean_of_f1, mean_of_shares, percentiles
from finetune.metrics.shares import wilson

NUM_BINS = 15
"""Equal-width confidence bins, as in Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599."""
PROBABILITY_FLOOR = 1e-12
"""Smaller probabilities count as this, so one certain mistake costs 27.6 nats and not infinity."""
_SUM_TOLERANCE = 1e-2
"""Rows of half-precision softmax over many classes miss one by this much."""


def decide(probabilities: torch.Tensor) -> torch.Tensor:
    """The class with the largest probability, (N,); the first of them on a tie."""
    return probabilities.argmax(dim=1)


def top_k_accuracy(probabilities: torch.Tensor, labels: torch.Tensor, k: int = 1) -> Proportion:
    """Share of images whose label is among the `k` most probable classes; lower class first on a tie.

    Raises:
        ValueError: if `k` is not in [1, K], or the inputs are not probabilities and labels.
    """
    probabilities, labels = _check(probabilities, labels)
    if not 1 <= k <= probabilities.shape[1]:
        raise ValueError(f"k must lie in [1, {probabilities.shape[1]}], got {k}.")
    own = probabilities.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(probabilities.shape[1]) < labels[:, None]  # (N, K)
    num_ahead = ((probabilities > own) | ((probabilities == own) & earlier)).sum(dim=1)
    return wilson(int((num_ahead < k).sum()), len(labels))


def confusion(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts (K, K), int64: rows are the truth, columns the decision."""
    probabilities, labels = _check(probabilities, labels)
    num_classes = probabilities.shape[1]
    cells = labels * num_classes + decide(probabilities)
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def balanced_accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> Measure:
    """Mean recall over the classes that have images here; `n` counts images."""
    table = confusion(probabilities, labels)
    counts = table.sum(dim=1)
    present = counts > 0
    return mean_of_shares(table.diagonal()[present].tolist(), counts[present].tolist())


def macro_f1(probabilities: torch.Tensor, labels: torch.Tensor) -> Measure:
    """Mean F1 over the classes that occur as truth or as decision, each counting alike; `n` counts images."""
    table = confusion(probabilities, labels)
    hits, sums = table.diagonal(), table.sum(dim=0) + table.sum(dim=1)
    seen = sums > 0
    return mean_of_f1(hits[seen].tolist(), (sums - 2 * hits)[seen].tolist(), len(labels))


def per_class(probabilities: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 of each class, in the order of `classes` (K names)."""
    table = confusion(probabilities, labels)
    if len(classes) != len(table):
        raise ValueError(f"classes has {len(classes)} names but there are {len(table)} columns of probabilities.")
    hits, truths, calls = (counts.tolist() for counts in (table.diagonal(), table.sum(dim=1), table.sum(dim=0)))
    return tuple(
        ClassScore(
            name=name,
            n=truth,
            precision=wilson(hit, call) if call else None,
            recall=wilson(hit, truth) if truth else None,
            f1=2 * hit / (truth + call) if truth + call else None,
        )
        for name, hit, truth, call in zip(classes, hits, truths, calls, strict=True)
    )


def log_losses(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of the label of each image, (N,), in nats, at most 27.6."""
    probabilities, labels = _check(probabilities, labels)
    return -probabilities.gather(1, labels[:, None])[:, 0].clamp(PROBABILITY_FLOOR, 1.0).log()


def log_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of `log_losses`; log K for a classifier that knows nothing."""
    return float(log_losses(probabilities, labels).mean())


def expected_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = NUM_BINS) -> float:
    """Mean distance between confidence and accuracy over right-closed bins of equal width, in [0, 1].

    `sum_b n_b/N |accuracy_b - confidence_b|`, Guo et al., ICML 2017, section 2. It depends on the
    number of bins, and is biased upward for small N: a perfectly calibrated classifier scores about
    0.08 on 100 images and 0.025 on 1,000.
    """
    gaps, places = _calibration_gaps(probabilities, labels, bins)[:2]
    return float(_binned_error(gaps[None], places[None], bins))


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> Measure:
    """`expected_calibration_error` with a bootstrap interval for the error without its upward bias.

    The basic (reflected) bootstrap, because resampling adds the same bias once more; it lies mostly
    below the value and covers about 90 % (a percentile interval: none at all for a calibrated
    classifier). It reaches down to 0 where a calibrated classifier of the same confidences
    would score as much (consistency resampling, Broecker & Smith, Weather and Forecasting 2007).
    """
    gaps, places, confidences = _calibration_gaps(probabilities, labels, NUM_BINS)
    n, value = len(gaps), float(_binned_error(gaps[None], places[None], NUM_BINS))
    low, high = percentiles(bootstrap(lambda rows: _binned_error(gaps[rows], places[rows], NUM_BINS), n, seed))
    chance = torch.Generator().manual_seed(seed + 1)

    def lucky_error(rows: torch.Tensor) -> torch.Tensor:
        drawn = confidences[rows]
        is_right = torch.rand(drawn.shape, generator=chance, dtype=drawn.dtype) < drawn
        return _binned_error(is_right.double() - drawn, places[rows], NUM_BINS)

    is_plain_luck = value <= percentiles(bootstrap(lucky_error, n, seed))[1]
    least = 0.0 if is_plain_luck else max(0.0, 2 * value - high)
    return Measure(value=value, low=least, high=max(value, 2 * value - low), n=n)


def score_predictions(
    probabilities: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], *, seed: int = 0
) -> SplitScores:
    """Every score of one split, with its 95 % interval and n.

    `top5` is None for five classes or fewer. In `per_class`, what has no denominator (precision of a class never
    called, recall of a class without images) is None.

    Raises:
        ValueError: if there is no image, a label outside [0, K), a row that is no distribution, or
            `classes` has not K names.
    """
    top1 = top_k_accuracy(probabilities, labels, 1)  # first, for it checks what comes in
    return SplitScores(
        n=len(labels),
        majority=int(labels.bincount().max()) / len(labels),
        balanced_accuracy=balanced_accuracy(probabilities, labels),
        macro_f1=macro_f1(probabilities, labels),
        top1=top1,
        top5=top_k_accuracy(probabilities, labels, 5) if probabilities.shape[-1] > 5 else None,
        log_loss=bootstrap_mean(log_losses(probabilities, labels), seed),
        ece=calibration_error(probabilities, labels, seed),
        per_class=per_class(probabilities, labels, classes),
        confusion=tuple(map(tuple, confusion(probabilities, labels).tolist())),
    )


def _calibration_gaps(
    probabilities: torch.Tensor, labels: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-or-wrong minus confidence, bin, and confidence of each decision; each (N,)."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    probabilities, labels = _check(probabilities, labels)
    confidences = probabilities.amax(dim=1)
    inner = torch.arange(1, bins, dtype=torch.float64) / bins
    places = torch.bucketize(confidences, inner)  # edge[i-1] < confidence <= edge[i]: right-closed
    return (decide(probabilities) == labels).double() - confidences, places, confidences


def _binned_error(gaps: torch.Tensor, places: torch.Tensor, bins: int) -> torch.Tensor:
    """The calibration error (R,) of R samples with gaps and bins (R, n)."""
    sums = torch.zeros(len(gaps), bins, dtype=torch.float64).scatter_add_(1, places, gaps)
    return sums.abs().sum(dim=1) / gaps.shape[1]


def _check(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        shapes = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"probabilities (N, K) and labels (N,) with N >= 1 are needed, got shapes {shapes}.")
    probabilities, labels = probabilities.detach().cpu().double(), labels.detach().cpu().long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < probabilities.shape[1]:
        raise ValueError(f"labels must lie in [0, {probabilities.shape[1]}), got {labels.min()} to {labels.max()}.")
    is_wrong = ~((probabilities.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE) | (probabilities < 0).any(dim=1)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {row} is no distribution over classes: it sums to {float(probabilities[row].sum()):.6g}."
        )
    return probabilities, labels
