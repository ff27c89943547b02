"""Which folders are classes and which are splits.

Folders are taken for splits by their names (`split_names`) or as `data.splits` says. Where names tell nothing, but the
same subfolders come back in several top folders, nothing is guessed: the layout is refused with what settles it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finetune.config.backbone_names import is_run
from finetune.data.split_names import Splits, few, is_generic, name_parts, role_of, unknown_split
from finetune.data.walking import Left, files_below, holds_images, image_files, is_image, listed
from finetune.errors import DataError, nearest

TABLE_SUFFIXES = frozenset([".csv", ".tsv", ".jsonl", ".parquet"])
MASK_WORDS = frozenset(
    ["mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "segmentations", "groundtruth"]
)


class ClassFolder(NamedTuple):
    """A folder of images of one class."""

    path: Path
    role: str | None
    name: str


@dataclass
class Layout:
    """Where the class folders are, and what was found on the way there."""

    top: Path
    """The folder that holds the class folders or the folders of splits: the root, or a lone folder inside it."""
    passed: list[Path]
    """Folders from the root down to `top`, without it."""
    folders: list[ClassFolder] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[Path] = field(default_factory=set)
    """Folders of splits, and those that a note names."""


def find_layout(root: Path, splits: Splits | None = None) -> Layout:
    """The class folders below `root`, each with the role that a folder above or below it gives; none if there are none.

    Raises:
        DataError: if folders could be splits or classes and nothing tells which, or one named cannot serve.
    """
    passed = lone_folders(root)
    layout = Layout(top=passed.pop(), passed=passed)
    if passed:
        layout.notes.append(f"{root} holds a lone folder: the images were looked for in {layout.top}.")
    kids = []
    for one in subfolders(layout.top, root):
        if holds_runs(one):
            layout.notes.append(f"{one} holds runs of this tool and is no class.")
            layout.used.add(one)
        else:
            kids.append(one)
    if splits:
        _take_given(root, layout, kids, splits)
        return layout
    inside = {one: classes_in(one, root) for one in kids}
    if splits is not None:
        layout.folders = [ClassFolder(one, None, one.name) for one in kids]
    elif roles := _roles(layout.top, inside):
        _take_splits(root, layout, inside, roles)
    elif nested := _splits_inside(kids, root):
        layout.folders = nested
        _refuse_empty_roles(root, layout, [f for one in kids for f in _folders(one)])
    else:
        _refuse_same_subfolders(root, inside)
        _refuse_masks(root, kids)
        only_splits = all(role_of(one.name) for one in kids)  # flat ones: images without classes
        layout.folders = [] if only_splits else [ClassFolder(one, None, one.name) for one in kids]
    return layout


def lone_folders(root: Path) -> list[Path]:
    """The root and the lone folders inside it, down to where the first table, shard, split or choice of folders is."""
    here, passed = root, [root]
    while not any(f.suffix.lower() in TABLE_SUFFIXES or is_image(f) for f in listed(here)):
        inside = [f for f in subfolders(here, root) if not holds_runs(f)]
        inside = inside or [f for f in _folders(here) if _holds_shards(f, root)]
        if len(inside) != 1 or role_of(inside[0].name):
            return passed
        here = inside[0]
        passed.append(here)
    return [root] if any(is_image(f) for f in listed(here)) and not _tables(here) else passed


def _tables(folder: Path) -> list[Path]:
    return [f for f in listed(folder) if f.suffix.lower() in TABLE_SUFFIXES]


def _holds_shards(folder: Path, root: Path) -> bool:
    return any(file.suffix.lower() == ".parquet" for file in files_below(folder, Left(), root))


def subfolders(folder: Path, root: Path) -> list[Path]:
    """Folders directly in `folder` that hold an image at any depth."""
    return [f for f in _folders(folder) if holds_images(f, root)]


def _folders(folder: Path) -> list[Path]:
    return [f for f in listed(folder) if f.is_dir()]


def classes_in(folder: Path, root: Path) -> list[Path]:
    """Class folders of a split: its subfolders, or those of a lone one that repeats its name or says nothing."""
    inside = subfolders(folder, root)
    if len(inside) == 1 and is_generic(inside[0].name, folder.name):
        return classes_in(inside[0], root)
    return inside


def holds_runs(folder: Path) -> bool:
    """Whether `folder` is a folder of runs of this tool, or a run."""
    return (folder / "mlflow.db").is_file() or is_run(folder) or any(map(is_run, _folders(folder)))


def _roles(top: Path, inside: dict[Path, list[Path]]) -> dict[Path, str]:
    """The role of each folder that has one, where a folder of class folders is train; else nothing is a split."""
    by_name = {one: role_of(one.name) for one in inside}
    shared = [set(name_parts(one.name)) for one in inside]
    common = set.intersection(*shared) if len(shared) > 1 else set()
    apart = {one: role_of(" ".join(part for part in name_parts(one.name) if part not in common)) for one in inside}
    for roles in (by_name, apart):  # seg_train and seg_test differ in what matters
        if any(role == "train" and inside[one] for one, role in roles.items()):
            return {one: role for one, role in roles.items() if role}
    if inside and all(by_name.values()) and any(inside.values()):
        names = ", ".join(one.name for one in inside)
        raise DataError(f"data.root: {top} holds {names} but no `train` folder of class folders. Add it.")
    return {}


def _take_splits(root: Path, layout: Layout, inside: dict[Path, list[Path]], roles: dict[Path, str]) -> None:
    for role, count in Counter(roles.values()).items():
        if count > 1:
            names = ", ".join(one.name for one, own in roles.items() if own == role)
            raise DataError(
                f"data.root: {root}: the folders {names} all mean {role}. Say which are which: data.splits: "
                f"{{{role}: [{names}]}} takes them together."
            )
    classes = {one.name for folder, role in roles.items() if role == "train" for one in inside[folder]}
    for other in (one for one in inside if one not in roles):
        if len(roles) == 1 or classes & {other.name, *(one.name for one in inside[other])}:
            raise unknown_split(other.name, str(other))
        layout.notes.append(f"{other} stands beside {_names(roles)} and is none of them; its images were left.")
    for folder, role in roles.items():
        if not inside[folder]:
            layout.notes.append(_flat_note(folder, role))
        layout.folders += [ClassFolder(one, role, one.name) for one in inside[folder]]
    layout.used |= {*inside}
    _refuse_empty_roles(root, layout, _folders(layout.top))


def _names(folders: Sequence[Path] | dict[Path, str]) -> str:
    return few([one.name for one in folders])


def _flat_note(folder: Path, role: str) -> str:
    count = sum(1 for _ in image_files(folder, Left()))
    return (
        f"{folder} holds {count} images without class folders: nothing says what they show, so they are in no split, "
        f"and {role} images are cut from the rest. `finetune predict RUN {folder}` predicts them."
    )


def _refuse_empty_roles(root: Path, layout: Layout, folders: Sequence[Path]) -> None:
    """A folder named like a split that holds nothing was meant to hold something."""
    served = {one.role for one in layout.folders}
    for folder in folders:
        role = role_of(folder.name)
        if role and role not in served and not holds_images(folder, root):
            raise _empty_role(folder, role)


def _empty_role(folder: Path, role: str) -> DataError:
    left = Left()
    list(image_files(folder, left))
    held = ", ".join(f"{n} x {kind}" for kind, n in sorted(left.kinds.items())) or "it is empty"
    return DataError(
        f"data.root: {folder} is named as {role}, but holds no image ({held}). Put its images there, or take the "
        f"folder away: then {role} images are cut from the rest."
    )


def _splits_inside(kids: Sequence[Path], root: Path) -> list[ClassFolder]:
    """CLASS/SPLIT instead of SPLIT/CLASS: every folder holds splits only, and one of them train."""
    inside = {one: subfolders(one, root) for one in kids}
    found = [ClassFolder(sub, role_of(sub.name), one.name) for one, subs in inside.items() for sub in subs]
    named = len(inside) > 1 and all(inside.values()) and all(one.role for one in found)
    if not named or not any(one.role == "train" for one in found):
        return []
    _refuse_several_sets(root, found)
    return found


def _refuse_several_sets(root: Path, found: Sequence[ClassFolder]) -> None:
    """Splits inside several folders, with class folders of their own in each: these are data sets and no classes."""
    classes = {
        one.path.parent: {sub.name for sub in subfolders(one.path, root)} for one in found if one.role == "train"
    }
    sets = [one for one, names in classes.items() if len(names) > 1]
    names = Counter(name for one in sets for name in classes[one])
    if len(sets) > 1 and max(names.values()) < len(sets):
        raise DataError(
            f"data.root: {root}: each of {_names(sets)} holds splits with class folders of its own "
            f"({few(sorted(classes[sets[0]]))} in {sets[0].name}), so they look like data sets and no classes. "
            f"Give one of them, such as {sets[0]}; if each of them is a class, data.splits: {{}} says so."
        )


def _refuse_same_subfolders(root: Path, inside: dict[Path, list[Path]]) -> None:
    counts = Counter(one.name for subs in inside.values() for one in subs)
    shared = [name for name, count in counts.items() if count > 1]
    tops = [one for one, subs in inside.items() if len({sub.name for sub in subs} & {*shared}) > 1]
    if len(tops) > 1:
        raise DataError(
            f"data.root: {root}: the folders {_names(tops)} hold the same subfolders ({few(sorted(shared))}), so they "
            "look like splits and the subfolders like classes. Say which is which: data.splits: "
            f"{{train: {tops[0].name}, test: {tops[1].name}}}; or data.splits: {{}} if each of them is a class; or "
            f"give one of them alone ({tops[0]})."
        )


def _refuse_masks(root: Path, kids: Sequence[Path]) -> None:
    stems: dict[Path, set[str]] = {}
    for mask in (one for one in kids if MASK_WORDS & set(name_parts(one.name))):
        for other in (one for one in kids if one != mask):
            for one in (mask, other):
                if one not in stems:
                    stems[one] = {_plain_stem(file) for file in image_files(one, Left(), root)}
            if 2 * len(stems[mask] & stems[other]) > len(stems[mask]):
                raise DataError(
                    f"data.root: {mask} holds images of the same names as {other}: masks or labels of them, and no "
                    f"class. Take it away or give {other} alone; if it is a class, data.splits: {{}} says so."
                )


def _plain_stem(file: Path) -> str:
    return file.stem.casefold().removesuffix("_mask").removesuffix("-mask")


def _take_given(root: Path, layout: Layout, kids: Sequence[Path], splits: Splits) -> None:
    if "train" not in splits:
        raise DataError("data.splits names no train, and there must be something to learn from. Add it.")
    taken: dict[Path, str] = {}
    for role, names in splits.items():
        for name in names:
            folder = given_folder(root, layout.top, name)
            if folder is None:
                known = [one.name for one in _folders(layout.top)]
                hint = nearest(name, known, otherwise=f"It holds {few(known) or 'no folders'}.")
                raise DataError(f"data.splits.{role}: {name} is no folder in {layout.top}. {hint}")
            if folder in taken:
                raise DataError(f"data.splits: {name} is named as {taken[folder]} and as {role}; leave out one.")
            taken[folder] = role
            layout.folders += [ClassFolder(one, role, one.name) for one in _given_classes(root, folder, role)]
    unused = [one for one in kids if not any(one == f or one in f.parents for f in taken)]
    if unused:
        layout.notes.append(f"data.splits names no role for {_names(unused)}; the images there were left.")
    layout.used |= {*kids, *taken}


def given_folder(root: Path, top: Path, name: str) -> Path | None:
    """The folder that a name of `data.splits` means, below the root or where the splits are; case may differ."""
    for base in (root, top):
        here: Path | None = base
        for part in Path(name.strip("/")).parts:
            exact = here / part if here is not None and (here / part).is_dir() else None
            alike = [f for f in _folders(here) if f.name.casefold() == part.casefold()] if here is not None else []
            here = exact or next(iter(alike), None)
        if here is not None and here != base:
            return here
    return None


def _given_classes(root: Path, folder: Path, role: str) -> list[Path]:
    if classes := classes_in(folder, root):
        return classes
    if not holds_images(folder, root):
        raise _empty_role(folder, role)
    raise DataError(
        f"data.splits.{role}: {folder} holds images without class folders, so nothing says what they show. Give "
        f"folders that hold class folders, and predict these: `finetune predict RUN {folder}`."
    )
