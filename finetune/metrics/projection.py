"""Projections of feature vectors: principal components, and whitening if asked for.

Everything is fitted on training features and then frozen: validation and test features pass through the
constants of training and never change them. All sums are float64; a projection is fitted once.

For diagnosis, and called by nothing else yet: `fit_projection`, `Projection`, `leave_binary`.
"""

from dataclasses import dataclass

import torch

EPSILON = 1e-5
"""Floor under whitened variances, in units of the mean variance of a column."""
_ROUNDING = 1e-12
"""Share of the largest variance (or of all of it) that is rounding, not data."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A fitted map from D features to k components, the strongest first."""

    mean: torch.Tensor
    """(D,) of the training features."""
    directions: torch.Tensor
    """(D, k), orthonormal columns."""
    variances: torch.Tensor
    """(k,) along the directions, descending; divisor N - 1. Shrunk where whitening with N <= D."""
    floor: float
    """Added to `variances` when whitening, in the units of a variance."""
    whitens: bool
    """Whether components are divided by their standard deviation."""

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (M, D) to components (M, k) in float64, with the constants of training.

        Raises:
            ValueError: if `features` is not (M, D).
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must have shape (M, {len(self.mean)}), got {tuple(features.shape)}.")
        components = (features.detach().cpu().double() - self.mean) @ self.directions  # (M, k)
        return components / (self.variances + self.floor).sqrt() if self.whitens else components


def fit_projection(features: torch.Tensor, *, keep: float | int, whiten: bool) -> Projection:
    """The principal components of training features, scaled to unit variance if `whiten`.

    With N <= D the sample variances spread far more than the true ones, the least of them towards 0, and
    dividing by them inflates noise. We then shrink them towards their mean by the share of Ledoit & Wolf,
    J. Multivariate Analysis 2004, 88:365-411; whitened training features are not quite white.
    With N > D nothing is shrunk, and N only a little above D still inflates: keep fewer components.

    Args:
        features: (N, D), of training images only.
        keep: a float in (0, 1] is the least share of variance to keep; an int is a number of components.
            So 1.0 keeps all that vary and 1 keeps one.
        whiten: divide each component by sqrt(variance + floor), floor = `EPSILON` * trace / D.

    Raises:
        ValueError: if there are fewer than two rows, a feature is not finite, no column varies, or
            `keep` is out of range or asks for more components than vary.
    """
    if features.ndim != 2 or len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features must be finite, of shape (N, D) and N >= 2, got shape {tuple(features.shape)}.")
    x = features.detach().cpu().double()
    mean = x.mean(dim=0)
    x = x - mean
    variances, directions = _principal_axes(x)
    if not len(variances):
        raise ValueError(f"all {len(x)} rows of features are equal; there is no direction to keep.")
    kept = _num_kept(variances, keep)
    average = float(variances.sum()) / x.shape[1]
    if whiten and len(x) <= x.shape[1]:
        share = _shrinkage(x, variances)
        variances = (1 - share) * variances + share * average
    floor = EPSILON * average if whiten else 0.0
    return Projection(
        mean=mean, directions=directions[:, :kept], variances=variances[:kept], floor=floor, whitens=whiten
    )


def leave_binary(features: torch.Tensor) -> torch.Tensor:
    """Which columns of training features (N, D) to leave as they are: (D,), true where all are 0 or 1.

    Flags keep their meaning only unscaled: project the other columns and put these beside the result.
    """
    return ((features == 0) | (features == 1)).all(dim=0)


def _principal_axes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (r,), descending, and directions (D, r) of centred rows (N, D); r is their rank."""
    if len(x) > x.shape[1]:
        variances, directions = torch.linalg.eigh(x.T @ x / (len(x) - 1))
        variances, directions = variances.flip(0), directions.flip(1)
    else:
        _, lengths, transposed = torch.linalg.svd(x, full_matrices=False)
        variances, directions = lengths.square() / (len(x) - 1), transposed.T
    rank = int((variances > _ROUNDING * variances[0].clamp(min=1e-300)).sum())
    return variances[:rank], directions[:, :rank]


def _num_kept(variances: torch.Tensor, keep: float | int) -> int:
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 1 <= keep <= len(variances):
            raise ValueError(f"keep={keep} components, but features vary in {len(variances)} directions.")
        return keep
    if isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a share in (0, 1] or a number of components, got {keep}.")
    sums = variances.cumsum(dim=0)
    return int((sums < keep * (1 - _ROUNDING) * sums[-1]).sum()) + 1


def _shrinkage(x: torch.Tensor, variances: torch.Tensor) -> float:
    """Ledoit and Wolf's share in [0, 1] of the mean variance, for centred rows (N, D)."""
    n, d = x.shape
    biased = variances * (n - 1) / n  # the paper divides by N
    squares = biased.square().sum()
    spread = squares - biased.sum().square() / d
    noise = (x.square().sum(dim=1).square().sum() / n - squares) / n
    return 1.0 if noise >= spread else float(noise / spread)
