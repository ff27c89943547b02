"""Files that the cells of a table mean: as written, without a suffix, or under a path of another machine.

How cells become files is decided once for a table, from a sample of its rows, and said where it is not as written. A
looser way is tried only where a stricter one finds less than half of the sample, so that a missing file is never
replaced by another of the same name; and where two ways of one kind find different files, neither is taken.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.data.formats import IMAGE_SUFFIXES
from finetune.data.split_names import ORNAMENTS, few, name_parts, role_of
from finetune.data.walking import listed
from finetune.errors import DataError, names_beside, nearest

_MOST_FOLDERS = 64
"""Folders beside a table that are looked into."""
_MOST_RULES = 512
"""Ways of one kind beyond which only those are looked at closely that find one of ten rows."""
_ENOUGH = 0.5
"""Share of the sample that settles how cells are read."""


class Cell(NamedTuple):
    """One row of the sample."""

    line: int
    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way from a cell to a file."""

    base: Path | None
    """Folder that cells are relative to; None: the cell is the whole path."""
    dropped: int = 0
    """Folders at the front of the cell that are left out."""
    suffix: str = ""
    """Added to the cell."""
    is_by_label: bool = False
    """Whether a folder named like the label stands between."""

    def file(self, text: str, label: str) -> Path | None:
        """Where it says the image is; None where the cell has not so many folders."""
        root, parts = path_parts(text)
        if self.base is None:
            return Path(root, *parts) if root == "/" else None
        if len(parts) <= self.dropped:
            return None
        inside = [label.strip("/")] if self.is_by_label else []
        return self.base.joinpath(*inside, *parts[self.dropped : -1], parts[-1] + self.suffix)

    def found(self, text: str, label: str) -> Path | None:
        """The file, where it is there."""
        file = self.file(text, label)
        try:
            return file if file is not None and file.is_file() else None
        except OSError:  # a caption is too long for a name
            return None


def path_parts(text: str) -> tuple[str, list[str]]:
    """The root of a path of any system (`/`, `C:` or none), and its parts."""
    plain = text.removeprefix("file://").replace("\\", "/")
    drive = re.match(r"[A-Za-z]:(?=/)", plain)
    root = drive[0] if drive else ("/" if plain.startswith("/") else "")
    return root, [part for part in plain.removeprefix(root).split("/") if part not in ("", ".")]


def find_rules(table: Path, sample: Sequence[Cell]) -> list[Rule]:
    """How the cells of `table` become files: the ways that find most of the sample, best first; none if none finds any.

    Raises:
        DataError: if two ways find different files.
    """
    left, chosen = list(sample), list[Rule]()
    depth = max((len(path_parts(cell.text)[1]) for cell in sample), default=1)
    whole = Rule(base=None)
    levels: list[Callable[[], list[Rule]]] = [lambda: [whole]]
    for dropped in range(depth):
        levels += [lambda tier=tier, dropped=dropped: _rules(tier(), sample, dropped) for tier in _tiers(table)]  # type: ignore[misc]
    for level in levels:
        found = _best(table, level(), left)
        for rule, hit in found:
            chosen.append(rule)
            left = [cell for cell in left if cell not in hit]
        if len(left) <= len(sample) * (1 - _ENOUGH):
            return chosen
    return chosen


def rules_note(table: Path, rules: Sequence[Rule], sample: Sequence[Cell]) -> str | None:
    """How cells were read, where it is not as they are written."""
    first = rules[0]
    if len(rules) == 1 and not first.suffix and first in (Rule(base=None), Rule(base=table.parent)):
        return None
    shown = []
    for rule in rules:
        text, file = next((cell.text, f) for cell in sample if (f := rule.found(cell.text, cell.label)))
        shown.append(f"{text!r} as {file}")
    return f"{table}: images were found by reading {few(shown)}."


