"""Views: the fixed crops of a test image that a classifier looks at, and the average over them.

Training draws crops and flips at random; testing takes a fixed set of them and averages (Krizhevsky et
al., NeurIPS 2012, section 4.1). Only what the data forgive may be used: without `hflip` among the
allowed changes ten views become five, for a mirrored left hand is a right hand. Where the recipe says
so of the classes, mirrored views are used, and what they say of left counts for right.

Views are a list of words with commas: `KIND`, `KIND@SHORTER` or `KIND/SIZE`, such as
`center@256,ten@320,flip`. KIND is center, flip (the centre and that of the mirrored image), five, ten,
whole or whole_flip; SHORTER is the length in pixels to which the image's shorter side is resized; SIZE
is another height and width in pixels of what the network sees. Three names stand for lists: multiscale,
fully_convolutional and resolutions. Views that need no mirror have names of their own.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.config.card import View
from finetune.errors import RecipeError
from finetune.metrics.calibration import log_probabilities

VIEWS = ("center", "flip", "five", "ten", "multiscale", "fully_convolutional", "resolutions")
"""Names; any list of words is the other way to say what to look at."""
AVERAGES = ("probability", "logit")
SCALES = (224, 256, 384, 480, 640)
"""Shorter sides for a network that looks at 224 pixels (He et al., CVPR 2016, section 3.4,
https://arxiv.org/abs/1512.03385); in proportion for others."""
_FIVE = ("top-left", "top-right", "bottom-left", "bottom-right", "center")
_PLACES = {
    "center": ("center",),
    "flip": ("center",),
    "five": _FIVE,
    "ten": _FIVE,
    "whole": ("whole",),
    "whole_flip": ("whole",),
}
_AT_SCALES = {
    "multiscale": "ten",
    "multiscale_five": "five",
    "fully_convolutional": "whole_flip",
    "fully_convolutional_unmirrored": "whole",
}
_UNMIRRORED = {
    "flip": "center",
    "ten": "five",
    "whole_flip": "whole",
    "multiscale": "multiscale_five",
    "fully_convolutional": "fully_convolutional_unmirrored",
}
_STEPS = (32, 16, 14, 8, 4, 2, 1)
"""Test resolutions are multiples of one of these where that of training is: networks look in patches."""
_WORD = re.compile(r"([a-z_]+)(?:@([1-9]\d{0,4}))?(?:/([1-9]\d{0,4}))?")


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One view of an image: what is cut out of it, at which scale, and whether of its mirror image."""

    place: str
    """A corner such as top-left, center, or whole."""
    is_mirrored: bool
    shorter_pixels: int | None = None
    """Where the words say it, the length to which the image's shorter side is resized."""
    size_pixels: int | None = None
    """Where the words say it, the height and width of what the network sees."""

    @property
    def name(self) -> str:
        """Such as `384 px mirrored top-left`, or `center at 288 px` where that is what the network sees."""
        scale = f"{self.shorter_pixels} px " if self.shorter_pixels else ""
        size = f" at {self.size_pixels} px" if self.size_pixels else ""
        return f"{scale}{'mirrored ' if self.is_mirrored else ''}{self.place}{size}"

    def scale_pixels(self, view: View) -> int:
        """Length of the image's shorter side; for another size the crop keeps the share that `view` has."""
        if self.shorter_pixels is not None:
            return self.shorter_pixels
        if self.size_pixels is None:
            return view.shorter_pixels
        return max(self.size_pixels, round(self.size_pixels * view.shorter_pixels / view.size_pixels))

    def cut(self, pixels: np.ndarray, view: View) -> np.ndarray:
        """This crop: (size, size, 3), or (H, W, 3) if whole; contiguous.

        Args:
            pixels: (H, W, 3), the image at this crop's scale, or its mirror image if the crop is mirrored.
            view: says how large a crop is where its name does not.

        Raises:
            ValueError: if the image is smaller than the crop.
        """
        if self.place == "whole":
            return np.ascontiguousarray(pixels)
        return np.ascontiguousarray(_cut(pixels, self.place, self.size_pixels or view.size_pixels))


def list_crops(views: str, size_pixels: int = 224) -> tuple[Crop, ...]:
    """The crops that `views` means, in a fixed order.

    A kind gives its crops, then the same of the mirrored image; a list goes word by word. `multiscale` is ten at each
    of five scales, from small to large: 50. `fully_convolutional` is the whole image and its mirror image at each of
    them: 10. `resolutions` is the centre as the network saw it in training, then at sizes about 1/7 and 2/7 larger: 3.

    Args:
        views: one of `VIEWS`, or words with commas as in `center@256,ten@320,flip`.
        size_pixels: height and width of what the network saw in training; fixes scales and resolutions.

    Raises:
        RecipeError: if a word is unknown, or a view comes twice.
    """
    crops = _crops_of(views, size_pixels)
    names = [crop.name for crop in crops]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"views: {views!r} holds {', '.join(twice)} twice, which would count double; name it once.")
    return crops


def _crops_of(views: str, size_pixels: int = 224) -> tuple[Crop, ...]:
    """As `list_crops`; how many there are and which are mirrored does not depend on `size_pixels`."""
    crops: list[Crop] = []
    for word in _words(views, size_pixels):
        found = _WORD.fullmatch(word)
        kind, shorter, size = found.groups() if found else ("", None, None)
        if kind not in _PLACES or (size and kind.startswith("whole")):
            raise RecipeError(
                f"views: {word!r} is unknown. Give {', '.join(VIEWS)}, or words with commas: center, flip, five, ten, "
                "whole or whole_flip, with @PIXELS for the image's shorter side or (unless whole) /PIXELS for what the "
                "network sees, such as center@256,ten@320,flip."
            )
        crops += [
            Crop(
                place=place,
                is_mirrored=is_mirrored,
                shorter_pixels=int(shorter) if shorter else None,
                size_pixels=int(size) if size else None,
            )
            for is_mirrored in ((False, True) if kind in _UNMIRRORED else (False,))
            for place in _PLACES[kind]
        ]
    return tuple(crops)


