"""Bytes of an image file -> upright RGB pixels, whatever the file holds.

Every oddity that changes what a network sees is settled here and nowhere else: EXIF rotation, palettes,
transparency (white shows through), CMYK, several frames, and 16 bits per channel (`value_range`). Pixels are
resized by PIL with antialiasing, as torchvision does on PIL images, because pretrained backbones were trained
and measured on such pixels.
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

from finetune.config.card import View
from finetune.data.bands import alpha_fault, band_fault, unknown_tiff
from finetune.data.formats import readable_formats, why_unreadable
from finetune.data.value_range import DEEP_MODES, FULL_RANGE, Levels, is_wide, levels_of, to_eight_bits, wide_values

MAX_PIXELS = 178_956_970
"""An image with more pixels than this, before or after resizing, is taken for a decompression bomb (PIL's limit)."""

DRAFT_GAP = 2
"""A JPEG is decoded at reduced size only where that stays this many times the answer (PIL's thumbnail default).
On photographs the result then differs from a full decode by less than 0.5 grey levels; with 1, by about 1.6."""

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
DAMAGE = (
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
"""What readers raise on damaged files; anything else is a bug and must surface."""


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
    has_frames: bool = False
    """The file holds more frames or pages than the one that was decoded."""
    is_clipped: bool = False
    """More than `CLIPPED` of its values lie outside the value range."""


CLIPPED = 0.01
"""Share of an image's values that may lie outside the value range before a word is said of it."""
ROTATED, FRAMES, BEYOND = 1, 2, 4
"""Bits of the last number of `facts_row`."""


def facts_row(facts: ImageFacts) -> tuple[int, int, int, int]:
    """The facts as numbers: width, height, place in `KINDS`, and bits that say what else it is."""
    flags = ROTATED * facts.is_rotated | FRAMES * facts.has_frames | BEYOND * facts.is_clipped
    return facts.width, facts.height, KINDS.index(facts.kind), flags


class BadImage(Exception):  # noqa: N818 - a finding about one file, which the audit counts; not always an error
    """A file that holds no readable image. `str(fault)` is the reason in a few words."""


class Scaling(NamedTuple):
    """What pixels are wanted of a file."""

    shorter_pixels: int | None
    """Length of the answer's shorter side; None keeps the size of the file."""
    interpolation: str
    """nearest, bilinear or bicubic."""
    value_range: tuple[float, float] = FULL_RANGE
    """Values that become 0 and 255, where the file has more than 8 bits per channel."""
    frame: str | int = "first"
    """Of several frames or pages: first, middle, or a number from 0."""


def scaling(view: View, frame: int | None = None) -> Scaling:
    """What pixels a view wants, of a file or of one of its frames."""
    return Scaling(view.shorter_pixels, view.interpolation, view.value_range, view.frame if frame is None else frame)


def decode(
    data: bytes,
    *,
    shorter_pixels: int | None,
    interpolation: str,
    value_range: tuple[float, float] = FULL_RANGE,
    frame: str | int = "first",
) -> tuple[np.ndarray, ImageFacts]:
    """Upright RGB pixels (H, W, 3) uint8, and what the file said of itself.

    Sizes follow torchvision's `Resize(shorter_pixels)`: the longer side is truncated to whole pixels. A large
    JPEG is decoded at half, quarter or eighth size where that stays at least twice as large as the answer.

    Args:
        data: the whole file, in one of `formats.SUFFIXES`.
        shorter_pixels: as in `Scaling`; so are the others.
        interpolation: see there.
        value_range: see there.
        frame: see there.

    Raises:
        BadImage: if `data` is empty, truncated, damaged, too large, or no image.
        ValueError: if `interpolation` is unknown.
    """
    (pixels,), facts = decode_sizes(data, [Scaling(shorter_pixels, interpolation, value_range, frame)])
    return pixels, facts


def decode_sizes(data: bytes, sizes: Sequence[Scaling]) -> tuple[list[np.ndarray], ImageFacts]:
    """The same image in several sizes, each bit for bit as `decode` gives it alone.

    The file is decoded once for each value range and frame. Only a large JPEG may be so once more for each of the
    reduced sizes (half, quarter, eighth) that `decode` would choose: another one would change the pixels.

    Args:
        data: the whole file.
        sizes: one or more.

    Raises:
        As `decode`.
    """
    for one in sizes:
        if one.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation must be one of {', '.join(_RESAMPLING)}, got {one.interpolation!r}.")
    if not sizes:
        raise ValueError("sizes is empty; name one or more.")
    answers: list[np.ndarray] = []
    known: dict[_Key, _Loaded] = {}
    with _silence():
        for one in sizes:
            image = _open(data)  # the header; what is decoded at a reduced size cannot be had at another
            try:
                loaded = _load(image, data, one, known)
                answers.append(_resize(loaded, one.shorter_pixels, _RESAMPLING[one.interpolation]))
            except DAMAGE as fault:
                raise BadImage(_reason(image, fault)) from fault
    return answers, loaded.facts


def count_frames(data: bytes) -> int:
    """Frames or pages of the file `data`; 1 where it is no image that can be opened, for decoding says why.

    Raises:
        BadImage: if it can be opened, but its frames cannot be counted.
    """
    with _silence():
        try:
            return _num_frames(_open(data))
        except BadImage:
            return 1
        except DAMAGE as fault:
            raise BadImage(f"damaged ({_short(fault)})") from fault


def _num_frames(image: Image.Image) -> int:
    """How many there are to choose from. A JPEG's others are previews or depths."""
    return 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))


