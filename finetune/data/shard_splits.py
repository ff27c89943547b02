"""The split that a column of parquet shards names, where the names of the files say none; by the rules of tables."""

from collections.abc import Collection, Sequence
from pathlib import Path

from finetune.data.columns import Columns, squeezed
from finetune.data.split_columns import MOST_WORDS, SplitRule, find_split, is_split_name
from finetune.data.split_names import Splits


def find_row_split(
    shards: Sequence[Path],
    header: Sequence[str],
    taken: Collection[str],
    wish: Columns,
    splits: Splits | None,
    *,
    where: str,
) -> SplitRule:
    """How rows get their role, by a column that is called like a split or that the recipe names.

    Args:
        shards: of one set.
        header: the names of their columns.
        taken: the columns of images and labels.
        wish: what the recipe says of columns.
        splits: what the recipe says of words.
        where: the set, for messages.

    Raises:
        DataError: if words are unknown, two columns could be the split, or the recipe names what is not there.
    """
    wished = squeezed(wish.get("split", ""))
    values: dict[int, dict[str, tuple[int, int]]] = {}
    for place, name in enumerate(header):
        if name not in taken and (is_split_name(name) or squeezed(name) == wished):
            words = _words(shards, name)
            if words is not None:
                values[place] = dict.fromkeys(words, (1, 1))
    return find_split(header, values, wish, splits, where=where)


def row_roles(shard: Path, header: Sequence[str], rule: SplitRule, num_rows: int) -> list[str | None]:
    """What `rule` says of each row: a role, that it is left out, or None."""
    held = {place: column_words(shard, header[place]) for place in rule.meanings}
    return [rule.role({place: own[row] for place, own in held.items()}) for row in range(num_rows)]


def column_words(shard: Path, name: str) -> list[str]:
    """The cells of a column as text; empty where there is nothing."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard, memory_map=True) as file:
        cells = file.read(columns=[name], use_threads=False).column(0).to_pylist()
    return ["" if cell is None else str(cell).strip() for cell in cells]


def _words(shards: Sequence[Path], name: str) -> list[str] | None:
    """Distinct cells of a column, sorted; None where there are too many for a split."""
    found: set[str] = set()
    for shard in shards:
        found.update(column_words(shard, name))
        if len(found) > MOST_WORDS:
            return None
    return sorted(found)
