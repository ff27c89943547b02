"""Batch norm in numbers: how fast its statistics may move, and when a batch is too small to give any."""

from finetune.errors import RecipeError

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


def refuse_lone_image(mode: str, batch_size: int, num_train: int) -> None:
    """Nothing, where batch norm is frozen or sees at least two images at a time.

    One image has no variance between images; where its maps have shrunk to one pixel it has none at all, and torch
    stops. Batches are of one size (what does not fill one waits for the next epoch), so no smaller one follows.

    Args:
        mode: of `train.batch_norm`.
        batch_size: images that pass through the network together.
        num_train: training images.

    Raises:
        RecipeError: if it trains, or takes its statistics, on single images.
    """
    if mode == "frozen" or min(batch_size, num_train) > 1:
        return
    has_more = num_train > 1
    seen = "train.batch_size is 1" if has_more else "there is one training image"
    remedy = f"Set train.batch_size to 2 or more ({SMALLEST_BATCH} or more is better)" if has_more else "Add images"
    raise RecipeError(
        f"{seen}, and with train.batch_norm={mode} batch norm has no variance between images to divide by. {remedy}, "
        "or set train.batch_norm=frozen."
    )
