"""Which column of a table or a shard is what.

A name is taken for its meaning only where one column alone can have it: `image` and `label` first, then the names that
others use for them, from the plainest to the vaguest. What was taken is said wherever it is not called `image` or
`label`; everything else is left to the recipe's `data.columns`.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from finetune.errors import DataError, nearest

Columns = Mapping[str, str]
"""The columns that are image, label and split, as `data.columns` gives them."""

_RANKS = {
    "image": (
        "image",
        "file filename fname filepath path filepaths filenames files images img imgs imagefile imagefilename imagename "
        "imagepath imagefilepath imgfile imgname imgpath imgfilename relativepath relpath fullpath picture photo",
        "imageid imgid imageids fileid pictureid photoid isicid idcode imageindex uuid id key name",
    ),
    "label": (
        "label",
        "labels class classes target targets category classname classlabel labelname categoryname targetname "
        "groundtruth finelabel coarselabel",
        "species breed diagnosis dx disease variety cultivar emotion expression findinglabels tag tags y gt",
        "classid labelid categoryid targetid classidx labelidx classindex labelindex",
    ),
}
"""Names without capitals and signs, a line for each rank: a column of a higher rank leaves the lower ones unused."""


def squeezed(name: str) -> str:
    """A name without capitals, blanks and signs: `Image ID`, `image_id` and `imageId` are one."""
    return re.sub(r"[\W_]+", "", name.casefold())


def is_known(name: str) -> bool:
    """Whether a column of this name can be the image or the label."""
    return any(squeezed(name) in rank.split() for ranks in _RANKS.values() for rank in ranks)


def find_column(what: str, header: Sequence[str], wish: Columns, where: str, among: Collection[int] = ()) -> int | None:
    """The place of the column that is `what`, or None where no name says so.

    Args:
        what: image or label.
        header: the names of all columns.
        wish: what the recipe says.
        where: the table, for messages.
        among: the places that can be it by what they hold; empty: all.

    Raises:
        DataError: if the recipe names a column that is not there, or two names say so alike.
    """
    if what in wish:
        return named_column(what, header, wish[what], where)
    places = [place for place in range(len(header)) if place in among or not among]
    for rank in _RANKS[what]:
        if found := [place for place in places if squeezed(header[place]) in rank.split()]:
            if len(found) > 1:
                names = " and ".join(f"`{header[place]}`" for place in found)
                raise DataError(
                    f"{where}: columns {names} could each be the {what}. Say which: "
                    f"data.columns.{what}={header[found[0]]}."
                )
            return found[0]
    return None


def named_column(what: str, header: Sequence[str], name: str, where: str) -> int:
    """The place of the column that the recipe names for `what`.

    Raises:
        DataError: if there is none, or more than one.
    """
    same = [place for place, cell in enumerate(header) if cell == name]
    same = same or [place for place, cell in enumerate(header) if squeezed(cell) == squeezed(name)]
    if len(same) == 1:
        return same[0]
    if same:
        raise DataError(f"{where}: data.columns.{what}: {len(same)} columns are called {name!r}. Rename all but one.")
    hint = nearest(name, header, otherwise=f"It has {listed_names(header)}.")
    raise DataError(f"{where}: data.columns.{what}: there is no column {name!r}. {hint}")


def missing_column(what: str, header: Sequence[str], where: str) -> DataError:
    """An error that says what is there, and how to say which column it is."""
    named = [name for name in header if name]
    if len(named) == 1 and " " in named[0]:
        return DataError(
            f"{where}: the first line, {named[0]!r}, is a single cell. Separate cells by commas, semicolons, tabs or "
            "bars, and write the names of the columns as the first line: image,label."
        )
    hint = nearest(what, named, otherwise="")
    example = next((name for name in named if not is_known(name)), "NAME")
    return DataError(
        f"{where} has no column `{what}`; it has {listed_names(named)}. {hint} ".replace("  ", " ")
        + f"Rename one to {what}, or say which it is: data.columns.{what}={example}."
    )


def listed_names(names: Sequence[str], most: int = 12) -> str:
    """Names with commas, and how many more there are."""
    named = [name for name in names if name]
    return (", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")) or "none"


def taken_note(where: str, header: Sequence[str], places: Mapping[str, int | None]) -> str | None:
    """Which columns were taken for image and label, where they are called otherwise."""
    taken = {what: header[place] for what, place in places.items() if place is not None}
    if all(squeezed(name) == what for what, name in taken.items()):
        return None
    return f"{where}: " + ", ".join(f"{what} from column `{name}`" for what, name in taken.items()) + "."
