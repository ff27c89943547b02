"""Linear probes on cached features: multinomial logistic regression, solved exactly.

A probe is the baseline that every fine-tuned model must beat. Its problem is convex and free of noise,
so full-batch L-BFGS finds the optimum and no learning rate is tuned. What makes it fast is a first guess
of the curvature (feature directions x class directions), which leaves L-BFGS a nearly round problem,
and float32 for all but the last steps. The answer is the same as without: float64, to the last step.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from finetune.process import threads_for

L2_GRID = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties tried on standardised features, per squared weight, in units of the mean cross-entropy."""
GRADIENT_NORM = 1e-6
"""A solution's gradient is at most this long, over weights and bias on standardised features."""
EXCESS = 1e-8
"""A solution's objective exceeds the minimum by at most this share: |g|^2 / (2 l2), by strong convexity."""
FLOAT32_GRADIENT_NORM = 5e-5
"""Below this the rounding of float32 products shows in the gradient; go on in float64."""
SWEEP_PROGRESS, SWEEP_LOOK, SWEEP_STEPS = 1e-3, 5, 40
"""In a sweep, stop when the last 5 steps lowered the objective by less than this share, or after 40."""
SHRUNK_IMAGES = 100.0
"""Images that the common variance of all features counts for beside those at hand: see `benchmarks/LOG.md`."""
SWEEP_PATIENCE = 2
"""Penalties in a row that may be worse than the best before the path ends."""
MAX_STEPS = 3000
MAX_TRIES, ROUNDING = 12, 1e-7
"""Lengths tried along one direction, and the share of the objective that float32 products get wrong."""
MEMORY = 20
"""Pairs of steps and gradient changes that L-BFGS remembers."""
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
    """Of the objective, over weights and bias on standardised features."""
    iterations: int

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Map raw features (N, D) to logits (N, K) in float64."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_probe(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, l2: float, start: Probe | None = None
) -> Probe:
    """The minimiser of J(W, b) = mean cross-entropy + l2 / 2 |W|^2 over standardised features.

    The probe of Kornblith et al., CVPR 2019, https://arxiv.org/abs/1805.08974; `l2` is 1 / (C N) in
    scikit-learn's terms. Columns are centred, and scaled by `scale_of`. A class
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
    problem = _Problem(features, labels, num_classes)
    with threads_for(problem.products):
        weights = problem.zeros() if start is None else problem.enter(start)
        return problem.leave(problem.solve(weights, l2), l2)


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

    From strong to weak penalty, each begun where the path so far points; of equals the stronger wins. The path ends
    where two penalties in a row were worse than the best before them: from there on the probe only fits more closely.
    Penalties are ranked by solutions to about three digits, and the chosen one is then solved exactly.

    Returns:
        The probe, and rows of the penalties that were tried, in the order of `grid`, with `l2`, `val_log_loss`,
        `val_top1`, `train_log_loss`, `iterations`, `chosen`, and `at_edge` (chosen, and the least or greatest of
        several: widen the grid).

    Raises:
        ValueError: as `fit_probe`, or if the grid or the validation set is empty.
    """
    if not grid:
        raise ValueError("sweep_probe needs at least one penalty to try.")
    _check(val_features, val_labels, num_classes)
    problem = _Problem(train_features, train_labels, num_classes)
    rows: dict[float, dict[str, Any]] = {}
    best: tuple[float, _Point] | None = None
    worse = 0
    with threads_for(problem.products):
        for l2, point in problem.path(grid):
            rows[l2] = _row(problem.leave(point, l2), point, val_features, val_labels)
            if best is None or rows[l2]["val_log_loss"] < rows[best[0]]["val_log_loss"]:
                best, worse = (l2, point), 0
            elif (worse := worse + 1) == SWEEP_PATIENCE:
                break
        assert best is not None
        chosen, point = best
        edges = {min(grid), max(grid)} if len(set(grid)) > 1 else set()
        for l2, row in rows.items():
            row |= {"chosen": l2 == chosen, "at_edge": l2 == chosen and l2 in edges}
        point = problem.solve(point.weights, chosen)
        probe = problem.leave(point, chosen)
        rows[chosen] |= _row(probe, point, val_features, val_labels)
        return probe, [rows[l2] for l2 in grid if l2 in rows]


