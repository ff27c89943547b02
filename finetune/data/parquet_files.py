"""Images in parquet shards, as the datasets hub writes them; only listed here, `shards` reads their bytes.

The image is the column whose type can hold one; the label is found by name, as in tables. A shard's split is a word in
its own name or in that of a folder around it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.columns import Columns, find_column, listed_names, missing_column, taken_note
from finetune.data.items import Found, Items, Listing
from finetune.data.labels import NO_LABEL, NO_MULTI_LABEL, check_labels
from finetune.data.shard_splits import find_row_split, row_roles
from finetune.data.split_columns import LEFT_OUT, SplitRule
from finetune.data.split_names import Splits, item_name, name_parts, normal_text, role_of, unknown_split
from finetune.data.walking import is_hidden
from finetune.errors import DataError

_DEPTH = 3
"""Folders below the root in which shards are looked for: the hub's are `plain_text/train/0000.parquet`, at most."""
_NO_SPLIT = frozenset(["part", "data", "shard", "chunk", "file", "of", "all", "c", "snappy", "dataset", "images"])
"""Words of shards' names that are no name of a split, beside numbers."""


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard whose columns are known."""

    path: Path
    role: str | None
    image: str
    label: str
    names: tuple[str, ...]
    """Of the classes, by number, where the schema has them."""
    header: tuple[str, ...]
    """Names of all columns."""
    notes: tuple[str, ...]


def find_shards(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Parquet files in `folder`, or else in the folders below it.

    Raises:
        DataError: if several folders hold a set of their own.
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        inside = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
    if own := [Path(e.path) for e in inside if e.name.lower().endswith(".parquet") and e.is_file()]:
        return own
    folders = [Path(e.path) for e in inside if depth and e.is_dir()]
    below = {f: shards for f in folders if (shards := find_shards(f, depth - 1))}
    if len(below) > 1 and not all(role_of(f.name) for f in below):
        names = listed_names([f.name for f in below])
        raise DataError(
            f"data.root: {folder} holds {len(below)} folders of parquet shards ({names}), each a set of its own. "
            "Give one."
        )
    return [shard for shards in below.values() for shard in shards]


def parquet_images(
    root: Path, shards: Sequence[Path], splits: Splits | None = None, columns: Columns | None = None
) -> Listing:
    """The rows of `shards`.

    Args:
        root: what the names of images are relative to.
        shards: parquet files.
        splits: the words that mean each role, as the recipe gives them.
        columns: the columns that are image and label, as the recipe gives them.

    Raises:
        DataError: if a shard cannot be read, or its columns, split or labels are unknown.
    """
    base = root if root.is_dir() else root.parent
    roles = _roles(base, shards, splits)
    read = [_understand(path, roles[path], columns or {}) for path in shards]
    if odd := [shard for shard in read if shard.image != read[0].image]:
        raise DataError(
            f"{odd[0].path}: images are in column `{odd[0].image}`, but in {read[0].path.name} they are in "
            f"`{read[0].image}`. Give the shards of one set."
        )
    split, header = _row_split(root, read, columns or {}, splits), read[0].header
    unlabelled: Counter[str] = Counter()
    others: Counter[str] = Counter()

    def find() -> Iterator[Found]:
        for shard in read:
            name = item_name(shard.path, base)
            labels = _labels(shard)
            own = row_roles(shard.path, header, split, len(labels)) if split.meanings else [shard.role] * len(labels)
            _refuse_unlabelled(shard, labels, own)
            for row, (label, role) in enumerate(zip(labels, own, strict=True)):
                if role == LEFT_OUT:
                    others[str(shard.path)] += 1
                elif label is None:
                    unlabelled[str(shard.path)] += 1
                else:
                    yield Found(f"{name}#{row}", label, role, shard.path, row)

    items = Items(find(), column=read[0].image)
    totals: Counter[str] = Counter()
    for held in items.counts().values():
        totals.update(held)
    if not any(shard.names for shard in read):
        check_labels(totals, str(root))
    said, used = " ".join(split.notes), {read[0].image, read[0].label, *(header[place] for place in split.meanings)}
    notes = [*dict.fromkeys(note for shard in read for note in shard.notes), *split.notes]
    notes += [
        f"column `{name}` of the parquet shards is not used."
        for name in dict.fromkeys(name for shard in read for name in shard.header)
        if name not in used and f"column `{name}`" not in said
    ]
    notes += [
        f"{path}: {num} test rows have no label and are not used. `finetune predict` labels images."
        for path, num in unlabelled.items()
    ]
    notes += [
        f"{path}: {num} rows are not used, for data.splits does not name what their split column holds."
        for path, num in others.items()
    ]
    return Listing(kind="parquet", items=items, warnings=tuple(notes))


def _row_split(root: Path, shards: Sequence[_Shard], wish: Columns, splits: Splits | None) -> SplitRule:
    """The split by a column, where the shards' names say none."""
    first = shards[0]
    if not any(shard.role for shard in shards):
        paths, taken = [shard.path for shard in shards], {first.image, first.label}
        return find_row_split(paths, first.header, taken, wish, splits, where=str(root))
    if "split" in wish:
        raise DataError(
            f"{root}: data.columns.split={wish['split']}: the shards' names say the split already. Leave it out."
        )
    return SplitRule()


