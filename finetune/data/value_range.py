"""More than 8 bits per channel: which values of a file become 0 and 255.

Files of 16 bits often hold 10 or 12, and floats may mean anything, so no file tells its range by itself. One range
serves a whole data set: it is given, or measured on training images alone, and what lies outside is clipped.
"""

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

FULL_RANGE = (0.0, 65535.0)
"""Of 16 bits; taken where no training image has more than 8."""
DEPTHS = (1, 8, 10, 12, 14, 16)
"""Bits that values are taken to have where they fill at least half of them."""
FAR_OUT = 2
"""A range is widened to the outermost values, unless it would grow by more than this factor for a few hot pixels."""
ENOUGH_IMAGES = 256
"""Images that are measured; of more, the first of a seeded sample."""
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N", "RGB", "RGBA")
"""Modes of PIL in which more than 8 bits per channel are read."""
_LOW, _HIGH, _ENOUGH_PIXELS = 0.1, 99.9, 250_000
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Values of one image, before anything is mapped."""

    lowest: float
    low: float
    """The 0.1th percentile."""
    high: float
    """The 99.9th percentile."""
    highest: float


@dataclass(frozen=True, kw_only=True)
class MeasuredRange:
    """What becomes 0 and 255, and what that was taken from."""

    low: float
    high: float
    lowest: float
    """Of all values that were seen."""
    highest: float
    num_images: int
    why: str


def is_wide(image: Image.Image) -> bool:
    """Whether a file, whose header alone was read, holds more than 8 bits per channel."""
    rawmodes = str([tile[3] for tile in getattr(image, "tile", [])])
    return image.mode in ("I", "F") or ";16" in image.mode or (";16" in rawmodes and image.mode != "CMYK")


def wide_values(image: Image.Image, data: bytes, frame: int) -> np.ndarray:
    """Values (H, W) or (H, W, C) of the file `data`, which `image` holds loaded; C of RGB or RGBA is 3 or 4.

    PIL keeps the high byte of each colour only. The low one comes where the file is read in the other byte order.
    """
    if image.mode in ("I", "F") or ";16" in image.mode:
        return np.asarray(image)
    with Image.open(io.BytesIO(data), formats=[str(image.format)]) as twin:
        if frame:
            twin.seek(frame)
        twin.tile = [tile._replace(args=_swapped(tile.args)) for tile in twin.tile]
        low = np.asarray(twin)
    values: np.ndarray = (np.asarray(image).astype(np.uint16) << 8) | low
    return values


def _swapped(args: Any) -> Any:
    if isinstance(args, tuple):
        return (_swapped(args[0]), *args[1:])
    mode, _, order = str(args).partition(";16")
    return f"{mode};16{_OTHER_BYTE[order]}" if order in _OTHER_BYTE else args


def to_eight_bits(values: np.ndarray, value_range: tuple[float, float]) -> tuple[np.ndarray, float]:
    """`values` as uint8 of the same shape, `value_range` stretched over 0 to 255, and the share that it clips.

    What is no number (NaN) becomes 0.
    """
    low, high = value_range
    with np.errstate(invalid="ignore"):  # damaged floats may be signalling NaNs
        values = values.astype(np.float64)
        outside = float(((values < low) | (values > high)).mean()) if values.size else 0.0
        scaled = np.nan_to_num((values - low) * (255.0 / (high - low)), posinf=255.0, neginf=0.0)
    return np.rint(scaled.clip(0, 255)).astype(np.uint8), outside


def levels_of(values: np.ndarray) -> Levels | None:
    """The levels of one image's values; None where none is a number."""
    flat = values[..., :3].ravel() if values.ndim == 3 else values.ravel()  # transparency is no colour
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return None
    some = flat[:: max(1, flat.size // _ENOUGH_PIXELS)]
    low, high = np.percentile(some.astype(np.float64), [_LOW, _HIGH])
    return Levels(lowest=float(flat.min()), low=float(low), high=float(high), highest=float(flat.max()))


def choose_range(seen: Sequence[Levels]) -> MeasuredRange:
    """The range for images of such levels: a full bit depth if they fill half of one, else what they do fill.

    One image in a hundred may lie outside what the others fill, as a thousandth of each image's pixels may.

    Raises:
        ValueError: if `seen` is empty.
    """
    if not seen:
        raise ValueError("no image to take a range from.")
    lowest, highest = min(one.lowest for one in seen), max(one.highest for one in seen)
    low = float(np.quantile([one.low for one in seen], 0.01, method="higher"))
    high = float(np.quantile([one.high for one in seen], 0.99, method="lower"))
    found = {"lowest": lowest, "highest": highest, "num_images": len(seen)}
    depth = next((bits for bits in DEPTHS if highest <= 2**bits - 1), None)
    if depth is not None and lowest >= 0 and high >= (top := 2**depth - 1) / 2 and low <= top / 4:
        return MeasuredRange(low=0.0, high=float(top), why=f"{depth} bit{'s' * (depth > 1)}", **found)  # type: ignore[arg-type]
    span = high - low
    low = lowest if high - lowest <= FAR_OUT * span else low
    high = highest if highest - low <= FAR_OUT * span else high
    low = 0.0 if 0 <= low <= high / 10 else low
    why = "what the training images fill"
    return MeasuredRange(low=low, high=high if high > low else low + 1, why=why, **found)  # type: ignore[arg-type]


def measure_range(levels: Iterable[Levels | None]) -> MeasuredRange | None:
    """The range for a sample of training images; None where none of them has more than 8 bits.

    Args:
        levels: of each image, None where it has 8 bits; only as many are asked for as are needed.
    """
    seen: list[Levels] = []
    for one in levels:
        if one is not None:
            seen.append(one)
        if len(seen) == ENOUGH_IMAGES:
            break
    return choose_range(seen) if seen else None
