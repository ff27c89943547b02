"""Linear probes on cached features: multinomial logistic regression, solved exactly.

A probe is the baseline that every fine-tuned model must beat. The problem is convex and noise-free, so
full-batch L-BFGS finds its optimum and no learning rate is tuned. What makes it fast is a change of
variables: in the eigenbasis of the features, each direction scaled by its curvature, the problem is
round and a few dozen steps do; the optimum is the same. With fewer images than features we work in
the span of the images, where the optimum lies anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

L2_GRID = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties tried on standardised features, per squared weight, in units of the mean cross-entropy."""
GRADIENT_NORM = 1e-6
"""The solver stops below this norm, or earlier only never: see also `SUBOPTIMALITY`."""
SUBOPTIMALITY = 1e-9
"""Largest relative excess of the objective over its minimum, by strong convexity: |g|^2 / (2 l2 J)."""
SWEEP_GRADIENT_NORM = 1e-4
"""Enough to rank penalties by validation loss; the chosen one is solved again to `GRADIENT_NORM`."""
MAX_ITERATIONS = 3000
STEPS_PER_CHECK = 8
"""L-BFGS steps between two looks at the gradient norm."""
TEMPERATURE = 0.07
"""Of the neighbours' votes: Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A solved probe. Its weights apply to raw features: the standardisation is folded in."""

    weight: torch.Tensor
    """(K, D) in float64."""
    bias: torch.Tensor
    """(K,) in float64."""
    l2: float
    objective: float
    """Mean cross-entropy plus penalty at the solution, in nats."""
    gradient_norm: float
    """Of the objective over weights and bias on standardised features."""
    iterations: int

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Map raw features (N, D) to logits (N, K) in float64."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_probe(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, l2: float, start: Probe | None = None
) -> Probe:
    """The minimiser of J(W, b) = mean cross-entropy + l2 / 2 |W|^2 over standardised features.

    The linear probe of Kornblith et al., CVPR 2019, https://arxiv.org/abs/1805.08974; `l2` is 1 / (C N) in
    scikit-learn's terms. Columns are standardised by mean and standard deviation of `features`. A class
    without images has its optimum at minus infinity; it gets weight 0 and the logit -log(N + 1) instead.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.
        l2: penalty; the bias is not penalised.
        start: a probe of the same shape to begin from; it changes the time, not the answer.

    Raises:
        ValueError: if lengths differ, a label is out of range, a feature is not finite, or `l2` is not positive.
    """
    problem = _Problem(features, labels, num_classes, torch.float64)
    weights = problem.enter(start) if start is not None else problem.zeros()
    return problem.solve(weights, l2, GRADIENT_NORM, SUBOPTIMALITY)


def sweep_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    *,
    num_classes: int,
    grid: Sequence[float] = L2_GRID,
) -> tuple[Probe, list[dict[str, Any]]]:
    """The probe whose penalty gives the smallest validation log loss, and one row per penalty tried.

    From strong to weak penalty, each starting where the last ended; of equals the stronger wins. The
    sweep computes in float32, the answer is solved again in float64.

    Returns:
        The probe, and rows in the order of `grid` with `l2`, `val_log_loss`, `val_top1`, `train_log_loss`,
        `iterations`, `chosen`, and `at_edge` (chosen, and the first or last of several: widen the grid).

    Raises:
        ValueError: as `fit_probe`, or if the grid or the validation set is empty.
    """
    if not grid or not len(val_labels):
        raise ValueError(f"sweep_probe needs penalties and validation images, got {len(grid)} and {len(val_labels)}.")
    _check(val_features, val_labels, num_classes)
    problem = _Problem(train_features, train_labels, num_classes, torch.float32)
    weights, best, rows = problem.zeros(), None, {}
    for l2 in sorted(set(grid), reverse=True):
        probe = problem.solve(weights, l2, SWEEP_GRADIENT_NORM, 1.0)
        weights = problem.enter(probe)
        logits = probe.logits(val_features)
        loss = float(F.cross_entropy(logits, val_labels))
        rows[l2] = {
            "l2": l2,
            "val_log_loss": loss,
            "val_top1": float((logits.argmax(1) == val_labels).double().mean()),
            "train_log_loss": float(F.cross_entropy(probe.logits(train_features), train_labels)),
            "iterations": probe.iterations,
        }
        if best is None or loss < rows[best.l2]["val_log_loss"]:
            best = probe
    assert best is not None
    edges = (min(rows), max(rows)) if len(rows) > 1 else ()
    for l2, row in rows.items():
        row |= {"chosen": l2 == best.l2, "at_edge": l2 == best.l2 and l2 in edges}
    answer = fit_probe(train_features, train_labels, num_classes=num_classes, l2=best.l2, start=best)
    return answer, [rows[l2] for l2 in grid]


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    *,
    num_classes: int,
    k: int,
    chunk: int = 1024,
) -> torch.Tensor:
    """Classes (N,) by the votes of the k nearest training images, weighted by exp(cosine / 0.07).

    Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978, as DINO evaluates features.

    Raises:
        ValueError: if lengths differ, a label is out of range, or k is not in [1, training images].
    """
    _check(train_features, train_labels, num_classes)
    if not 1 <= k <= len(train_labels):
        raise ValueError(f"k must lie in 1 to {len(train_labels)} (the training images), got {k}.")
    known = F.normalize(train_features.float(), dim=1)
    votes = F.one_hot(train_labels, num_classes).float()  # (N_train, K)
    answers = []
    for rows in features.float().split(chunk):
        nearest = (F.normalize(rows, dim=1) @ known.T).topk(k, dim=1)
        weights = ((nearest.values - 1) / TEMPERATURE).exp()  # (B, k); -1 keeps exp in range and changes no vote
        answers.append((votes[nearest.indices] * weights[..., None]).sum(1).argmax(1))
    return torch.cat(answers) if answers else torch.empty(0, dtype=torch.long)


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features must be (N, D) and labels (N,), N > 0; got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}.")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite.")


