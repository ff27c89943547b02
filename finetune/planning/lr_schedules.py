"""The learning rate over a stage: pure functions of the step, so that a resumed run needs no state for them.

Every schedule is a share of the peak. The rate of each group of weights is its own peak times this share, so
ratios between groups never change. Only the plateau rule looks at the training; what it remembers is a small dict.

For diagnosis, and called by nothing else yet: `suggest_drops`.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

from finetune.config.recipe import ScheduleSpec

CYCLIC = ("cyclic", "cosine_restarts")
"""Schedules that restart, and so are made of whole cycles."""
ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1 / 25 / 1e4
"""Share of the steps that `one_cycle` rises, and where it begins and ends: torch's."""
LEAST_GAIN = 1e-4
"""A val loss is better for `plateau` if it is lower by this share of the best."""
MOST_DROPS = 5
"""After so many drops `plateau` leaves the rate alone; what does not improve by then is done."""
WINDOW = 0.1
"""Share of the run over which `suggest_drops` measures a slope."""
FLAT, FALLING = -2.0, -4.0
"""Slope in standard errors above which a falling curve counts as flat, and below which a flat one falls again. The gap
between the two keeps chance from marking one plateau twice."""
_BARS = "▁▂▃▄▅▆▇█"
_ROUNDING = 1e-9
"""In steps: 0.07 * 100 is 7.000000000000001 on a computer, and not 8 steps."""


def rate_factor(
    spec: ScheduleSpec,
    step: int,
    *,
    epochs: int,
    steps_per_epoch: int,
    swa_start: float | None = None,
    swa_lr: float = 0.5,
) -> float:
    """The share of its peak that every rate has at `step`.

    Warm-up is linear and ends on the peak: (step + 1) / w over the first w = ceil(fraction * steps) steps; the schedule
    then runs over the rest, whose shares place its drops. `one_cycle` (Smith & Topin 2017,
    https://arxiv.org/abs/1708.07120) rises on its own. Cycles begin and end with whole epochs, whatever the warm-up: it
    takes the place of the beginning of the first one, of half of it at most. `cyclic` is Huang et al., ICLR 2017,
    section 3, https://arxiv.org/abs/1704.00109; `cosine_restarts` is SGDR, Loshchilov & Hutter, ICLR 2017, section 3,
    https://arxiv.org/abs/1608.03983, as is `cosine`. These reach `end` one step after the last. `plateau` stays at the
    peak here; multiply by `Plateau.factor`.

    Args:
        spec: name and numbers of the schedule.
        step: counted from 0 within the stage.
        epochs: of the stage; for cycles as `whole_epochs` rounds them.
        steps_per_epoch: optimizer steps in one epoch.
        swa_start: share of all steps after which the rate stays at `swa_lr`; None: never. Before it nothing changes.
        swa_lr: share of the peak at which weights are averaged.

    Raises:
        ValueError: if the step is outside the stage, the cycles do not fill the epochs, or the schedule has no name.
    """
    steps = epochs * steps_per_epoch
    if spec.name is None:
        raise ValueError("train.schedule.name is still open; the planner decides it before a rate is asked for.")
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in 0 to {steps - 1}, got {step}.")
    if swa_start is not None and step >= round(swa_start * steps):
        return swa_lr
    if spec.name == "one_cycle":
        return _one_cycle(step, steps)
    ends = [end * steps_per_epoch for end in cycle_ends(spec, epochs)]
    warmup = _whole(spec.warmup_fraction * steps)
    if spec.name in CYCLIC:
        warmup = min(warmup, ends[0] // 2)
    if step < warmup:
        return (step + 1) / warmup
    begin, end = next((begin, end) for begin, end in zip([warmup, *ends], ends, strict=False) if step < end)
    return _fall(spec, step - begin, end - begin)


def whole_epochs(spec: ScheduleSpec, epochs: int) -> int:
    """The fewest epochs, at least `epochs`, that are made of whole cycles; `epochs` where the schedule has none.

    Without it the formula of Huang et al. leaves a rest: 10 epochs in 4 cycles of ceil(10 / 4) = 3 have a fourth cycle
    of one epoch, which ends, and is kept, at the full rate.
    """
    return sum(_cycle_lengths(spec, epochs))


def cycle_ends(spec: ScheduleSpec, epochs: int) -> tuple[int, ...]:
    """Numbers of epochs after which a cycle is over and a snapshot due; the last is `epochs`.

    Raises:
        ValueError: if the cycles do not fill the epochs.
    """
    ends = tuple(accumulate(_cycle_lengths(spec, epochs)))
    if ends[-1] != epochs:
        raise ValueError(f"{spec.cycles} cycles do not fill {epochs} epochs but {ends[-1]}; see whole_epochs.")
    return ends


def _cycle_lengths(spec: ScheduleSpec, epochs: int) -> list[int]:
    """Epochs of each cycle; together at least `epochs`."""
    if spec.name not in CYCLIC:
        return [epochs]
    growth, first = spec.growth if spec.name == "cosine_restarts" else 1.0, 1
    while sum(lengths := [math.floor(first * growth**cycle + 0.5) for cycle in range(spec.cycles)]) < epochs:
        first += 1
    return lengths


def _fall(spec: ScheduleSpec, step: int, steps: int) -> float:
    """The share of the peak at `step` of the `steps` after warm-up, or of a cycle."""
    done, share = step / steps, 1.0  # as it stays for `constant` and `plateau`
    match spec.name:
        case "step":
            share = spec.gamma ** (step // max(1, round(spec.every * steps)))
        case "multistep":
            share = spec.gamma ** sum(round(milestone * steps) <= step for milestone in spec.milestones)
        case "exponential":
            share = 10 ** (-spec.decades * done)
        case "inverse":
            share = 1 / (1 + (10**spec.decades - 1) * done)
        case "linear":
            share = spec.end + (1 - spec.end) * (1 - done)
        case "cosine" | "cyclic" | "cosine_restarts":
            share = spec.end + (1 - spec.end) * 0.5 * (1 + math.cos(math.pi * done))
    return share


def _one_cycle(step: int, steps: int) -> float:
    """A cosine up to the peak and a longer one down, below the start; step for step torch's `OneCycleLR`."""
    peak = ONE_CYCLE_RISE * steps - 1
    low, begin, end = (ONE_CYCLE_START, 0.0, peak) if step <= peak else (ONE_CYCLE_END, steps - 1.0, peak)
    return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * (step - begin) / (end - begin)))


