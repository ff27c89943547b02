"""Multinomial logistic regression on standardised features, solved by Newton's method.

The problem is convex and free of noise, so no learning rate is tuned. Each Newton step is found by conjugate gradients
in float32. What makes them few is a guess of the Hessian that knows which images each class is confused on: they bend
its weights most, and are taken as they are; all others bend them as the covariance of the features does. Only where the
exact minimum is asked for is the slope evaluated in float64, a few times in all: the step may be rough, the slope it
starts from may not. And a step is judged by logits, not weights: how far to go along it, or along the path that
stronger penalties point to, costs no product of matrices. Every loop has an end: `MAX_STEPS`, `MAX_PRODUCTS`,
`MAX_HALVINGS`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finetune.features.curvature import guess_inverse
from finetune.process import threads_for

GRADIENT_NORM = 1e-6
"""A solution's gradient is at most this long, over weights and bias on standardised features."""
EXCESS = 1e-8
"""A solution's objective exceeds the minimum by at most this share: |g|^2 / (2 l2), by strong convexity."""
NEAR = 1e-3
"""A descent is near the minimum where its next step would save less than this share of the objective."""
ROUGH, FINE = 0.3, 0.01
"""What conjugate gradients shrink the residual to, at most and at least: far from the minimum, where the objective is
not quadratic, a close Newton step is no better than a loose one."""
SHRUNK_IMAGES = 100.0
"""Images that the common variance of all features counts for beside those at hand: see `benchmarks/LOG.md`."""
MAX_STEPS, MAX_PRODUCTS, MAX_HALVINGS = 100, 300, 30
"""Newton steps of a solution, products with the Hessian in one of them, and halvings of a step that overshoots."""
CHUNK = 1024
"""Images whose logits are held at a time: they stay in the processor's cache."""
MAX_TURNS, LEVEL, LEAST_LENGTH = 8, 1e-4, 1e-4
"""Steps in a plane; what the next of them must save, as a share of the objective; and what the least part of one is."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a descent in float32 stands."""

    weights: torch.Tensor
    """(R + 1, C) in float64: weights along R directions of the features, for the C classes present; then the bias."""
    logits: torch.Tensor | None
    """(N, C) of the training images in float32; None where they were not kept."""
    gain: float = math.inf
    """Share of the objective that the step which led here was to save."""
    forcing: float = ROUGH
    """What conjugate gradients shrank its residual to."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where a descent in float64 ended."""

    weights: torch.Tensor
    """(R + 1, C)"""
    objective: float
    """Mean cross-entropy plus penalty, in nats."""
    gradient_norm: float
    steps: int


