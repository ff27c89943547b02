"""Random views for training: presets by kind of image, flips only where the data allow them, one seed per image.

The only module that imports albumentations. Its own seeding draws the same numbers in every loader worker and,
through `set_random_seed`, gives every transform of a chain the same stream, so that a flip and a crop are
correlated. Here each call hands all transforms one fresh pair of generators: the pixels depend on the seed of
the call and on nothing else. What we do ourselves (principal colours, the user's function, cutout) draws from
generators of its own, so that asking for it changes nothing before it.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from finetune.config.card import INTERPOLATIONS
from finetune.data.changes import CUTOUT_GREY, CheckedChange, ColorShift, OwnChange, cut_out
from finetune.data.decoding import center_crop
from finetune.data.domains import CROP_AREA, DOMAINS, Rules
from finetune.process import QUIET, lend_environment, put_back_later

PRESETS = ("none", "light", "medium", "heavy")
INVARIANCES = ("hflip", "vflip", "rot90")
CROPS = ("area", "scale")
POLICIES = ("none", "trivial", "rand")

CROP_SIDES = (256 / 224, 480 / 224)
"""Shorter side over the crop's, for crops of an image at a random scale."""
CUTOUT_SIDE = (0.2, 0.5)

RAND_OPERATIONS = 2
RAND_STRENGTH = 9 / 30
"""Magnitude 9 on a scale that ends at 30."""
SHEAR, SHIFT, TURN = 0.3, 150 / 331, 30.0
"""Ends of the scale for shapes: slope, share of the side, degrees. Beyond them labels begin to turn."""