def _whole(steps: float) -> int:
    return math.ceil(steps - _ROUNDING)


class Plateau:
    """A rate that drops by a factor whenever the val loss has not improved for some epochs.

    The same as torch's `ReduceLROnPlateau` up to `MOST_DROPS`, but for its patience: torch drops one epoch after that
    many are lost, this in the last of them.
    """

    def __init__(self, *, factor: float, patience: int) -> None:
        self._factor, self._patience = factor, patience
        self._best, self._waited, self._drops = math.inf, 0, 0

    @property
    def factor(self) -> float:
        """The share of the rate that is left."""
        return self._factor**self._drops

    def sees(self, loss: float) -> bool:
        """Whether the val loss of one more epoch makes the rate drop. NaN is no improvement."""
        if loss < self._best * (1 - LEAST_GAIN):
            self._best, self._waited = loss, 0
            return False
        self._waited += 1
        if self._waited < self._patience or self._drops == MOST_DROPS:
            return False
        self._waited, self._drops = 0, self._drops + 1
        return True

    def state_dict(self) -> dict[str, float]:
        """All it remembers, for a checkpoint."""
        return {"best": self._best, "waited": self._waited, "drops": self._drops}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The reverse of `state_dict`."""
        self._best, self._waited, self._drops = state["best"], int(state["waited"]), int(state["drops"])


def suggest_drops(losses: Sequence[float]) -> list[int]:
    """Steps at which a curve, trained at a constant rate, stops falling: where a drop of the rate is worth trying.

    A line is fitted by least squares to each tenth of the run. A step is marked where the line that begins there is no
    longer clearly falling, after one that was. A curve that never falls gets no mark: its rate is wrong from the start.

    Args:
        losses: one finite training loss per step; noise that is independent between steps.

    Returns:
        Positions in `losses`, ascending; empty where there are fewer than 50.
    """
    if len(losses) < 50:
        return []
    width, is_falling, marks = max(8, round(WINDOW * len(losses))), False, []
    for begin, slope in enumerate(_slopes(losses, width)):
        if is_falling and slope > FLAT:
            marks.append(begin)
        is_falling = slope <= FLAT if is_falling else slope < FALLING
    return marks


def _slopes(losses: Sequence[float], width: int) -> list[float]:
    """Slope over its standard error of every window of `width` losses; running sums make it one pass."""
    mean = math.fsum(losses) / len(losses)
    y = [loss - mean for loss in losses]
    rows = (y, [v * v for v in y], [i * v for i, v in enumerate(y)])
    sums, squares, moments = ([0.0, *accumulate(row)] for row in rows)
    spread = width * (width**2 - 1) / 12  # of the positions 0 to width - 1 around their mean
    least = 1e-9 * squares[-1] + 1e-200  # what rounding leaves of the residuals of a straight line
    slopes = []
    for begin in range(len(y) - width + 1):
        total, square, moment = (row[begin + width] - row[begin] for row in (sums, squares, moments))
        slope = (moment - total * (begin + (width - 1) / 2)) / spread
        residual = max(least, square - total**2 / width - slope**2 * spread)
        slopes.append(slope / math.sqrt(residual / (width - 2) / spread))
    return slopes


def draw_curve(
    spec: ScheduleSpec,
    epochs: int,
    steps_per_epoch: int,
    *,
    width: int = 40,
    swa_start: float | None = None,
    swa_lr: float = 0.5,
) -> str:
    """One line of `width` blocks whose heights are the rate over the stage. Takes what `rate_factor` takes."""
    steps = epochs * steps_per_epoch
    factors = [
        rate_factor(
            spec,
            int((column + 0.5) * steps / width),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            swa_start=swa_start,
            swa_lr=swa_lr,
        )
        for column in range(width)
    ]
    return "".join(_BARS[round(factor * (len(_BARS) - 1))] for factor in factors)
