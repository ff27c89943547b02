"""Formats of image files: which are read, what a file is by its first bytes, and why another is not read.

The content decides, never the name: a WebP under `.jpg` is read as WebP. HEIC takes a plug-in, pillow-heif, which is
registered when the first such file is met and it is installed.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

from PIL import Image

from finetune.data.items import Item

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k"),
}
"""By Pillow's name of a format, the suffixes of its files."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
FOREIGN = {
    ".svg": "SVG drawings",
    ".psd": "Photoshop files",
    ".dcm": "DICOM",
    ".nii": "NIfTI volumes",
    ".jxl": "JPEG XL",
    ".exr": "OpenEXR",
    ".tga": "TGA",
    ".ico": "icons",
    ".npy": "NumPy arrays",
    ".npz": "NumPy arrays",
} | dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), "raw camera files")
"""Images that are not read, by suffix, and what they are."""
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<!DOC", "HTML"),
    (b"<!doc", "HTML"),
    (b"<html", "HTML"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"PK\x03\x04", "ZIP"),
    (b"version https://git-lfs", "Git LFS pointer"),
)
_SPOKEN_AN = ("HTML", "MP4", "SVG")
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"
)
LEAST_FILES = 5
"""Fewer files of a format than this tell nothing about a class."""


def format_of(data: bytes) -> str | None:
    """The format of a file by its first bytes, in Pillow's word where it has one; None where they tell nothing."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = [data[at : at + 4] for at in (8, *range(16, 40, 4))]
        named = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        return "AVIF" if "AVIF" in named else next(iter(named), "MP4" if data[8:11] in (b"mp4", b"iso") else None)
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def readable_formats(data: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that a file may be opened as; HEIF only where it is needed and can be had."""
    return (*_built_in(), *(("HEIF",) if format_of(data) == "HEIF" and _has_heif() else ()))


def why_unreadable(data: bytes) -> str:
    """A few words on a file that none of the readable formats took."""
    name = format_of(data)
    if name == "HEIF":
        return "HEIC, which takes a plug-in: pip install 'finetune-vision[heic]'"
    if name == "AVIF" and name not in _built_in():
        return "an AVIF, which takes Pillow 11.3 or later"
    if name in SUFFIXES:
        return f"damaged ({name} by its first bytes)"
    return f"not an image but {'an' if name in _SPOKEN_AN else 'a'} {name}" if name else "not an image"


@lru_cache(maxsize=1)
def _built_in() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in SUFFIXES if name != "HEIF" and name in Image.OPEN)


@lru_cache(maxsize=1)
def _has_heif() -> bool:
    if find_spec("pillow_heif") is None:
        return False
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return True


class Contents:
    """Formats of files by content, class and suffix, gathered while their bytes are read for something else."""

    def __init__(self) -> None:
        self._found, self._lock = Counter[tuple[str, str, int]](), threading.Lock()

    def note(self, item: Item, data: bytes) -> None:
        """Remember what the file of one item is; several threads may call."""
        if name := format_of(data[:64]):
            with self._lock:
                self._found[item.file.suffix.lower() if item.row is None else "", name, item.label] += 1

    def warnings(self, classes: Sequence[str]) -> list[str]:
        """Names that say another format than the content, and formats that only one class has."""
        return [*self._misnamed(classes), *self._lone(classes)]

    def _misnamed(self, classes: Sequence[str]) -> list[str]:
        wrong = Counter[tuple[int, str]]()
        for (suffix, name, label), count in self._found.items():
            if suffix in IMAGE_SUFFIXES and name in SUFFIXES and suffix not in SUFFIXES[name]:
                wrong[label, f"{suffix} read as {name}"] += count
        parts = [f"class {classes[label]}: {count} x {what}" for (label, what), count in sorted(wrong.items())]
        if not parts:
            return []
        more = f"; and so on in {len(parts) - 5} more" if len(parts) > 5 else ""
        return [
            f"{'; '.join(parts[:5])}{more}, by content and not by name; none dropped ({wrong.total()} files hold "
            "another format than their names say)."
        ]

    def _lone(self, classes: Sequence[str]) -> list[str]:
        homes: dict[str, Counter[int]] = {}
        spelt: dict[str, Counter[str]] = {}
        for (suffix, name, label), count in self._found.items():
            homes.setdefault(name, Counter())[label] += count
            spelt.setdefault(name, Counter())[suffix if suffix in SUFFIXES.get(name, ()) else name] += count
        totals = sum(homes.values(), Counter[int]())
        told = []
        for name in sorted(homes):
            label, count = homes[name].most_common(1)[0]
            others = len(homes) > 1 and len(totals) > 1
            if others and len(homes[name]) == 1 and count >= max(LEAST_FILES, totals[label] / 10):
                words = ", ".join(f"{n} x {suffix}" for suffix, n in sorted(spelt[name].items()))
                told.append(f"{words}, all in class {classes[label]}")
        if not told:
            return []
        return [
            f"files of one format lie in one class only: {'; '.join(told)}. A network may learn the traces of a format "
            "instead of what is shown; save all images alike if you can."
        ]
