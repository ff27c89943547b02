"""The one walk through folders: which files are images, which folders are nobody's, links followed and loops survived.

Training, judging, predicting and measuring all walk here, so that what one of them leaves out no other takes in.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.formats import IMAGE_SUFFIXES

SYSTEM_NAMES = frozenset(
    ["__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"]
) | frozenset(["lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])
"""Files and folders, in lower case, that systems and network drives leave behind. Hidden ones begin with a dot."""


@dataclass
class Left:
    """What a walk came across and did not take."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their names, by suffix; images with hidden names."""
    links: list[str] = field(default_factory=list)
    """Links to folders that would lead back into the data, and where they lead."""


def listed(folder: Path) -> list[Path]:
    """What stands in `folder`, sorted, without what is hidden or the system's."""
    return sorted(f for f in folder.iterdir() if not is_hidden(f.name))


def is_hidden(name: str) -> bool:
    """Whether no user put it there as data."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def is_image(file: Path) -> bool:
    """Whether it is a file with the suffix of an image."""
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def holds_images(folder: Path, root: Path | None = None) -> bool:
    """Whether an image lies at any depth."""
    return next(image_files(folder, Left(), root), None) is not None


def image_files(folder: Path, left: Left, root: Path | None = None) -> Iterator[Path]:
    """Image files at any depth, in no order; what is left out is counted in `left`. The rest is as in `files_below`."""
    for file in files_below(folder, left, root):
        suffix, hidden = file.suffix.lower(), is_hidden(file.name)
        if suffix in IMAGE_SUFFIXES and not hidden:
            yield file
        elif not hidden:
            left.kinds["links to nothing" if _is_dead(file) else suffix or "without suffix"] += 1
        elif suffix in IMAGE_SUFFIXES and not file.name.startswith("._"):  # a Mac writes ._x.jpg beside every x.jpg
            left.kinds["hidden"] += 1


def files_below(folder: Path, left: Left, root: Path | None = None) -> Iterator[Path]:
    """Files at any depth, in no order, each real folder once and none that is hidden or the system's.

    A linked file or folder belongs where the link is. A link that leads back into the walked data, or above it, is
    not followed, for it would put the images of other folders here.

    Args:
        folder: where to walk; it may be a link itself.
        left: gets the links that are not followed.
        root: the whole of the data that `folder` is a part of; None: `folder` itself.
    """
    bounds, seen = (root or folder).resolve(), set[Path]()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(parent)
        if (real := here.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not is_hidden(f) and not _leads_back(here / f, bounds, left))
        yield from (here / name for name in files)


def _leads_back(folder: Path, bounds: Path, left: Left) -> bool:
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    leads_back = target.is_relative_to(bounds) or bounds.is_relative_to(target)
    if leads_back:
        left.links.append(f"{folder} (to {target})")
    return leads_back


def _is_dead(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def _raise(fault: OSError) -> None:
    raise fault  # os.walk would leave out, silently, a folder it may not read
