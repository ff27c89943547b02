"""Images that tables list: one table, perhaps with a split column, or one table for each split.

A table is read twice, row by row: once to learn what its columns hold and where its files lie, once to list its images.
Whatever of it is not used (columns, rows, other tables) is named with its reason.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.columns import (
    Columns,
    find_column,
    is_known,
    listed_names,
    missing_column,
    taken_note,
)
from finetune.data.delimited import Rows, read_rows
from finetune.data.formats import IMAGE_SUFFIXES
from finetune.data.items import Found, Items, Listing
from finetune.data.labels import NO_LABEL, NO_MULTI_LABEL, check_labels
from finetune.data.locating import Cell, Rule, find_rules, not_found, rules_note
from finetune.data.split_columns import LEFT_OUT, MOST_WORDS, SplitRule, find_split
from finetune.data.split_names import Splits, few, item_name, normal_text
from finetune.errors import DataError

_SAMPLE = 100
"""Rows from all over a table by which its files are found."""
_SHOWN_COLUMNS = 8
"""Columns that are not used and get a line each; the rest share one."""


@dataclass(kw_only=True)
class _Profile:
    """What a first reading tells."""

    num_rows: int = 0
    sample: list[Cell] = field(default_factory=list)
    values: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """See `split_columns.Values`."""


@dataclass(kw_only=True)
class _Left:
    """Rows that a second reading could not use, by reason: their number and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, what: object) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= 5:
            self.first.setdefault(reason, []).append(str(what))

    def told(self, reason: str) -> str:
        """The first of them, with commas."""
        return ", ".join(self.first[reason])


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table that is understood."""

    rows: Rows
    image: int
    label: int
    split: SplitRule
    role: str | None
    """Of all its rows, where it is the table of one split."""
    files: tuple[Rule, ...]
    notes: tuple[str, ...]


def table_images(
    tables: Mapping[Path, str | None],
    splits: Splits | None = None,
    columns: Columns | None = None,
    notes: Iterable[str] = (),
) -> Listing:
    """The images that the rows of `tables` name.

    Args:
        tables: each with the role of its rows; None: a column says it, or nothing does.
        splits: the words that mean each role, as the recipe gives them.
        columns: the columns that are image, label and split, as the recipe gives them.
        notes: taken over.

    Raises:
        DataError: if columns, labels or splits are missing, unknown or ambiguous, or no file is found.
    """
    read = [_understand(table, role, splits, columns or {}) for table, role in tables.items()]
    left = [_Left() for _ in read]
    root = Path(os.path.commonpath([table.parent for table in tables]))
    items = Items(one for table, own in zip(read, left, strict=True) for one in _find(table, own, root))
    where = ", ".join(str(table.rows.path) for table in read)
    lines = [*notes, *(note for table in read for note in table.notes)]
    for table, own in zip(read, left, strict=True):
        lines += _left_notes(table.rows.path, own)
    totals: Counter[str] = Counter()
    for held in items.counts().values():
        totals.update(held)
    check_labels(totals, where)
    lines += _repeated(items, where)
    return Listing(kind="table", items=items, warnings=tuple(lines))


def _understand(table: Path, role: str | None, splits: Splits | None, wish: Columns) -> _Table:
    rows, where = read_rows(table, wish.values()), str(table)
    header = rows.header
    _refuse_headless(rows, wish)
    image = find_column("image", header, wish, where)
    if image is None:
        raise missing_column("image", header, where)
    label = find_column("label", header, wish, where)
    profile = _profile(rows, image, label)
    if label is None:
        raise _one_hot(header, profile, where) or missing_column("label", header, where)
    if image == label:
        raise DataError(f"{where}: column `{header[image]}` cannot be both image and label.")
    split = SplitRule() if role else find_split(header, profile.values, wish, splits, where=where)
    files = find_rules(table, profile.sample)
    if profile.sample and not files:
        raise not_found(table, profile.sample)
    notes = [
        taken_note(where, header, {"image": image, "label": label}),
        rules_note(table, files, profile.sample) if files else None,
        *split.notes,
        *_unused_columns(header, {image, label, *split.meanings}, " ".join(split.notes)),
    ]
    return _Table(
        rows=rows,
        image=image,
        label=label,
        split=split,
        role=role,
        files=tuple(files),
        notes=tuple(note for note in notes if note),
    )


def _refuse_headless(rows: Rows, wish: Columns) -> None:
    """A first line that names an image is no header."""
    header, table = rows.header, rows.path
    if wish:
        return
    paths = [cell for cell in header if _is_image_path(cell)]
    if not paths and not any(is_known(cell) for cell in header):
        paths = [cell for cell in header if cell and (table.parent / cell.replace("\\", "/")).is_file()]
    if paths:
        cell = paths[0]
        names = ["image" if one == cell else f"column{place}" for place, one in enumerate(header)]
        if len(names) == 2:
            names = ["image" if one == cell else "label" for one in header]
        raise DataError(
            f"{table} has no header: its first line names the image {cell!r}. Write a line with the names of "
            f"the columns above it, such as {(rows.delimiter or ',').join(names)}."
        )


def _is_image_path(cell: str) -> bool:
    return Path(cell.replace("\\", "/")).suffix.lower() in IMAGE_SUFFIXES


def _profile(rows: Rows, image: int, label: int | None) -> _Profile:
    """Read a table once: a sample of its images, and what the columns hold that are neither image nor label."""
    profile, draw = _Profile(), random.Random(0)
    profile.values = {place: {} for place in range(len(rows.header)) if place not in (image, label)}
    longer = []
    for line, row in rows:
        profile.num_rows += 1
        if any(row[len(rows.header) :]):
            longer.append(str(line))
        for place in list(profile.values):
            cells = profile.values[place]
            word = row[place] if place < len(row) else ""
            first, count = cells.get(word, (line, 0))
            cells[word] = first, count + 1
            if len(cells) > MOST_WORDS:
                del profile.values[place]
        if image < len(row) and row[image]:
            cell = Cell(line, row[image], row[label] if label is not None and label < len(row) else "")
            if len(profile.sample) < _SAMPLE:
                profile.sample.append(cell)
            elif (at := draw.randrange(profile.num_rows)) < _SAMPLE:
                profile.sample[at] = cell
    if longer:
        raise DataError(
            f"{rows.path}: {len(longer)} rows have more cells than the header (lines {few(longer)}). Put quotes around "
            "cells that hold the separator, or name the columns that the header lacks."
        )
    profile.sample.sort()
    return profile


def _one_hot(header: Sequence[str], profile: _Profile, where: str) -> DataError | None:
    """An error where there is no label, but several columns hold 0 and 1 alone."""
    hot = [
        header[place]
        for place, cells in profile.values.items()
        if header[place] and cells and {cell.casefold() for cell in cells} <= {"0", "1", "0.0", "1.0", "true", "false"}
    ]
    if len(hot) < 2:
        return None
    return DataError(
        f"{where} has no column `label`, but {len(hot)} columns hold only 0 and 1 ({listed_names(hot)}): labels as "
        "one-hot columns. Write one column `label` with the name of the column that holds the 1. "
        f"{NO_MULTI_LABEL}."
    )


def _unused_columns(header: Sequence[str], used: set[int], said: str) -> list[str]:
    """A line for each column that nothing is made of."""
    names = [
        f"`{name}`" if name else f"{place + 1} (without a name)"
        for place, name in enumerate(header)
        if place not in used
    ]
    names = [name for name in names if f"column {name}" not in said]
    lines = [f"column {name} is not used." for name in names[:_SHOWN_COLUMNS]]
    if more := names[_SHOWN_COLUMNS:]:
        lines.append(f"{len(more)} more columns are not used: {listed_names(more)}.")
    return lines


def _find(table: _Table, left: _Left, root: Path) -> Iterator[Found]:
    """The images of one table; what cannot be used is counted in `left`, and refused at the end where it does harm."""
    needed = max(table.image, table.label)
    for line, row in table.rows:
        cells = row + [""] * (needed + 1 - len(row))
        text, label = cells[table.image], normal_text(cells[table.label])
        if "\n" in text or "\n" in label:
            raise DataError(f"{table.rows.path}: a quote is opened but not closed in the row that ends in line {line}.")
        words = {place: row[place] if place < len(row) else "" for place in table.split.meanings}
        role = table.role or table.split.role(words)
        if role == LEFT_OUT:
            left.add("other", line)
        elif not text or (label.casefold() in NO_LABEL and role != "test"):
            left.add("short", line)
        elif label.casefold() in NO_LABEL:
            left.add("unlabelled", line)
        else:
            file = _file(table.files, text, label)
            if file is None:
                file = table.files[0].file(text, label) or root / text
                left.add("missing", text)
            yield Found(item_name(file, root), label, role, file)
    if num := left.counts["short"]:
        raise DataError(
            f"{table.rows.path}: {num} rows lack an image or a label (lines {left.told('short')}). Fill or delete them."
        )


def _file(rules: Sequence[Rule], text: str, label: str) -> Path | None:
    return next((file for rule in rules if (file := rule.found(text, label))), None)


def _left_notes(table: Path, left: _Left) -> Iterator[str]:
    if num := left.counts["missing"]:
        yield f"{table}: {num} of the images it lists are not there: {left.told('missing')}."
    if num := left.counts["unlabelled"]:
        yield (
            f"{table}: {num} test rows have no label and are not used (lines {left.told('unlabelled')}). `finetune "
            "predict` labels their images."
        )
    if num := left.counts["other"]:
        yield f"{table}: {num} rows are not used, for data.splits does not name what their split column holds."


def _repeated(items: Items, where: str) -> list[str]:
    """A line on images that are listed more than once.

    Raises:
        DataError: if one has several labels.
    """
    twice: Counter[str] = Counter()
    torn: Counter[str] = Counter()
    for place in range(1, len(items)):
        if (name := items.name(place)) == items.name(place - 1):
            (twice if items.labels[place] == items.labels[place - 1] else torn)[name] += 1
    if torn:
        raise DataError(
            f"{where}: {len(torn)} images are listed with several labels: {few([*torn])}. Keep one label for "
            f"each. {NO_MULTI_LABEL}."
        )
    if twice:
        return [f"{where}: {twice.total()} rows name, with the same label, an image of another row: {few([*twice])}."]
    return []
