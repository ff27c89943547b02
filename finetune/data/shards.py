"""Rows of parquet shards: read in any order, by any thread, in any forked loader worker."""

import errno
import threading
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.compute import after_fork

ROW_GROUP_CACHE_BYTES = 2**30
"""Image bytes of parquet row groups kept in memory, per process."""

_lock = threading.Lock()
_row_groups: dict[tuple[str, int, int, str, int], Any] = {}  # insertion order is age


def read_row(shard: Path, row: int, column: str = "image") -> bytes:
    """The image bytes of one row of a parquet shard, from any thread; rows near it are then cheap.

    Args:
        shard: the file.
        row: its number in the whole shard.
        column: holds bytes, or a struct with a field `bytes`.

    Raises:
        OSError: if the shard or the row cannot be read, or the row holds no bytes.
    """
    import pyarrow as pa

    state = shard.stat()
    key = (str(shard), state.st_mtime_ns, state.st_size, column)  # a shard written anew is another shard
    try:
        starts = _group_starts(*key[:3])
        group = bisect_right(starts, row) - 1
        with _lock:  # several threads read at once; one of them loads
            images = _row_groups.get((*key, group))
            if images is None:
                images = _load_group(key, group)
        value: bytes | None = images[row - starts[group]].as_py()
    except (pa.ArrowException, IndexError, KeyError) as fault:
        raise OSError(errno.EIO, f"row {row} cannot be read ({fault})", str(shard)) from fault
    if value is None:
        raise OSError(errno.EIO, f"row {row} holds no bytes", str(shard))
    return value


@lru_cache(maxsize=1024)
def _group_starts(shard: str, _changed: int, _size: int) -> tuple[int, ...]:
    import pyarrow.parquet as pq

    meta = pq.read_metadata(shard)
    starts = [0]
    for group in range(meta.num_row_groups - 1):
        starts.append(starts[-1] + meta.row_group(group).num_rows)
    return tuple(starts)


def _load_group(key: tuple[str, int, int, str], group: int) -> Any:
    """The image bytes of one row group, as a pyarrow column; kept, while the oldest make room."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Neither threads nor open handles outlive the call: both would break in forked loader workers.
    with pq.ParquetFile(key[0], memory_map=True) as file:
        is_struct = pa.types.is_struct(file.schema_arrow.field(key[3]).type)
        name = f"{key[3]}.bytes" if is_struct else key[3]
        table = file.read_row_group(group, columns=[name], use_threads=False)
    images = (table.flatten() if is_struct else table).column(name)
    held = sum(kept.nbytes for kept in _row_groups.values())
    for old in list(_row_groups):
        if held + images.nbytes <= ROW_GROUP_CACHE_BYTES:
            break
        held -= _row_groups.pop(old).nbytes
    _row_groups[(*key, group)] = images
    return images


def _renew_lock() -> None:
    """A forked child has only the thread that forked; a lock that another one held would stay shut."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


after_fork(_renew_lock)