class Augmentation:
    """A random view of an image, fixed by a seed. Not for several threads at once; forked workers are fine."""

    def __init__(
        self,
        preset: str,
        *,
        size_pixels: int,
        interpolation: str,
        invariances: Sequence[str],
        domain: str = "natural",
        crop: str = "area",
        rotate_degrees: float = 0.0,
        pca_color: ColorShift | None = None,
        policy: str = "none",
        cutout: float = 0.0,
        custom: OwnChange | None = None,
    ) -> None:
        """Prepare the transforms.

        Args:
            preset: none (centre crop), light (random resized crop), medium (with mild brightness and contrast) or
                heavy (small crops, strong colour, cutout). What else is asked for here is done under any preset.
            size_pixels: height and width of the answer.
            interpolation: how crops are enlarged: nearest, bilinear or bicubic. Shrinking averages areas.
            invariances: which of hflip, vflip and rot90 are allowed; no other is ever drawn.
            domain: natural, document, medical, fine or tiny; it bounds what the preset and the policy change.
            crop: area (part of the image, any shape within bounds, resized) or scale (the whole image at a random
                scale, then a random crop: He et al., CVPR 2016, section 3.4, https://arxiv.org/abs/1512.03385).
            rotate_degrees: largest rotation to either side; corners are filled with the image mirrored.
            pca_color: shifts along the principal colours of the training images.
            policy: none, trivial (Mueller and Hutter, ICCV 2021, https://arxiv.org/abs/2103.10158) or rand (Cubuk et
                al., 2020, https://arxiv.org/abs/1909.13719; two operations, magnitude 9 of 30). It takes the place
                of the preset's colours. Unlike the papers we mirror borders, and stay within `domain`.
            cutout: side of a grey square over that of the view, its centre anywhere (DeVries and Taylor, 2017,
                https://arxiv.org/abs/1708.04552); it takes the place of heavy's own. 0: none.
            custom: the user's own change, applied before `cutout`. It must keep every label true, and not flip
                horizontally where labels follow flips. Its contract is checked at the first call.

        Raises:
            ValueError: if a name is unknown or a number outside its range; at a call, if `custom` breaks its contract.
        """
        _check(preset, interpolation, invariances, domain, crop, policy, rotate_degrees, cutout)
        self.preset = preset
        self.domain = domain
        self.size_pixels = size_pixels
        self._lines: list[str] = []
        self._chain: Any = None
        self._mirror: Any = None
        self._eraser: Any = None
        self._own: list[tuple[int, OwnChange]] = []
        rules = DOMAINS[domain]
        erases = preset == "heavy" and rules.hides_parts and not cutout
        if preset != "none" or policy != "none" or rotate_degrees:
            kit = _make_kit(interpolation)
            steps = [
                *_bend(kit, rules, preset, rotate_degrees),
                _cut(kit, rules, preset, crop, size_pixels),
                *_turn(kit, invariances if preset != "none" else ()),
                *(_policy(kit, rules, policy) if policy != "none" else _tint(kit, rules, preset)),
            ]
            self._lines = [step.line for step in steps]
            self._chain = kit.ops.Compose([step.transform for step in steps])
            flips = [step.transform for step in steps if isinstance(step.transform, kit.ops.HorizontalFlip)]
            self._mirror = flips[0] if flips else None
            self._eraser = _erase(kit) if erases else None
        else:
            self._lines = [f"centre crop of {size_pixels} px"]
        self._add_own(pca_color, custom, cutout)
        if erases:
            sides = f"{CUTOUT_SIDE[0]:.0%} to {CUTOUT_SIDE[1]:.0%}"
            self._lines.append(f"cutout of one grey rectangle, sides {sides} of the image's, p = 0.5")

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """A view (size, size, 3) uint8 of `pixels` (H, W, 3) uint8, which stay as they are."""
        return self.draw(pixels, seed)[0]

    def draw(self, pixels: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
        """The same view, and whether the horizontal flip is in it: labels may have to follow."""
        generators = np.random.Generator(np.random.PCG64(seed)), random.Random(seed)
        if self._chain is None:
            view = center_crop(pixels, self.size_pixels)
        else:
            self._chain.set_random_state(*generators)
            view = self._chain(image=pixels)["image"]
        for stream, change in self._own:
            view = change(view, np.random.Generator(np.random.PCG64([seed, stream])))
        if self._eraser is not None:
            self._eraser.set_random_state(*generators)
            view = self._eraser(image=view)["image"]
        return view, self._mirror is not None and bool(self._mirror.get_applied_params())  # none if it was skipped

    def describe(self) -> list[str]:
        """One line per transform, in the order they are applied."""
        return list(self._lines)

    def _add_own(self, pca_color: ColorShift | None, custom: OwnChange | None, cutout: float) -> None:
        if pca_color is not None and pca_color.deviation:
            grey = ", ".join(f"{255 * pca_color.deviation * value:.1f}" for value in pca_color.eigenvalues)
            self._own.append((1, pca_color.change))
            self._lines.append(
                f"shift along the principal colours of the training images, deviation {pca_color.deviation} "
                f"(of {grey} grey levels)"
            )
        if custom is not None:
            name = getattr(custom, "__name__", type(custom).__name__)
            self._own.append((2, CheckedChange(custom, name)))
            self._lines.append(f"own change {name}")
        if side := round(cutout * self.size_pixels):
            self._own.append((3, partial(cut_out, side=side)))
            self._lines.append(f"cutout of one grey square of {side} px, clipped at the border")


class _Kit(NamedTuple):
    """What every transform is made of."""

    ops: Any
    """albumentations."""
    enlarge: int
    """cv2's flag."""
    shrink: str | None
    mirror: int
    """cv2's flag: borders repeat the image backwards, so that no black corner tells what was done."""

    @property
    def bending(self) -> dict[str, Any]:
        """How pixels are found where a shape changes."""
        return {"interpolation": self.enlarge, "border_mode": self.mirror, "p": 1.0}

    def jitter(self, p: float, **factors: Any) -> Any:
        """Colour jitter of the factors that are named; the others stay."""
        still = {"brightness": (1.0, 1.0), "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": (0.0, 0.0)}
        return self.ops.ColorJitter(**(still | factors), p=p)


class _Step(NamedTuple):
    transform: Any
    line: str


def _check(
    preset: str,
    interpolation: str,
    invariances: Sequence[str],
    domain: str,
    crop: str,
    policy: str,
    rotate_degrees: float,
    cutout: float,
) -> None:
    for key, value, known in (
        ("preset", preset, PRESETS),
        ("interpolation", interpolation, INTERPOLATIONS),
        ("domain", domain, tuple(DOMAINS)),
        ("crop", crop, CROPS),
        ("policy", policy, POLICIES),
    ):
        if value not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}.")
    if unknown := set(invariances) - set(INVARIANCES):
        raise ValueError(f"invariances may be {', '.join(INVARIANCES)}, got {sorted(unknown)}.")
    if not 0 <= rotate_degrees <= 180:
        raise ValueError(f"rotate_degrees must lie in [0, 180], got {rotate_degrees}.")
    if not 0 <= cutout < 1:
        raise ValueError(f"cutout must lie in [0, 1), got {cutout}.")


