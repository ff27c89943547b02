"""Colours of a data set, measured once, on training images alone, and the same ever after.

The channel constants of pretrained weights are part of those weights; these here are for training from random
weights, or for who asks for them. The principal colours are for augmentation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.changes import ColorShift
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
    total, squares, means = np.zeros(3), np.zeros(3), []
    pixels = 0
    for crop in _crops(store, indices, size_pixels, seed, limit):
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


@dataclass(frozen=True, kw_only=True)
class ColorBasis:
    """Principal colours of a data set: how red, green and blue vary together."""

    eigenvalues: tuple[float, float, float]
    """Variances in units of pixels / 255, largest first."""
    eigenvectors: tuple[tuple[float, float, float], ...]
    """Rows are red, green and blue; column k belongs to eigenvalue k; its length is 1, its largest entry positive."""
    num_images: int

    def shifts(self, deviation: float) -> ColorShift:
        """Random shifts along these colours, weights of standard deviation `deviation` (0.1 in the paper)."""
        return ColorShift(eigenvalues=self.eigenvalues, eigenvectors=self.eigenvectors, deviation=deviation)


def fit_color_basis(
    store: ImageStore, rows: Sequence[int], *, size_pixels: int, seed: int, limit: int = ENOUGH_IMAGES
) -> ColorBasis:
    """Eigenvalues and eigenvectors of the covariance of red, green and blue over all pixels of training images.

    Krizhevsky et al., NeurIPS 2012, section 4.1,
    https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks.
    One pass in float64.

    Args:
        store: gives decoded, resized images.
        rows: the training images; no other image is read.
        size_pixels: side of the centre crop.
        seed: of the sample, where there are more than `limit` images.
        limit: images that are enough.

    Raises:
        ValueError: if no image can be read.
    """
    total, products, pixels, images = np.zeros(3), np.zeros((3, 3)), 0, 0
    for crop in _crops(store, rows, size_pixels, seed, limit):
        total, products = total + crop.sum(0), products + crop.T @ crop
        pixels, images = pixels + len(crop), images + 1
    if not images:
        raise ValueError("no training image could be read.")
    mean = total / pixels
    values, vectors = np.linalg.eigh(products / pixels - np.outer(mean, mean))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    # a vector and its negative are equally right; one of them must be chosen for good
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    return ColorBasis(eigenvalues=_three(values), eigenvectors=tuple(_three(row) for row in vectors), num_images=images)


def _crops(store: ImageStore, indices: Sequence[int], size_pixels: int, seed: int, limit: int) -> Iterator[np.ndarray]:
    """Pixels (P, 3) of each image, or of a seeded sample of `limit`, in units of pixels / 255."""
    rows = list(indices)
    if len(rows) > limit:
        rows = sorted(np.random.default_rng(seed).choice(rows, limit, replace=False).tolist())
    for index in rows:
        try:
            pixels = store.get(index)
        except (BadImage, OSError):
            continue  # the survey names it
        yield center_crop(pixels, size_pixels).reshape(-1, 3).astype(np.float64) / 255


def _three(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
