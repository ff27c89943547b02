"""Images that a program holds as map-style torch data sets, one for all images or one for each role.

They are asked for all of their images once, for labels and digests; after that, images come on demand. What gives other
images each time it is asked is refused: a split, a cache and a resumed run know an image by its content.
"""

import hashlib
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from finetune.config.section import ROLES
from finetune.data.decoding import DAMAGE, BadImage
from finetune.data.held import as_picture, digest_picture, hold
from finetune.data.items import Found, Item, Items
from finetune.data.labels import NO_MULTI_LABEL, spelling_warnings
from finetune.data.sources import Source
from finetune.data.split_names import few, role_of
from finetune.errors import DataError, nearest

MapStyle = Dataset[Any] | Sequence[Any]
"""What has a length and gives (image, label) by number."""
Handed = MapStyle | Mapping[str, MapStyle]
"""One for all images, or one for each role."""
ASKED_TWICE = 8
"""Images that are asked for a second time, to find out whether they are the same."""
_NO_CHANGE = (
    "A data set gives images as they are: take random transforms out of it, for `augment.preset` and `vary=` change "
    "training images"
)


def open_datasets(handed: Handed, progress: Callable[[int, int], None] = lambda done, total: None) -> Source:
    """The images of one data set, or of one for each role, as a source whose images come on demand.

    An item is (image, label): a Pillow image, or an array (H, W, 3) or tensor (3, H, W) of uint8; a name, or a number,
    which `classes`, where the data set (or the one that it is a part of) has such names, tells the name of. Classes
    stand in the order of `classes`, of the numbers, or of the alphabet, and those without an image are left out.

    Args:
        handed: each has `__len__` and `__getitem__`; names of roles are those of folders: train, val, valid, test ...
        progress: called with the number of images read and in all.

    Raises:
        DataError: if there is nothing to learn from, an item is of another kind, or images are not the same each time.
    """
    parts = _by_role(handed)
    asked = _Asked(parts)
    rows = _read_all(asked, progress)
    names = _class_names(rows, parts)
    found = [one if one.name is None else one._replace(name=names[one.name]) for one in rows]
    learned = Counter(str(one.name) for one in found if one.name is not None and one.role in (None, "train"))
    classes = tuple(name for name in dict.fromkeys(names.values()) if name in learned)
    _check_classes(asked.name, classes, found)
    items = _OwnItems(
        [
            Found(f"{one.part}#{one.row}", str(one.name or classes[0]), one.role, Path(one.part), one.row)
            for one in found
        ],
        asked,
    )
    items.number_classes({name: number for number, name in enumerate(classes)})
    digests: dict[tuple[str, int | None], str | BadImage] = {(one.part, one.row): one.content for one in found}
    source = Source(
        root=Path(asked.name),
        kind="dataset",
        classes=classes,
        items=items,
        warnings=tuple(_warnings(classes, names, learned, found)),
        digests=tuple(digests[item.file.name, item.row] for item in items),
    )
    _refuse_changing(source, asked)
    return source


def digest_contents(source: Source) -> str:
    """32 hex digits that change with any image, label or role of a source that was read, but not with their order."""
    lines = sorted(
        f"{digest}\t{source.classes[item.label]}\t{item.role}\n"
        for item, digest in zip(source.items, source.digests or (), strict=True)
    )
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


class _Row(NamedTuple):
    """What one item answered."""

    part: str
    row: int
    role: str | None
    name: Any
    """Its label as the data set gives it, later the name of its class; None where the item is faulty."""
    content: str | BadImage


