"""The probe's learning curve: a line, and a figure.

Shared by the page and the terminal. A run of before curves were measured has neither.
"""

import math
from collections.abc import Callable
from html import escape

from markupsafe import Markup

from finetune.config.measures import LearningCurveFacts
from finetune.reporting.svg import (
    draw_line,
    draw_svg,
    draw_text,
    interval_text,
    nice_ticks,
    percent,
)

Scale = Callable[[float], float]


def curve_sentence(curve: LearningCurveFacts | None) -> str:
    """What twice the labels would give, or that it cannot be told; nothing where no curve was measured."""
    if curve is None or not curve.points:
        return ""
    images, twice = curve.num_images, curve.twice
    if twice is None or curve.now is None:
        return f"what twice the labels would give cannot be told from {images:,} images: too few for smaller parts"
    low, high = 100 * twice.low, 100 * twice.high
    if not curve.is_told:
        return f"what twice the labels would give cannot be told from {images:,} images: [{low:.0f}, {high:.0f}] %"
    kind = "balanced accuracy " if curve.is_balanced else ""
    now, then = 100 * curve.now.value, 100 * twice.value
    return f"twice the labels: probe {kind}{now:.1f} -> about {then:.0f} % [{low:.0f}, {high:.0f}]"


def curve_figure(curve: LearningCurveFacts | None) -> Markup:
    """Accuracy by the number of training images, what twice as many would give hollow; nothing without a law."""
    if curve is None or len(curve.points) < 2 or curve.twice is None or curve.now is None:
        return Markup("")
    images, now, twice = curve.num_images, curve.now, curve.twice
    dots = [(float(row.images), row.accuracy) for row in curve.points] + [(2.0 * images, twice)]
    ends = [end for _, part in dots for end in (part.low, part.high)]
    low = max(0.0, math.floor(min(ends) * 20) / 20)
    high = min(1.0, math.ceil(max(ends) * 20) / 20)
    first, last = (math.log2(dots[place][0]) for place in (0, -1))
    left, right, top, bottom = 52, 400, 20, 200

    def x(count: float) -> float:
        return left + 14 + (right - left - 28) * (math.log2(count) - first) / (last - first)

    def y(share: float) -> float:
        return bottom - (bottom - top) * (share - low) / max(high - low, 0.01)

    body = []
    for tick in nice_ticks(low, high):
        body.append(draw_line(left, y(tick), right, y(tick), "grid"))
        body.append(draw_text(left - 8, y(tick) + 4, f"{100 * tick:g} %", kind="small", anchor="end"))
    for count, part in dots:
        body.append(draw_line(x(count), y(part.low), x(count), y(part.high), "whisker s0"))
        body.append(draw_text(x(count), bottom + 17, f"{count:,.0f}", kind="small", anchor="middle"))
    body.append(_law(images, now.value, twice.value, dots[0][0], x, y))
    for place, (count, part) in enumerate(dots):
        kind = "f0" if place < len(curve.points) else "hollow s0"
        hover = f"{count:,.0f} images: {percent(part.value)} ({interval_text(part)})"
        body.append(f'<circle cx="{x(count):.1f}" cy="{y(part.value):.1f}" r="5" class="{kind}">')
        body.append(f"<title>{escape(hover)}</title></circle>")
    body.append(draw_text((left + right) / 2, bottom + 34, "training images", kind="small", anchor="middle"))
    spoken = "; ".join(f"{count:,.0f} images {percent(part.value)}" for count, part in dots[:-1])
    label = f"Accuracy of the probe by training images: {spoken}; foretold for {dots[-1][0]:,.0f}: "
    return draw_svg(420, bottom + 40, f"{label}{percent(twice.value)} ({interval_text(twice)})", "".join(body),
                    kind="quadrants")  # fmt: skip


def _law(images: int, now: float, twice: float, first: float, x: Scale, y: Scale) -> str:
    """The power law through what it says of now and of twice the images, from `first` images on."""
    exponent = math.log2(max(1 - now, 1e-6) / max(1 - twice, 1e-6))
    counts = [first * (2 * images / first) ** (step / 24) for step in range(25)]
    places = ((x(count), y(1 - (1 - now) * (count / images) ** -exponent)) for count in counts)
    return f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}" class="curve light s0"/>'
