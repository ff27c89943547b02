"""Labels as people write them: cells that hold none, several, or a measured value, and spellings that nearly agree.

Nothing is merged or repaired here, for a class is what the user says it is: what can only be wrong is refused, what
may be meant is named.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping

from finetune.data.split_names import few
from finetune.errors import DataError

NO_LABEL = frozenset(["", "nan", "null", "n/a", "#n/a", "<na>", "nat", "-nan"])
"""Cells, in lower case, by which programs say that there is no value."""
NO_MULTI_LABEL = "Training with several labels per image (multi-label) is not there yet"
_MAYBE_NO_LABEL = frozenset(["none", "na", "nil", "undefined", "unlabeled", "unlabelled", "?", "-", "nan", "null"])
_SEPARATORS = "|;,+&/ "
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_MOST_RARE = 100
"""Rare labels that are looked at for slips of spelling."""
_MANY = 20
"""Distinct fractional numbers beyond which labels are measurements, whatever their number of images."""


def check_labels(counts: Mapping[str, int], where: str) -> None:
    """Refuse labels, written in cells, that are not one class each.

    Args:
        counts: images by label.
        where: table or shards, for messages.

    Raises:
        DataError: if cells hold lists or several labels, measured values, or nearly every row has its own.
    """
    for check in (_check_several, _check_measured):
        check(counts, where)


def spelling_warnings(counts: Mapping[str, int]) -> list[str]:
    """Lines on classes that are spelt nearly alike, or like no label at all.

    Raises:
        DataError: if a number is written in two ways, such as 1 and 1.0.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    numbers: defaultdict[float, list[str]] = defaultdict(list)
    for name in sorted(counts):
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups[re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", plain).strip()].append(name)
        if _NUMBER.fullmatch(name):
            numbers[float(name)].append(name)
    if same := [names for names in numbers.values() if len(names) > 1]:
        raise DataError(
            f"{len(same)} numbers are written in more than one way and would be classes of their own: "
            f"{few([_told(names, counts) for names in same])}. Write each label in one way."
        )
    warnings = []
    if near := [names for names in groups.values() if len(names) > 1]:
        warnings.append(
            f"{len(near)} labels are written in more than one way, and each spelling is a class of its own: "
            f"{few([_told(names, counts) for names in near])}. If they are one class, write them alike."
        )
    for rare, plain in _misspelt(counts):
        warnings.append(
            f"label {_told([rare], counts)} is spelt nearly like {_told([plain], counts)}. If it is a slip, mend it."
        )
    if empty := [name for name in sorted(counts) if name.casefold() in _MAYBE_NO_LABEL]:
        warnings.append(f"{_told(empty, counts)} reads as if there were no label, and is taken as a class.")
    return warnings


def _misspelt(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Labels of one or two images, each with one of many images that it is nearly spelt like."""
    rare = [name for name, count in sorted(counts.items()) if count <= 2 and not any(map(str.isdigit, name))]
    pairs = []
    for name in rare[:_MOST_RARE]:
        common = [other for other, count in counts.items() if count >= 10 * counts[name]]
        near = difflib.get_close_matches(name, common, n=1, cutoff=0.8)
        pairs += [(name, other) for other in near if other.casefold() != name.casefold()]
    return pairs


def _told(names: list[str], counts: Mapping[str, int]) -> str:
    return " and ".join(f"{name!r} ({counts[name]} images)" for name in names)


def _check_several(counts: Mapping[str, int], where: str) -> None:
    listed = [name for name in counts if re.fullmatch(r"[\[({].*[\])}]", name) and re.search(r"[,'\"]|^.\d+.$", name)]
    several = listed or _several(counts)
    if several:
        raise DataError(
            f"{where}: {sum(counts[name] for name in several)} rows hold several labels in one cell, such as "
            f"{several[0]!r}. {NO_MULTI_LABEL}: keep one label in each cell, or take these rows away."
        )


def _several(counts: Mapping[str, int]) -> list[str]:
    """Labels made of others: of labels that also stand alone, or, between plain separators, recur in other cells."""
    for separator in _SEPARATORS:
        parts = {name: [p.strip() for p in name.split(separator) if p.strip()] for name in counts if separator in name}
        combined = {name: own for name, own in parts.items() if len(own) > 1}
        uses: defaultdict[str, int] = defaultdict(int)
        for own in combined.values():
            for part in set(own):
                uses[part] += 1
        found = []
        for name, own in combined.items():
            alone = all(part in counts for part in own)
            if separator in "|;,":
                if all(part in counts or uses[part] > 1 for part in own):
                    found.append(name)
            elif alone and counts[name] < min(counts[part] for part in own):  # `apple pie` beside apple and pie
                found.append(name)
        if found:
            return sorted(found)
    return []


def _check_measured(counts: Mapping[str, int], where: str) -> None:
    total, distinct = sum(counts.values()), len(counts)
    if total < 8:
        return
    example = ", ".join(list(counts)[:3])
    are_numbers = all(_NUMBER.fullmatch(name) for name in counts)
    fractional = are_numbers and any(not float(name).is_integer() for name in counts)
    if fractional and (distinct > _MANY or distinct > total / 2):
        raise DataError(
            f"{where}: the labels are {distinct} different numbers in {total} rows ({example}): this looks like a "
            "measured quantity, and finetune trains classes, no regression. Write a class for each range of values, "
            "or name the column that holds the class: data.columns.label=NAME."
        )
    if distinct > 0.8 * total:
        kind = "a measured quantity or a number of the row" if are_numbers else "a name or a text of each image"
        raise DataError(
            f"{where}: nearly every row has a label of its own ({distinct} labels in {total} rows: {example}): this "
            f"looks like {kind}. Name the column that holds the class: data.columns.label=NAME."
        )
