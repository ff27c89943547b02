"""Batch norm in numbers: how fast its statistics may move, and when a batch is too small to give any."""

SMALLEST_BATCH = 16
"""Images per batch below which the mean and the variance of a batch are mostly noise."""
DEFAULT_MOMENTUM = 0.1
"""What torch moves a running statistic by in one step, as a share of the way to that of the batch."""


def momentum_for(steps_per_epoch: int) -> float:
    """The share by which one step moves the running statistics: min(10 / s, 0.1).

    Kornblith et al., CVPR 2019, https://arxiv.org/abs/1805.08974, who state the decay
    max(1 - 10 / s, 0.9) of the old value; torch's momentum is one less that. A long epoch then averages over
    about a tenth of its steps, and a short one still forgets the source's images as fast as torch lets it.

    Args:
        steps_per_epoch: s, optimizer steps.

    Raises:
        ValueError: if there is no step.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}.")
    return min(10 / steps_per_epoch, DEFAULT_MOMENTUM)


def small_batch_warning(batch_size: int, num_train: int) -> str | None:
    """What to say where batch norm would train on fewer than 16 images at a time; None where it has enough.

    Args:
        batch_size: images that pass through the network together. Adding up gradients does not enlarge it.
        num_train: training images; a batch holds no more than all of them.
    """
    images = min(batch_size, num_train)
    if images >= SMALLEST_BATCH:
        return None
    seen = f"batch norm sees {images} image{'s' if images != 1 else ''} at a time, too few for a mean and a variance"
    remedy = f"train.batch_size {SMALLEST_BATCH} or more, or " if num_train >= SMALLEST_BATCH else ""
    return f"{seen}; use {remedy}train.batch_norm frozen"
