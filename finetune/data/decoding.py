"""Bytes of an image file -> upright RGB pixels, whatever the file holds.

Every oddity that changes what a network sees is settled here and nowhere else: EXIF rotation, palettes,
transparency (white shows through), CMYK and 16 bits per channel. Pixels are resized by PIL with
antialiasing, as torchvision does on PIL images, because pretrained backbones were trained and measured
on such pixels.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""An image with more pixels than this, before or after resizing, is taken for a decompression bomb (PIL's limit)."""

DRAFT_GAP = 2
"""A JPEG is decoded at reduced size only where that stays this many times the answer (PIL's thumbnail default).
On photographs the result then differs from a full decode by less than 0.5 grey levels; with 1, by about 1.6."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL's readers raise on damaged files; anything else is a bug and must surface.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


KINDS = ("rgb", "grey", "palette", "alpha", "cmyk", "16-bit")
"""How pixels may be stored."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a file said of itself, before any resizing."""

    width: int
    """Pixels, upright (after EXIF rotation)."""
    height: int
    kind: str
    """One of `KINDS`."""
    is_rotated: bool
    """The file carried an EXIF orientation other than 1."""


def facts_row(facts: ImageFacts) -> tuple[int, int, int, int]:
    """The facts as numbers: width, height, place in `KINDS`, whether it is rotated."""
    return facts.width, facts.height, KINDS.index(facts.kind), int(facts.is_rotated)


class BadImage(Exception):  # noqa: N818 - a finding about one file, which the audit counts; not always an error
    """A file that holds no readable image. `str(fault)` is the reason in a few words."""


def decode(data: bytes, *, shorter_pixels: int | None, interpolation: str) -> tuple[np.ndarray, ImageFacts]:
    """Upright RGB pixels (H, W, 3) uint8, and what the file said of itself.

    Sizes follow torchvision's `Resize(shorter_pixels)`: the longer side is truncated to whole pixels. A large
    JPEG is decoded at half, quarter or eighth size where that stays at least twice as large as the answer.

    Args:
        data: the whole file (JPEG, PNG, BMP, GIF, TIFF or WebP; of several frames, the first).
        shorter_pixels: length of the answer's shorter side; None keeps the size of the file.
        interpolation: nearest, bilinear or bicubic.

    Raises:
        BadImage: if `data` is empty, truncated, damaged, too large, or no image.
        ValueError: if `interpolation` is unknown.
    """
    (pixels,), facts = decode_sizes(data, [(shorter_pixels, interpolation)])
    return pixels, facts


def decode_sizes(data: bytes, sizes: Sequence[tuple[int | None, str]]) -> tuple[list[np.ndarray], ImageFacts]:
    """The same image in several sizes, each bit for bit as `decode` gives it alone.

    The file is decoded once. Only a large JPEG may be so once more for each of the reduced sizes (half, quarter,
    eighth) that `decode` would choose: another one would change the pixels.

    Args:
        data: the whole file.
        sizes: one or more; of each, the length of the shorter side and the interpolation, as for `decode`.

    Raises:
        As `decode`.
    """
    for _, interpolation in sizes:
        if interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation must be one of {', '.join(_RESAMPLING)}, got {interpolation!r}.")
    if not sizes:
        raise ValueError("sizes is empty; name one or more.")
    if not data:
        raise BadImage("empty file")
    answers: list[np.ndarray] = []
    known: dict[tuple[int, int], _Loaded] = {}
    with _silence():
        for shorter, interpolation in sizes:
            image = _open(data)  # the header; what is decoded at a reduced size cannot be had at another
            try:
                loaded = _load(image, shorter, known)
                answers.append(_resize(loaded, shorter, _RESAMPLING[interpolation]))
            except _DAMAGE as fault:
                raise BadImage(_reason(image, fault)) from fault
    return answers, loaded.facts


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as fault:
        raise BadImage("too many pixels") from fault
    except UnidentifiedImageError as fault:
        raise BadImage("not an image") from fault
    except _DAMAGE as fault:
        raise BadImage(f"damaged header ({_short(fault)})") from fault
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too many pixels")
    return image


class _Loaded(NamedTuple):
    """An image in memory, perhaps reduced."""

    flat: Image.Image
    full: tuple[int, int]
    """Width and height before it was reduced."""
    box: tuple[float, float, float, float] | None
    """The part of it that is image, where it was reduced."""
    orientation: int
    """Of EXIF; still to be undone."""
    facts: ImageFacts