def _make_kit(interpolation: str) -> _Kit:
    with lend_environment(QUIET):  # it calls home at import otherwise
        import albumentations
    import cv2

    put_back_later("cv2 threads", partial(cv2.setNumThreads, cv2.getNumThreads()))
    cv2.setNumThreads(0)  # its threads fight with the loader's workers, and do not survive a fork
    flags = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
    # cv2 does not antialias, but evaluation does: areas are averaged where a crop shrinks
    shrink = None if interpolation == "nearest" else "image"
    return _Kit(albumentations, flags[interpolation], shrink, cv2.BORDER_REFLECT_101)


def _bend(kit: _Kit, rules: Rules, preset: str, rotate_degrees: float) -> list[_Step]:
    """Before the crop, while there is image beyond its border."""
    steps = []
    if degrees := max(rotate_degrees, rules.tilt.get(preset, 0.0)):
        turn = kit.ops.Rotate(limit=(-degrees, degrees), **kit.bending)
        steps.append(_Step(turn, f"rotation by up to {degrees:g} degrees to either side, corners mirrored"))
    if share := rules.warp.get(preset):
        warp = kit.ops.Perspective(scale=(0.0, share), **(kit.bending | {"p": 0.5}))
        steps.append(_Step(warp, f"perspective, corners moved with deviation up to {share:.0%} of the side, p = 0.5"))
    return steps


def _cut(kit: _Kit, rules: Rules, preset: str, crop: str, size: int) -> _Step:
    ops, how = kit.ops, {"interpolation": kit.enlarge, "area_for_downscale": kit.shrink}
    if preset == "none":
        return _Step(ops.Lambda(image=partial(_center, size=size), p=1.0), f"centre crop of {size} px")
    window = ops.RandomCrop(height=size, width=size, pad_if_needed=True, border_mode=kit.mirror)
    if crop == "scale":
        widest = min(CROP_SIDES[1], math.sqrt(1 / rules.floor) if rules.floor else math.inf)
        low, high = round(CROP_SIDES[0] * size), round(widest * size)
        scale = ops.SmallestMaxSize(max_size=list(range(low, high + 1)), **how)
        line = f"shorter side resized to {low} to {high} px, random crop of {size} px"
        return _Step(ops.Sequential([scale, window], p=1.0), line)
    if rules.padding:
        margin = max(1, round(rules.padding * size))
        line = f"{margin} px mirrored outwards on each side, random crop of {size} px"
        return _Step(ops.Sequential([ops.Pad(padding=margin, border_mode=kit.mirror), window], p=1.0), line)
    low_area, high_area = CROP_AREA[preset]
    area = max(low_area, rules.floor), high_area
    cut = ops.RandomResizedCrop(size=(size, size), scale=area, ratio=rules.aspect, **how)
    return _Step(cut, f"random crop of {area[0]:.0%} to {area[1]:.0%} of the area, resized to {size} px")


def _center(pixels: np.ndarray, size: int, **_: Any) -> np.ndarray:
    return center_crop(pixels, size)


def _turn(kit: _Kit, invariances: Sequence[str]) -> list[_Step]:
    steps = {
        "hflip": _Step(kit.ops.HorizontalFlip(p=0.5), "horizontal flip, p = 0.5"),
        "vflip": _Step(kit.ops.VerticalFlip(p=0.5), "vertical flip, p = 0.5"),
        "rot90": _Step(kit.ops.RandomRotate90(p=1.0), "rotation by 0, 90, 180 or 270 degrees"),
    }
    return [steps[name] for name in INVARIANCES if name in invariances]