class _Problem:
    """Standardised features in a basis where the objective is easy to minimise.

    Unknowns are kept as (R + 1, C): weights of C present classes in the span (R = min(N, D)), then the bias.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int, dtype: torch.dtype) -> None:
        _check(features, labels, num_classes)
        self.num_classes = num_classes
        self.present, self.labels = labels.unique(return_inverse=True)
        x = features.double()
        self.mean = x.mean(0)
        std = x.std(0, correction=0)
        # A constant column has only rounding for a deviation; divided by it, noise would become a feature.
        self.std = torch.where(std > 1e-6 * self.mean.abs() + 1e-12, std, 1.0)
        x = (x - self.mean) / self.std
        self.span = None
        if len(x) < x.shape[1]:
            self.span, triangle = torch.linalg.qr(x.T)  # (D, N); x = triangle.T @ span.T
            x = triangle.T.contiguous()
            dtype = torch.float64  # small enough to be exact at once
        self.x = x.to(dtype)
        some = self.x[:: max(1, len(x) // (4 * x.shape[1]))]  # enough rows for a basis; any basis is exact
        self.curvature, self.basis = torch.linalg.eigh((some.T @ some / len(some)).double())
        self.curvature.clamp_(min=0)

    def zeros(self) -> torch.Tensor:
        return self.x.new_zeros(self.x.shape[1] + 1, len(self.present), dtype=torch.float64)

    def enter(self, probe: Probe) -> torch.Tensor:
        """The unknowns of a probe on raw features."""
        weight, bias = probe.weight[self.present], probe.bias[self.present]  # (C, D), (C,)
        inside = weight * self.std
        bias = bias + weight @ self.mean
        return torch.cat([(inside if self.span is None else inside @ self.span).T, (bias - bias.mean())[None]])

    def loss_and_gradient(self, weights: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (self.x @ weights[:-1].to(self.x.dtype)).double() + weights[-1]
        logs = logits.log_softmax(1)
        rows = torch.arange(len(logs))
        loss = -logs[rows, self.labels].mean() + l2 / 2 * weights[:-1].square().sum()
        residual = logs.exp_()
        residual[rows, self.labels] -= 1
        residual /= len(residual)
        slope = (self.x.T @ residual.to(self.x.dtype)).double() + l2 * weights[:-1]
        return loss, torch.cat([slope, residual.sum(0, keepdim=True)])

    def solve(self, weights: torch.Tensor, l2: float, gradient_norm: float, suboptimality: float) -> Probe:
        if not l2 > 0:  # also catches NaN
            raise ValueError(f"l2 must be positive, got {l2}.")
        scale = self._scale(weights, l2)
        unknown = torch.zeros_like(weights, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [unknown],
            max_iter=STEPS_PER_CHECK,
            history_size=20,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        seen: list[tuple[float, float]] = []

        def place(at):
            shift = at * scale
            return weights + torch.cat([self.basis @ shift[:-1], shift[-1:]])

        def closure() -> float:
            loss, slope = self.loss_and_gradient(place(unknown.detach()), l2)
            unknown.grad = torch.cat([self.basis.T @ slope[:-1], slope[-1:]]) * scale
            seen.append((float(loss), float(slope.norm())))
            return float(loss)

        steps = 0
        last = float("inf")
        while True:
            optimizer.step(closure)
            steps += STEPS_PER_CHECK
            w = place(unknown.detach())
            loss, slope = self.loss_and_gradient(w, l2)
            norm = float(slope.norm())
            tol = min(gradient_norm, (2 * l2 * suboptimality * float(loss)) ** 0.5)
            if self.x.dtype == torch.float32:
                tol = max(gradient_norm, (2 * l2 * 1e-6 * float(loss)) ** 0.5)
            import os

            if os.environ.get("V"):
                print(l2, steps, len(seen), float(loss), norm, tol)
            if (
                norm <= tol
                or steps > MAX_ITERATIONS
                or (self.x.dtype == torch.float32 and float(loss) > last * (1 - 1e-6))
            ):
                break
            last = float(loss)
        self.evals = len(seen)
        return self._leave(w, l2, float(loss), norm, steps)

    def _scale(self, weights: torch.Tensor, l2: float) -> torch.Tensor:
        p = ((self.x @ weights[:-1].to(self.x.dtype)).double() + weights[-1]).softmax(1)
        spread = (p * (1 - p)).mean(0).clamp(min=1e-6)  # (C,)
        inner = self.curvature[:, None] * spread + l2
        return torch.cat([inner, spread[None]]).rsqrt()

    def _leave(self, weights, l2, objective, norm, steps) -> Probe:
        inside = weights[:-1].T if self.span is None else weights[:-1].T @ self.span.T  # (C, D)
        weight = self.mean.new_zeros(self.num_classes, len(self.mean))
        bias = self.mean.new_full((self.num_classes,), 0)
        weight[self.present] = inside / self.std
        bias[self.present] = weights[-1] - weights[-1].mean() - weight[self.present] @ self.mean
        import math

        absent = torch.ones(self.num_classes, dtype=torch.bool)
        absent[self.present] = False
        bias[absent] = -math.log(len(self.labels) + 1)
        return Probe(weight=weight, bias=bias, l2=l2, objective=objective, gradient_norm=norm, iterations=steps)