def _load(image: Image.Image, shorter: int | None, known: dict[tuple[int, int], _Loaded]) -> _Loaded:
    """The image large enough for `shorter`; out of `known` where it was loaded before."""
    is_jpeg = image.format in ("JPEG", "MPO")
    if known and not is_jpeg:
        return next(iter(known.values()))
    kind, orientation, size = _kind(image), _orientation(image), image.size  # asking a PNG for EXIF loads it
    box: tuple[float, float, float, float] | None = None
    if shorter is not None and is_jpeg:
        width, height = _fit(size, shorter)
        # PIL never drafts below the size asked for
        drafted = image.draft(None, (DRAFT_GAP * width, DRAFT_GAP * height))
        box = drafted[1] if drafted else None
    if (reduced := image.size) in known:
        return known[reduced]
    image.load()
    # Loading turns TIFFs upright by itself, and drafting shrinks JPEGs: only the latter keep the size of the header.
    remaining = _orientation(image)
    full = size if box else image.size
    width, height = full[::-1] if remaining >= 5 else full
    facts = ImageFacts(width=width, height=height, kind=kind, is_rotated=orientation != 1)
    known[reduced] = _Loaded(_flatten(image), full, box, remaining, facts)
    return known[reduced]


def _resize(loaded: _Loaded, shorter: int | None, resample: Image.Resampling) -> np.ndarray:
    flat = loaded.flat
    if shorter is not None and flat.size != (target := _fit(loaded.full, shorter)):
        flat = flat.resize(target, resample, box=loaded.box)
    if loaded.orientation in _UPRIGHT:
        flat = flat.transpose(_UPRIGHT[loaded.orientation])
    return np.array(flat.convert("RGB"))


def _fit(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = size
    fitted = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    if fitted[0] * fitted[1] > MAX_PIXELS:
        raise BadImage(f"too narrow to resize ({width} x {height})")
    return fitted


def _kind(image: Image.Image) -> str:
    rawmodes = str([tile[3] for tile in getattr(image, "tile", [])])
    if image.mode in ("I", "F") or ";16" in image.mode or ";16" in rawmodes:
        return "16-bit"
    if image.mode in ("P", "PA"):
        return "palette"
    if image.mode in ("RGBA", "LA", "RGBa", "La") or "transparency" in image.info:
        return "alpha"
    return {"1": "grey", "L": "grey", "CMYK": "cmyk"}.get(image.mode, "rgb")


def _flatten(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: white behind what is transparent, eight bits per channel."""
    if image.mode in ("I", "F") or ";16" in image.mode:
        return Image.fromarray(_to_eight_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of integers in [0, 65535] or floats in [0, 1], [0, 255] or [0, 65535]; else stretched to fit."""
    tops = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    with np.errstate(invalid="ignore"):  # damaged floats may be signalling NaNs
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    fitting = [top for top in tops if low >= 0 and high <= top]
    low, high = (0.0, fitting[0]) if fitting else (low, high)
    return np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # EXIF that cannot be read says nothing; the pixels may still be whole
    return value if value in _UPRIGHT else 1


def _reason(image: Image.Image, fault: BaseException) -> str:
    text = str(fault).lower()
    if not any(word in text for word in ("truncated", "unrecognized data stream", "not enough", "unexpected end")):
        return f"damaged ({_short(fault)})"
    if image.format not in ("JPEG", "PNG", "TIFF"):  # BMP is stored bottom up, GIF is filled beforehand
        return "truncated"
    # Rows that were never reached stay zero, so the last row that is not tells how far decoding came.
    core = getattr(image, "_im", None)
    box = core.getbbox() if core is not None else None
    share = 100 * box[3] // core.size[1] if core is not None and box else 100
    return f"truncated after {share} %" if share < 100 else "truncated"


def _short(fault: BaseException) -> str:
    return " ".join((str(fault) or type(fault).__name__).split())[:60]


_silence_lock = threading.Lock()
_silence_depth = 0
_silenced = warnings.catch_warnings()


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings from PIL inside; unlike bare `catch_warnings`, threads may overlap and the filters still return."""
    global _silence_depth, _silenced  # noqa: PLW0603 - the filters are global, so is their count
    with _silence_lock:
        if _silence_depth == 0:
            _silenced = warnings.catch_warnings()
            _silenced.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _silence_depth += 1
    try:
        yield
    finally:
        with _silence_lock:
            _silence_depth -= 1
            if _silence_depth == 0:
                _silenced.__exit__(None, None, None)


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle (size, size, 3) of (H, W, 3), to the pixel as torchvision's `CenterCrop`: black where too small."""
    height, width = pixels.shape[:2]
    if height < size or width < size:
        tall, wide = max(size - height, 0), max(size - width, 0)
        pixels = np.pad(pixels, ((tall // 2, (tall + 1) // 2), (wide // 2, (wide + 1) // 2), (0, 0)))
        height, width = pixels.shape[:2]
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return pixels[top : top + size, left : left + size]
