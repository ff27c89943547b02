"""The choice of a probe's penalty: a sweep that is warm-started, loose, and no closer than the choice asks for.

Penalties are ranked by the log loss on images left out, of one validation set or of all folds together. One loose
Newton step from where stronger penalties point to tells most of them apart; where it does not, rivals take further
steps until one is ahead. So the choice is that of exact solutions, at the price of a few products per penalty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from finetune.features.logistic import LogisticProblem, Point, check_rows

L2_GRID = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties tried on standardised features, per squared weight, in units of the mean cross-entropy."""
PATIENCE = 2
"""Penalties in a row that may be worse than the best before the path ends."""
FIRST = 2
"""Place in the grid, from the strongest, where the path begins: the strongest are tried where the best is near them."""
DOUBT, CHANGED = 0.3, 1 / 3
"""Share of the log loss that may be wrong after a step, over the square of what its residual was shrunk to; or this
share of what the step changed, in the log loss or in the objective."""
SURE, EQUAL = 1e-3, 1e-5
"""Share of the log loss that may be in doubt for the chosen penalty; and beside which rivals count as equal."""
MOST_STEPS = 10
"""For one penalty; what is in doubt after them, float32 cannot tell."""


class Part:
    """Images that a probe is solved on, and others that judge it.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        judges: features (M, D) and labels (M,) of the others.
        num_classes: K.

    Raises:
        ValueError: as `LogisticProblem`, for either.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        judges: tuple[torch.Tensor, torch.Tensor],
        *,
        num_classes: int,
    ) -> None:
        check_rows(*judges, num_classes)
        self.problem = LogisticProblem(features, labels, num_classes)
        self._inside, self._answers = self.problem.inside(judges[0]), judges[1]
        self._path: dict[float, Point] = {}

    def step(self, l2: float) -> None:
        """One Newton step for a penalty, the first from where the path so far points to."""
        point = self._path.pop(l2) if l2 in self._path else self._start(l2)
        self._path[l2] = self.problem.improve(point, l2)
        for known in list(self._path)[:-2]:  # logits are large, and soon known again
            self._path[known] = replace(self._path[known], logits=None)

    def known(self, l2: float) -> Point:
        """Where the descent for a penalty that was tried stands."""
        return self._path[l2]

    def judge(self, l2: float) -> float:
        """Log loss on the judges, summed, for a penalty that was tried."""
        logits = self.problem.logits(self._inside, self.weights(l2))
        return float(F.cross_entropy(logits, self._answers, reduction="none").double().sum())

    def predict(self, l2: float) -> torch.Tensor:
        """The class (M,) that each judge is given, for a penalty that was tried."""
        return self.problem.logits(self._inside, self.weights(l2)).argmax(1)

    def weights(self, l2: float) -> torch.Tensor:
        """As far as known, for a penalty that was tried."""
        return self._path[l2].weights

    def _start(self, l2: float) -> Point:
        if not self._path:
            return self.problem.zero()
        near = sorted(self._path, key=lambda known: abs(math.log(known / l2)))
        last, before = [*(self._path[known] for known in near), self.problem.zero()][:2]
        return self.problem.follow(last, before, l2)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The penalty that images left out chose, and what they say of those that were tried."""

    l2: float
    losses: dict[float, float]
    """Log loss of each penalty tried, summed over the judges: right to about `SURE` where chosen, else less so."""
    at_edge: bool
    """The penalty is the least or greatest of several: widen the grid."""


def choose_penalty(parts: Sequence[Part], grid: Sequence[float] = L2_GRID) -> Choice:
    """The penalty with the smallest log loss over the judges of all parts; of equals the stronger.

    From strong to weak penalty, until `PATIENCE` in a row are worse than the best before them: from there on the probe
    only fits more closely. The strongest are skipped, but where they are neighbours of the best.

    Raises:
        ValueError: if the grid is empty, or a penalty is not positive.
    """
    if not grid or not all(l2 > 0 for l2 in grid):
        raise ValueError(f"the choice of a penalty needs one or more to try, all of them positive; got {grid}.")
    sweep = _Sweep(parts, grid)
    while (l2 := sweep.next()) is not None:
        sweep.step(l2)
    return Choice(
        l2=sweep.best,
        losses={l2: trial.loss for l2, trial in sweep.trials.items()},
        at_edge=len(sweep.ladder) > 1 and sweep.best in (sweep.ladder[0], sweep.ladder[-1]),
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    losses: tuple[float, ...]
    """After each step, summed over the judges of all parts."""
    doubt: float
    """What the exact loss may differ by from the last."""

    @property
    def loss(self) -> float:
        return self.losses[-1]


class _Sweep:
    def __init__(self, parts: Sequence[Part], grid: Sequence[float]) -> None:
        self._parts = parts
        self.ladder = sorted(set(grid), reverse=True)
        self.trials: dict[float, _Trial] = {}

    @property
    def best(self) -> float:
        """The penalty whose loss is smallest so far; of equals the strongest."""
        return min(sorted(self.trials, reverse=True), key=lambda l2: self.trials[l2].loss)

    def next(self) -> float | None:
        """The penalty to take a step for; None once the best is known. No penalty comes up more than `MOST_STEPS`."""
        if (untried := self._untried()) is not None:
            return untried
        rivals = [l2 for l2 in self.trials if not self._is_behind(l2)]
        least = SURE if rivals == [self.best] else EQUAL
        open_to = [l2 for l2 in rivals if self.trials[l2].doubt > least * self.trials[l2].loss]
        return min(open_to, key=lambda l2: (len(self.trials[l2].losses), self.trials[l2].loss), default=None)

    def step(self, l2: float) -> None:
        """Take a step for a penalty in every part, closer than the one before."""
        for part in self._parts:
            part.step(l2)
        loss, points = sum(part.judge(l2) for part in self._parts), [part.known(l2) for part in self._parts]
        before = self.trials[l2].losses if l2 in self.trials else ()
        changed = max(point.gain for point in points) * loss
        if before:
            changed = max(changed, abs(loss - before[-1]))
        doubt = max(DOUBT * max(point.forcing for point in points) ** 2 * loss, CHANGED * changed)
        losses = (*before, loss)
        self.trials[l2] = _Trial(losses=losses, doubt=doubt if len(losses) < MOST_STEPS else 0.0)

    def _untried(self) -> float | None:
        """The next penalty to look at; None where the best lies between two that were tried, or at an edge.

        Asked again when the losses are known better.
        """
        last = max((self.ladder.index(l2) for l2 in self.trials), default=-1)
        tail = [l2 for l2 in self.ladder if l2 in self.trials][-PATIENCE:]
        if last + 1 < len(self.ladder) and (len(self.trials) <= PATIENCE or self.best in tail):
            return self.ladder[max(last + 1, FIRST) if len(self.ladder) > 2 * FIRST else last + 1]
        at = self.ladder.index(self.best)
        beside = [l2 for l2 in self.ladder[max(0, at - 1) : at + 2] if l2 not in self.trials]
        return beside[0] if beside else None

    def _is_behind(self, l2: float) -> bool:
        """Whether a penalty is certainly not the best, also as both were after as many steps: they err alike."""
        trial, best = self.trials[l2], self.trials[self.best]
        steps = min(len(trial.losses), len(best.losses)) - 1
        is_behind_alike = trial.losses[steps] - trial.doubt > best.losses[steps]
        return is_behind_alike and trial.loss - trial.doubt > best.loss + best.doubt
