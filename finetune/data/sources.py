"""Where images and labels come from: class folders, a table, or parquet shards of the datasets hub.

A source only lists; it opens no image. Names are sorted, so its order never depends on the file system, and
classes are always the sorted names (also for parquet, whose stored label numbers are mapped), so one rule
tells which output belongs to which class.
"""

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.items import ROLES, Found, Item, Items
from finetune.data.shards import read_row
from finetune.errors import DataError, names_beside, nearest

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"])
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}

_ROLE_OF = {role: role for role in ROLES} | {"valid": "val", "validation": "val"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """All images of a data set, unread."""

    root: Path
    kind: str
    """folders, table or parquet."""
    classes: tuple[str, ...]
    """Sorted names, in Unicode's composed form (NFC)."""
    items: Items
    """Sorted by name."""
    warnings: tuple[str, ...]


def read_bytes(item: Item) -> bytes:
    """The image file of `item`, undecoded. Cheap in random order, and after a fork.

    Raises:
        OSError: if the file or the row cannot be read.
    """
    return item.file.read_bytes() if item.row is None else read_row(item.file, item.row)


def open_source(root: Path) -> Source:
    """The images under `root`, in one of four layouts.

    Folders `train`, `val` (`valid`, `validation`), `calibration`, `test` of class folders; one tree of class
    folders; a table (.csv or .tsv: the file, or the only one in a folder with fewer than two class folders)
    with columns image, label and perhaps split; parquet shards `SPLIT-*.parquet` with columns
    `image: struct<bytes, path>` and `label`. Class folders are searched to any depth.

    Raises:
        DataError: if there is nothing to learn from, or the layout is ambiguous.
    """
    if not root.exists():
        hint = nearest(root.name, names_beside(root), otherwise="Check the path.")
        raise DataError(f"data.root: {root} does not exist. {hint}")
    try:
        return _open(root)
    except OSError as fault:
        raise DataError(f"data.root: {fault.filename or root} cannot be read ({fault.strerror or fault}).") from fault


def _open(root: Path) -> Source:
    if root.is_file():
        if root.suffix.lower() in TABLE_DELIMITERS:
            return _open_table(root, root)
        if root.suffix.lower() == ".parquet":
            return _open_parquet(root, [root])
        raise DataError(f"data.root: {root} is a file but no table (.csv, .tsv) or parquet shard. Give a folder.")
    if shards := _shards(root) or _shards(root / "data"):
        return _open_parquet(root, shards)
    tables = [f for f in _listed(root) if f.is_file() and f.suffix.lower() in TABLE_DELIMITERS]
    folders = _class_folders(root)
    if len(folders) >= 2 or not tables:
        ignored = [f"{t.name} lies beside class folders and was not read; to use it, give {t}." for t in tables]
        return _open_folders(root, folders, ignored)
    if len(tables) > 1:
        names = ", ".join(t.name for t in tables)
        raise DataError(f"data.root: {root} holds {len(tables)} tables ({names}). Give the one that lists the images.")
    return _open_table(root, tables[0])


def _open_folders(root: Path, folders: Sequence[tuple[Path, str | None]], warnings: list[str]) -> Source:
    loose = [f for parent in {root} | {folder.parent for folder, _ in folders} for f in _listed(parent) if _is_image(f)]
    if not folders and (lone := loose or list(_image_files(root, Counter()))):
        raise DataError(
            f"data.root: {lone[0].parent} holds images directly, without class folders. Put each image into a "
            "folder named like its class, or write a table with columns image,label and give that."
        )
    skipped: Counter[str] = Counter()
    items = Items(
        Found(_name(file, root), _normal(folder.name), role, file)
        for folder, role in folders
        for file in _image_files(folder, skipped)
    )
    if skipped:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(skipped.items()))
        warnings.append(
            f"{skipped.total()} files in class folders are no images by their names and were left: {kinds}."
        )
    if loose:
        warnings.append(f"{len(loose)} images lie outside any class folder and were left (the first: {min(loose)}).")
    return _source(root, "folders", items, warnings)


def _class_folders(root: Path) -> list[tuple[Path, str | None]]:
    """Folders that hold images, each with the role its parent gives it. A class may be called `test`, too."""
    folders = [f for f in _listed(root) if f.is_dir() and _holds_images(f)]
    splits = [(f, role) for f in folders if (role := _ROLE_OF.get(f.name.casefold()))]
    inside = [(c, role) for f, role in splits for c in _listed(f) if c.is_dir() and _holds_images(c)]
    if not any(role == "train" for _, role in inside):
        if len(splits) < len(folders):
            return [(f, None) for f in folders]
        if inside:
            names = ", ".join(f.name for f, _ in splits)
            raise DataError(f"data.root: {root} holds {names} but no `train` folder of class folders. Add it.")
        return []
    for other in (f for f in folders if f.name.casefold() not in _ROLE_OF):
        raise _unknown_split(other.name, str(other))
    return [*inside]