class LogisticProblem:
    """Standardised features and labels, in the coordinates that the solver works in.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.

    Raises:
        ValueError: if lengths differ, a label is out of range, or a feature is not finite.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        check_rows(features, labels, num_classes)
        self.num_classes = num_classes
        self.present, self.labels = labels.unique(return_inverse=True)
        self.mean, self.std = features.double().mean(0), scale_of(features)
        self._features = features
        self._span = self._directions()  # (D, R), orthonormal
        self._rough = torch.cat([self.inside(features[rows]) for rows in self._chunks()])  # (N, R)
        self._variance = self._rough.square().mean(0)  # (R,)

    def inside(self, features: torch.Tensor) -> torch.Tensor:
        """Raw features (M, D) of any images in the coordinates of this problem: (M, R) in float32."""
        return ((features.double() - self.mean) / self.std).float() @ self._span.float()

    def logits(self, inside: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(M, K) in float32 of images in the coordinates of this problem."""
        logits = inside.new_full((len(inside), self.num_classes), self._absent)
        bias = weights[-1] - weights[-1].mean()
        logits[:, self.present] = torch.addmm(bias.float(), inside, weights[:-1].float())
        return logits

    def zero(self) -> Point:
        """All weights are 0."""
        shape = len(self.labels), len(self.present)
        return Point(
            weights=self.mean.new_zeros(self._span.shape[1] + 1, shape[1]), logits=self._rough.new_zeros(shape)
        )

    def enter(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(R + 1, C) of a probe on raw features, weight (K, D) and bias (K,)."""
        weight, bias = weight[self.present], bias[self.present] + weight[self.present] @ self.mean
        return torch.cat([self._span.T @ (weight * self.std).T, (bias - bias.mean())[None]])

    def leave(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (K, D) and bias (K,) of the probe on raw features."""
        weight = self.mean.new_zeros(self.num_classes, len(self.mean))
        bias = self.mean.new_full((self.num_classes,), self._absent)
        weight[self.present] = (self._span @ weights[:-1]).T / self.std
        bias[self.present] = weights[-1] - weights[-1].mean() - weight[self.present] @ self.mean
        return weight, bias

    def follow(self, last: Point, before: Point, l2: float) -> Point:
        """The best point for a penalty in the plane of two: of solutions for stronger penalties they point ahead."""
        return self._combine(last, before, l2, start=(1.0, 0.0), most=math.inf)

    def improve(self, point: Point, l2: float) -> Point:
        """A Newton step in float32, as long as serves the objective best; the closer, the less the last one gained.

        Raises:
            ValueError: if `l2` is not positive.
        """
        if not l2 > 0:  # also catches NaN
            raise ValueError(f"l2 must be positive, got {l2}.")
        logits = self._logits(point)
        objective, slope, chances = self._evaluate(point.weights, l2, logits)
        if not float(slope.norm()) > 0:
            return Point(weights=point.weights, logits=logits, gain=0.0, forcing=FINE)
        forcing = _forcing(point.gain)
        direction = self._newton(slope, chances, l2, forcing=forcing)
        gain = -float((slope * direction).sum()) / 2 / objective
        here, ahead = Point(weights=point.weights, logits=logits), Point(weights=direction, logits=None)
        found = self._combine(here, ahead, l2, start=(1.0, 1.0), most=objective * (1 + LEVEL))
        return Point(weights=found.weights, logits=found.logits, gain=gain, forcing=forcing)

    def approach(self, l2: float) -> Point:
        """Near the minimum, from zero: the objective is right to about four digits."""
        point = self.zero()
        for _ in range(MAX_STEPS):
            point = self.improve(point, l2)
            if point.gain < NEAR:
                break
        return point

    def solve(self, weights: torch.Tensor, l2: float) -> Solution:
        """The minimum, to `GRADIENT_NORM` and `EXCESS`, evaluated in float64, from weights (R + 1, C) near to it.

        Raises:
            ValueError: if `l2` is not positive.
        """
        if not l2 > 0:
            raise ValueError(f"l2 must be positive, got {l2}.")
        objective, slope, chances = self._evaluate(weights, l2, None)
        gain = NEAR
        for steps in range(MAX_STEPS + 1):
            norm, goal = float(slope.norm()), min(GRADIENT_NORM, math.sqrt(2 * l2 * EXCESS * objective))
            found = Solution(weights=weights, objective=objective, gradient_norm=norm, steps=steps)
            if norm <= goal or steps == MAX_STEPS:
                break
            direction = self._newton(slope, chances, l2, forcing=max(_forcing(gain), min(ROUGH, goal / norm / 2)))
            decrease = float((slope * direction).sum())
            gain = -decrease / 2 / objective
            for halvings in range(MAX_HALVINGS):
                length = 0.5**halvings
                weights = found.weights + length * direction
                objective, slope, chances = self._evaluate(weights, l2, None)
                if objective <= found.objective + 1e-4 * length * decrease:  # Armijo
                    break
            else:  # rounding hides any descent
                break
        return found

    @property
    def _absent(self) -> float:
        """The logit of a class without images, in place of minus infinity."""
        return -math.log(len(self.labels) + 1)

    def _chunks(self) -> Iterator[slice]:
        for first in range(0, len(self.labels), CHUNK):
            yield slice(first, first + CHUNK)

    def _exact(self, rows: slice) -> torch.Tensor:
        """(rows, D) standardised in float64; not kept, for it is asked for a few times only."""
        return (self._features[rows].double() - self.mean) / self.std

    def _directions(self) -> torch.Tensor:
        """(D, R) eigenvectors of the covariance; where images are fewer than features, those of their span alone."""
        num, width = self._features.shape
        if num < width:  # the optimum is a combination of images: D unknowns per class become N
            span, triangle = torch.linalg.qr(self._exact(slice(None)).T)  # (D, N), (N, N)
            return span @ torch.linalg.eigh(triangle @ triangle.T / num)[1]
        some = self._features[:: max(1, num // (4 * width))]  # enough to guess the curvature from
        some = ((some.double() - self.mean) / self.std).float()
        return torch.linalg.qr(torch.linalg.eigh(some.T @ some / len(some))[1].double())[0]

    def _logits(self, point: Point) -> torch.Tensor:
        if point.logits is not None:
            return point.logits
        return torch.addmm(point.weights[-1].float(), self._rough, point.weights[:-1].float())

    def _evaluate(
        self, weights: torch.Tensor, l2: float, logits: torch.Tensor | None
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Objective, slope (R + 1, C) in float64, and chances (N, C) of the classes in float32.

        From logits in float32, or in float64 where there are none.
        """
        inner = self._span @ weights[:-1] if logits is None else weights[:-1].float()
        bias, total = weights[-1].to(inner), 0.0
        pull, bias_pull = torch.zeros_like(inner), torch.zeros_like(bias)
        chances = self._rough.new_empty(len(self.labels), len(bias))
        for rows in self._chunks():
            x, own = self._exact(rows) if logits is None else self._rough[rows], self.labels[rows, None]
            p = (torch.addmm(bias, x, inner) if logits is None else logits[rows]).log_softmax(1)
            total -= float(p.gather(1, own).double().sum())
            chances[rows] = p.exp_()
            p.scatter_add_(1, own, p.new_full(own.shape, -1.0))
            pull.addmm_(x.T, p)
            bias_pull += p.sum(0)
        pull = self._span.T @ pull if logits is None else pull.double()
        slope = torch.cat([pull, bias_pull[None].double()]) / len(self.labels)
        slope[:-1] += l2 * weights[:-1]
        return total / len(self.labels) + l2 / 2 * float(weights[:-1].square().sum()), slope, chances

    def _combine(self, one: Point, other: Point, l2: float, *, start: tuple[float, float], most: float) -> Point:
        """The sum of shares of two points where the objective is least, by Newton's method in their plane.

        From the shares `start`, or from the first point alone where the objective there is more than `most`.
        """
        weights, logits = (one.weights, other.weights), (self._logits(one), self._logits(other))
        squares = torch.stack([torch.stack([(a[:-1] * b[:-1]).sum() for b in weights]) for a in weights])
        at = self._look(logits, torch.tensor(start, dtype=torch.float64), squares, l2)
        if not at.objective <= most:
            at = self._look(logits, torch.tensor((1.0, 0.0), dtype=torch.float64), squares, l2)
        for _ in range(MAX_TURNS):
            step = -torch.linalg.lstsq(at.bend, at.slope[:, None], driver="gelsd").solution[:, 0]
            gain = -float(at.slope @ step) / 2
            length = 1.0
            while gain > LEVEL * at.objective and length > LEAST_LENGTH:
                found = self._look(logits, at.shares + length * step, squares, l2)
                if found.objective <= at.objective - 2e-4 * length * gain:
                    break
                length /= 2
            else:
                break
            at = found
        first, second = at.shares.tolist()
        return Point(
            weights=first * weights[0] + second * weights[1], logits=(first * logits[0]).add_(logits[1], alpha=second)
        )

    def _look(
        self, logits: tuple[torch.Tensor, torch.Tensor], shares: torch.Tensor, squares: torch.Tensor, l2: float
    ) -> "_InPlane":
        """The objective, its slope and its curvature in the plane of two points, without a product of matrices."""
        first, second = shares.tolist()
        objective, sums = 0.0, [0.0] * 5
        for rows in self._chunks():
            one, other, own = logits[0][rows], logits[1][rows], self.labels[rows, None]
            p = (first * one).add_(other, alpha=second).log_softmax(1)
            objective -= float(p.gather(1, own).double().sum())
            p.exp_()
            p_one, p_other = p * one, p * other
            mean_one, mean_other = p_one.sum(1), p_other.sum(1)
            found = (
                (mean_one - one.gather(1, own)[:, 0]).double().sum(),
                (mean_other - other.gather(1, own)[:, 0]).double().sum(),
                _dot(p_one, one) - _dot(mean_one, mean_one),
                _dot(p_one, other) - _dot(mean_one, mean_other),
                _dot(p_other, other) - _dot(mean_other, mean_other),
            )
            sums = [total + float(more) for total, more in zip(sums, found, strict=True)]
        num = len(self.labels)
        slope = squares.new_tensor(sums[:2]) / num + l2 * squares @ shares
        bend = squares.new_tensor([sums[2:4], sums[3:5]]) / num + l2 * squares
        return _InPlane(
            shares=shares,
            objective=objective / num + l2 / 2 * float(shares @ squares @ shares),
            slope=slope,
            bend=bend,
        )

    def _newton(self, slope: torch.Tensor, chances: torch.Tensor, l2: float, *, forcing: float) -> torch.Tensor:
        """(R + 1, C) the Newton step, by conjugate gradients: Nocedal & Wright, Numerical Optimization, 5.3, 7.1."""
        norm = float(slope.norm())
        left = (slope / -norm).float()  # of unit length, so that small slopes keep their digits
        divide = guess_inverse(self._rough, self._variance, chances, l2)
        direction, round_left = torch.zeros_like(left), divide(left)
        along, size = round_left, float((left * round_left).sum())
        enough = forcing**2 * size
        for _ in range(MAX_PRODUCTS):
            bent = self._bend(chances, along, l2)
            if not (curvature := float((along * bent).sum())) > 0:  # rounding: what is left bends nothing
                break
            direction += size / curvature * along
            left = left - size / curvature * bent
            round_left = divide(left)
            before, size = size, float((left * round_left).sum())
            if not size > enough:
                break
            along = round_left + size / before * along
        return norm * direction.double()

    def _bend(self, chances: torch.Tensor, along: torch.Tensor, l2: float) -> torch.Tensor:
        """(R + 1, C): the Hessian of the objective times a direction, in float32."""
        bent = torch.zeros_like(along)
        for rows in self._chunks():
            x, p = self._rough[rows], chances[rows]
            change = torch.addmm(along[-1], x, along[:-1])  # (rows, C), of logits
            change -= (p * change).sum(1, keepdim=True)
            change *= p
            bent[:-1].addmm_(x.T, change)
            bent[-1] += change.sum(0)
        bent /= len(self.labels)
        bent[:-1] += l2 * along[:-1]
        return bent


def _forcing(gain: float) -> float:
    """Eisenstat & Walker, SIAM J. Sci. Comput. 1996: as close as Newton's own convergence is worth."""
    return min(ROUGH, max(FINE, math.sqrt(max(gain, 0.0))))


@dataclass(frozen=True, kw_only=True)
class _InPlane:
    shares: torch.Tensor
    """(2,) of the two points."""
    objective: float
    slope: torch.Tensor
    """(2,)"""
    bend: torch.Tensor
    """(2, 2)"""


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.dot(one.flatten(), other.flatten())


@contextmanager
def solver_threads(features: torch.Tensor, num_classes: int) -> Iterator[None]:
    """As many threads as the products of a problem of this size are worth."""
    with threads_for(min(len(features), CHUNK) * features.shape[1] * num_classes):
        yield


def check_rows(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
    """Refuse features that are not (N, D) with a label each in [0, num_classes), or not finite, by a ValueError."""
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features must be (N, D) and labels (N,), N > 0; got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}.")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite.")


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
