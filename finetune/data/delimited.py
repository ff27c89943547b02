"""Rows of tables as people save them: commas, semicolons, tabs or bars, a byte-order mark, blanks around cells; JSON
lines, too.

The separator is read off the first lines, never off the suffix alone. Text must be UTF-8: another encoding cannot be
told from the bytes with certainty, and a wrong guess would misspell labels in silence.
"""

import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.data.columns import is_known, squeezed
from finetune.errors import DataError

TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
"""Suffixes of tables, and what separates cells where the lines do not tell."""
_DELIMITERS = ",;\t|"
_HEAD_BYTES = 1 << 16
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MEND = "Save the table as UTF-8 text (spreadsheets call it `CSV UTF-8`)"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A table whose first line is known, and whose rows are read anew each time they are asked for."""

    path: Path
    header: tuple[str, ...]
    """Names of columns, without blanks around them."""
    delimiter: str
    """Empty for JSON lines."""
    header_line: int
    """Its number, from 1; 0 for JSON lines."""

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Lines that are not empty below the header, with their numbers; cells without blanks around them."""
        try:
            yield from (self._json_rows() if not self.delimiter else self._text_rows())
        except UnicodeDecodeError:
            raise _not_utf8(self.path) from None
        except csv.Error as fault:
            raise DataError(f"{self.path} cannot be read as a table ({fault}). Is a quote left open?") from fault

    def _text_rows(self) -> Iterator[tuple[int, list[str]]]:
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=self.delimiter, skipinitialspace=True)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if reader.line_num > self.header_line and any(cells):
                    yield reader.line_num, cells

    def _json_rows(self) -> Iterator[tuple[int, list[str]]]:
        with self.path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    one = _json_object(self.path, number, line)
                    yield number, [_as_cell(one.get(name)) for name in self.header]


def read_rows(path: Path, known: Collection[str] = ()) -> Rows:
    """The table at `path`, its header and separator found.

    Args:
        path: a file with a suffix of `TABLE_DELIMITERS`.
        known: names of columns that the recipe gives; they help to find the separator.

    Raises:
        DataError: if it is no UTF-8 text, or empty.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_UTF16) or b"\0" in head[:1000]:
        raise DataError(
            f"{path} is UTF-16 text, or no text at all. {_MEND}, or convert it: iconv -f UTF-16 -t UTF-8 {path.name}."
        )
    text = head.decode("utf-8-sig", errors="replace")  # rows are read strictly, and then name the fault
    if len(head) == _HEAD_BYTES:
        text = text[: text.rfind("\n") + 1] or text
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        names = [name for number, line in lines for name in _json_object(path, number, line)]
        return Rows(path=path, header=tuple(dict.fromkeys(names)), delimiter="", header_line=0)
    delimiter = _delimiter(text, TABLE_DELIMITERS[path.suffix.lower()], {squeezed(name) for name in known})
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    cells = next(([cell.strip() for cell in row] for row in reader if _is_row(row)), [])
    if any("�" in cell for cell in cells):
        raise _not_utf8(path)
    return Rows(path=path, header=tuple(cells), delimiter=delimiter, header_line=reader.line_num)


def _is_row(row: list[str]) -> bool:
    """Whether a first line names columns; `sep=;` is a word to spreadsheets."""
    return any(cell.strip() for cell in row) and not row[0].strip().casefold().startswith("sep=")


def _delimiter(text: str, own: str, known: Collection[str]) -> str:
    """The separator under which the header names known columns and all rows are as long as it is."""
    best, chosen = (0, 0.0, 1, False), own
    for delimiter in _DELIMITERS:
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            rows = [row for row, _ in zip((row for row in reader if _is_row(row)), range(50), strict=False)]
        except csv.Error:
            continue
        if not rows or len(rows[0]) < 2:
            continue
        names = sum(is_known(cell) or squeezed(cell) in known for cell in rows[0])
        alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        if (score := (names, alike, len(rows[0]), delimiter == own)) > best:
            best, chosen = score, delimiter
    return chosen


def _json_object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        one = json.loads(line)
    except ValueError as fault:
        raise DataError(f"{path}, line {number}: this is no JSON ({fault}). Each line must be an object.") from fault
    if not isinstance(one, dict):
        raise DataError(
            f'{path}, line {number}: each line must be an object such as {{"file_name": ..., "label": ...}}.'
        )
    return one


def _as_cell(value: object) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _not_utf8(path: Path) -> DataError:
    """Where the first byte lies that is no UTF-8, and what stands around it."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as fault:
                around = line[max(0, fault.start - 10) : fault.start + 10].decode("latin-1")
                return DataError(
                    f"{path}, line {number}: byte 0x{line[fault.start]:02x} (near {around!r} in Latin-1) is no UTF-8. "
                    f"{_MEND}, or convert it: iconv -f ENCODING -t UTF-8 {path.name}."
                )
    return DataError(f"{path} is no UTF-8 text. {_MEND}.")