def _listed(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not _is_hidden(f.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def _holds_images(folder: Path) -> bool:
    return next(_image_files(folder, Counter()), None) is not None


def _image_files(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Image files at any depth, links followed (each real folder once); what is left out is counted in `skipped`."""
    seen: set[Path] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(parent)
        if (real := here.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        for file in files:
            suffix = Path(file).suffix.lower()
            if _is_hidden(file):
                skipped["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                yield here / file
            else:
                skipped[suffix or "without suffix"] += 1


def _raise(fault: OSError) -> None:
    raise fault  # os.walk would leave out, silently, a folder it may not read


def _open_table(root: Path, table: Path) -> Source:
    _, header = next(_table_rows(table), (1, []))
    header = [cell.casefold() for cell in header]
    where = [_column(name, header, str(table)) for name in ("image", "label")]
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
            role = _ROLE_OF.get(word.casefold()) if has_roles else None
            if has_roles and role is None:
                raise _unknown_split(word, f"{table}, line {line}")
            file = table.parent / row[where[0]].replace("\\", "/")
            yield Found(_name(file, table.parent), _normal(row[where[1]]), role, file)

    return _source(root, "table", Items(find()), [])


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


def _column(name: str, header: Sequence[str], where: str) -> int:
    if name in header:
        return header.index(name)
    raise DataError(
        f"{where} has no column `{name}`; it has {', '.join(header) or 'none'}. {nearest(name, header)} "
        "Needed are image and label; split is optional."
    )


def _shards(folder: Path) -> list[Path]:
    return [f for f in _listed(folder) if f.suffix.lower() == ".parquet"] if folder.is_dir() else []


def _open_parquet(root: Path, shards: Sequence[Path]) -> Source:
    return _source(
        root, "parquet", Items(one for shard in shards for one in _shard_images(root, shard, len(shards))), []
    )


def _shard_images(root: Path, shard: Path, num_shards: int) -> Iterator[Found]:
    import pyarrow as pa

    word = re.split(r"[-.]", shard.name)[0]
    role = _ROLE_OF.get(word.casefold())
    if role is None and num_shards > 1:
        raise _unknown_split(word, str(shard))
    try:
        labels = _shard_labels(shard)
    except pa.ArrowException as fault:
        raise DataError(f"{shard} is no parquet file we can read ({fault}). Fetch it again.") from fault
    name = _name(shard, root if root.is_dir() else root.parent)
    for row, label in enumerate(labels):
        yield Found(f"{name}#{row}", label, role, shard, row)


def _shard_labels(shard: Path) -> list[str]:
    """The class name of every row; the number itself where the schema names no classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard, memory_map=True) as file:
        schema = file.schema_arrow
        for name in ("image", "label"):
            _column(name, schema.names, str(shard))
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
    return [_normal(names[value] if names else str(value)) for value in values]


def _stored_names(metadata: dict[bytes, bytes]) -> list[str]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _name(file: Path, root: Path) -> str:
    try:
        name = file.relative_to(root).as_posix()
    except ValueError:  # a table may name absolute paths
        name = file.as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _normal(text: str) -> str:
    """One spelling for names that look alike: macOS stores accents decomposed, others composed."""
    return unicodedata.normalize("NFC", text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")).strip()


def _unknown_split(word: str, where: str) -> DataError:
    known = ", ".join(_ROLE_OF)
    hint = nearest(word.casefold(), _ROLE_OF, otherwise=f"Known are {known}.")
    return DataError(f"{where}: {word!r} is not the name of a split. {hint} Rename it or take it away.")


def _source(root: Path, kind: str, items: Items, warnings: list[str]) -> Source:
    if not len(items):
        raise DataError(
            f"data.root: {root} holds no images. Expected are class folders with {', '.join(sorted(IMAGE_SUFFIXES))} "
            "files (perhaps inside train, val, test), a table with columns image,label, or parquet shards."
        )
    counts = items.counts()
    learned = counts.get("train") or counts.get("all")
    if not learned:
        raise DataError(f"data.root: {root} names the splits {', '.join(counts)} but no train to learn from. Add it.")
    classes = tuple(sorted(learned))
    _check_classes(root, classes, counts)
    for role, held in counts.items():
        if missing := [c for c in classes if c not in held]:
            warnings.append(f"{role} has no image of {len(missing)} of {len(classes)} classes: {_few(missing)}.")
    if single := [c for c in classes if learned[c] == 1]:
        warnings.append(f"{len(single)} classes have a single image to learn from: {_few(single)}.")
    items.number_classes({name: label for label, name in enumerate(classes)})
    return Source(root=root, kind=kind, classes=classes, items=items, warnings=tuple(warnings))


def _check_classes(root: Path, classes: Sequence[str], counts: dict[str, dict[str, int]]) -> None:
    faults = [
        f"class {name!r} is in {role} but not in train. {nearest(name, classes)}".strip()
        for role, held in counts.items()
        for name in sorted(set(held) - set(classes))
    ]
    if faults:
        raise DataError(
            f"data.root: {root}: {' '.join(faults[:5])} Rename or remove what is extra ({len(faults)} in all)."
        )
    if len(classes) < 2:
        raise DataError(
            f"data.root: {root} holds one class only ({classes[0]!r}); to tell apart takes two. If the classes lie "
            "deeper, give the folder that holds the class folders directly."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
