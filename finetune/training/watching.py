"""What a training shows and leaves while it goes: `curves.csv`, its symptoms, and the rules that end it.

Every rule is plain arithmetic on numbers already measured, with a state of numbers and lists, so that an interrupted
run comes to the same verdict at the same step.

For diagnosis, and called by nothing else yet: `symptoms`, `is_hopeless`, `copy_weights`, `update_ratios`.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from finetune.errors import RunError
from finetune.runs.folder import append, write_whole

COLUMNS = ("stage", "epoch", "step", "name", "value")
WINDOW = 10
"""Steps over which the loss is averaged before it is called diverged: one bad batch is none."""
RECOVERY_FACTOR = 0.3
"""Of the rates after a divergence. The largest stable rate is a sharp bound (2 over the curvature) and the best lies
just below it, so a third mostly suffices; a tenth would leave a run of fixed length undertrained."""
HEALTHY_UPDATE = (1e-4, 1e-2)
"""Norm of a step's update over that of the weights; about 1e-3 is the rule of thumb."""
FLAT_LOSS, ACCURACY_JUMP, LEARNED = 0.05, 0.1, 0.95
"""A loss that changes by less than this share is flat; an accuracy that gains this many points moves; and from this
accuracy on, a flat loss is no symptom."""
MIN_EPOCHS, MIN_TRIALS = 3, 3
"""Epochs before a curve has a shape; trials before another can be called bad."""


class Curves:
    """Measured values of a run in long form, one row each, appended as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self._first_steps = path, dict[str, int]()
        if not path.exists():
            write_whole(path, lambda temporary: temporary.write_text(",".join(COLUMNS) + "\n"))

    def append(self, stage: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Add one row per value. Epochs count from 0 within a stage (-1 is its start), and so does `step`.

        Written is the step since the run began: a stage begins one after the last step of the stage before it, so that
        no value of a name shares its step with another.
        """
        running = self._first_step(stage) + step
        rows = [f"{stage},{epoch},{running},{name},{value!r}\n" for name, value in values.items()]
        append(self.path, "".join(rows))

    def rows(self) -> list[dict[str, str]]:
        """Every whole row, oldest first."""
        with self.path.open(encoding="utf-8", newline="") as handle:
            return [row for row in csv.DictReader(handle) if row["value"]]

    def _first_step(self, stage: str) -> int:
        if stage not in self._first_steps:
            steps = [(row["stage"], int(row["step"])) for row in self.rows()]
            own, others = ([step for name, step in steps if (name == stage) is is_own] for is_own in (True, False))
            self._first_steps[stage] = min(own) if own else max(others, default=-1) + 1
        return self._first_steps[stage]

    def forget_after(self, stage: str, epoch: int) -> None:
        """Drop what an interrupted run wrote of `stage` after `epoch`."""
        kept = [row for row in self.rows() if row["stage"] != stage or int(row["epoch"]) <= epoch]
        text = "".join(",".join(row[column] for column in COLUMNS) + "\n" for row in kept)
        write_whole(self.path, lambda path: path.write_text(",".join(COLUMNS) + "\n" + text, encoding="utf-8"))


def rewind(curves: Curves, stage: str, weights: Path) -> None:
    """Drop from the curves what a stage without `weights` wrote after its last whole epoch; before they are read."""
    if weights.exists():
        return
    checkpoint, before_all = weights.parent / "last.ckpt", -2
    done = torch.load(checkpoint, weights_only=True)["keeper"]["epoch"] if checkpoint.exists() else before_all
    curves.forget_after(stage, done)


def is_clearly_worse(top1: float, start: float, n: int) -> bool:
    """Whether accuracy on `n` images lies more than two standard errors below that at the start."""
    return start - top1 > 2 * math.sqrt((start * (1 - start) + top1 * (1 - top1)) / n)


