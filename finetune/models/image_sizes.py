"""Other image sizes for networks that are built for one: transformers with position embeddings or windows.

timm resamples them (`set_input_size`); here stand which sizes there are, and what a network is asked before.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn


def size_unit(model: nn.Module, own_pixels: int) -> int:
    """Sizes this network takes are multiples of so many pixels: of its patches, and where it has windows, of the part
    of its own size over which a window counts once. 1 where it has neither.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return 1
    side = int(patch[0] if isinstance(patch, tuple | list) else patch)
    for module in model.modules():
        window = getattr(module, "window_size", None)
        window = window[0] if isinstance(window, tuple | list) and window else window
        if isinstance(window, int) and 1 < window <= own_pixels // side:
            return math.lcm(side, own_pixels // window) if own_pixels % window == 0 else side
    return side


def nearest_size(wish_pixels: int, unit: int) -> int:
    """The multiple of `unit` nearest to the wish; of two the larger, and never 0."""
    return max(1, (2 * wish_pixels + unit) // (2 * unit)) * unit


def takes_size(network: nn.Module, size_pixels: int) -> Exception | None:
    """What the network raises at an image (1, 3, S, S); None where it answers."""
    example = next(network.parameters()).new_zeros(1, 3, size_pixels, size_pixels)
    try:
        with torch.inference_mode():
            network(example)
    except (AssertionError, RuntimeError, ValueError, TypeError) as fault:
        if isinstance(fault, torch.OutOfMemoryError):
            raise
        return fault
    return None


def set_image_size(model: Any, size_pixels: int) -> None:
    """Let a network of timm take images (S, S): position embeddings and tables of windows are resampled in place.

    Raises:
        AssertionError, RuntimeError, ValueError or TypeError: as timm, where the size does not fit.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm itself calls torch to interpolate
        model.set_input_size(img_size=(size_pixels, size_pixels))
