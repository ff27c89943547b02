"""The user's own split in a table: a column of words, or columns that say yes or no.

It is taken by name (`split`; `is_valid`, `is_test`; `set`, `phase` ...) or because every cell is a word for a split.
Numbers of folds are never guessed: which fold is held out is the user's decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.data.columns import Columns, listed_names, named_column, squeezed
from finetune.data.split_names import Splits, few, role_of, unknown_split
from finetune.errors import DataError, nearest

REST, LEFT_OUT = "rest", "left out"
"""What a cell says beside a role: nothing (other columns, or train), or that its row is not used."""
_NAMES = {"set", "subset", "partition", "phase", "usage", "dataset", "splits", "fold", "folds", "kfold", "cvfold"}
"""Names of columns that hold a split, or the number of a fold."""
_FLAGS = {
    **dict.fromkeys(("isvalid", "isval", "isvalidation", "valid", "val", "validation"), ("val", REST)),
    **dict.fromkeys(("istest", "istesting", "test", "isholdout", "holdout"), ("test", REST)),
    **dict.fromkeys(("istrain", "istraining", "istrainingimage", "train"), (REST, "test")),
}
"""The roles of yes and no, by name."""
_YES, _NO = frozenset(["true", "1", "1.0", "yes", "y", "t"]), frozenset(["false", "0", "0.0", "no", "n", "f"])
MOST_WORDS = 64
"""Distinct values beyond which a column is no split."""

Values = Mapping[int, Mapping[str, tuple[int, int]]]
"""By column, its distinct cells in the order they come, each with its first line and how many there are."""


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How a row gets its role."""

    meanings: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """By column, what each cell says: a role, `REST` or `LEFT_OUT`. No column: no row has a role."""
    notes: tuple[str, ...] = ()

    def role(self, row: Mapping[int, str]) -> str | None:
        """One of the roles, `LEFT_OUT`, or None where the table names none, by the row's cells of `meanings`."""
        said = [meaning[row[place]] for place, meaning in self.meanings.items()]
        return next((one for one in said if one != REST), "train") if said else None


def find_split(header: Sequence[str], values: Values, wish: Columns, splits: Splits | None, *, where: str) -> SplitRule:
    """The rule for roles.

    Args:
        header: names of all columns.
        values: the cells of the columns that are neither image nor label; without those of too many values.
        wish: what the recipe says of columns; split `none`: no column is the split.
        splits: what the recipe says of words.
        where: the table, for messages.

    Raises:
        DataError: if words are unknown, two columns could be the split, or the recipe names words that are not there.
    """
    if splits is not None and not splits:  # the recipe says that nothing is a split
        return SplitRule()
    if "split" in wish:
        if wish["split"].casefold() == "none" and "none" not in header:
            return SplitRule()
        place = named_column("split", header, wish["split"], where)
        if place not in values:
            raise DataError(
                f"{where}: data.columns.split: column `{header[place]}` names no splits: it is the image or the label, "
                f"or holds over {MOST_WORDS} different values."
            )
        places = [place]
    else:
        places = _by_name(header, values, splits) or _by_words(header, values, splits, where)
    if not places:
        if splits:
            raise DataError(
                f"{where}: data.splits names {_names(splits)}, but no column is known as the split. Name it: "
                "data.columns.split=NAME."
            )
        return SplitRule(notes=tuple(_unused_splits(header, values)))
    flags = [place for place in places if _is_flag(header[place], values[place]) and not splits]
    if flags == places:
        return _flag_rule(header, values, flags, where)
    return _word_rule(header[places[0]], places[0], values[places[0]], splits, where)


def is_split_name(name: str) -> bool:
    """Whether a column of this name may hold a split."""
    return squeezed(name) == "split" or squeezed(name) in _NAMES or squeezed(name) in _FLAGS


def _by_name(header: Sequence[str], values: Values, splits: Splits | None) -> list[int]:
    exact = [place for place in values if squeezed(header[place]) == "split" and any(values[place])]
    said = [place for place in values if squeezed(header[place]).startswith("is")]  # `valid` may be a flag of quality
    return exact[:1] or [place for place in said if not splits and _is_flag(header[place], values[place])]