def probe_path(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, grid: Sequence[float] = L2_GRID
) -> dict[float, Probe]:
    """A probe for each penalty, solved to about three digits: enough to rank penalties by.

    Raises:
        ValueError: as `fit_probe`.
    """
    problem = _Problem(features, labels, num_classes)
    with threads_for(problem.products):
        return {l2: problem.leave(point, l2) for l2, point in problem.path(grid)}


def _row(probe: Probe, point: "_Point", features: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    logits = probe.logits(features)
    penalty = probe.l2 / 2 * float(point.weights[:-1].square().sum())
    return {
        "l2": probe.l2,
        "val_log_loss": float(F.cross_entropy(logits, labels)),
        "val_top1": float((logits.argmax(1) == labels).double().mean()),
        "train_log_loss": probe.objective - penalty,
        "iterations": probe.iterations,
    }


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
    one_hot = F.one_hot(train_labels, num_classes).float()  # (N_train, K)
    answers = [torch.empty(0, dtype=torch.long, device=features.device)]
    for rows in features.float().split(chunk):
        near = (F.normalize(rows, dim=1) @ known.T).topk(k, dim=1)
        votes = ((near.values - 1) / TEMPERATURE).exp()  # (B, k); the -1 keeps exp in range and changes no vote
        answers.append((one_hot[near.indices] * votes[..., None]).sum(1).argmax(1))
    return torch.cat(answers)


def scale_of(features: torch.Tensor) -> torch.Tensor:
    """(D,) what each column of (N, D) is divided by: its deviation, drawn towards the common one where N is small.

    A feature that rarely fires has almost no deviation in a few images, and divided by it would drown all others when
    it fires later. So the common deviation (the mean of those that are not zero) counts as that of another
    `SHRUNK_IMAGES` images. Columns are thus taken to share a unit, as features of one layer do.
    """
    exact = features.double()
    std = exact.std(0, correction=0)
    # A constant column has only rounding for a deviation; divided by it, noise would become a feature.
    varies = std > 1e-6 * exact.mean(0).abs() + 1e-12
    if not varies.any():
        return torch.ones_like(std)
    common, count = std[varies].mean().square(), len(exact)
    shrunk = (count * std.square() + SHRUNK_IMAGES * common) / (count + SHRUNK_IMAGES)
    return torch.where(varies, shrunk.sqrt(), common.sqrt())


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features must be (N, D) and labels (N,), N > 0; got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}.")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite.")


@dataclass(frozen=True, kw_only=True)
class _Point:
    weights: torch.Tensor
    """(R + 1, C) in float64: weights in the span of the images (R = min(N, D)) for C classes present, then bias."""
    loss: float
    slope: torch.Tensor
    """(R + 1, C)"""
    steps: int = 0


_Evaluate = Callable[[torch.Tensor], _Point]
_Pairs = deque[tuple[torch.Tensor, torch.Tensor, float]]
"""Step, change of the slope, and their product, of the last steps."""


