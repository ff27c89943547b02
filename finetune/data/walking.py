"""The walk through folders: which files are images, which folders are nobody's, links followed and loops survived."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"])


def listed(folder: Path) -> list[Path]:
    """What stands in `folder`, sorted, without what is hidden."""
    return sorted(f for f in folder.iterdir() if not is_hidden(f.name))


def is_hidden(name: str) -> bool:
    """Whether no user put it there as data."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(file: Path) -> bool:
    """Whether it is a file with the suffix of an image."""
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def holds_images(folder: Path) -> bool:
    """Whether an image lies at any depth."""
    return next(image_files(folder, Counter()), None) is not None


def image_files(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Image files at any depth, links followed (each real folder once); what is left out is counted in `skipped`."""
    seen: set[Path] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(parent)
        if (real := here.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not is_hidden(f))
        for file in files:
            suffix = Path(file).suffix.lower()
            if is_hidden(file):
                skipped["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                yield here / file
            else:
                skipped[suffix or "without suffix"] += 1


def _raise(fault: OSError) -> None:
    raise fault  # os.walk would leave out, silently, a folder it may not read
