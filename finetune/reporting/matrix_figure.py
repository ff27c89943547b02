"""How much, how similar: which strategy the matrix takes at every place, and a dot where these data stand.

The map is drawn by the function that advises, at the probe's accuracy on these data; the field under the dot is asked
at the very place of the dot. So the picture says what the advice says.
"""

import math

from markupsafe import Markup

from finetune.config.plan import Advice
from finetune.config.section import Prefer
from finetune.planning.matrix import ORDER, Place, choose_at
from finetune.reporting.svg import draw_line, draw_svg, draw_text, is_number

COLUMNS, ROWS = 24, 12
"""Fields of the map."""


def where(advice: Advice) -> tuple[Place, Prefer] | None:
    """The place of these data in the matrix, and what is preferred; None where it is not known."""
    numbers = (advice.images_per_class, advice.similarity, advice.small_below, advice.similar_from, advice.probe_error)
    if not all(is_number(number) for number in numbers) or not advice.probe_error:
        return None
    return Place(advice.images_per_class, advice.similarity, advice.probe_error), advice.prefer


def fields(
    place: Place, prefer: Prefer, *, columns: int, rows: int, decades: float
) -> tuple[list[list[str]], int, int]:
    """The strategy in every field, rows from most to least similar; and row and column of the field of `place`.

    Args:
        place: of the data.
        prefer: `train.prefer`.
        columns: over `decades` decades of images per class, from 1.
        rows: over similarity from 1 to 0.
        decades: shown.
    """

    def field(row: int, column: int) -> str:
        images = 10 ** (decades * (column + 0.5) / columns)
        return choose_at(Place(images, 1 - (row + 0.5) / rows, place.error), prefer)

    names = [[field(row, column) for column in range(columns)] for row in range(rows)]
    column = min(columns - 1, max(0, int(columns * math.log10(max(place.images, 1.0)) / decades)))
    row = min(rows - 1, max(0, int(rows * (1 - place.similarity))))
    names[row][column] = choose_at(place, prefer)
    return names, row, column


def decades_for(images: float, small_below: float) -> int:
    """Decades of images per class that a map shows."""
    return max(4, math.ceil(math.log10(max(images, small_below, 1)) + 0.3))


def grid_figure(advice: Advice) -> Markup:
    """The map as a drawing, each strategy in its colour; a dot for the data, a line for their similarity's interval."""
    found = where(advice)
    if found is None:
        return Markup("")
    place, prefer = found
    small_below, similar_from = advice.small_below, advice.similar_from
    low, high = advice.similarity_low, advice.similarity_high
    left, right, top, bottom = 42.0, 384.0, 46.0, 290.0
    decades = decades_for(place.images, small_below)
    names, row, column = fields(place, prefer, columns=COLUMNS, rows=ROWS, decades=decades)
    wide, tall = (right - left) / COLUMNS, (bottom - top) / ROWS

    def x(count: float) -> float:
        return left + (right - left) * math.log10(max(count, 1)) / decades

    def y(value: float) -> float:
        return bottom - (bottom - top) * min(1.0, max(0.0, value))

    body = []
    for at, line in enumerate(names):
        for to, name in enumerate(line):
            mark = ' stroke="currentColor"' if (at, to) == (row, column) else ""
            body.append(
                f'<rect x="{left + to * wide + 0.5:.1f}" y="{top + at * tall + 0.5:.1f}" width="{wide - 1:.1f}" '
                f'height="{tall - 1:.1f}" class="choice-{name}"{mark}/>'
            )
    for number, name in enumerate(ORDER):
        body.append(f'<rect x="{left + 90 * number:.1f}" y="18" width="12" height="12" class="choice-{name}"/>')
        body.append(draw_text(left + 90 * number + 17, 28, name, kind="small"))
    middle, level = x(small_below), y(similar_from)
    body += [draw_line(middle, top - 4, middle, bottom, "stage"), draw_line(left, level, right + 4, level, "stage")]
    body.append(draw_text(middle, top - 5, f"{small_below:,g}", kind="small strong", anchor="middle"))
    body.append(draw_text(right + 8, level + 4, f"{similar_from:.2f}", kind="small strong"))
    for power in range(decades + 1):
        label = f"{10**power:,}" if power < 5 else f"{10 ** (power - 3)}k" if power < 6 else f"{10 ** (power - 6):,}M"
        body.append(draw_text(x(10**power), bottom + 17, label, kind="small", anchor="middle"))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(draw_text(left - 8, y(tick) + 4, f"{tick:g}", kind="small", anchor="end"))
    body.append(draw_text(0, 12, "similarity", kind="small"))
    body.append(draw_text((left + right) / 2, bottom + 34, "training images per class", kind="small", anchor="middle"))
    dot = x(place.images), y(place.similarity)
    body.append(draw_line(dot[0], y(high), dot[0], y(low), "whisker s1"))
    body.append(f'<circle cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="6" class="f1 dot"/>')
    label = (
        f"{place.images:g} images per class, similarity {place.similarity:.2f} ({low:.2f} to {high:.2f}), the probe "
        f"wrong on {100 * place.error:.1f} %: the matrix takes {names[row][column]}"
    )
    return draw_svg(420, bottom + 40, label, "".join(body), kind="quadrants")