def is_clearly_higher(losses: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether `losses` (N,) lie above `others` of the same images by over two standard errors of their difference."""
    if losses.shape != others.shape or len(losses) < 2 or not (losses - others).isfinite().all():
        return not bool(losses.isfinite().all())
    difference = losses - others
    return float(difference.mean()) > 2 * float(difference.std()) / math.sqrt(len(difference))


@dataclass
class EarlyStop:
    """Look-ahead: stop once `patience` epochs in a row have not lowered the val loss.

    The start of the stage counts as epoch -1, so a training that only does harm changes nothing where the best is kept.
    Ties keep the earlier epoch, and a loss that is not a number is worse than any other. Where val is too small
    to tell epochs apart, `keeps_last` runs to the end and keeps the last epoch that val does not clearly speak
    against. Under a cyclic schedule the loss rises after every restart, so patience counts ends of cycles only.
    """

    patience: int
    keeps_last: bool = False
    best_epoch: int = -1
    best_loss: float = math.inf
    cycle_ends: tuple[int, ...] = ()
    """Epochs done when a cycle is over, as `recipe.schedules.cycle_ends` counts them; empty where there are none."""

    def sees(self, epoch: int, loss: float, *, is_harmed: bool = False) -> bool:
        """Whether the epoch is to be kept, as things stand; never one that is clearly worse than the start."""
        if not is_harmed and loss < (math.inf if self.keeps_last else self.best_loss):
            self.best_epoch, self.best_loss = epoch, loss
            return True
        return False

    def is_over(self, epoch: int) -> bool:
        """Whether to stop after `epoch`."""
        if self.keeps_last:
            return False
        if self.cycle_ends:
            return sum(self.best_epoch + 1 < end <= epoch + 1 for end in self.cycle_ends) >= self.patience
        return epoch - self.best_epoch >= self.patience


@dataclass
class Divergence:
    """The cost has exploded: it is not finite, or its mean over ten steps is some times the original cost.

    The original is the first loss, or log K where that is more: after a probe the first loss is small, and noise alone
    would be several times as much. Fields are plain, so that a checkpoint can carry them.
    """

    num_classes: int
    ratio: float | None = 3.0
    """None stops only at a loss that is not finite."""
    steps: int = 0
    first: float = math.nan
    recent: list[float] = field(default_factory=list)

    def sees(self, loss: float) -> str | None:
        """What is wrong as of this step, in words; None while nothing is.

        Args:
            loss: of one step, over its whole batch, in nats.
        """
        self.steps += 1
        if not math.isfinite(loss):
            return f"step {self.steps}: the loss is {loss}"
        self.first = loss if math.isnan(self.first) else self.first
        self.recent = [*self.recent, loss][-WINDOW:]
        mean, reference = sum(self.recent) / len(self.recent), max(self.first, math.log(self.num_classes))
        if self.ratio is None or len(self.recent) < WINDOW or mean <= self.ratio * reference:
            return None
        whose = "the first loss" if reference == self.first else f"log {self.num_classes}"
        return (
            f"step {self.steps}: the mean loss of the last {WINDOW} steps is {mean:.4g}, "
            f"more than {self.ratio:g} x {reference:.4g} ({whose})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in numbers and a list."""
        return {key: value for key, value in asdict(self).items() if key in ("steps", "first", "recent")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.steps, self.first, self.recent = state["steps"], state["first"], list(state["recent"])


@dataclass
class Recovery:
    """After the first divergence of a stage, back to where it was good, with lower rates; after the second, an end."""

    times: int = 0

    @property
    def factor(self) -> float:
        """What every rate of the stage is multiplied by from here on."""
        return RECOVERY_FACTOR**self.times

    def after(self, why: str, *, lr: float) -> str:
        """Count a divergence, and say in words how it goes on; the caller restores the state and uses `factor`.

        Args:
            why: what `Divergence.sees` said.
            lr: the recipe's rate of the head, at its peak.

        Raises:
            RunError: at the second time.
        """
        if self.times:
            raise RunError(
                f"training diverged again, at {self.factor:g} of the rates ({why}). The learning rate is too high: set "
                f"train.optimizer.lr to {0.1 * lr:.2g} (it is {lr:.2g}), or lower train.optimizer.backbone_lr_ratio; "
                "then look at data.normalize, and at train.clip_norm, which tames single bad batches."
            )
        self.times += 1
        return f"training diverged ({why}): going back, with {self.factor:g} of the rates (lr {self.factor * lr:.2g})"


@torch.no_grad()
def update_ratio(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """Norm of a step's update over the norm of the weights before it, or after it where they began at zero.

    It holds whatever made the step: momentum, adaptive rates, decay and clipping are all in it. `before` costs a copy,
    so take it on few steps.
    """
    moved = get_total_norm([new.detach() - old for old, new in zip(before, after, strict=True)])
    size = get_total_norm(before) or get_total_norm(after)
    return float(moved / size.clamp(min=1e-12))


def copy_weights(optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    """What trains, by part (`head`, `backbone`), as it is now: taken before a step for `update_ratios` after it."""
    return {part: [weight.detach().clone() for weight in weights] for part, weights in _by_part(optimizer).items()}


def update_ratios(before: Mapping[str, Sequence[torch.Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`update_ratio` by part, since `copy_weights`."""
    return {part: update_ratio(before[part], weights) for part, weights in _by_part(optimizer).items()}


def _by_part(optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    parts: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["part"].partition("/")[0], []).extend(group["params"])
    return parts


def symptoms(rows: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """What the curves say about the learning rate, in sentences, by stage; empty if they say nothing.

    Loss and accuracy are read side by side, for accuracy can jump while the loss is flat: only the order of the
    classes has changed, by very little.

    Args:
        rows: of `Curves`; read are `train/loss` and `train/top1` by epoch, `update_ratio` or
            `update_ratio/PART`, and any loss for numbers that are none.
    """
    stages: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], {}).setdefault(row["name"], []).append(float(row["value"]))
    found = []
    for stage, values in stages.items():
        losses = [name for name in ("train/running_loss", "train/loss", "val/loss") if name in values]
        broken = next((name for name in losses if not all(map(math.isfinite, values[name]))), None)
        if broken is not None:
            found.append(
                f"{stage}: {broken} is not finite: the cost exploded. The rate is too high; try a tenth of it."
            )
            continue
        if said := _flatness(values.get("train/loss", []), values.get("train/top1", [])):
            found.append(f"{stage}: {said}")
        found += [f"{stage}: {said}" for name, ratios in values.items() if (said := _pace(name, ratios))]
    return tuple(found)


def _flatness(losses: Sequence[float], top1: Sequence[float]) -> str:
    if len(losses) < MIN_EPOCHS or len(top1) != len(losses):
        return ""
    end = sum(losses[-(len(losses) // 3) :]) / (len(losses) // 3)  # the last third: one epoch is noisy
    change, gain = (losses[0] - end) / max(abs(losses[0]), 1e-12), top1[-1] - top1[0]
    both = f"loss {losses[0]:.4g} to {end:.4g} ({-change:+.1%}), accuracy {top1[0]:.1%} to {top1[-1]:.1%}"
    if change < -FLAT_LOSS:
        return f"{both}: the loss rises. The rate is too high; try a third of it."
    if change >= FLAT_LOSS or top1[0] >= LEARNED:
        return ""
    if gain >= ACCURACY_JUMP:
        return f"{both}: it is learning, for accuracy moves while the loss is flat. The rate is probably low; try x 3."
    return f"{both}: the loss barely changes. The rate is too low (try x 3), or there is nothing left to learn."


def _pace(name: str, ratios: Sequence[float]) -> str:
    kind, _, part = name.partition("/")
    if kind != "update_ratio" or HEALTHY_UPDATE[0] <= (middle := median(ratios)) <= HEALTHY_UPDATE[1]:
        return ""
    (low, high), whose = HEALTHY_UPDATE, f" of the {part}" if part else ""
    word = "small" if middle < low else "large"
    return f"steps{whose} are {word}: mostly {middle:.2g} of the norm of its weights ({low:g} to {high:g} is usual)."


def is_hopeless(losses: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether a trial may be broken off: its best val loss so far is worse than the median of the others' by then.

    The median stopping rule of Golovin et al., KDD 2017, section 3.2, https://doi.org/10.1145/3097983.3098043, but with
    the best loss of the others too, not their running mean, for the best epoch is what is kept. A loss that is not a
    number is worse than any.

    Args:
        losses: of the trial, by epoch.
        others: of the trials before it; those that did not come this far do not count.
    """
    then = [_best(other[: len(losses)]) for other in others if len(other) >= len(losses)]
    return bool(losses) and len(then) >= MIN_TRIALS and _best(losses) > median(then)


def _best(losses: Sequence[float]) -> float:
    return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)
