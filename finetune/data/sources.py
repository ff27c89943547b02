"""Where images and labels come from: class folders, a table, or parquet shards of the datasets hub.

A source only lists; it opens no image. Names are sorted, so its order never depends on the file system, and
classes are always the sorted names (also for parquet, whose stored label numbers are mapped), so one rule
tells which output belongs to which class.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.data.choosing_tables import choose_tables, not_a_table, outranks, split_tables
from finetune.data.columns import Columns
from finetune.data.decoding import BadImage
from finetune.data.delimited import TABLE_DELIMITERS
from finetune.data.folders import NO_CLASS_NOTE, folder_images
from finetune.data.formats import IMAGE_SUFFIXES
from finetune.data.items import Item, Items, Listing
from finetune.data.labels import spelling_warnings
from finetune.data.layouts import classes_in, find_layout, given_folder, lone_folders, subfolders
from finetune.data.parquet_files import find_shards, parquet_images
from finetune.data.shards import read_row
from finetune.data.split_names import Splits, few, item_name, role_of
from finetune.data.table_files import table_images
from finetune.data.walking import Left, image_files, listed
from finetune.errors import DataError, names_beside, nearest


@dataclass(frozen=True, kw_only=True)
class Source:
    """All images of a data set, unread."""

    root: Path
    kind: str
    """folders, table, parquet, or dataset where a program handed it in."""
    classes: tuple[str, ...]
    """Names in Unicode's composed form (NFC), sorted; of a dataset in its own order."""
    items: Items
    """Sorted by name."""
    warnings: tuple[str, ...]
    digests: tuple[str | BadImage, ...] | None = None
    """Of every item's content, or the fault that reading it met, where listing took reading; None elsewhere."""

    def of_role(self, *roles: str | None) -> "Source":
        """The same source with the images of these roles alone; None stands for images of no role."""
        rows = [index for index in range(len(self.items)) if self.items.role(index) in roles]
        digests = None if self.digests is None else tuple(self.digests[row] for row in rows)
        return replace(self, items=self.items.taken(np.array(rows, dtype=np.int64)), digests=digests)


def read_bytes(item: Item) -> bytes:
    """The image file of `item`, undecoded. Cheap in random order, and after a fork.

    Raises:
        OSError: if the file or the row cannot be read.
        BadImage: if a program holds the image, and cannot give it.
    """
    if item.data is not None:
        return item.data
    if item.read is not None:
        return item.read()
    return item.file.read_bytes() if item.row is None else read_row(item.file, item.row, item.column or "image")


def open_source(
    root: Path, splits: Splits | None = None, columns: Columns | None = None, *, is_learned: bool = True
) -> Source:
    """The images under `root`, in one of four layouts.

    Folders `train`, `val` (`valid`, `validation`), `calibration`, `test` of class folders; one tree of class
    folders; a table (.csv, .tsv or .jsonl) with columns image, label and perhaps split, or one table for each split;
    parquet shards `SPLIT-*.parquet` with columns `image: struct<bytes, path>` and `label`. Class folders are searched
    to any depth.

    Args:
        root: a folder, or a table or shard.
        splits: the names that mean a split, by role, as `data.splits` gives them; None: `split_names` knows them.
        columns: the columns of a table or shard that are image, label and split, as `data.columns` gives them.
        is_learned: whether a model is to learn from them, which takes two classes; to judge one, any class will do.

    Raises:
        DataError: if there is nothing to learn from, or the layout is ambiguous.
    """
    if not root.exists():
        hint = nearest(root.name, names_beside(root), otherwise="Check the path.")
        raise DataError(f"data.root: {root} does not exist. {hint}")
    try:
        source = _source(root, _open(root, splits, columns), is_learned)
    except OSError as fault:
        raise DataError(f"data.root: {fault.filename or root} cannot be read ({fault.strerror or fault}).") from fault
    _refuse_unused(source, columns or {})
    return source


def _refuse_unused(source: Source, columns: Columns) -> None:
    """Raises DataError where the recipe names columns and there is no table: a wish is never dropped unsaid."""
    if columns and source.kind == "folders":
        raise DataError(
            f"data.columns names columns of a table ({', '.join(columns.values())}), but {source.root} holds class "
            "folders. Give the table itself as data.root, or remove the key."
        )


def _open(root: Path, splits: Splits | None, columns: Columns | None) -> Listing:
    if root.is_file():
        if root.suffix.lower() in TABLE_DELIMITERS:
            return table_images({root: None}, splits, columns)
        if root.suffix.lower() == ".parquet":
            return parquet_images(root, [root], splits, columns)
        raise not_a_table(root)
    top = lone_folders(root)[-1]
    if shards := find_shards(top):
        return parquet_images(root, shards, splits, columns)
    tables = [f for f in listed(top) if f.is_file() and f.suffix.lower() in TABLE_DELIMITERS]
    tables = tables or split_tables(top, splits)
    named = [given_folder(root, top, name) for names in (splits or {}).values() for name in names]
    if not named and len(tables) == 1 and (note := outranks(tables[0], columns)):
        return _listed_images(root, top, {tables[0]: None}, splits, columns, [note])
    if not named or not tables or any(one is not None and classes_in(one, root) for one in named):
        layout = find_layout(root, splits)
        if len(layout.folders) >= 2 or not tables:
            unread = "lies beside class folders and was not read; to use it, give"
            layout.notes += [f"{table.name} {unread} {table}." for table in tables]
            return folder_images(root, layout)
    chosen, notes = choose_tables(top, tables, splits, columns)
    return _listed_images(root, top, chosen, splits, columns, notes)


