"""Images in class folders: the listing of what a layout holds, and of everything in it that was not used."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.data.formats import FOREIGN, SUFFIXES, format_of
from finetune.data.items import Found, Items, Listing
from finetune.data.layouts import Layout, holds_runs
from finetune.data.split_names import few, item_name, normal_text
from finetune.data.walking import Left, files_below, holds_images, image_files, is_image, listed
from finetune.errors import DataError

NO_CLASS_NOTE = "hold no image and are no class"
SNIFFED = 20
"""Files of a folder without images that are opened to say what they are."""


def folder_images(root: Path, layout: Layout) -> Listing:
    """The images in class folders, each with its role.

    Raises:
        DataError: if images lie beside no class folder, or all files of a class are of a kind that is not read.
    """
    folders, notes = layout.folders, list(layout.notes)
    parents = sorted({layout.top} | {one.path.parent for one in folders})
    loose = [f for parent in parents for f in listed(parent) if is_image(f)]
    if not folders and (lone := loose or sorted(image_files(root, Left()))):
        raise _no_classes(lone)
    left, used = Left(), layout.used | {one.path for one in folders}
    items = Items(
        Found(item_name(file, root), normal_text(one.name), one.role, file)
        for one in folders
        for file in image_files(one.path, left, root)
    )
    for parent in [*layout.passed, *parents]:
        notes += _without_images(root, parent, used, {one.path.parent for one in folders})
    if left.kinds:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(left.kinds.items()))
        notes.append(
            f"{left.kinds.total()} files in class folders are no images by their names and were left: {kinds}."
        )
    if left.links:
        led = few(sorted(left.links))
        notes.append(f"{len(left.links)} links lead back into the data and were not followed: {led}.")
    if loose:
        notes.append(f"{len(loose)} images lie outside any class folder and were left (the first: {min(loose)}).")
    return Listing(kind="folders", items=items, warnings=tuple(notes))


def _no_classes(lone: Sequence[Path]) -> DataError:
    home, _ = Counter(file.parent for file in lone).most_common(1)[0]
    lone = [file for file in lone if file.parent == home]
    words = Counter(found[0] for file in lone if (found := re.match(r"[^\W\d_]{2,}", file.stem)))
    common = sorted(word for word, count in words.items() if count > 1)
    if 2 <= len(common) <= 100 and sum(words[word] for word in common) > 0.9 * len(lone):
        hint = f" Their names begin with {few(common)}: if that is the class, sort them into folders of these names."
    else:
        hint = ""
    return DataError(
        f"data.root: {home} holds images directly, without class folders. Put each image into a folder named "
        f"like its class, or write a table with columns image,label and give that.{hint}"
    )


def _without_images(root: Path, parent: Path, used: Iterable[Path], class_level: Iterable[Path]) -> list[str]:
    """A line on the folders of `parent` in which nothing can be used."""
    told = []
    for folder in listed(parent):
        if not folder.is_dir() or folder in used or holds_images(folder, root):
            continue
        if holds_runs(folder):
            told.append(f"{item_name(folder, root)} (runs of this tool)")
            continue
        what, is_image_kind = _what_is_there(folder)
        if is_image_kind and parent in class_level:
            raise DataError(
                f"data.root: no file in the class folder {folder} can be used ({what}). Save them as JPEG or PNG, or "
                "take the folder away."
            )
        told.append(f"{item_name(folder, root)} ({what})")
    return [f"{len(told)} folders {NO_CLASS_NOTE}: {few(told)}."] if told else []


def _what_is_there(folder: Path) -> tuple[str, bool]:
    """What a folder without images holds, and whether those files are images of a kind that is not read."""
    left = Left()
    list(image_files(folder, left))
    if left.links:
        return f"a link back into the data, {few(left.links)}", False
    if not left.kinds:
        return "empty", False
    named = [
        f"{n} x {kind}" + (f", {FOREIGN[kind]}" if kind in FOREIGN else "") for kind, n in sorted(left.kinds.items())
    ]
    files = sorted(f for f in files_below(folder, Left()) if f.is_file())
    inside = set(filter(None, map(_content, files[:SNIFFED])))
    if inside:
        named.append(f"by content {', '.join(sorted(inside))}")
    return "; ".join(named), bool(inside) or any(kind in FOREIGN for kind in left.kinds)


def _content(file: Path) -> str | None:
    """The format of an image under a name that is no image's."""
    with file.open("rb") as stream:
        name = format_of(stream.read(64))
    return name if name in SUFFIXES else None