def _roles(base: Path, shards: Sequence[Path], splits: Splits | None) -> dict[Path, str | None]:
    """Of each shard, by its name or by that of a folder around it; of one shard alone, only where a name says so."""
    roles: dict[Path, str | None] = dict.fromkeys(shards)
    if splits is not None and not splits:  # the recipe says that nothing is a split
        return roles
    for path in shards:
        words = [path.name.split(".")[0], re.split(r"[-.]", path.name)[0], *reversed(path.relative_to(base).parts[:-1])]
        roles[path] = next((role for word in words if (role := role_of(word, splits))), None)
    odd = [path for path, role in roles.items() if role is None]
    are_odd = splits is None and not all(_is_numbered(path) for path in odd)
    if len(shards) > 1 and odd and (any(roles.values()) or are_odd):
        raise unknown_split(re.split(r"[-.]", odd[0].name)[0], str(odd[0]), splits)
    return roles


def _is_numbered(path: Path) -> bool:
    """Whether a shard's name only counts: `0000.parquet`, `part-00001-of-00004.snappy.parquet`."""
    return all(part in _NO_SPLIT or part.isdecimal() for part in name_parts(path.stem))


def _understand(path: Path, role: str | None, wish: Columns) -> _Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            schema = file.schema_arrow
    except pa.ArrowException as fault:
        raise DataError(f"{path} is no parquet file we can read ({fault}). Fetch it again.") from fault
    where, header = str(path), schema.names
    images = [place for place, one in enumerate(schema) if _holds_images(one.type)]
    image = find_column("image", header, wish, where, images) if images else None
    if image is None and len(images) == 1:
        image = images[0]
    if image is None or image not in images:
        raise _no_images(schema, image, wish, where)
    others = [place for place in range(len(header)) if place not in images]
    label = find_column("label", header, wish, where, others) if others or "label" in wish else None
    if label is None:
        raise missing_column("label", [header[place] for place in others], where)
    kind = schema.field(label).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        raise DataError(
            f"{where}: column `{header[label]}` holds lists, several labels for an image. {NO_MULTI_LABEL}: give a set "
            "with one label in each row."
        )
    if pa.types.is_struct(kind) or label in images:
        raise DataError(f"{where}: column `{header[label]}` is {kind}; a label is a number or a text.")
    notes = [taken_note(f"parquet shards in {path.parent}", header, {"image": image, "label": label})]
    return _Shard(
        path=path,
        role=role,
        image=header[image],
        label=header[label],
        names=tuple(_stored_names(schema.metadata or {}, header[label])),
        header=tuple(header),
        notes=tuple(note for note in notes if note),
    )


def _holds_images(kind: Any) -> bool:
    """Whether a column of this type can hold image files: bytes, or a struct with a field of bytes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _no_images(schema: Any, image: int | None, wish: Columns, where: str) -> DataError:
    place = image if image is not None else find_column("image", schema.names, wish, where)
    if place is None:
        return missing_column("image", schema.names, where)
    kind = schema.field(place).type
    return DataError(
        f"{where}: column `{schema.names[place]}` is {kind} and holds no image files; it must be bytes or "
        "struct<bytes: binary, path: string>. Where it holds paths, write a table (CSV) of paths and labels instead."
    )


def _labels(shard: _Shard) -> list[str | None]:
    """The class name of every row; the number itself where the schema names no classes; None where there is none.

    Raises:
        DataError: if the shard cannot be read, or holds numbers that are no class's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = shard.names
    try:
        with pq.ParquetFile(shard.path, memory_map=True) as file:
            values = file.read(columns=[shard.label], use_threads=False).column(shard.label).to_pylist()
    except pa.ArrowException as fault:
        raise DataError(f"{shard.path} is no parquet file we can read ({fault}). Fetch it again.") from fault
    stray = [value for value in values if names and isinstance(value, int) and value not in range(-1, len(names))]
    if stray:
        raise DataError(f"{shard.path}: {len(stray)} labels are no number in [0, {len(names)}), such as {stray[0]}.")
    return [_label(value, names) for value in values]


def _refuse_unlabelled(shard: _Shard, labels: Sequence[str | None], roles: Sequence[str | None]) -> None:
    """Rows without a label are harmless in the test part alone, where they can be left."""
    wrong = [row for row, label in enumerate(labels) if label is None and roles[row] not in ("test", LEFT_OUT)]
    if wrong:
        raise DataError(
            f"{shard.path}: {len(wrong)} rows have no label in [0, {len(shard.names) or '...'}); the first is row "
            f"{wrong[0]}. Take them away, or give the labels."
        )


def _label(value: Any, names: Sequence[str]) -> str | None:
    if names and isinstance(value, int):
        return normal_text(names[value]) if 0 <= value < len(names) else None
    label = "" if value is None else normal_text(str(value))
    return None if label.casefold() in NO_LABEL else label


def _stored_names(metadata: Mapping[bytes, bytes], label: str) -> list[str]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