class _Problem:
    """Standardised features and labels, in the coordinates the solver works in."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        _check(features, labels, num_classes)
        self.num_classes = num_classes
        self.present, self.labels = labels.unique(return_inverse=True)
        exact = features.double()
        self.mean = exact.mean(0)
        self.std = scale_of(exact)
        exact = (exact - self.mean) / self.std
        self.span: torch.Tensor | None = None
        if len(exact) < exact.shape[1]:  # the optimum is a combination of images: D unknowns per class become N
            self.span, triangle = torch.linalg.qr(exact.T)  # (D, N) with orthonormal columns, (N, N)
            exact = triangle.T.contiguous()
        self.exact = exact  # (N, R)
        self.products = exact.numel() * len(self.present)  # multiplications for all logits, the most of any step
        self.rough = exact.float()
        self.some = self.rough[:: max(1, len(exact) // (4 * exact.shape[1]))]  # enough to guess the curvature from
        self.basis = torch.linalg.eigh(self.some.T @ self.some / len(self.some))[1]  # (R, R)
        self.squares = (self.some @ self.basis).square_()  # (rows, R)

    def zeros(self) -> torch.Tensor:
        return self.exact.new_zeros(self.exact.shape[1] + 1, len(self.present))

    def enter(self, probe: Probe) -> torch.Tensor:
        """The unknowns of a probe on raw features."""
        weight = probe.weight[self.present]  # (C, D)
        bias = probe.bias[self.present] + weight @ self.mean
        inside = weight * self.std
        return torch.cat([(inside if self.span is None else inside @ self.span).T, (bias - bias.mean())[None]])

    def leave(self, point: _Point, l2: float) -> Probe:
        """The probe on raw features of a point."""
        inside = point.weights[:-1].T if self.span is None else point.weights[:-1].T @ self.span.T  # (C, D)
        weight = self.mean.new_zeros(self.num_classes, len(self.mean))
        bias = self.mean.new_full((self.num_classes,), -math.log(len(self.labels) + 1))
        weight[self.present] = inside / self.std
        bias[self.present] = point.weights[-1] - point.weights[-1].mean() - weight[self.present] @ self.mean
        norm = float(point.slope.norm())
        return Probe(weight=weight, bias=bias, l2=l2, objective=point.loss, gradient_norm=norm, iterations=point.steps)

    def path(self, grid: Sequence[float]) -> Iterator[tuple[float, _Point]]:
        """Rough solutions from the strongest penalty to the weakest, each begun where those before it point to."""
        found: list[tuple[float, _Point]] = []
        for l2 in sorted(set(grid), reverse=True):
            point = self.solve(self.extrapolate(found, l2), l2, is_rough=True)
            found.append((l2, point))
            yield l2, point

    def extrapolate(self, path: list[tuple[float, _Point]], l2: float) -> torch.Tensor:
        """Where the solutions for stronger penalties point to: a straight line in log l2, if it is any good."""
        if len(path) < 2:
            return path[-1][1].weights if path else self.zeros()
        (l2_before, before), (l2_last, last) = path[-2:]
        share = math.log(l2 / l2_last) / math.log(l2_last / l2_before)
        guess = last.weights + share * (last.weights - before.weights)
        return min((guess, last.weights), key=lambda weights: self.evaluate(self.rough, weights, l2).loss)

    def evaluate(self, x: torch.Tensor, weights: torch.Tensor, l2: float) -> _Point:
        """Objective and slope, with products in the precision of `x` and all else in float64."""
        rows = torch.arange(len(x), device=x.device)
        # Both products are written with C rows, not columns: 2 to 3 x faster in float32.
        logs = ((weights[:-1].T.to(x.dtype) @ x.T).T.double() + weights[-1]).log_softmax(1)  # (N, C)
        loss = l2 / 2 * weights[:-1].square().sum() - logs[rows, self.labels].mean()
        residual = logs.exp_()
        residual[rows, self.labels] -= 1
        residual /= len(x)
        slope = (residual.T.to(x.dtype) @ x).T.double() + l2 * weights[:-1]
        return _Point(weights=weights, loss=float(loss), slope=torch.cat([slope, residual.sum(0, keepdim=True)]))

    def solve(self, weights: torch.Tensor, l2: float, *, is_rough: bool = False) -> _Point:
        """The minimum, or with `is_rough` a point about three digits from it."""
        if not l2 > 0:  # also catches NaN
            raise ValueError(f"l2 must be positive, got {l2}.")
        losses: list[float] = []

        def is_near(point: _Point) -> bool:
            norm = float(point.slope.norm())
            if not is_rough:
                return norm < FLOAT32_GRADIENT_NORM
            losses.append(point.loss)
            before = losses[-SWEEP_LOOK - 1] if len(losses) > SWEEP_LOOK else math.inf
            has_slowed = before - point.loss < SWEEP_PROGRESS * point.loss
            return has_slowed or norm**2 < 2 * l2 * SWEEP_PROGRESS * point.loss or len(losses) > SWEEP_STEPS

        def is_solved(point: _Point) -> bool:
            return float(point.slope.norm()) <= min(GRADIENT_NORM, math.sqrt(2 * l2 * EXCESS * point.loss))

        guess = self._inverse_curvature(weights, l2)
        pairs: _Pairs = deque(maxlen=MEMORY)
        point = _descend(lambda w: self.evaluate(self.rough, w, l2), guess, weights, is_near, pairs, 0)
        if is_rough:
            return point
        return _descend(lambda w: self.evaluate(self.exact, w, l2), guess, point.weights, is_solved, pairs, point.steps)

    def _inverse_curvature(self, weights: torch.Tensor, l2: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Divides a slope by a guess of the Hessian: feature directions (x) class directions + l2."""
        p = ((self.some @ weights[:-1].float()).double() + weights[-1]).softmax(1)  # (rows, C)
        spread = (p * (1 - p)).sum(1)  # rows that are already certain bend nothing
        along = (spread / spread.mean().clamp(min=1e-12)) @ self.squares.double() / len(p)  # (R,)
        bends, turn = torch.linalg.eigh(torch.diag(p.mean(0)) - p.T @ p / len(p))  # (C,), (C, C)
        bends = bends.clamp(min=1e-6 * float(bends.max()) + 1e-12)
        scale = 1 / (along[:, None] * bends + l2)  # (R, C)

        def divide(slope: torch.Tensor) -> torch.Tensor:
            inner = (self.basis.T @ slope[:-1].float()).double() @ turn * scale
            return torch.cat([(self.basis @ inner.float()).double(), slope[-1:] @ turn / bends]) @ turn.T

        return divide