def _by_words(header: Sequence[str], values: Values, splits: Splits | None, where: str) -> list[int]:
    """A column whose name is that of splits and that holds one word for them, or all of whose cells are such words."""
    named, plain = [], []
    for place, cells in values.items():
        roles = [role_of(word, splits) for word in cells]
        if squeezed(header[place]) in _NAMES and any(roles):
            named.append(place)
        elif all(roles) and "train" in roles and len(set(roles)) > 1:
            plain.append(place)
    found = named or plain
    if len(found) > 1:
        names = " and ".join(f"`{header[place]}`" for place in found)
        raise DataError(
            f"{where}: columns {names} could each be the split. Say which: data.columns.split={header[found[0]]}."
        )
    return found


def _is_flag(name: str, cells: Mapping[str, tuple[int, int]]) -> bool:
    return squeezed(name) in _FLAGS and all(cell.casefold() in _YES | _NO for cell in cells)


def _flag_rule(header: Sequence[str], values: Values, flags: Sequence[int], where: str) -> SplitRule:
    meanings, notes = {}, []
    for place in flags:
        yes, no = _FLAGS[squeezed(header[place])]
        meanings[place] = {cell: yes if cell.casefold() in _YES else no for cell in values[place]}
        told = "train where it says yes, test where it says no" if yes == REST else f"{yes} where it says yes"
        notes.append(f"{where}: the split is that of column `{header[place]}` ({told}).")
    return SplitRule(meanings=meanings, notes=tuple(notes))


def _word_rule(
    name: str, place: int, cells: Mapping[str, tuple[int, int]], splits: Splits | None, where: str
) -> SplitRule:
    meaning: dict[str, str] = {}
    if splits is not None:
        given = {role: {_plain(one): one for one in names} for role, names in splits.items()}
        found = {_plain(word) for word in cells}
        if lost := [one for names in given.values() for plain, one in names.items() if plain not in found]:
            hint = nearest(lost[0], cells, otherwise=f"It holds {listed_names(list(cells))}.")
            raise DataError(f"{where}: data.splits: column `{name}` holds no {lost[0]!r}. {hint}")
        rest = LEFT_OUT if "train" in given else "train"
        for word in cells:
            meaning[word] = next((role for role, names in given.items() if _plain(word) in names), rest)
    else:
        for word, (line, _) in cells.items():
            if (role := role_of(word)) is None:
                raise _unknown_word(name, word, cells, f"{where}, line {line}")
            meaning[word] = role
    notes = [] if squeezed(name) == "split" and splits is None else [_word_note(name, meaning, where)]
    return SplitRule(meanings={place: meaning}, notes=tuple(notes))


def _plain(word: str) -> str:
    """One spelling for the words of the recipe and those of cells: fold 0 is also written 0.0."""
    text = word.strip().casefold()
    return text.removesuffix(".0") if text.removesuffix(".0").isdecimal() else text


def _word_note(name: str, meaning: Mapping[str, str], where: str) -> str:
    roles = dict.fromkeys(meaning.values())
    words = {role: [word or "(empty)" for word in meaning if meaning[word] == role] for role in roles}
    told = "; ".join(f"{role}: {few(own)}" for role, own in words.items())
    return f"{where}: the split is that of column `{name}` ({told})."


def _unknown_word(name: str, word: str, cells: Mapping[str, tuple[int, int]], where: str) -> DataError:
    fault = unknown_split(word, where)
    return DataError(
        f"{fault} Column `{name}` holds {listed_names(list(cells))}; data.columns.split=none leaves it unused."
    )


def _unused_splits(header: Sequence[str], values: Values) -> list[str]:
    """A line on each column that is called like a split but whose cells do not say which is which."""
    lines = []
    for place, cells in values.items():
        if (squeezed(header[place]) in _NAMES or squeezed(header[place]) in _FLAGS) and any(cells):
            words = [cell for cell in cells if cell]
            which = "" if _is_flag(header[place], cells) else f" data.splits='{{val: {words[0]}}}'"
            lines.append(
                f"column `{header[place]}` ({listed_names(words, 6)}) is not used, for its cells do not say which part "
                f"is for what; to use it: data.columns.split={header[place]}{which}."
            )
    return lines


def _names(splits: Splits) -> str:
    return listed_names([name for names in splits.values() for name in names])
