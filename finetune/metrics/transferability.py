"""Transferability: how well features fit a task, told before anything is trained.

Measures in float64, higher is better in each. None of them wins on all tasks, so a ranking shows several
and a probe confirms the choice. Two traps of wide features are closed: the evidence has a determinant of
size N, in which the (D - k) log alpha that widely copied code forgets cancels, and the H-score shrinks.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F

_MAX_ITERATIONS, _TOLERANCE = 500, 1e-7
"""Steps and relative change of alpha/beta that end its fixed point; the evidence is right to 1e-7 then."""
_RANK_TOLERANCE = 1e-12
"""Eigenvalues below this share of the largest count as zero: 1e-6 of a singular value, float32's noise."""
_RATIO_FLOOR, _RATIO_CEILING = 1e-10, 1e8
"""Bounds of alpha/beta against the largest and the summed eigenvalue. The floor decides only where some
features reproduce a target exactly and its evidence has no maximum; from the ceiling on they are ignored."""
_SUM_TOLERANCE = 1e-2
"""Rows of half-precision softmax over many classes miss one by this much."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def logme(features: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> float:
    """LogME: the largest log evidence of a Bayesian linear model per image, in nats, mean over classes.

    You et al., ICML 2021, https://arxiv.org/abs/2102.11005. Each class that occurs is a target in
    {0, 1}, without intercept. Widths may be compared, and scales do not matter. The precisions of weights
    and noise are the fixed point of MacKay, Neural Computation 1992, 4:415-447, which You et al. start from
    1 and 1. Unlike them we start from the best of a grid of their ratios, whose best noise is known: the
    answer then depends neither on the features' scale nor on a local maximum. Where features reproduce the
    labels exactly it is cut off, at some 11 nats.

    Args:
        features: (N, D).
        labels: (N,), integers in [0, num_classes).
        num_classes: K; classes without an image are left out of the mean.

    Raises:
        ValueError: if shapes or labels do not fit, a value is not finite, or fewer than two classes occur.
    """
    features, labels = _check(features, labels, num_classes)
    spectrum = _spectrum(features / _largest(features), _indicators(labels, num_classes))
    return float(_evidence(spectrum, _best_ratio(spectrum)).mean())


def h_score(features: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> float:
    """Shrunk H-score: variance between classes in units of the features' variance, in [0, K - 1].

    `tr(cov_a(f)^-1 (1 - a) cov(E[f|y]))`: Bao et al., ICIP 2019, with the Ledoit-Wolf shrinkage `a` of
    Ibrahim et al., 2021, https://arxiv.org/abs/2110.06893. Without it any labels score K - 1 if N <= D.
    Arguments and errors are those of `logme`; constant features score 0.
    """
    features, labels = _check(features, labels, num_classes)
    centred = features - features.mean(dim=0)
    varies = centred.abs().amax(dim=0) > _RANK_TOLERANCE * features.abs().amax(dim=0)  # more than rounding does
    centred = centred * varies / _largest(centred * varies)
    spectrum = _spectrum(centred, F.normalize(_indicators(labels, num_classes), dim=0))
    variances, width = spectrum.eigenvalues / spectrum.n, features.shape[1]
    shrinkage = _ledoit_wolf(centred.square().sum(dim=1), variances, width)
    kept = (1 - shrinkage) * variances
    shares = spectrum.squares.sum(dim=1) * kept / (kept + shrinkage * variances.sum() / width)
    return float(shares[variances > 0].sum())


def leep(source_probabilities: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> float:
    """LEEP: mean log-likelihood, in nats, of labels guessed from the source head alone; at most 0.

    Nguyen et al., ICML 2020, https://arxiv.org/abs/2002.12462. No logarithm of 0 can occur: each image
    is among those the conditionals are counted from. One-hot probabilities give `nce`, but for soft
    ones property 1 of the paper, LEEP >= NCE + mean log theta(x_i)_(z_i), is not a law.

    `source_probabilities` (N, Z) are theta; labels (N,), K and errors are those of `logme`, and a row
    that is no distribution is a ValueError too. Rows are normalised again in float64.
    """
    theta, labels = _check(source_probabilities, labels, num_classes)
    is_wrong = ((theta.sum(dim=1) - 1).abs() > _SUM_TOLERANCE) | (theta < 0).any(dim=1)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0, 0])
        raise ValueError(f"row {row} is no distribution over source classes: it sums to {float(theta[row].sum()):.6g}.")
    theta = theta / theta.sum(dim=1, keepdim=True)
    joint = F.one_hot(labels, num_classes).double().T @ theta  # (K, Z), times N
    conditional = joint / joint.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)  # 0 where no image says z
    return min(0.0, float((conditional[labels] * theta).sum(dim=1).log().mean()))


def nce(source_predictions: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> float:
    """Negative conditional entropy -H(Y|Z) of labels given source classes, in nats; at most 0.

    Tran et al., ICCV 2019, https://arxiv.org/abs/1908.08142. More source classes give higher values,
    up to 0 where no source class holds images of two classes. `source_predictions` (N,) are the source
    head's class of each image, any integers; labels (N,), K and errors are those of `logme`.
    """
    if source_predictions.ndim != 1 or source_predictions.dtype not in _INTEGERS:
        raise ValueError(f"source_predictions must be integers (N,), got {source_predictions}.")
    source = source_predictions.detach().cpu().unique(return_inverse=True)[1]  # (N,), each class occurs
    labels = _check(source[:, None], labels, num_classes)[1]
    pairs = torch.bincount(source * num_classes + labels, minlength=(int(source.max()) + 1) * num_classes)
    counts = pairs.view(-1, num_classes).double()  # (Z, K)
    return min(0.0, float(torch.special.xlogy(counts, counts / counts.sum(dim=1, keepdim=True)).sum()) / len(labels))


def rank_agreement(scores: Mapping[str, Sequence[float]]) -> dict[tuple[str, str], float]:
    """Spearman's rank correlation of each pair of measures over the same candidates, in [-1, 1].

    `scores` holds a value per candidate for each measure, all in one order. The answer is empty for fewer
    than three candidates, and leaves out a measure that ties them all: it has no correlation, not zero.

    Raises:
        ValueError: if the lengths differ, or a score is not finite.
    """
    sizes = {name: len(values) for name, values in scores.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"each measure needs one score per candidate, got {sizes}.")
    if wrong := [name for name, values in scores.items() if not all(map(math.isfinite, values))]:
        raise ValueError(f"scores must be finite, but {', '.join(wrong)} is not; leave out what has no score.")
    if max(sizes.values(), default=0) < 3:
        return {}
    from scipy.stats import spearmanr

    telling = [name for name, values in scores.items() if len(set(values)) > 1]
    return {(a, b): float(spearmanr(scores[a], scores[b]).statistic) for a, b in combinations(telling, 2)}


class _Spectrum(NamedTuple):
    """Features and T targets, seen along the k = min(N, D) left singular vectors of the features."""

    n: int
    eigenvalues: torch.Tensor  # (k,) squared singular values
    squares: torch.Tensor  # (k, T) squared projections of the targets
    outside: torch.Tensor  # (T,) squared length of each target outside these directions


def _spectrum(features: torch.Tensor, targets: torch.Tensor) -> _Spectrum:
    n, width = features.shape
    wide = n <= width
    eigenvalues, vectors = torch.linalg.eigh(features @ features.T if wide else features.T @ features)
    is_zero = eigenvalues <= _RANK_TOLERANCE * eigenvalues[-1]
    eigenvalues = eigenvalues.masked_fill(is_zero, 0.0)
    squares = (vectors.T @ (targets if wide else features.T @ targets)).square()
    if wide:
        return _Spectrum(n, eigenvalues, squares, squares.new_zeros(squares.shape[1]))
    squares = (squares / eigenvalues[:, None]).masked_fill(is_zero[:, None], 0.0)  # F v is sqrt(eigenvalue) long
    return _Spectrum(n, eigenvalues, squares, (targets.square().sum(dim=0) - squares.sum(dim=0)).clamp_min(0.0))


def _evidence(spectrum: _Spectrum, ratio: torch.Tensor, beta: torch.Tensor | None = None) -> torch.Tensor:
    """Log evidence / N of each target, (T,), at alpha/beta = `ratio`; at the best beta if none is given."""
    unexplained = ratio / (spectrum.eigenvalues[:, None] + ratio)  # (k, T)
    # ||Fm - y||^2 + alpha/beta ||m||^2 at the best weights m, (T,)
    misfit = (spectrum.outside + (spectrum.squares * unexplained).sum(dim=0)) / spectrum.n
    beta = 1 / misfit if beta is None else beta
    log_determinant = (spectrum.eigenvalues[:, None] / ratio).log1p().sum(dim=0) / spectrum.n
    return (beta.log() - math.log(2 * math.pi) - beta * misfit - log_determinant) / 2


def _best_ratio(spectrum: _Spectrum) -> torch.Tensor:
    """alpha/beta of the largest evidence, (T,)."""
    s = spectrum.eigenvalues[:, None]  # (k, 1)
    low, high = _RATIO_FLOOR * (float(s.max()) or 1.0), _RATIO_CEILING * (float(s.sum()) or 1.0)
    grid = torch.logspace(math.log10(low), math.log10(high), 64, dtype=torch.float64)
    start = ratio = grid[torch.stack([_evidence(spectrum, point) for point in grid]).argmax(dim=0)]
    for _ in range(_MAX_ITERATIONS):
        explained, unexplained = s / (s + ratio), ratio / (s + ratio)  # (k, T)
        gamma, rest = explained.sum(dim=0), spectrum.n - len(s) + unexplained.sum(dim=0)  # rest = N - gamma
        residual = spectrum.outside + (spectrum.squares * unexplained.square()).sum(dim=0)
        penalty = (spectrum.squares * explained * unexplained).sum(dim=0)  # alpha/beta ||m||^2
        wanted = torch.where(penalty > 0, ratio * gamma * residual / (rest * penalty), high)
        before, ratio = ratio, wanted.clamp(low, high)
        if ((ratio / before).log().abs() < _TOLERANCE).all():
            break
    return torch.where(_evidence(spectrum, ratio) >= _evidence(spectrum, start), ratio, start)


def _ledoit_wolf(squared_lengths: torch.Tensor, variances: torch.Tensor, width: int) -> float:
    """Ledoit & Wolf, JMVA 2004, 88:365-411, from the rows' squared lengths (N,) and the spectrum (k,)."""
    energy = variances.square().sum()
    spread = float(energy - variances.sum().square() / width)
    noise = float(squared_lengths.square().mean() - energy) / len(squared_lengths)
    return min(max(noise, 0.0) / spread, 1.0) if spread > 0 else 0.0


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) or 1.0


def _indicators(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return F.one_hot(labels, num_classes)[:, labels.unique()].double()  # (N, T), the classes that occur


def _check(rows: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    if rows.ndim != 2 or not rows.numel() or labels.shape != rows.shape[:1]:
        shapes = f"{tuple(rows.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"rows (N, D) with one label each (N,), none empty, are needed; got {shapes}.")
    if not (rows.isfinite().all() and labels.isfinite().all()):
        raise ValueError("infinities or NaN among the values; half precision may be too short for these features.")
    rows, labels = rows.detach().cpu().double(), labels.detach().cpu()
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    labels = labels.long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}.")
    if labels.min() == labels.max():
        raise ValueError(f"two classes must occur to be told apart, but every label is {labels.min()}.")
    return rows, labels
