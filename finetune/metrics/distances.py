"""Distances between two sets of features: how far a user's images are from those of pre-training.

The Frechet distance compares means and covariances, the earth mover's distance class prototypes. Both
depend on the extractor, so compare values of one extractor only, and with no fixed threshold. A Frechet
distance of few images is mostly bias; `frechet_to` measures the bias and subtracts it.
"""

import math
from dataclasses import dataclass

import torch

GAMMA = 0.01
"""Of `emd_similarity`, per unit of feature distance: the value and the feature scale of Cui et al."""
SPLITS = 8
"""Random halvings of the target that `frechet_to` averages its baseline over."""
ROWS_PER_COMPONENT = 4
"""Target rows for each component compared; each half of a split then has two."""
_ROUNDING = 1e-12  # of the largest variance


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean and covariance of a set of feature vectors, in float64."""

    mean: torch.Tensor
    """(D,)"""
    covariance: torch.Tensor
    """(D, D), divisor n - 1."""
    n: int
    """Rows behind the estimate."""


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """A bias-corrected Frechet distance, in variances of the source: 1 is a shift by one deviation."""

    value: float
    """Near 0, on either side, for a sample of the source itself; below 0 means that no shift is seen."""
    baseline: float
    """The bias subtracted; `value + baseline` is the plain distance."""
    n: int
    """Rows of the target."""
    components: int
    """Directions summed over. Compare only distances with the same number."""


def fit_gaussian(features: torch.Tensor) -> Gaussian:
    """Mean and unbiased covariance of features (N, D).

    Raises:
        ValueError: if there are fewer than two rows, no column, or a feature is not finite.
    """
    x = _checked(features, "features", rows=2)
    mean = x.mean(dim=0)
    centred = x - mean
    return Gaussian(mean=mean, covariance=centred.T @ centred / (len(x) - 1), n=len(x))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in squared feature units; never negative.

    Dowson & Landau, J. Multivariate Analysis 1982, 12:450-455; of features: Heusel et al., NeurIPS 2017,
    https://arxiv.org/abs/1706.08500. The last trace is that of the symmetric (S_a^1/2 S_b S_a^1/2)^(1/2),
    the sum of the singular values of S_a^1/2 S_b^1/2: so no covariance is squared, and a singular one
    costs no digits. Biased upward for few rows: see `frechet_to`.

    Raises:
        ValueError: if the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a has {len(a.mean)} features but b has {len(b.mean)}; they must match.")
    overlap = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    shape = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return float((a.mean - b.mean).square().sum() + shape.clamp(min=0))


def frechet_to(features: torch.Tensor, source: Gaussian, *, components: int = 64, seed: int = 0) -> FrechetDistance:
    """The Frechet distance of features from `source`, without unit and corrected for few rows.

    Both are projected on the leading eigenvectors of the source covariance and divided by the source's
    standard deviations there, so the source is N(0, I) and the scale of the extractor cancels. What moves
    only in directions the source hardly uses is not seen.

    The bias of a plain distance is, to first order, c (1/n_a + 1/n_b) for sets of n_a and n_b rows (Chong &
    Forsyth, CVPR 2020, https://arxiv.org/abs/1911.07023, extrapolate it away). Two halves of the target
    share one truth, so their distance is all bias, c (1/m_1 + 1/m_2); times (1/n + 1/n_source) over
    (1/m_1 + 1/m_2), a quarter for a large source, it is the bias of the whole. This c is exact for means,
    and for covariances near the source's, where the bias matters; a target of half the deviations keeps
    about 6 % of its value as bias. `ROWS_PER_COMPONENT` leaves 3 % of the bias to higher orders.

    Args:
        features: (N, D), N >= 4, by the extractor of the source.
        source: fitted on many more rows than D; its own noise is corrected to first order only.
        components: the most to compare; fewer where N // 4 or the rank of the source is less.
        seed: decides the splits.

    Raises:
        ValueError: if widths differ, rows or `components` are too few, or the source does not vary.
    """
    x = _checked(features, "features", rows=ROWS_PER_COMPONENT)
    if x.shape[1] != len(source.mean):
        raise ValueError(f"features has {x.shape[1]} columns but source has {len(source.mean)}; they must match.")
    if components < 1:
        raise ValueError(f"components must be positive, got {components}.")
    variances, directions = torch.linalg.eigh(source.covariance)
    rank = int((variances > _ROUNDING * variances[-1].clamp(min=1e-300)).sum())
    if not rank:
        raise ValueError("the source has no variance; fit it on features that differ.")
    k = min(components, len(x) // ROWS_PER_COMPONENT, rank)
    z = (x - source.mean) @ directions[:, -k:] / variances[-k:].sqrt()  # (N, k)
    unit = Gaussian(mean=z.new_zeros(k), covariance=torch.eye(k, dtype=z.dtype), n=source.n)
    baseline = (1 / len(z) + 1 / source.n) * _bias_per_inverse_row(z, seed)
    return FrechetDistance(value=frechet(fit_gaussian(z), unit) - baseline, baseline=baseline, n=len(z), components=k)


def class_prototypes(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean features of each class that has images, and its share of the images.

    From features (N, D) and labels (N,): (C, D) and (C,), float64, for the C classes with images, in order.

    Raises:
        ValueError: if there is no row, a feature is not finite, the lengths differ, or a label is out of range.
    """
    x = _checked(features, "features", rows=1)
    labels = labels.detach().cpu().long()
    if labels.shape != (len(x),):
        raise ValueError(f"features has {len(x)} rows but labels has shape {tuple(labels.shape)}; they must match.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}.")
    counts = torch.bincount(labels, minlength=num_classes).double()
    sums = x.new_zeros(num_classes, x.shape[1]).index_add_(0, labels, x)
    present = counts > 0
    return sums[present] / counts[present, None], counts[present] / len(x)


def emd(
    target_prototypes: torch.Tensor,
    target_weights: torch.Tensor,
    source_prototypes: torch.Tensor,
    source_weights: torch.Tensor,
) -> float:
    """The earth mover's distance between weighted points, in feature units: least mean Euclidean way.

    Rubner, Tomasi & Guibas, IJCV 2000, 40:99-121, solved exactly as a linear program; 100 x 1,000 points
    take a second. Prototypes are (K, D) and (Z, D), weights (K,) and (Z,) with any positive sum.

    Raises:
        ValueError: if shapes do not match, a value is not finite, or weights are negative or all 0.
    """
    import numpy as np
    from scipy import optimize, sparse

    here, supply = _weighted(target_prototypes, target_weights, "target")
    there, demand = _weighted(source_prototypes, source_weights, "source")
    if here.shape[1] != there.shape[1]:
        raise ValueError(f"target has {here.shape[1]} features but source has {there.shape[1]}; they must match.")
    ways = torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")  # (K, Z); exactly 0 where equal
    longest = float(ways.max()) or 1.0  # the solver's tolerances are absolute
    k, z = ways.shape
    leaving = sparse.kron(sparse.eye(k), np.ones((1, z)))
    arriving = sparse.kron(np.ones((1, k)), sparse.eye(z))
    sums = sparse.vstack([leaving, arriving]).tocsr()[:-1]  # the last follows from the others
    amounts = torch.cat([supply, demand])[:-1].numpy()
    flow = optimize.linprog((ways / longest).flatten().numpy(), A_eq=sums, b_eq=amounts, method="highs")
    if flow.status != 0:
        raise ArithmeticError(f"the earth mover's distance was not found: {flow.message}")
    return max(0.0, float(flow.fun)) * longest


def emd_similarity(
    target_prototypes: torch.Tensor,
    target_weights: torch.Tensor,
    source_prototypes: torch.Tensor,
    source_weights: torch.Tensor,
    *,
    gamma: float = GAMMA,
) -> float:
    """exp(-gamma * `emd`) in (0, 1]: 1 for equal sets. Arguments as there.

    Cui et al., CVPR 2018, https://arxiv.org/abs/1806.06193. Their `GAMMA` suits the scale of their
    features; another extractor needs its own, or only the order of the values means something.

    Raises:
        ValueError: as `emd`, or if `gamma` is not positive.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive, got {gamma}.")
    return math.exp(-gamma * emd(target_prototypes, target_weights, source_prototypes, source_weights))


def _bias_per_inverse_row(z: torch.Tensor, seed: int) -> float:
    """The c of a distance c (1/m_1 + 1/m_2) between random halves, averaged over `SPLITS` splits."""
    generator = torch.Generator().manual_seed(seed)
    half = len(z) // 2
    orders = [torch.randperm(len(z), generator=generator) for _ in range(SPLITS)]
    total = sum(frechet(fit_gaussian(z[order[:half]]), fit_gaussian(z[order[half:]])) for order in orders)
    return total / SPLITS / (1 / half + 1 / (len(z) - half))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _weighted(points: torch.Tensor, weights: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = _checked(points, f"{name}_prototypes", rows=1), weights.detach().cpu().double()
    if w.shape != (len(x),) or not w.isfinite().all() or w.min() < 0 or w.sum() <= 0:
        raise ValueError(f"{name}_weights must be {len(x)} finite values >= 0, not all 0, got {w.tolist()[:5]}.")
    return x, w / w.sum()


def _checked(features: torch.Tensor, name: str, *, rows: int) -> torch.Tensor:
    if features.ndim != 2 or len(features) < rows or not features.shape[1]:
        raise ValueError(f"{name} must have shape (N, D) with N >= {rows}, got {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite.")
    return features.detach().cpu().double()
