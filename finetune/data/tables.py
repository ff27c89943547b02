"""Tables: rows into a parquet file, a part at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from finetune.runs.folder import write_whole

KINDS = ("text", "number", "texts", "numbers")
"""What a column may hold: a text, a number, a list of texts, or numbers by text. Any of them may be None."""
Row = Mapping[str, str | float | Sequence[str] | Mapping[str, float] | None]
_ROWS = 4096
"""Per row group; bounds memory."""


def write_parquet(rows: Iterable[Row], path: Path, columns: Mapping[str, str]) -> int:
    """How many rows were written. The file is whole or absent; rows are taken as they come and never all held.

    Args:
        rows: each with a value, or None, for every column.
        path: written over.
        columns: kind of each, one of `KINDS`, by name.

    Raises:
        ValueError: if a kind is unknown.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    types = dict(zip(KINDS, (text, number, pa.list_(text), pa.map_(text, number)), strict=True))
    if unknown := sorted(set(columns.values()) - set(KINDS)):
        raise ValueError(f"a column holds one of {', '.join(KINDS)}, not {', '.join(unknown)}.")
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with pq.ParquetWriter(temporary, schema) as writer:
            for part in _parts(rows):
                writer.write_table(pa.Table.from_pylist([_plain(row) for row in part], schema=schema))
                count += len(part)

    write_whole(path, write)
    return count


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while part := list(islice(remaining, _ROWS)):
        yield part


def _plain(row: Row) -> dict[str, object]:
    return {key: list(value.items()) if isinstance(value, Mapping) else value for key, value in row.items()}