class _Asked:
    """The data sets by the name of their part, asked by one thread at a time: few of them bear more."""

    def __init__(self, parts: Mapping[str, tuple[str | None, Any]]) -> None:
        self.parts = parts
        self.name = "+".join(dict.fromkeys(type(own).__name__ for _, own in parts.values()))
        self._lock = threading.Lock()

    def ask(self, part: str, row: int) -> tuple[Any, Any]:
        """An image and its label, of whatever kinds they are.

        Raises:
            BadImage: if the data set raises what damaged files do.
            DataError: if the item is no pair.
        """
        try:
            with self._lock:
                item = self.parts[part][1][row]
        except DAMAGE as fault:
            raise BadImage(_said(fault)) from fault
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"item {row} of {part} is a {type(item).__name__}; a data set gives a pair (image, label) for each "
                "number. Wrap it in one that does."
            )
        return item[0], item[1]

    def read(self, part: str, row: int) -> bytes:
        """An image as the file that it would be.

        Raises:
            BadImage: if it cannot be had.
        """
        image = as_picture(self.ask(part, row)[0], f"{part}#{row}")
        try:
            return hold(image, f"{part}#{row}").data
        except DAMAGE as fault:  # Pillow reads a file when its pixels are asked for
            raise BadImage(_said(fault)) from fault

    def answer(self, part: str, row: int) -> _Row:
        """What an item is, the fault where it is faulty."""
        role = self.parts[part][0]
        try:
            image, label = self.ask(part, row)
        except BadImage as fault:
            return _Row(part, row, role, None, fault)
        where = f"item {row} of {part}"
        try:
            picture = as_picture(image, where)
        except (TypeError, ValueError) as fault:
            raise DataError(f"{fault} {_NO_CHANGE}, and the view of the weights scales and normalises.") from fault
        try:
            content: str | BadImage = digest_picture(picture)
        except DAMAGE as fault:
            content = BadImage(_said(fault))
        return _Row(part, row, role, _plain_label(label, where), content)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes where they are not forks: a lock does not travel."""
        return {"parts": self.parts, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class _OwnItems(Items):
    """Items that are read from where a program holds them."""

    def __init__(self, found: Sequence[Found], asked: _Asked) -> None:
        super().__init__(found)
        self._asked = asked

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        item = super().__getitem__(index)
        if isinstance(item, list):
            return item
        assert item.row is not None
        read = partial(self._asked.read, item.file.name, item.row)
        return Item(name=item.name, label=item.label, role=item.role, file=item.file, row=item.row, read=read)


def _by_role(handed: Handed) -> dict[str, tuple[str | None, Any]]:
    """By the name of each part, its role and its data set."""
    if not isinstance(handed, Mapping):
        return {type(handed).__name__: (None, _checked(handed, "dataset="))}
    parts: dict[str, tuple[str | None, Any]] = {}
    for word, own in handed.items():
        role = role_of(str(word))
        if role is None:
            raise DataError(f"dataset= names {word!r}, which is no role. {nearest(str(word), ROLES)} {_roles()}")
        if role in parts:
            raise DataError(f"dataset= names {role} twice. {_roles()}")
        parts[role] = (role, _checked(own, f"dataset[{word!r}]"))
    if "train" not in parts:
        raise DataError(f"dataset= names no train to learn from, but {', '.join(parts) or 'nothing'}. Add it.")
    return parts


def _roles() -> str:
    return f"Roles are {', '.join(ROLES)}; those that are not named are cut from train."


def _checked(own: Any, where: str) -> Any:
    is_map = hasattr(own, "__len__") and hasattr(own, "__getitem__")
    if isinstance(own, IterableDataset | str | torch.Tensor | np.ndarray) or not is_map:
        raise DataError(
            f"{where} is a {type(own).__name__}; give a data set with __len__ and __getitem__, whose items are pairs "
            "(image, label)."
        )
    if not len(own):
        raise DataError(f"{where}, a {type(own).__name__}, is empty.")
    return own


def _read_all(asked: _Asked, progress: Callable[[int, int], None]) -> list[_Row]:
    places = [(part, row) for part, (_, own) in asked.parts.items() for row in range(len(own))]
    rows = []
    for done, (part, row) in enumerate(places, 1):
        rows.append(asked.answer(part, row))
        progress(done, len(places))
    if all(row.name is None for row in rows):
        raise DataError(f"none of the {len(rows)} items of {asked.name} can be read: {rows[0].content}.")
    return rows


def _plain_label(label: Any, where: str) -> int | str:
    if isinstance(label, torch.Tensor | np.generic | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | str):
        told = f"{NO_MULTI_LABEL}." if isinstance(label, list | tuple | torch.Tensor | np.ndarray) else ""
        raise DataError(f"the label of {where} is {label!r}; give the name of a class, or its number. {told}".rstrip())
    return label


def _class_names(rows: Sequence[_Row], parts: Mapping[str, tuple[str | None, Any]]) -> dict[Any, str]:
    """Names of classes by what stands for them in the items, in the order in which classes stand."""
    labels = {row.name for row in rows if row.name is not None}
    if len({type(label) for label in labels}) > 1:
        raise DataError("some labels are numbers and some are names; give all of one kind.")
    named = [names for _, own in parts.values() if (names := _own_classes(own)) is not None]
    if any(names != named[0] for names in named):
        raise DataError(f"the data sets name different classes: {few([str(list(names)) for names in named])}.")
    if not named:
        return {label: _composed(label) for label in sorted(labels)}
    are_numbers = isinstance(next(iter(labels)), int)
    known: dict[Any, str] = {number if are_numbers else name: name for number, name in enumerate(named[0])}
    if strange := sorted(labels - set(known)):
        raise DataError(
            f"labels {few([repr(label) for label in strange])} stand for none of the {len(named[0])} classes that the "
            f"data set names: {few(list(named[0]))}."
        )
    return {label: _composed(name) for label, name in known.items()}


def _own_classes(own: Any) -> tuple[str, ...] | None:
    """`classes` of a data set, or of the one that it is a part of, where these are names."""
    while own is not None:
        names = getattr(own, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
        own = getattr(own, "dataset", None)
    return None


def _composed(label: object) -> str:
    return unicodedata.normalize("NFC", str(label))


def _check_classes(name: str, classes: Sequence[str], found: Sequence[_Row]) -> None:
    if strange := sorted({f"{one.name!r} in {one.role}" for one in found if one.name not in (None, *classes)}):
        raise DataError(f"{name}: classes stand elsewhere that are not in train: {few(strange)}. Take them away.")
    if len(classes) < 2:
        raise DataError(f"{name} holds one class only ({', '.join(classes)}); to tell apart takes two.")


def _warnings(
    classes: Sequence[str], names: Mapping[Any, str], learned: Counter[str], found: Sequence[_Row]
) -> list[str]:
    warnings = []
    if empty := [name for name in names.values() if name not in classes]:
        warnings.append(
            f"{len(empty)} of {len(names)} classes that the data set names have no image to learn from and were left "
            f"out, so labels and logits are numbered without them: {few(empty)}."
        )
    for role in dict.fromkeys(one.role for one in found if one.role is not None):
        held = {one.name for one in found if one.role == role}
        if missing := [name for name in classes if name not in held]:
            warnings.append(f"{role} has no image of {len(missing)} of {len(classes)} classes: {few(missing)}.")
    if single := [name for name in classes if learned[name] == 1]:
        warnings.append(f"{len(single)} classes have a single image to learn from: {few(single)}.")
    return warnings + spelling_warnings(learned)


def _refuse_changing(source: Source, asked: _Asked) -> None:
    assert source.digests is not None
    for index in range(0, len(source.items), -(-len(source.items) // ASKED_TWICE)):
        item, first = source.items[index], source.digests[index]
        assert item.row is not None
        second = asked.answer(item.file.name, item.row).content
        if not isinstance(first, BadImage) and second != first:
            raise DataError(f"{item.name} is another image each time it is asked for. {_NO_CHANGE}.")


def _said(fault: BaseException) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())[:100].rstrip(": ")