def _words(views: str, size_pixels: int) -> list[str]:
    words: list[str] = []
    for word in views.split(","):
        if kind := _AT_SCALES.get(word.strip()):
            words += [f"{kind}@{round(size_pixels * scale / SCALES[0])}" for scale in SCALES]
        elif word.strip() == "resolutions":
            words += ["center", *(f"center/{larger}" for larger in _resolutions(size_pixels))]
        else:
            words.append(word.strip())
    return words


def _resolutions(size_pixels: int) -> tuple[int, int]:
    step = next(step for step in _STEPS if step == 1 or (size_pixels % step == 0 and 7 * step <= size_pixels))
    first = size_pixels + step * max(1, round(size_pixels / 7 / step))
    return first, first + step * max(1, round(size_pixels / 7 / step))


def check_crops(crops: Sequence[Crop], view: View) -> None:
    """Nothing, if every crop fits into every image at its scale.

    Raises:
        RecipeError: if one is larger than the shorter side of its image.
    """
    for crop in crops:
        size, scale = crop.size_pixels or view.size_pixels, crop.scale_pixels(view)
        if crop.place != "whole" and scale < size:
            raise RecipeError(
                f"views: {crop.name!r} cuts {size} x {size} px out of an image whose shorter side is {scale} px; "
                f"make that at least {size}."
            )


def view_names(views: str, size_pixels: int = 224) -> tuple[str, ...]:
    """The name of each crop, in the order of `list_crops`; orders differ between tools, names do not.

    "mirrored top-left" is the top left of the mirrored image: the picture's right side.

    Raises:
        RecipeError: if `views` is unknown.
    """
    return tuple(crop.name for crop in list_crops(views, size_pixels))


def view_crops(pixels: np.ndarray, size: int, views: str) -> list[np.ndarray]:
    """The crops of one resized image, each (size, size, 3) and contiguous.

    `center`: the centre crop. `five`: four corners (top left, top right, bottom left, bottom right)
    and the centre. `ten`: those five, then the same five of the mirrored image; torchvision's order.
    Where W - size is odd, the mirrored centre is not the mirror of the centre: it lies one pixel
    beside it, as in torchvision.

    Args:
        pixels: (H, W, 3), already resized; no side below `size`.
        size: height and width of a crop, in pixels.
        views: center, flip, five or ten; the others need images at several scales.

    Raises:
        RecipeError: if `views` is unknown.
        ValueError: if `views` are of several scales, `size` is not positive, or the image is smaller than it.
    """
    crops = list_crops(views, size)
    if any(crop.place == "whole" or crop.shorter_pixels or crop.size_pixels for crop in crops):
        raise ValueError(f"{views} cannot be cut out of one resized image; a `Viewer` makes the others.")
    images = {False: pixels}
    if any(crop.is_mirrored for crop in crops):
        images[True] = mirror(pixels)
    return [np.ascontiguousarray(_cut(images[crop.is_mirrored], crop.place, size)) for crop in crops]


def mirror(pixels: np.ndarray) -> np.ndarray:
    """The mirror image (H, W, 3), contiguous.

    Mirroring once and cutting then is many times as fast as copying crops out of numpy's reversed view, which goes
    pixel by pixel: for five crops of 96 px that takes a quarter of the time of decoding.
    """
    return torch.from_numpy(np.ascontiguousarray(pixels)).flip(1).numpy()


def _cut(image: np.ndarray, place: str, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"cannot crop {size} x {size} pixels from an image of {width} x {height}; resize it first.")
    bottom, right = height - size, width - size
    top, left = {
        "top-left": (0, 0),
        "top-right": (0, right),
        "bottom-left": (bottom, 0),
        "bottom-right": (bottom, right),
        "center": (round(bottom / 2), round(right / 2)),  # rounds halves to even, as torchvision does
    }[place]
    return image[top : top + size, left : left + size]


def permitted_views(views: str, changes: Collection[str]) -> tuple[str, str | None]:
    """The views that the allowed changes permit, and the reason where they are not those asked for.

    Raises:
        RecipeError: if `views` is unknown.
    """
    if "hflip" in changes or not any(crop.is_mirrored for crop in _crops_of(views)):
        return views, None
    left = re.sub("[a-z_]+", lambda word: _UNMIRRORED.get(word[0], word[0]), views)
    return left, f"{left} views instead of {views}: hflip is not declared in data.invariances, so no view is mirrored"


def unmirror(probabilities: torch.Tensor, views: str, mirror_classes: Sequence[int]) -> torch.Tensor:
    """What each view says of the image as it is: mirrored views swap the classes that mirroring swaps.

    Args:
        probabilities: (V, N, K), in the order of `view_names`.
        views: as in `list_crops`.
        mirror_classes: K numbers; by class, the class of its mirror image.

    Raises:
        RecipeError: if `views` is unknown.
        ValueError: if V or K are not those of `views` and `mirror_classes`.
    """
    crops = _crops_of(views)
    if probabilities.shape[::2] != (len(crops), len(mirror_classes)):
        raise ValueError(
            f"probabilities ({len(crops)}, N, {len(mirror_classes)}) are needed, got {tuple(probabilities.shape)}."
        )
    columns, answer = list(mirror_classes), probabilities.clone()
    for number, crop in enumerate(crops):
        if crop.is_mirrored:
            answer[number] = probabilities[number][:, columns]
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
