"""Channel constants of a data set, measured once, on training images alone, and the same ever after.

The constants of pretrained weights are part of those weights; these here are for training from random
weights, or for who asks for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.decoding import BadImage, center_crop
from finetune.data.loading import ImageStore

ENOUGH_IMAGES = 10_000
"""A seeded sample of this many says the mean to well under a grey level."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Per channel, in units of pixels / 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Pooled over pixels and images; ones where only the mean is to be subtracted."""
    num_images: int
    standard_error: float
    """Of the mean, the largest of the three channels, images taken as independent."""


def measure_constants(
    store: ImageStore, indices: Sequence[int], *, size_pixels: int, kind: str, seed: int, limit: int = ENOUGH_IMAGES
) -> Constants:
    """Mean and standard deviation of the pixels of training images, as the evaluation view crops them.

    Sums are kept in float64 and weighted by pixels, so any order and any batch give the same.

    Args:
        store: gives decoded, resized images.
        indices: the training images; no other image is read.
        size_pixels: side of the centre crop.
        kind: `channel_mean` or `channel_mean_std`.
        seed: of the sample, where there are more than `limit` images.
        limit: images that are enough.

    Raises:
        ValueError: if `kind` is neither, or no image can be read.
    """
    if kind not in ("channel_mean", "channel_mean_std"):
        raise ValueError(f"kind must be channel_mean or channel_mean_std, got {kind!r}.")
    rows = list(indices)
    if len(rows) > limit:
        rows = sorted(np.random.default_rng(seed).choice(rows, limit, replace=False).tolist())
    total, squares, means = np.zeros(3), np.zeros(3), []
    pixels = 0
    for index in rows:
        try:
            crop = center_crop(store.get(index), size_pixels).reshape(-1, 3).astype(np.float64) / 255
        except (BadImage, OSError):
            continue  # the survey names it
        total, squares, pixels = total + crop.sum(0), squares + (crop**2).sum(0), pixels + len(crop)
        means.append(crop.mean(0))
    if not means:
        raise ValueError("no training image could be read.")
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-12))
    error = float(np.std(means, axis=0).max()) / math.sqrt(len(means))
    ones = kind == "channel_mean"
    return Constants(
        mean=_three(mean), std=(1.0, 1.0, 1.0) if ones else _three(std), num_images=len(means), standard_error=error
    )


def _three(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
