"""How a probe's accuracy grows with the number of labelled images, and what twice as many would give.

Over a small range of sizes the error of a classifier falls about as a power of the number of images (Hestness et al.
2017, https://arxiv.org/abs/1712.00409; Viering & Loog, TPAMI 2022, https://arxiv.org/abs/2103.10948). Probes are
solved on halves, quarters and eighths of the training images; parts of one size are disjoint, and each lies within a
larger one. The law has two unknowns, the error at hand and the exponent: few points cannot tell an error that stays for
ever from a small exponent. All pairs of the two are weighed by how well they explain the points, whose errors go
together for they are made on the same images; so no fit can fail, and images too few to tell give a wide interval.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.config.imbalance import hides_classes
from finetune.config.measures import CurvePoint, LearningCurveFacts, Measure
from finetune.features.probing import guess_near

SIZES, LEAST_PER_CLASS = 3, 2
"""Sizes of parts, each half of the next, and images per class that the smallest have on average."""
CHEAP, MOST = 10**9, 2 * 10**9
"""Products of images, features and classes. With more training images than the first, one part of each size gets a
probe; a part of more than the second gets none."""
MISFIT = 0.05
"""By how much the law may miss the error at half the images, as a share of it; and so again for every halving."""
EXPONENT, EXPONENT_SPREAD = 0.25, 0.2
"""What is expected of the exponent before anything is seen: `benchmarks/curve.py` says how well that serves."""
WIDEST = 0.2
"""An interval wider than this says too little to be told as a number."""
_EXPONENTS, _ERRORS, _NOISE = 51, 121, 10
"""Of each, how many values are weighed."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Mistakes of the probes of one size."""

    images: float
    """That each probe learned from, on average."""
    wrong: torch.Tensor
    """(M,) share of wrong answers by image, over the probes that judged it; nan where none did."""
    shares: tuple[float, ...]
    """Of wrong answers, by probe."""
    chance: float = 0.0
    """Variance of `shares` that finitely many judged images explain."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """error = E (images / `images`)^-c, and how well each pair of E and c explains what was measured."""

    images: float
    errors: torch.Tensor
    """(L,) values of E."""
    exponents: torch.Tensor
    """(C,) values of c."""
    weights: torch.Tensor
    """(L, C), summing to 1."""
    luck: float
    """Variance of the error that the choice of `images` training images explains."""

    def accuracy(self, images: float, n: int) -> Measure:
        """Of a probe that learns from this many images: the median, and where it lies in 95 of 100 cases."""
        share = images / self.images
        errors = self.errors[:, None] * share**-self.exponents  # (L, C)
        steps = (torch.arange(_NOISE, dtype=torch.float64) + 0.5) / _NOISE
        noisy = errors[..., None] + torch.special.ndtri(steps) * (self.luck / share) ** 0.5
        weights = self.weights[..., None].expand_as(noisy) / _NOISE
        return _middle(1 - noisy.clamp(0, 1).flatten(), weights.flatten(), n)

    def exponent(self, n: int) -> Measure:
        """c with its 95 % interval."""
        return _middle(self.exponents, self.weights.sum(0), n)


def measure_curve(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    l2: float,
    seed: int,
    right: torch.Tensor,
    folds: int = 0,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LearningCurveFacts:
    """Accuracy by the number of training images, and what is foretold for twice as many.

    The penalty is that of all images, which per mean loss counts more where they are fewer.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.
        l2: the penalty that was chosen for all images.
        seed: of the parts.
        right: (M,) bool, what was right with all images: of val, or of the N images when each was left out.
        folds: of the cross-validation that `right` comes from.
        val: (M, D) features and (M,) labels that judge; None: images judge the probes that did not learn from them.
    """
    num = len(labels)
    rows = [_judge(features, labels, part, num_classes=num_classes, l2=l2, val=val) for part in
            _parts(labels, seed=seed, num_features=features.shape[1], num_classes=num_classes)]  # fmt: skip
    wrong = (~right).double()
    rows.append(Judged(images=num - num / folds if folds else num, wrong=wrong, shares=(float(wrong.mean()),)))
    is_balanced = hides_classes(labels.bincount(minlength=num_classes).tolist())
    judges = labels if val is None else val[1]
    errors, covariance = _errors(rows, judges, is_balanced=is_balanced)
    points = tuple(
        CurvePoint(
            images=round(row.images),
            probes=max(1, folds) if row is rows[-1] else len(row.shares),
            accuracy=_accuracy(float(error), float(square), len(judges)),
        )
        for row, error, square in zip(rows, errors, covariance.diagonal(), strict=True)
    )
    found = LearningCurveFacts(
        points=points, judged="cross-validation" if val is None else "val", is_balanced=is_balanced, num_images=num
    )
    if len(rows) < 2:
        return found
    law = weigh_laws([row.images for row in rows], errors, covariance, images=num, luck=_luck(rows, num))
    now, twice = (law.accuracy(images, len(judges)) for images in (num, 2 * num))
    told = {"exponent": law.exponent(len(judges)), "is_told": twice.high - twice.low <= WIDEST}
    return found.model_copy(update={"now": now, "twice": twice, **told})


def weigh_laws(
    sizes: Sequence[float], errors: torch.Tensor, covariance: torch.Tensor, *, images: float, luck: float = 0.0
) -> Law:
    """How well power laws explain errors (S,) measured at `sizes`, from few images to many.

    Gaussian noise of the covariance, and independent of it the luck of the training images and the misfit of any law;
    before anything is seen, exponents are a Gaussian that is cut at 0, and all errors are alike.

    Args:
        sizes: images that were learned from.
        errors: (S,), the mean over judged images.
        covariance: (S, S) of `errors`, positive definite.
        images: to which the law's E refers.
        luck: variance of the error that the choice of training images explains, the same at all sizes: parts of one
            size are all of the images, however small they are.
    """
    share = torch.tensor([size / images for size in sizes], dtype=torch.float64)
    misfit = MISFIT * errors * -share.log2()
    precision = torch.linalg.inv(covariance + torch.diag(luck + misfit.square()))
    last, deviation = float(errors[-1]), float(covariance[-1, -1] + luck) ** 0.5
    levels = torch.linspace(max(1e-4, last - 5 * deviation), min(1.0, last + 5 * deviation), _ERRORS).double()
    exponents = torch.linspace(0, 1, _EXPONENTS).double()
    missed = errors - levels[:, None, None] * share ** -exponents[:, None]  # (L, C, S)
    fit = -0.5 * torch.einsum("lcs,st,lct->lc", missed, precision, missed)
    fit -= 0.5 * ((exponents - EXPONENT) / EXPONENT_SPREAD).square()
    weights = (fit - fit.max()).exp()
    return Law(images=images, errors=levels, exponents=exponents, weights=weights / weights.sum(), luck=luck)


def nested_parts(labels: torch.Tensor, *, seed: int, halvings: int) -> torch.Tensor:
    """(N,) of each image its smallest part, in [0, 2^halvings), every class spread evenly.

    Parts 2k and 2k + 1 together are part k of the next size.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[torch.argsort(labels[order], stable=True)]
    part = torch.empty(len(labels), dtype=torch.long)
    part[by_class] = torch.arange(len(labels)) % 2**halvings
    return part


