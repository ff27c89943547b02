"""Views: the fixed crops of a test image that a classifier looks at, and the average over them.

Training draws crops and flips at random; testing takes a fixed set of them and averages (Krizhevsky et
al., NeurIPS 2012, section 4.1). Only what the data forgive may be used: without `hflip` among the
allowed changes ten views become five, for a mirrored left hand is a right hand. Where the recipe says
so of the classes, mirrored views are used, and what they say of left counts for right.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from finetune.scores.calibration import log_probabilities

VIEWS = ("center", "five", "ten")
AVERAGES = ("probability", "logit")
_MIRRORED = "mirrored "
_FIVE = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


def view_names(views: str) -> tuple[str, ...]:
    """The name of each crop, in the order of `view_crops`; orders differ between tools, names do not.

    "mirrored top-left" is the top left of the mirrored image: the picture's right side.
    """
    _check_views(views)
    if views == "center":
        return ("center",)
    return _FIVE if views == "five" else _FIVE + tuple(_MIRRORED + name for name in _FIVE)


def view_crops(pixels: np.ndarray, size: int, views: str) -> list[np.ndarray]:
    """The crops of one resized image, each (size, size, 3) and contiguous.

    `center`: the centre crop. `five`: four corners (top left, top right, bottom left, bottom right)
    and the centre. `ten`: those five, then the same five of the mirrored image; torchvision's order.
    Where W - size is odd, the mirrored centre is not the mirror of the centre: it lies one pixel
    beside it, as in torchvision.

    Args:
        pixels: (H, W, 3), already resized; no side below `size`.
        size: height and width of a crop, in pixels.
        views: one of `VIEWS`.

    Raises:
        ValueError: if `views` is unknown, `size` is not positive, or the image is smaller than it.
    """
    _check_views(views)
    height, width = pixels.shape[:2]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"cannot crop {size} x {size} pixels from an image of {width} x {height}; resize it first.")
    images = (pixels, pixels[:, ::-1]) if views == "ten" else (pixels,)
    bottom, right = height - size, width - size
    middle = (round(bottom / 2), round(right / 2))  # rounds halves to even, as torchvision does
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)] if views != "center" else []
    # torch.from_numpy refuses the negative strides of a mirrored array, hence the copies
    return [
        np.ascontiguousarray(image[top : top + size, left : left + size])
        for image in images
        for top, left in [*corners, middle]
    ]


def permitted_views(views: str, changes: Collection[str]) -> tuple[str, str | None]:
    """The views that the allowed changes permit, and the reason where they are not those asked for.

    Raises:
        ValueError: if `views` is unknown.
    """
    _check_views(views)
    if views == "ten" and "hflip" not in changes:
        return "five", "five views instead of ten: hflip is not declared in data.invariances, so no view is mirrored"
    return views, None


def unmirror(probabilities: torch.Tensor, views: str, mirror_classes: Sequence[int]) -> torch.Tensor:
    """What each view says of the image as it is: mirrored views swap the classes that mirroring swaps.

    Args:
        probabilities: (V, N, K), in the order of `view_names`.
        views: one of `VIEWS`.
        mirror_classes: K numbers; by class, the class of its mirror image.

    Raises:
        ValueError: if `views` is unknown, or V or K are not those of `views` and `mirror_classes`.
    """
    names = view_names(views)
    if probabilities.shape[::2] != (len(names), len(mirror_classes)):
        raise ValueError(
            f"probabilities ({len(names)}, N, {len(mirror_classes)}) are needed, got {tuple(probabilities.shape)}."
        )
    columns, answer = list(mirror_classes), probabilities.clone()
    for view, name in enumerate(names):
        if name.startswith(_MIRRORED):
            answer[view] = probabilities[view][:, columns]
    return answer


def average_views(probabilities: torch.Tensor, how: str = "probability") -> torch.Tensor:
    """One distribution per image, (N, K), from those of V views; the same type as given.

    `probability` is the arithmetic mean (Krizhevsky et al., 2012); its log loss is never above the mean
    log loss of the views. `logit` is the normalised geometric mean: the softmax of the mean logits.
    The two can disagree. One view comes back bit for bit.

    Args:
        probabilities: (V, N, K), each row summing to one.
        how: one of `AVERAGES`.

    Raises:
        ValueError: if `how` is unknown, or there is no view.
    """
    if how not in AVERAGES:
        raise ValueError(f"how must be one of {', '.join(AVERAGES)}, got {how!r}.")
    if probabilities.ndim != 3 or not len(probabilities):
        raise ValueError(f"probabilities (V, N, K) with V >= 1 are needed, got shape {tuple(probabilities.shape)}.")
    if len(probabilities) == 1:
        return probabilities[0]
    if how == "probability":
        mean = probabilities.double().mean(dim=0)
    else:
        mean = log_probabilities(probabilities).mean(dim=0).softmax(dim=-1)
    return mean.to(probabilities.dtype)


def _check_views(views: str) -> None:
    if views not in VIEWS:
        raise ValueError(f"views must be one of {', '.join(VIEWS)}, got {views!r}.")