def _listed_images(
    root: Path,
    top: Path,
    tables: Mapping[Path, str | None],
    splits: Splits | None,
    columns: Columns | None,
    notes: Sequence[str],
) -> Listing:
    try:
        listing = table_images(tables, splits, columns, notes)
    except DataError as fault:
        holding = [one for one in subfolders(top, root) if len(classes_in(one, root)) > 1]
        if len(holding) != 1:
            raise
        raise DataError(f"{fault} Or give {holding[0]}, which holds class folders.") from fault
    return replace(listing, warnings=(*listing.warnings, *_unlisted(top, tables, listing.items)))


def _unlisted(folder: Path, tables: Collection[Path], items: Items) -> list[str]:
    """A line on the images in a folder that its tables do not list.

    Raises:
        DataError: if they lie in a folder named like a split, and the tables were a choice among several.
    """
    more = Counter(os.path.realpath(file.parent) for file in image_files(folder, Left()))
    more.subtract({os.path.realpath(where): count for where, count in items.counts_by_folder().items()})
    held = {where: count for where, count in sorted(more.items()) if count > 0}
    if not held:
        return []
    told = [f"{count} in {item_name(Path(where), folder.resolve())}" for where, count in held.items()]
    present = [f for f in listed(folder) if f.suffix.lower() in TABLE_DELIMITERS]
    if len(present) > len(tables) and any(role_of(Path(where).name) for where in held):
        raise DataError(
            f"data.root: {folder} holds {len(present)} tables ({few([f.name for f in present])}), and images that none "
            f"of those with labels lists: {few(told)}. If they are to stay out, give the table itself, "
            f"{next(iter(tables))}: splits are then cut from its rows. `finetune predict` labels the others."
        )
    return [f"{sum(held.values())} images are in no row of the table and were left: {few(told)}."]


def _source(root: Path, listing: Listing, is_learned: bool) -> Source:
    items, warnings = listing.items, list(listing.warnings)
    if not len(items):
        raise DataError(
            f"data.root: {root} holds no images. Expected are class folders with {', '.join(sorted(IMAGE_SUFFIXES))} "
            "files (perhaps inside train, val, test), a table with columns image,label, or parquet shards."
            f"{_what_else(root)}"
        )
    counts = items.counts()
    if not is_learned:
        classes = tuple(sorted({name for held in counts.values() for name in held}))
        items.number_classes({name: label for label, name in enumerate(classes)})
        return Source(root=root, kind=listing.kind, classes=classes, items=items, warnings=tuple(warnings))
    learned = counts.get("train") or counts.get("all")
    if not learned:
        raise DataError(f"data.root: {root} names the splits {', '.join(counts)} but no train to learn from. Add it.")
    classes = tuple(sorted(learned))
    _check_classes(root, classes, counts, [line for line in warnings if NO_CLASS_NOTE in line])
    for role, held in counts.items():
        if missing := [c for c in classes if c not in held]:
            warnings.append(f"{role} has no image of {len(missing)} of {len(classes)} classes: {few(missing)}.")
    if single := [c for c in classes if learned[c] == 1]:
        warnings.append(f"{len(single)} classes have a single image to learn from: {few(single)}.")
    warnings += spelling_warnings(learned)
    items.number_classes({name: label for label, name in enumerate(classes)})
    return Source(root=root, kind=listing.kind, classes=classes, items=items, warnings=tuple(warnings))


def _what_else(root: Path) -> str:
    left = Left()
    list(image_files(root, left) if root.is_dir() else [])
    return f" There are {', '.join(f'{n} x {kind}' for kind, n in left.kinds.most_common(5))}." if left.kinds else ""


def _check_classes(root: Path, classes: Sequence[str], counts: dict[str, dict[str, int]], left: Sequence[str]) -> None:
    faults = [
        f"class {name!r} is in {role} but not in train. {nearest(name, classes)}".strip()
        for role, held in counts.items()
        for name in sorted(set(held) - set(classes))
    ]
    if faults:
        raise DataError(
            f"data.root: {root}: {' '.join(faults[:5])} Rename or remove what is extra ({len(faults)} in all)."
        )
    if len(classes) < 2:
        raise DataError(
            f"data.root: {root} holds one class only ({classes[0]!r}); to tell apart takes two. If the classes lie "
            f"deeper, give the folder that holds the class folders directly. {' '.join(left)}".rstrip()
        )