def read_levels(data: bytes, frame: str | int = "first") -> Levels | None:
    """The levels of the values in the file `data`; None where it has 8 bits per channel, or cannot be read."""
    with _silence():
        try:
            image = _open(data)
            place, _ = _seek(image, frame)
            if not is_wide(image) or band_fault(image):
                return None
            image.load()
            return levels_of(wide_values(image, data, place))
        except (BadImage, *DAMAGE):
            return None  # decoding it says why


def _seek(image: Image.Image, frame: str | int) -> tuple[int, int]:
    """Turn to a frame; its number from 0, and how many there are."""
    count = _num_frames(image)
    place = frame if isinstance(frame, int) else count // 2 if frame == "middle" else 0
    if place:
        image.seek(place)
    return place, count


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats(data))
    except Image.DecompressionBombError as fault:
        raise BadImage("too many pixels") from fault
    except UnidentifiedImageError as fault:
        raise BadImage(unknown_tiff(data) or why_unreadable(data)) from fault
    except DAMAGE as fault:
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


_Key = tuple[tuple[int, int], tuple[float, float], str | int]


def _load(image: Image.Image, data: bytes, wanted: Scaling, known: dict[_Key, _Loaded]) -> _Loaded:
    """The image large enough for what is wanted; out of `known` where it was loaded before."""
    shorter, (_, _, value_range, frame) = wanted.shorter_pixels, wanted
    is_jpeg = image.format in ("JPEG", "MPO")
    if (key := (image.size, value_range, frame)) in known and not is_jpeg:
        return known[key]
    place, num_frames = _seek(image, frame)
    is_deep, kind, orientation, size = is_wide(image), _kind(image), _orientation(image), image.size
    box: tuple[float, float, float, float] | None = None
    if shorter is not None and is_jpeg:
        width, height = _fit(size, shorter)
        # PIL never drafts below the size asked for
        drafted = image.draft(None, (DRAFT_GAP * width, DRAFT_GAP * height))
        box = drafted[1] if drafted else None
    if is_jpeg and (key := (image.size, value_range, frame)) in known:
        return known[key]
    if fault := band_fault(image):
        raise BadImage(fault)
    image.load()  # asking a PNG for EXIF has loaded it already
    if fault := alpha_fault(image):
        raise BadImage(fault)
    # Loading turns TIFFs upright by itself, and drafting shrinks JPEGs: only the latter keep the size of the header.
    remaining = _orientation(image)
    full = size if box else image.size
    width, height = full[::-1] if remaining >= 5 else full
    outside = 0.0
    if is_deep:
        if image.mode not in DEEP_MODES:
            raise BadImage(f"16 bits per channel in mode {image.mode} are not read; convert it to RGB or grey")
        eight, outside = to_eight_bits(wide_values(image, data, place), value_range)
        image = _with_eight_bits(image, eight)
    facts = ImageFacts(
        width=width,
        height=height,
        kind=kind,
        is_rotated=orientation != 1,
        has_frames=num_frames > 1,
        is_clipped=outside > CLIPPED,
    )
    known[key] = _Loaded(_flatten(image), full, box, remaining, facts)
    return known[key]


def _with_eight_bits(image: Image.Image, pixels: np.ndarray) -> Image.Image:
    """`pixels` as an image; its transparency stays that of the file, for that is no measured value."""
    mapped = Image.fromarray(pixels)
    if mapped.mode == "RGBA":
        mapped.putalpha(image.getchannel("A"))
    return mapped


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
    if is_wide(image):
        return "16-bit"
    if image.mode in ("P", "PA"):
        return "palette"
    if image.mode in ("RGBA", "LA", "RGBa", "La") or "transparency" in image.info:
        return "alpha"
    return {"1": "grey", "L": "grey", "CMYK": "cmyk"}.get(image.mode, "rgb")


def _flatten(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: white behind what is transparent, eight bits per channel."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


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