def _parts(labels: torch.Tensor, *, seed: int, num_features: int, num_classes: int) -> Iterator[list[torch.Tensor]]:
    """The parts (N,) bool of each size that get a probe, from small to large."""
    each = num_features * num_classes
    least, most = LEAST_PER_CLASS * len(labels.unique()), MOST / each
    halvings = [k for k in range(1, 40) if least <= len(labels) / 2**k <= most][:SIZES]
    if not halvings:
        return
    smallest = nested_parts(labels, seed=seed, halvings=halvings[-1])
    for k in reversed(halvings):
        part = smallest // 2 ** (halvings[-1] - k)
        yield [part == number for number in range(2**k if len(labels) * each <= CHEAP else 1)]


def _judge(
    features: torch.Tensor,
    labels: torch.Tensor,
    parts: Sequence[torch.Tensor],
    *,
    num_classes: int,
    l2: float,
    val: tuple[torch.Tensor, torch.Tensor] | None,
) -> Judged:
    """What probes that learned from each of some parts of one size make wrong."""
    answers = []
    for inside in parts:
        judges, truth = (features, labels) if val is None else val
        known = labels[inside]
        scaled = l2 * len(labels) / len(known)
        guessed = guess_near(features[inside], known, judges, num_classes=num_classes, l2=scaled)
        wrong = (guessed != truth).double()
        answers.append(wrong.masked_fill(inside, torch.nan) if val is None else wrong)
    table = torch.stack(answers)  # (P, M)
    images = sum(int(inside.sum()) for inside in parts) / len(parts)
    shares = table.nanmean(1)
    return Judged(
        images=images, wrong=table.nanmean(0), shares=tuple(shares.tolist()), chance=_chance(table, shares.mean())
    )


