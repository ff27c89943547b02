"""Images that a CSV or TSV table lists."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.data.items import Found, Items, Listing
from finetune.data.split_names import Splits, item_name, normal_text, role_of, unknown_split
from finetune.errors import DataError, nearest

TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def table_images(table: Path, splits: Splits | None = None) -> Listing:
    """The images that the rows of `table` name.

    Raises:
        DataError: if columns, labels or splits are missing or unknown.
    """
    _, header = next(_table_rows(table), (1, []))
    header = [cell.casefold() for cell in header]
    where = [column_of(name, header, str(table)) for name in ("image", "label")]
    split = header.index("split") if "split" in header else None
    short, has_roles = [], False
    for line, row in _table_rows(table, skip=1):
        if any(len(row) <= at or not row[at] for at in where):
            short.append(line)
        has_roles = has_roles or (split is not None and split < len(row) and bool(row[split]))
    if short:
        lines = ", ".join(map(str, short[:5]))
        raise DataError(f"{table}: {len(short)} rows lack an image or a label (lines {lines}). Fill or delete them.")

    def find() -> Iterator[Found]:
        for line, row in _table_rows(table, skip=1):
            word = row[split] if split is not None and split < len(row) else ""
            role = role_of(word, splits) if has_roles else None
            if has_roles and role is None:
                raise unknown_split(word, f"{table}, line {line}", splits)
            file = table.parent / row[where[0]].replace("\\", "/")
            yield Found(item_name(file, table.parent), normal_text(row[where[1]]), role, file)

    return Listing(kind="table", items=Items(find()))


def _table_rows(table: Path, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not empty, with their number, and without blanks around the cells."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=TABLE_DELIMITERS[table.suffix.lower()])
            for number, row in enumerate(reader):
                cells = [cell.strip() for cell in row]
                if number >= skip and (any(cells) or number == 0):
                    yield reader.line_num, cells
    except (csv.Error, UnicodeDecodeError) as fault:
        raise DataError(f"{table} cannot be read as a table in UTF-8 ({fault}). Save it as UTF-8 text.") from fault


def column_of(name: str, header: Sequence[str], where: str) -> int:
    """The place of a column.

    Raises:
        DataError: if `header` has none of this name.
    """
    if name in header:
        return header.index(name)
    raise DataError(
        f"{where} has no column `{name}`; it has {', '.join(header) or 'none'}. {nearest(name, header)} "
        "Needed are image and label; split is optional."
    )
