"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no state for them."""

import math


def rate_factor(schedule: str, step: int, *, steps: int, warmup_fraction: float) -> float:
    """The share of its peak rate that every group has at `step`; ratios between groups never change.

    Warm-up is linear and ends on the peak: (step + 1) / w over the first w = ceil(fraction * steps)
    steps. The schedule then runs over the rest; cosine (Loshchilov & Hutter, ICLR 2017, section 3,
    https://arxiv.org/abs/1608.03983) would reach zero one step after the last.

    Args:
        schedule: `cosine` or `constant`.
        step: counted from 0 within the stage.
        steps: of the stage in all.
        warmup_fraction: share of `steps` spent warming up.
    """
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