def _chance(table: torch.Tensor, error: torch.Tensor) -> float:
    """Variance of the shares of wrong answers (P, M) of probes that are equally good, over what each of them judged.

    On images that two probes judge they differ by where they disagree, on others as any two samples do.
    """
    if len(table) < 2:
        return 0.0
    judged = (~table.isnan()).double()
    per_image, own = judged.sum(0), float(judged.sum(1).mean())
    share = table.nanmean(0)
    disagreement = (share * (1 - share) * per_image / (per_image - 1))[per_image > 1].nanmean().nan_to_num()
    common = float((judged[0] * judged[1]).sum())
    return float(common * disagreement + (own - common) * error * (1 - error)) / own**2


def _luck(rows: Sequence[Judged], images: int) -> float:
    """Variance of the error of a probe on all images from one choice of them to another; it falls as they grow."""
    several = [row for row in rows if len(row.shares) > 1]
    freedom = sum(len(row.shares) - 1 for row in several)
    found = [
        (len(row.shares) - 1) * (float(torch.tensor(row.shares).var()) - row.chance) * row.images / images
        for row in several
    ]
    return max(0.0, sum(found) / freedom) if freedom else 0.0


def _errors(rows: Sequence[Judged], labels: torch.Tensor, *, is_balanced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) errors at every size, and their covariance (S, S) over the images that all sizes judged.

    One image that all get wrong and one that all get right stand in the covariance beside them: where no mistake was
    seen, some still happen (Laplace's rule).
    """
    wrong = torch.stack([row.wrong for row in rows], 1)  # (M, S)
    known = ~wrong.isnan().any(1)
    wrong, labels = wrong[known], labels[known]
    if is_balanced:
        counts = labels.bincount().double()
        wrong = wrong * (len(labels) / int((counts > 0).sum()) / counts[labels])[:, None]
    both = torch.cat([wrong, torch.ones(1, len(rows)), torch.zeros(1, len(rows))])
    covariance = torch.cov(both.T, correction=0).reshape(len(rows), len(rows)) / len(both)
    return wrong.mean(0), covariance + 1e-8 * torch.eye(len(rows))


def _accuracy(error: float, variance: float, n: int) -> Measure:
    half = 1.96 * variance**0.5
    return Measure(value=1 - error, low=max(0.0, 1 - error - half), high=min(1.0, 1 - error + half), n=n)


def _middle(values: torch.Tensor, weights: torch.Tensor, n: int) -> Measure:
    """The weighted median of values, and the two that leave out 2.5 % of the weights each."""
    order = values.argsort()
    heard = weights[order].cumsum(0)
    low, value, high = (
        float(values[order[min(len(order) - 1, int(torch.searchsorted(heard, share)))]])
        for share in (0.025, 0.5, 0.975)
    )
    return Measure(value=value, low=low, high=high, n=n)
