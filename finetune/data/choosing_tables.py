"""Which of several tables list the images: one for each split, or the only one with images and labels.

Forms for answers and tables without labels, which competitions put beside the training table, are named and left.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.columns import Columns, find_column, listed_names, squeezed
from finetune.data.delimited import TABLE_DELIMITERS, read_rows
from finetune.data.split_names import Splits, role_of
from finetune.data.walking import listed
from finetune.errors import DataError

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
