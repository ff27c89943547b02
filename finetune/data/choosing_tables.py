"""Which of several tables list the images: one for each split, or the only one with images and labels.

Forms for answers and tables without labels, which competitions put beside the training table, are named and left.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.columns import Columns, find_column, listed_names, squeezed
from finetune.data.delimited import TABLE_DELIMITERS, read_rows
from finetune.data.locating import Cell, find_rules
from finetune.data.split_names import Splits, normal_text, role_of
from finetune.data.walking import listed
from finetune.errors import DataError

_FIRST = 200
"""Rows by which a table beside folders is judged."""
_ORNAMENTS = {"labels", "label", "annotations", "annotation", "list", "lists", "metadata", "meta", "df", "info"}
"""Words that leave the meaning of a table's name as it is, beside those of all splits: `train_labels.csv`."""


def choose_tables(
    folder: Path, tables: Sequence[Path], splits: Splits | None, columns: Columns | None
) -> tuple[dict[Path, str | None], list[str]]:
    """Which of the tables in a folder list the images, each with its role; and a line on each of the others.

    Raises:
        DataError: if several could.
    """
    if len(tables) == 1 and tables[0].parent == folder:
        return {tables[0]: None}, []
    roles: dict[Path, str | None] = {}
    notes = []
    for table in tables:
        role = _role_of_table(table, folder, splits)
        if why := _useless(table, role, splits, columns or {}):
            notes.append(f"{table.name} is not used: {why}.")
        else:
            roles[table] = role
    names = listed_names([table.name for table in roles or tables])
    if len(roles) > 1 and None in roles.values():
        odd = next(table for table, role in roles.items() if role is None)
        raise DataError(
            f"data.root: {folder} holds {len(roles)} tables that may list the images ({names}), and {odd.name} is not "
            "called like a split. Give the one that lists the images, or say which is which: "
            f"data.splits='{{train: {odd.stem}, test: NAME}}'."
        )
    if not roles:
        raise DataError(
            f"data.root: {folder} holds {len(tables)} tables ({names}), none of which can be used. {' '.join(notes)} "
            "Name the columns: data.columns.image=NAME data.columns.label=NAME."
        )
    return roles, notes


def split_tables(root: Path, splits: Splits | None) -> list[Path]:
    """Tables beside images in folders named like splits: `train/metadata.csv`, as the datasets hub has them."""
    folders = [f for f in listed(root) if f.is_dir() and role_of(f.name, splits)]
    return [f for folder in folders for f in listed(folder) if f.is_file() and f.suffix.lower() in TABLE_DELIMITERS]


def outranks(table: Path, columns: Columns | None) -> str | None:
    """A line on a table that lists images under labels of its own, where folders beside it might be taken for classes.

    Such a table is read, and the folders are places and no classes. None: there are no folders, or the table cannot be
    read, finds less than half of its first images, or has a label that is the name of a folder.

    Args:
        table: beside folders.
        columns: as the recipe gives them.

    Raises:
        DataError: if its images may lie in several of the folders.
    """
    tops = [f for f in listed(table.parent) if f.is_dir()]
    folders = {f.name for f in tops} | {inner.name for f in tops for inner in f.glob("*/")}
    if len(tops) < 2:
        return None
    try:
        rows = read_rows(table, (columns or {}).values())
        places = [find_column(what, rows.header, columns or {}, str(table)) for what in ("image", "label")]
        if None in places:
            return None
        image, label = (place for place in places if place is not None)
        cells: list[Cell] = []
        labels: set[str] = set()
        for line, row in rows:
            if len(row) > max(image, label) and row[image]:
                labels.add(normal_text(row[label]))
                if len(cells) < _FIRST:
                    cells.append(Cell(line, row[image], row[label]))
    except DataError:  # it is not read, and said to be left
        return None
    if len(labels) < 2 or labels & folders:
        return None
    ways = find_rules(table, cells)
    if 2 * sum(any(way.found(cell.text, cell.label) for way in ways) for cell in cells) <= len(cells):
        return None
    return f"{table.name} gives the images labels of its own, so it was read, and the folders beside it are no classes."


def not_a_table(file: Path) -> DataError:
    """An error on a file that is neither a table nor a shard, with what to make of it."""
    do = {
        **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "Save the sheet as `CSV UTF-8`."),
        **dict.fromkeys((".txt", ".lst", ".list"), "Save it as CSV, with image,label as its first line."),
        **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "Unpack it, and give the folder."),
        **dict.fromkeys((".json", ".xml"), "Save it as CSV, with columns image,label."),
    }.get(file.suffix.lower(), "Give a folder.")
    return DataError(f"data.root: {file} is a file but no table (.csv, .tsv, .jsonl) or parquet shard. {do}")


def _useless(table: Path, role: str | None, splits: Splits | None, wish: Columns) -> str | None:
    """Why a table beside others is not used; None where it is."""
    if "submission" in table.stem.casefold():
        return "it is a form for answers"
    header = read_rows(table, wish.values()).header
    if splits is not None and role is None:
        return "data.splits does not name it"
    if not _has("image", header, wish):
        return "it has no column that is known as the image"
    if not _has("label", header, wish):
        hint = "; `finetune predict` labels its images" if role else ""
        return f"it has no column that is known as the label{hint}"
    return None


def _has(what: str, header: Sequence[str], wish: Columns) -> bool:
    if what in wish:
        return squeezed(wish[what]) in {squeezed(cell) for cell in header}
    try:
        return find_column(what, header, wish, "") is not None
    except DataError:  # two of them: said where the table is read
        return True


def _role_of_table(table: Path, folder: Path, splits: Splits | None) -> str | None:
    """The role that a table's name gives: `train.csv`, `train_labels.csv`, `labels-test.csv`."""
    stems = [table.stem, table.name]
    plain = [part for part in table.stem.replace("-", "_").split("_") if squeezed(part) not in _ORNAMENTS]
    words = [*stems, "_".join(plain), *([table.parent.name] if table.parent != folder else [])]
    return next((role for word in words if (role := role_of(word, splits))), None)
