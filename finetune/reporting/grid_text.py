"""The map of the matrix as characters: which strategy is taken where, and where these data stand."""

from finetune.config.plan import Advice
from finetune.planning.matrix import ORDER
from finetune.reporting.matrix_figure import decades_for, fields, where

SIGNS = {"probe": ".", "partial": "+", "full": "#"}
_WIDE, _TALL = 56, 9
"""Columns and rows of the map."""


def grid_text(advice: Advice) -> str:
    """The map, `o` where the data stand, `|` over their similarity's interval; nothing where a number is not known."""
    found = where(advice)
    if found is None:
        return ""
    place, prefer = found
    decades = decades_for(place.images, advice.small_below)
    names, row, column = fields(place, prefer, columns=_WIDE, rows=_TALL, decades=decades)
    chosen = names[row][column]
    lines = [[SIGNS[name] for name in line] for line in names]
    first, last = (
        min(_TALL - 1, max(0, int(_TALL * (1 - end)))) for end in (advice.similarity_high, advice.similarity_low)
    )
    for between in range(first, last + 1):
        lines[between][column] = "|"
    lines[row][column] = "o"
    labels = {0: "1.00", _TALL // 2: "0.50", _TALL - 1: "0.00"}
    frame = " " * 7 + "+" + "-" * _WIDE + "+"
    body = [f"  {labels.get(at, ''):>4} :{''.join(line)}:" for at, line in enumerate(lines)]
    foot = [" "] * (_WIDE + 12)
    for power in range(decades + 1):
        label = f"{10**power:g}" if power < 4 else f"1e{power}"
        start = 8 + round(_WIDE * power / decades) - (len(label) if power == decades else 0)
        foot[start : start + len(label)] = label
    key = "   ".join(f"{SIGNS[name]} {name}" for name in ORDER)
    title = f"  Similarity, over training images per class; the probe wrong on {100 * place.error:.1f} %"
    return "\n".join([title, frame, *body, frame, "".join(foot).rstrip(), f"        {key}   o these data: {chosen}"])
