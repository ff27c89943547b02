"""Random views for training: four presets, flips only where the data allow them, one seed per image.

The only module that imports albumentations. Its own seeding draws the same numbers in every loader worker and,
through `set_random_seed`, gives every transform of a chain the same stream, so that a flip and a crop are
correlated. Here each call hands all transforms one fresh pair of generators: the pixels depend on the seed of
the call and on nothing else.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.data.decoding import center_crop

PRESETS = ("none", "light", "medium", "heavy")
INVARIANCES = ("hflip", "vflip", "rot90")

CROP_AREA = {"light": (0.5, 1.0), "medium": (0.25, 1.0), "heavy": (0.08, 1.0)}
"""Share of the image that a random crop covers; torchvision's default is that of `heavy`."""
CROP_ASPECT = (3 / 4, 4 / 3)
COLOUR = {
    "medium": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.0, "hue": 0.0},
    "heavy": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.05},
}
"""Half-widths of the factors around 1; hue in turns of the colour circle."""
CUTOUT_SIDE = (0.2, 0.5)
CUTOUT_GREY = 127


class Augmentation:
    """A random view of an image, fixed by a seed. Not for several threads at once; forked workers are fine."""

    def __init__(self, preset: str, *, size_pixels: int, interpolation: str, invariances: Sequence[str]) -> None:
        """Prepare the transforms.

        Args:
            preset: none (centre crop), light (random resized crop), medium (with mild brightness and contrast) or
                heavy (small crops, strong colour, cutout).
            size_pixels: height and width of the answer.
            interpolation: how crops are enlarged: nearest, bilinear or bicubic. Shrinking averages areas.
            invariances: which of hflip, vflip and rot90 are allowed; no other is ever drawn.

        Raises:
            ValueError: if a name is unknown.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        if unknown := set(invariances) - set(INVARIANCES):
            raise ValueError(f"invariances may be {', '.join(INVARIANCES)}, got {sorted(unknown)}.")
        self.preset = preset
        self.size_pixels = size_pixels
        self._lines: list[str] = [f"centre crop of {size_pixels} px"]
        self._chain: Any = None
        self._mirror: Any = None
        if preset != "none":
            self._lines = []
            self._chain = self._compose(interpolation, set(invariances))

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """A view (size, size, 3) uint8 of `pixels` (H, W, 3) uint8, which stay as they are."""
        return self.draw(pixels, seed)[0]

    def draw(self, pixels: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
        """The same view, and whether the horizontal flip is in it: labels may have to follow."""
        if self._chain is None:
            return center_crop(pixels, self.size_pixels), False
        self._chain.set_random_state(np.random.Generator(np.random.PCG64(seed)), random.Random(seed))
        view = self._chain(image=pixels)["image"]
        return view, bool(self._mirror.get_applied_params())  # none if the chain skipped it, or does not hold it

    def describe(self) -> list[str]:
        """One line per transform, in the order they are applied."""
        return list(self._lines)

    def _compose(self, interpolation: str, invariances: set[str]) -> Any:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it calls home at import otherwise
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)  # its threads fight with the loader's workers, and do not survive a fork
        flags = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
        if interpolation not in flags:
            raise ValueError(f"interpolation must be one of {', '.join(flags)}, got {interpolation!r}.")
        size, area = self.size_pixels, CROP_AREA[self.preset]
        steps = [
            A.RandomResizedCrop(
                size=(size, size),
                scale=area,
                ratio=CROP_ASPECT,
                interpolation=flags[interpolation],
                # cv2 does not antialias, but evaluation does: areas are averaged where a crop shrinks
                area_for_downscale=None if interpolation == "nearest" else "image",
            )
        ]
        self._lines.append(f"random crop of {area[0]:.0%} to {area[1]:.0%} of the area, resized to {size} px")
        self._mirror = A.HorizontalFlip(p=0.5)
        flips = {
            "hflip": (self._mirror, "horizontal flip, p = 0.5"),
            "vflip": (A.VerticalFlip(p=0.5), "vertical flip, p = 0.5"),
            "rot90": (A.RandomRotate90(p=1.0), "rotation by 0, 90, 180 or 270 degrees"),
        }
        extras = [flips[name] for name in INVARIANCES if name in invariances]
        if colour := COLOUR.get(self.preset):
            named = ", ".join(f"{name} {value}" for name, value in colour.items() if value)
            extras.append((A.ColorJitter(**colour, p=0.8), f"colour jitter ({named}), p = 0.8"))
        if self.preset == "heavy":
            sides = f"{CUTOUT_SIDE[0]:.0%} to {CUTOUT_SIDE[1]:.0%}"
            cutout = A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=CUTOUT_SIDE,
                hole_width_range=CUTOUT_SIDE,
                fill=CUTOUT_GREY,
                p=0.5,
            )
            extras.append((cutout, f"cutout of one grey rectangle, sides {sides} of the image's, p = 0.5"))
        self._lines += [line for _, line in extras]
        return A.Compose([*steps, *(step for step, _ in extras)])