def _descend(
    evaluate: _Evaluate,
    divide: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
    is_done: Callable[[_Point], bool],
    pairs: _Pairs,
    steps: int,
) -> _Point:
    """L-BFGS from `weights` until done, stuck, or out of steps: Nocedal & Wright, Numerical Optimization, 7.5.

    `divide` applies the first guess of the inverse Hessian; `pairs` is read and grows.
    """
    point, size = replace(evaluate(weights), steps=steps), 1.0
    while not is_done(point) and point.steps < MAX_STEPS:
        direction = point.slope.clone()
        shares = []
        for step, change, product in reversed(pairs):
            shares.append(float((step * direction).sum()) / product)
            direction -= shares[-1] * change
        direction = size * divide(direction)
        for (step, change, product), share in zip(pairs, reversed(shares), strict=True):
            direction += (share - float((change * direction).sum()) / product) * step
        found = _search(evaluate, point, -direction)
        if found is None:
            break
        step, change = found.weights - point.weights, found.slope - point.slope
        if (product := float((step * change).sum())) > 0:
            pairs.append((step, change, product))
            size = product / float((change * divide(change)).sum())
        point = replace(found, steps=point.steps + 1)
    return point


def _search(evaluate: _Evaluate, point: _Point, direction: torch.Tensor) -> _Point | None:
    """A point along `direction` that meets Wolfe's conditions, or None where rounding hides any descent."""
    descent = float((point.slope * direction).sum())
    low, high, length = 0.0, math.inf, 1.0
    best = None
    for _ in range(MAX_TRIES):
        found = evaluate(point.weights + length * direction)
        ahead = float((found.slope * direction).sum())
        # Near the optimum rounding hides the decrease, and the slope still shows it: Hager & Zhang, SIAM J.
        # Optim. 2005, section 2.
        is_level = found.loss <= point.loss * (1 + ROUNDING) and ahead <= -0.9 * descent
        if not (found.loss <= point.loss + 1e-4 * length * descent or is_level):  # too far; also catches NaN
            high = length
        elif ahead < 0.9 * descent:  # not far enough
            low, best = length, found
        else:
            return found
        length = 2 * low if high == math.inf else (low + high) / 2
    return best
