"""How much and how similar, as a grid of characters: where the data stand, and what is usually done there."""

import math
from collections.abc import Collection

from finetune.recipe.plan import Advice
from finetune.reporting.decision import CELLS

_WIDE, _TALL = 30, 4
"""Columns and rows of one cell of the grid."""
Place = tuple[int, int]
"""Row and column in the grid."""


def grid_text(advice: Advice) -> str:
    """Four cells with what is usually done in each, `o` where the data stand, `|` over their similarity's interval.

    Each cell has a scale of its own, so that its name has room; nothing where a number is not known.
    """
    images, small, share, similar = advice.images_per_class, advice.small_below, advice.similarity, advice.similar_from
    low, high = advice.similarity_low, advice.similarity_high
    if not all(math.isfinite(value) for value in (images, small, share, similar, low, high)):
        return ""

    def row(value: float) -> int:
        is_upper = value >= similar
        way = (value - similar) / max(1e-9, 1 - similar) if is_upper else value / max(1e-9, similar)
        return (_TALL if is_upper else 2 * _TALL + 1) - 1 - min(_TALL - 1, max(0, int(way * _TALL)))

    is_large, border = images >= small, math.log10(max(small, 1.0))
    place = math.log10(max(images, 1.0))
    way = (place - border) / 2 if is_large else place / max(1e-9, border)  # a cell of large sets spans two decades
    column = (_WIDE + 1 if is_large else 0) + min(_WIDE - 1, max(0, int(way * _WIDE)))
    marks = {(row(high) + step, column): "|" for step in range(row(low) - row(high) + 1)}
    marks[row(share), column] = "o"
    lines = [[*" " * _WIDE, ":", *" " * _WIDE] for _ in range(2 * _TALL + 1)]
    lines[_TALL] = [*"-" * _WIDE, "+", *"-" * _WIDE]
    for (is_similar, is_right), name in CELLS.items():
        first, outer = _free_place(name, marks, is_similar=is_similar, is_right=is_right)
        lines[first][outer : outer + len(name)] = name
    for (mark_row, mark_column), mark in marks.items():
        lines[mark_row][mark_column] = mark
    labels = {0: "1.00", _TALL: f"{similar:.2f}", 2 * _TALL: "0.00"}
    frame = " " * 7 + "+" + "-" * _WIDE + "+" + "-" * _WIDE + "+"
    body = [f"  {labels.get(i, ''):>4} :{''.join(line)}:" for i, line in enumerate(lines)]
    title = "  Similarity, over training images per class"
    foot = f"{'1':>9}{f'{small:g}':>{_WIDE}}{f'{max(small, 1) * 100:g}':>{_WIDE + 1}}"
    return "\n".join([title, frame, *body, frame, foot])


def _free_place(name: str, marks: Collection[Place], *, is_similar: bool, is_right: bool) -> Place:
    """Row and column for the name of a cell: its outer corner, or the next place inwards that no mark crosses."""
    rows = list(range(_TALL)) if is_similar else list(range(2 * _TALL, _TALL, -1))
    left, right = (_WIDE + 2, 2 * _WIDE - len(name)) if is_right else (1, _WIDE - 1 - len(name))
    places = [(line, column) for column in ((right, left) if is_right else (left, right)) for line in rows]
    free = [
        (line, start)
        for line, start in places
        if not any(row == line and start - 1 <= column <= start + len(name) for row, column in marks)
    ]
    return (free or places)[0]
