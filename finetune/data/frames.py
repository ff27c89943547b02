"""Files of several frames or pages, where each frame is an image: `data.frame: each`.

A listing opens no file; here those are opened that may hold several, and each of their frames becomes an item. What is
cut, compared and counted as one are still files: frames of one animation are near copies of each other.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from finetune.compute import num_cores
from finetune.config.recipe import DataSpec
from finetune.data.decoding import BadImage, count_frames
from finetune.data.formats import format_of
from finetune.data.items import Found, Item, Items
from finetune.data.sources import Source, open_source, read_bytes
from finetune.errors import DataError

SEVERAL = ("GIF", "TIFF", "WEBP", "PNG", "AVIF", "HEIF")
"""Formats whose files may hold several frames."""
_AT_ONCE = 64


def open_images(data: DataSpec) -> Source:
    """The images that a recipe names; of files of several frames each one, where it says so.

    Raises:
        DataError: as `open_source`, or if it names none.
    """
    if data.root is None:
        raise DataError(
            "no folder is named. Where images were handed in from Python, only a program that does so again "
            "(dataset=...) can look at them."
        )
    source = open_source(Path(data.root).expanduser(), data.splits, data.columns.named)
    return each_frame(source) if data.frame == "each" else source


def each_frame(source: Source) -> Source:
    """The source with an item for each frame of its files; a file of one frame, or of none, stays as it is."""
    items, bad = source.items, list[str]()
    column = items[0].column if len(items) else None
    expanded = Items(_found(items, bad), column)
    expanded.number_classes({name: label for label, name in enumerate(source.classes)})
    if not bad:
        return replace(source, items=expanded)
    told = f"the frames of {len(bad):,} files cannot be counted, so each is taken for one image, its first: {bad[0]}."
    return replace(source, items=expanded, warnings=(*source.warnings, told))


def _found(items: Items, bad: list[str]) -> Iterator[Found]:
    """Every frame in order; a name and a reason is put into `bad` where frames cannot be counted."""
    with ThreadPoolExecutor(num_cores()) as pool:
        for start in range(0, len(items), _AT_ONCE):
            some = items[start : start + _AT_ONCE]
            for item, count in zip(some, pool.map(_count, some), strict=True):
                if isinstance(count, BadImage):
                    bad.append(f"{item.name} ({count})")
                frames = range(count) if isinstance(count, int) and count > 1 else [None]
                for frame in frames:
                    yield Found(item.name, items.class_names[item.label], item.role, item.file, item.row, frame)


def frames_of(item: Item) -> list[Item]:
    """The item, or one for each frame of its file, where that holds several."""
    count = _count(item)
    if isinstance(count, BadImage) or count == 1:
        return [item]
    return [replace(item, frame=frame) for frame in range(count)]


def _count(item: Item) -> int | BadImage:
    """Frames in the file of an item: 1 where it cannot be read, for decoding says why."""
    try:
        if item.row is None and item.data is None:
            with item.file.open("rb") as file:
                if format_of(file.read(64)) not in SEVERAL:
                    return 1
        return count_frames(read_bytes(item))
    except OSError:
        return 1
    except BadImage as fault:
        return fault


def frame_digests(items: Items, files: Sequence[str]) -> list[str]:
    """Per item, a hash of its file and of which frame it is; of the file alone where that is one image.

    Args:
        items: all of a source.
        files: a hash of each item's file; empty where it cannot be read, and then so is the answer.
    """
    return [
        file if frame is None or not file else hashlib.blake2b(f"{file}:{frame}".encode(), digest_size=16).hexdigest()
        for file, frame in zip(files, map(items.frame, range(len(items))), strict=True)
    ]


def is_of_same_file(one: Item, other: Item) -> bool:
    """Whether two items are frames of one file."""
    return one.frame is not None and (one.file, one.row) == (other.file, other.row)
