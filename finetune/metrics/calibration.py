"""Temperature scaling: one number that makes confidence honest and leaves every decision as it is.

Guo et al., ICML 2017, section 4.2, https://arxiv.org/abs/1706.04599. The log loss is convex in the
inverse temperature, so we find the minimum by a bracketed Newton search on its slope, in float64. The
authors' L-BFGS recipe (rate 0.01, 50 iterations) stops short: at 1.76 where the optimum is 3.12.
"""

import math

import torch
import torch.nn.functional as F

from finetune.config.scores import Temperature
from finetune.metrics.classification import expected_calibration_error

COLDEST, HOTTEST = 1e-4, 1e4
"""The temperatures searched. An optimum beyond them is none: see `Temperature.value`."""
_LEAST = 1e-38
"""What a softmax in single precision rounds to zero. A higher floor would bias the temperature."""
_PRECISION = 1e-10
"""Relative, of the inverse temperature."""
_MOST_STEPS = 200
"""Ten are usual; halving the bracket alone would take 40."""


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None) -> Temperature:
    """The temperature with the least log loss on `labels`.

    For averages over views or members pass `log_probabilities(average)`: scaling does not commute with
    averaging, so average first and fit one temperature after (Rahaman & Thiery, NeurIPS 2021).

    Args:
        logits: (N, K), finite; or log-probabilities, which are logits too.
        labels: (N,), integers in [0, K).
        weights: (N,), of each image in the log loss, positive; None: all alike. They do not enter the ECE.

    Raises:
        ValueError: if there is no image, the shapes do not match, a label is outside [0, K), or a
            logit is not finite.
    """
    logits, labels = _check(logits, labels)
    shares = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64)  # (N,), adding up to 1
    if weights is not None:
        shares = weights.double() / weights.double().sum()
    inverse = _best_inverse(logits - logits.gather(1, labels[:, None]), shares)
    before = _log_loss(logits, labels, shares)
    value = None if inverse is None else 1 / inverse
    after = before if value is None else _log_loss(logits / value, labels, shares)
    if value is not None and after > before:  # only rounding, where the optimum is 1
        value, after = 1.0, before
    return Temperature(
        value=value,
        n=len(labels),
        log_loss_before=before,
        log_loss_after=after,
        ece_before=expected_calibration_error(logits.softmax(dim=1), labels),
        ece_after=expected_calibration_error(apply_temperature(logits, value or 1.0).softmax(dim=1), labels),
    )


def apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scaled logits of the same shape, float64; their softmax are the calibrated probabilities.

    Decisions do not change. For averaged probabilities pass `log_probabilities(average)`.

    Raises:
        ValueError: if `temperature` is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    return logits.double() / temperature


def log_probabilities(probabilities: torch.Tensor) -> torch.Tensor:
    """Logarithms in float64 of probabilities of any shape, finite also for zeros."""
    return probabilities.double().clamp_min(_LEAST).log()


def _log_loss(logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor) -> float:
    return float((F.cross_entropy(logits, labels, reduction="none") * shares).sum())


def _best_inverse(leads: torch.Tensor, shares: torch.Tensor) -> float | None:
    """The inverse temperature where the slope of the log loss is zero; None if that is out of range.

    `leads` (N, K) are logits minus the logit of the label: then the slope of a row that is right has
    no positive term, and "all right" is recognised without rounding.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    if _slope(leads, shares, low)[0] >= 0 or _slope(leads, shares, high)[0] <= 0:
        return None
    inverse = 1.0
    for _ in range(_MOST_STEPS):
        slope, curvature = _slope(leads, shares, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        if slope == 0 or abs(step - inverse) <= _PRECISION * inverse:
            return inverse
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        inverse = step if low < step < high else math.sqrt(low * high)
    return inverse


def _slope(leads: torch.Tensor, shares: torch.Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean log loss with respect to the inverse temperature."""
    probabilities = (leads * inverse).softmax(dim=1)  # (N, K)
    means = (probabilities * leads).sum(dim=1)  # (N,)
    spreads = (probabilities * (leads - means[:, None]) ** 2).sum(dim=1)
    return float((means * shares).sum()), float((spreads * shares).sum())


def _check(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits (N, K) and labels (N,) with N >= 1 are needed, got shapes {shapes}.")
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}), got {labels.min()} to {labels.max()}.")
    if not logits.isfinite().all():
        raise ValueError("logits hold infinities or NaN; take `log_probabilities` of probabilities that hold zeros.")
    return logits, labels
