"""Images in parquet shards, as the datasets hub writes them; only listed here, `shards` reads their bytes."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.data.items import Found, Items, Listing
from finetune.data.split_names import Splits, item_name, normal_text, role_of, unknown_split
from finetune.data.table_files import column_of
from finetune.data.walking import listed
from finetune.errors import DataError


def find_shards(folder: Path) -> list[Path]:
    """Parquet files directly in `folder`."""
    return [f for f in listed(folder) if f.suffix.lower() == ".parquet"] if folder.is_dir() else []


def parquet_images(root: Path, shards: Sequence[Path], splits: Splits | None = None) -> Listing:
    """The rows of `shards`.

    Raises:
        DataError: if a shard cannot be read, or its split or labels are unknown.
    """
    return Listing(
        kind="parquet", items=Items(one for shard in shards for one in _shard_images(root, shard, len(shards), splits))
    )


def _shard_images(root: Path, shard: Path, num_shards: int, splits: Splits | None) -> Iterator[Found]:
    import pyarrow as pa

    word = re.split(r"[-.]", shard.name)[0]
    role = role_of(word, splits)
    if role is None and num_shards > 1:
        raise unknown_split(word, str(shard), splits)
    try:
        labels = _shard_labels(shard)
    except pa.ArrowException as fault:
        raise DataError(f"{shard} is no parquet file we can read ({fault}). Fetch it again.") from fault
    name = item_name(shard, root if root.is_dir() else root.parent)
    for row, label in enumerate(labels):
        yield Found(f"{name}#{row}", label, role, shard, row)


def _shard_labels(shard: Path) -> list[str]:
    """The class name of every row; the number itself where the schema names no classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard, memory_map=True) as file:
        schema = file.schema_arrow
        for name in ("image", "label"):
            column_of(name, schema.names, str(shard))
        image = schema.field("image").type
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise DataError(f"{shard}: column image is {image}; it must be struct<bytes: binary, path: string>.")
        values = file.read(columns=["label"], use_threads=False).column("label").to_pylist()
    names = _stored_names(schema.metadata or {})
    wrong = [row for row, value in enumerate(values) if value is None or (names and value not in range(len(names)))]
    if wrong:
        raise DataError(
            f"{shard}: {len(wrong)} rows have no label in [0, {len(names) or '...'}); the first is row {wrong[0]}, "
            f"with {values[wrong[0]]!r}. Shards of a test set are often published without labels: leave them out."
        )
    return [normal_text(names[value] if names else str(value)) for value in values]


def _stored_names(metadata: dict[bytes, bytes]) -> list[str]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