def _tiers(table: Path) -> list[Callable[[], list[tuple[Path, bool]]]]:
    """Folders to look in, and whether by label, from the plainest to the loosest; listed only when it comes to them."""
    here, above = table.parent, table.parent.parent
    role = role_of(table.stem)

    def named() -> list[Path]:
        return [f for f in _folders(here) if f.name == table.stem or (role and role_of(f.name) == role)]

    return [
        lambda: [(here, False)],
        lambda: [(above, False)],
        lambda: [(Path.cwd(), False)],
        lambda: [(f, False) for f in named()],
        lambda: [(f, True) for f in (here, above, *named())],
        lambda: [(inner, False) for f in named() for inner in _folders(f)],
        lambda: [(f, True) for f in _folders(here)],
        lambda: [(inner, False) for f in _folders(here) for inner in (f, *_folders(f))][: _MOST_FOLDERS * 4],
        lambda: [(f, False) for f in _folders(above) if _is_for_images(f.name)],
    ]


def _is_for_images(name: str) -> bool:
    """Whether a folder is called like one of images or of a split; other folders near may be other data sets."""
    return role_of(name) is not None or set(name_parts(name)) <= {*ORNAMENTS, "jpg", "jpeg", "jpegs", "png", "raw"}


def _folders(parent: Path) -> list[Path]:
    return [f for f in listed(parent) if f.is_dir()][:_MOST_FOLDERS]


def _rules(bases: Sequence[tuple[Path, bool]], sample: Sequence[Cell], dropped: int) -> list[Rule]:
    plain = any(Path(path_parts(cell.text)[1][-1]).suffix.lower() not in IMAGE_SUFFIXES for cell in sample)
    lower = sorted(IMAGE_SUFFIXES, key=lambda s: (s not in (".jpg", ".jpeg", ".png"), s))
    suffixes = ["", *lower, *(s.upper() for s in lower)] if plain else [""]
    return [
        Rule(base=base, dropped=dropped, suffix=suffix, is_by_label=by_label)
        for base, by_label in bases
        for suffix in suffixes
    ]


def _best(table: Path, rules: Sequence[Rule], cells: Sequence[Cell]) -> Iterator[tuple[Rule, list[Cell]]]:
    """Rules that find cells, the one that finds most first, each with those that no rule before it found."""
    hits: dict[Rule, dict[Cell, Path]] = {}
    few_cells = cells[:: max(1, len(cells) // 10)]
    for rule in rules:
        if len(rules) > _MOST_RULES and not any(rule.found(cell.text, cell.label) for cell in few_cells):
            continue
        if held := {cell: file for cell in cells if (file := rule.found(cell.text, cell.label))}:
            hits[rule] = held
    for cell in cells:
        twice = {file.resolve(): file for held in hits.values() if (file := held.get(cell))}
        if len(twice) > 1:
            raise DataError(
                f"{table}, line {cell.line}: {cell.text!r} may be {few([str(f) for f in sorted(twice.values())])}. "
                "Write the folder and the suffix into the table, or keep only the folder that is meant beside it."
            )
    done: set[Cell] = set()
    for rule in sorted(hits, key=lambda rule: -len(hits[rule])):
        if new := [cell for cell in hits[rule] if cell not in done]:
            done.update(new)
            yield rule, new


def not_found(table: Path, sample: Sequence[Cell]) -> DataError:
    """An error that tells what was tried for the first of the sample."""
    cell = sample[0]
    if re.match(r"(https?|s3|gs)://", cell.text):
        return DataError(
            f"{table}, line {cell.line}: {cell.text!r} is an address. Download the images and list their files."
        )
    root, parts = path_parts(cell.text)
    tried = [Path(root, *parts)] if root == "/" else []
    tried += [base.joinpath(*parts) for base in dict.fromkeys((table.parent, table.parent.parent, Path.cwd()))]
    tried += [f / parts[-1] for f in _folders(table.parent)][:3]
    suffix = "" if tried[0].suffix.lower() in IMAGE_SUFFIXES else ", each also with the suffix of an image"
    beside = names_beside(tried[0]) + names_beside(tried[-1])
    alike = [name for name in beside if name.casefold() == parts[-1].casefold()]
    hint = f"There is {alike[0]}: capitals count." if alike else nearest(parts[-1], beside)
    return DataError(
        f"{table}: no image of its rows was found. For {cell.text!r} in line {cell.line} were tried, among others, "
        f"{', '.join(map(str, dict.fromkeys(tried)))}{suffix}. {hint} ".rstrip()
        + " Put the table beside its images, or write paths relative to the table."
    )
