"""The list of images, as columns: a million take some eighty megabytes, and each is an `Item` only while it is asked
for.
"""

import copy
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from finetune.config.section import ROLES


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image and its label."""

    name: str
    """The path relative to the root, with "/"; in parquet `shard.parquet#row`."""
    label: int
    """Index into the source's classes."""
    role: str | None
    """One of `ROLES` where the source says so."""
    file: Path
    row: int | None = None
    """Row of the parquet shard `file`; None where `file` is the image."""
    column: str | None = None
    """Column of that shard that holds the images."""
    data: bytes | None = None
    """The file itself, where a program holds it in memory."""
    frame: int | None = None
    """Of the several in the file, from 0; None where the file is one image."""
    read: Callable[[], bytes] | None = None
    """Gives the file, where a program makes it each time it is asked for."""


class Found(NamedTuple):
    """An image as a source finds it, its class still a name."""

    name: str
    class_name: str
    role: str | None
    file: Path
    row: int | None = None
    frame: int | None = None
    """The name is that of the file."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What one layout holds, and what of it was not used."""

    kind: str
    """folders, table or parquet."""
    items: "Items"
    warnings: tuple[str, ...] = ()


class Items(Sequence[Item]):
    """Items, sorted by name; rows of one shard and frames of one file by number."""

    def __init__(self, found: Iterable[Found], column: str | None = None) -> None:
        """Take in what is found, one at a time; classes are numbered by `number_classes`, once all are known.

        Args:
            found: images, in any order.
            column: of the parquet shards that hold them.
        """
        self._column = column
        self._names, self._files = _Texts(), _Texts()
        folders: dict[str, int] = {}
        classes: dict[str, int] = {}
        columns = [array("i"), array("i"), array("b"), array("i"), array("i")]
        for one in found:
            folder, name = str(one.file.parent), one.file.name
            self._names.append(one.name)
            self._files.append(name)
            columns[0].append(folders.setdefault(folder, len(folders)))
            columns[1].append(classes.setdefault(one.class_name, len(classes)))
            columns[2].append(-1 if one.role is None else ROLES.index(one.role))
            columns[3].append(-1 if one.row is None else one.row)
            columns[4].append(-1 if one.frame is None else one.frame)
        self._folders = [Path(folder) for folder in folders]
        order = self._sorted(columns[3], columns[4])
        self._names, self._files = self._names.taken(order), self._files.taken(order)
        self._folder_of, self._class_of, self._role_of, self._row_of, self._frame_of = (
            np.array(one)[order] for one in columns
        )
        self.class_names = list(classes)
        """As they came, before they are numbered."""

    def number_classes(self, numbers: dict[str, int]) -> None:
        """Give every class its number, its items' label."""
        new = np.array([numbers[name] for name in self.class_names], dtype=np.int32)
        self._class_of, self.class_names = new[self._class_of], sorted(numbers, key=numbers.__getitem__)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int32 of all items."""
        labels: np.ndarray = self._class_of
        return labels

    def name(self, index: int) -> str:
        """Of one item; frames are counted from 1."""
        frame = self.frame(index)
        return self._names[index] if frame is None else f"{self._names[index]}#frame-{frame + 1}"

    def frame(self, index: int) -> int | None:
        """Of the several in an item's file, from 0; None where the file is one image."""
        frame = int(self._frame_of[index])
        return None if frame < 0 else frame

    def role(self, index: int) -> str | None:
        """Of one item, where the source says so."""
        number = int(self._role_of[index])
        return None if number < 0 else ROLES[number]

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by role (`all` where the source names none) and by class."""
        counts: dict[str, dict[str, int]] = {}
        for number in np.unique(self._role_of).tolist():
            own = self._class_of[self._role_of == number]
            held = np.bincount(own, minlength=len(self.class_names)).tolist()
            named = {name: count for name, count in zip(self.class_names, held, strict=True) if count}
            counts["all" if number < 0 else ROLES[number]] = named
        return counts

    def counts_by_folder(self) -> dict[Path, int]:
        """Images by the folder their files are in."""
        held = np.bincount(self._folder_of, minlength=len(self._folders)).tolist()
        return dict(zip(self._folders, held, strict=True))

    def taken(self, rows: np.ndarray) -> "Items":
        """The items at the positions `rows` (M,), with the labels they have."""
        chosen = copy.copy(self)
        chosen._names, chosen._files = self._names.taken(rows), self._files.taken(rows)
        chosen._folder_of, chosen._class_of, chosen._role_of, chosen._row_of, chosen._frame_of = (
            one[rows] for one in (self._folder_of, self._class_of, self._role_of, self._row_of, self._frame_of)
        )
        return chosen

    @property
    def num_bytes(self) -> int:
        """Memory that the columns take."""
        columns = (self._folder_of, self._class_of, self._role_of, self._row_of, self._frame_of)
        return sum(int(column.nbytes) for column in columns) + self._names.num_bytes + self._files.num_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Items) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._row_of)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} items, and no number {index}.")
        index %= len(self)
        row = int(self._row_of[index])
        return Item(
            name=self.name(index),
            label=int(self._class_of[index]),
            role=self.role(index),
            file=self._folders[self._folder_of[index]] / self._files[index],
            row=None if row < 0 else row,
            column=None if row < 0 else self._column,
            frame=self.frame(index),
        )

    def _sorted(self, rows: "array[int]", frames: "array[int]") -> np.ndarray:
        """Positions in the order of names; of shards by row, for #10 comes after #9, and so of files by frame."""

        def key(place: int) -> tuple[str, int, int]:
            name, frame = self._names[place], frames[place]
            return (name, 0, frame) if rows[place] < 0 else (name.rpartition("#")[0], rows[place], frame)

        return np.array(sorted(range(len(rows)), key=key), dtype=np.int64)


class _Texts:
    """Many short texts in one piece of memory; names of files keep bytes that are no text."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __getitem__(self, place: int) -> str:
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogateescape")

    @property
    def num_bytes(self) -> int:
        """Memory of texts and places."""
        return sys.getsizeof(self._bytes) + sys.getsizeof(self._ends)

    def taken(self, order: np.ndarray) -> "_Texts":
        """The texts at the positions `order`."""
        chosen = _Texts()
        for place in order.tolist():
            chosen._bytes += self._bytes[self._ends[place] : self._ends[place + 1]]
            chosen._ends.append(len(chosen._bytes))
        return chosen