def _tint(kit: _Kit, rules: Rules, preset: str) -> list[_Step]:
    if not (colour := rules.colour.get(preset)):
        return []
    named = ", ".join(f"{name} {value:g}" for name, value in colour.items() if value)
    return [_Step(kit.ops.ColorJitter(**colour, p=0.8), f"colour jitter ({named}), p = 0.8")]


def _erase(kit: _Kit) -> Any:
    sides = {"hole_height_range": CUTOUT_SIDE, "hole_width_range": CUTOUT_SIDE}
    return kit.ops.CoarseDropout(num_holes_range=(1, 1), **sides, fill=CUTOUT_GREY, p=0.5)


def _policy(kit: _Kit, rules: Rules, policy: str) -> list[_Step]:
    is_rand = policy == "rand"
    low, high = (RAND_STRENGTH, RAND_STRENGTH) if is_rand else (0.0, 1.0)
    operations = [*_shape_operations(kit, rules, low, high), *_tone_operations(kit, rules, low, high)]
    limits = (
        f"shear to {high * SHEAR * rules.reach:.2g}, shift to {high * SHIFT * rules.reach:.0%}, rotation to "
        f"{high * TURN * rules.reach:g} degrees, tones by {high * rules.tone:.0%}"
    )
    title = f"RandAugment, magnitude {30 * RAND_STRENGTH:.0f} of 30" if is_rand else "TrivialAugment, random strength"
    line = f"one of {len(operations)} operations ({title}: {limits})"
    return [_Step(kit.ops.OneOf(operations, p=1.0), line) for _ in range(RAND_OPERATIONS if is_rand else 1)]


def _either(kit: _Kit, make: Callable[[tuple[float, float]], Any], low: float, high: float) -> Any:
    """One way or the other, by `low` to `high`."""
    return kit.ops.OneOf([make((-high, -low)), make((low, high))], p=1.0)


def _shape_operations(kit: _Kit, rules: Rules, low: float, high: float) -> list[Any]:
    slope, shift, turn = (rules.reach * top for top in (math.degrees(math.atan(SHEAR)), SHIFT, TURN))
    made = [kit.ops.NoOp(p=1.0)]
    for axis, other in (("x", "y"), ("y", "x")):
        for key, top in (("shear", slope), ("translate_percent", shift)):
            make = partial(_affine, kit, key, axis, other)
            made.append(_either(kit, make, low * top, high * top))
    return [*made, _either(kit, lambda span: kit.ops.Rotate(limit=span, **kit.bending), low * turn, high * turn)]


def _affine(kit: _Kit, key: str, axis: str, other: str, span: tuple[float, float]) -> Any:
    return kit.ops.Affine(**{key: {axis: span, other: (0.0, 0.0)}}, **kit.bending)


def _tone_operations(kit: _Kit, rules: Rules, low: float, high: float) -> list[Any]:
    ops, tone = kit.ops, rules.tone

    def factor(name: str) -> Any:
        return _either(kit, lambda span: kit.jitter(1.0, **{name: (1 + span[0], 1 + span[1])}), low * tone, high * tone)

    # a factor f of PIL's sharpness enhancer is an alpha of (f - 1) / 13 here
    sharper = ops.Sharpen(alpha=(low * tone / 13, high * tone / 13), lightness=(1.0, 1.0), p=1.0)
    softer = ops.GaussianBlur(blur_limit=3, sigma_limit=(max(0.1, 0.7 * low), 0.7 * high), p=1.0)
    made = [factor("brightness"), factor("contrast"), ops.OneOf([sharper, softer], p=1.0) if rules.blurs else sharper]
    if rules.recolours:
        bits = 8 - round(4 * high), 8 - round(4 * low)
        made += [
            factor("saturation"),
            ops.Posterize(num_bits=bits, p=1.0),
            ops.Solarize(threshold_range=(1 - high, 1 - low), p=1.0),
            ops.AutoContrast(method="pil", p=1.0),
            ops.Equalize(mode="pil", p=1.0),
        ]
    return made
