"""Figures of the report as inline SVG, drawn by hand.

Our figures are simple, and importing a plotting library costs more than drawing all of them. Colours are
CSS classes (`f0` fills and `s0` strokes with the first colour), so light, dark and print need one drawing.
Text enters only through `draw_text` and `draw_svg`, which escape it.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

from finetune.config.measures import Measure
from finetune.metrics.shares import wilson

NUM_COLOURS = 6
"""Colours the style sheet knows; further series take them up again."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One measured quantity over a run."""

    name: str
    points: tuple[tuple[str, float, float], ...]
    """(stage, step, value), ordered by step; every value finite."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Test images whose confidence lies in one interval of a reliability diagram."""

    confidence: float
    """Mean of the largest probability."""
    right: float
    """Share answered rightly, with a 95 % interval below."""
    low: float
    high: float
    count: int
    edges: tuple[float, float]


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float; NaN, None and absent values are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(share: object, *, unit: bool = True) -> str:
    """A share as per cent with one decimal, a dash where there is none; with its unit it never rounds up to 100."""
    if not is_number(share):
        return "–"
    number = 100 * float(share)  # type: ignore[arg-type]
    text = f"{number:.1f}".replace("-", "−")
    if text == "100.0":
        text = "> 99.9" if unit and number < 100 - 1e-9 else "100"
    return f"{text} %" if unit else text


def points(share: float, *, signed: bool = True) -> str:
    """A difference of shares in per cent points, with a real minus sign."""
    number = round(100 * share, 1) + 0.0  # + 0.0 turns −0.0 into 0.0
    return (f"{number:+.1f}" if signed else f"{number:.1f}").replace("-", "−")


def shorten(text: str, columns: int) -> str:
    """`text` cut to a number of columns (wide characters take two), ending in an ellipsis where it was cut."""
    widths = column_widths(text)
    if sum(widths) <= columns:
        return text
    used, end = 0, 0
    while used + widths[end] <= columns - 1:
        used += widths[end]
        end += 1
    return text[:end].rstrip() + "…"


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_panel(
    series: Sequence[Series],
    stages: Sequence[tuple[str, float, float]],
    *,
    title: str,
    shares: bool = False,
    log: bool = False,
) -> Markup:
    """One small chart of values by step; a path per series and stage, so that stages do not join up.

    Args:
        series: what to draw; those without points are left out.
        stages: (name, first step, last step) in order.
        title: stands above the chart.
        shares: label the vertical axis in per cent.
        log: draw it logarithmically where values span more than a factor of 20; a series that falls below
            a hundredth of the smallest series' peak is drawn there, so that a rate of zero has a place.
    """
    series = [s for s in series if s.points]
    values = [value for s in series for _, _, value in s.points]
    if not values:
        return Markup("")
    width, height, left, right, top, bottom = 360, 226, 46, 350, 62, 196
    floor = max(min(max(value for _, _, value in s.points) for s in series) * 1e-2, 1e-12)
    log = log and max(values) > 20 * max(min(values), 0.0)
    scale: Callable[[float], float] = (lambda v: math.log10(max(v, floor))) if log else (lambda v: v)
    low, high = scale(min(values)), scale(max(values))
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    steps = [step for s in series for _, step, _ in s.points] + [edge for _, *edges in stages for edge in edges]
    first, last = min(steps), max(*steps, min(steps) + 1)

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (scale(value) - low) / (high - low)

    body = [draw_text(0, 13, title, kind="title"), draw_legend([s.name for s in series], y=33, width=width)]
    for tick in _log_ticks(low, high) if log else nice_ticks(low, high):
        label = percent(tick) if shares else f"{tick:.3g}".replace("e-0", "e−").replace("e-", "e−")
        body.append(draw_line(left, y(tick), right, y(tick), "grid"))
        body.append(draw_text(left - 6, y(tick) + 4, label.replace(".0 %", " %"), kind="small", anchor="end"))
    for tick in nice_ticks(first, last):
        body.append(draw_text(x(tick), bottom + 16, f"{tick:,.0f}", kind="small", anchor="middle"))
    body.append(draw_text(right, bottom + 29, "step", kind="small", anchor="end"))
    for (name, start, end), before in zip(stages, [None, *stages], strict=False):
        edge = x(start if before is None else (before[2] + start) / 2)
        if before is not None:
            body.append(draw_line(edge, top - 14, edge, bottom, "stage"))
        room = int((x(end) - edge) / 6.5)
        if room >= 3:
            body.append(draw_text(edge + (4 if before else 0), top - 5, shorten(name, room), kind="small"))
    for number, one in enumerate(series):
        body.append(_paths(one, x, y, number % NUM_COLOURS))
    ends = "; ".join(f"{s.name} from {s.points[0][2]:.3g} to {s.points[-1][2]:.3g}" for s in series)
    return draw_svg(width, height, f"{title} by step: {ends}", "".join(body), title=title)


def score_strip(rows: Sequence[tuple[str, Measure]], *, reference: tuple[str, float] | None) -> Markup:
    """Scores as dots with their intervals over one axis of shares, and a mark for the trivial score if it fits."""
    if not rows:
        return Markup("")
    low = max(0.0, math.floor((min(score.low for _, score in rows) - 0.04) * 20) / 20)
    width, left, right, bottom = 480, 96, 420, 30 * len(rows) + 12

    def x(share: float) -> float:
        return left + (right - left) * (share - low) / (1 - low)

    body = []
    for tick in nice_ticks(low, 1.0):
        body.append(draw_line(x(tick), 8, x(tick), bottom, "grid"))
        body.append(draw_text(x(tick), bottom + 16, f"{100 * tick:g} %", kind="small", anchor="middle"))
    if reference and reference[1] > low:
        body.append(draw_line(x(reference[1]), 4, x(reference[1]), bottom, "stage"))
        body.append(draw_text(x(reference[1]), bottom + 30, reference[0], kind="small", anchor="middle"))
    for number, (name, score) in enumerate(rows):
        y = 30 * number + 24
        body.append(draw_text(0, y + 4, name))
        body.append(draw_line(x(score.low), y, x(score.high), y, f"whisker s{number}"))
        body.append(f'<circle cx="{x(score.value):.1f}" cy="{y}" r="5.5" class="f{number}"/>')
        body.append(draw_text(right + 10, y + 4, percent(score.value), kind="number"))
    spoken = "; ".join(f"{n} {percent(s.value)} ({interval_text(s)})" for n, s in rows)
    return draw_svg(width, bottom + 36, f"Share right with 95 % interval: {spoken}", "".join(body), kind="strip")


def interval_bar(score: Measure | None) -> Markup:
    """A bar from 0 to a share, with a whisker over its interval; nothing where there is no share."""
    if score is None:
        return Markup("")
    body = '<rect y="3" width="120" height="6" rx="3" class="track"/>'
    body += f'<rect y="3" width="{120 * score.value:.1f}" height="6" rx="3" class="bar"/>'
    low, high = 120 * score.low, 120 * score.high
    ends = "".join(draw_line(end, 2.5, end, 9.5, "tip") for end in (low, high))
    body += draw_line(low, 6, high, 6, "tip") + ends
    return draw_svg(120, 12, f"{percent(score.value)} ({interval_text(score)})", body, kind="interval")


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """A heat map of counts, rows the truth; shade is the share of the row, hits and mistakes in two colours."""
    size = 46 if len(classes) <= 10 else 33
    longest = max((min(19, sum(column_widths(name))) for name in classes), default=0)
    left, top = max(72, 8.0 * longest + 14), 4.6 * longest + 34
    body = [draw_text(left - 10, top - 8, "truth ↓", kind="small", anchor="end")]
    body.append(draw_text(left, 10, "predicted →", kind="small"))
    for row, (name, line) in enumerate(zip(classes, counts, strict=True)):
        total, y = max(1, sum(line)), top + row * size
        body.append(draw_text(left - 10, y + size / 2 + 4, shorten(name, 19), anchor="end", hover=name))
        turn = f' transform="rotate(-40 {left + row * size + size / 2 - 2:.1f} {top - 10:.1f})"'
        x = left + row * size + size / 2
        body.append(draw_text(x - 2, top - 10, shorten(name, 18), extra=turn, hover=name))
        for column, count in enumerate(line):
            x, share, hit = left + column * size, count / total, row == column
            # a small share of mistakes must be seen: the root lifts it above the paper
            shade = share if hit else math.sqrt(share)
            hover = f"{name} taken for {classes[column]}: {count} of {sum(line)}"
            body.append(
                f'<g><title>{escape(hover)}</title><rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2}" '
                f'height="{size - 2}" rx="3" class="cell"/><rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2}" '
                f'height="{size - 2}" rx="3" class="{"f0" if hit else "f1"}" fill-opacity="{shade:.3f}"/>'
            )
            if count:
                kind = "number on" if shade > 0.55 else "number"
                body.append(draw_text(x + size / 2, y + size / 2 + 4, str(count), kind=kind, anchor="middle"))
            body.append("</g>")
    right = sum(line[i] for i, line in enumerate(counts))
    label = f"Confusion matrix of {len(classes)} classes: {right} of {sum(map(sum, counts))} on the diagonal"
    return draw_svg(
        left + len(classes) * size + 4.5 * longest, top + len(classes) * size + 4, label, "".join(body), kind="matrix"
    )


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray, *, num_bins: int = 10) -> list[Bin]:
    """The filled bins of equal width over the largest probability.

    Args:
        probabilities: (N, K); rows that are not finite are left out.
        labels: (N,), integers in [0, K).
        num_bins: how many bins divide [0, 1].
    """
    known = np.isfinite(probabilities).all(axis=1)
    probabilities, labels = probabilities[known], labels[known]
    confidence = probabilities.max(axis=1, initial=0.0)  # (N,)
    hit = probabilities.argmax(axis=1) == labels if len(labels) else np.zeros(0, bool)
    place = np.clip((confidence * num_bins).astype(int), 0, num_bins - 1)
    bins = []
    for number in np.unique(place):
        inside = place == number
        count, right = int(inside.sum()), int(hit[inside].sum())
        share, edges = wilson(right, count), (number / num_bins, (number + 1) / num_bins)
        mean = float(confidence[inside].mean())
        bins.append(Bin(confidence=mean, right=share.value, low=share.low, high=share.high, count=count, edges=edges))
    return bins


def reliability_diagram(bins: Sequence[Bin]) -> Markup:
    """Share right against confidence, one dot with its interval per bin, over a histogram of the bins."""
    if not bins:
        return Markup("")
    width, left, right, top, bottom, base = 380, 46, 366, 22, 262, 344

    def x(share: float) -> float:
        return left + (right - left) * share

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    body = [draw_text(0, 10, "share right", kind="small"), draw_text(0, bottom + 30, "images", kind="small")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(draw_line(left, y(tick), right, y(tick), "grid"))
        body.append(draw_text(left - 6, y(tick) + 4, f"{100 * tick:g} %", kind="small", anchor="end"))
        body.append(draw_text(x(tick), base + 16, f"{100 * tick:g} %", kind="small", anchor="middle"))
    body.append(draw_line(x(0), y(0), x(1), y(1), "stage"))
    body.append(draw_text(x(0.5), base + 31, "confidence", kind="small", anchor="middle"))
    most = max(b.count for b in bins)
    for b in bins:
        start, end, tall = x(b.edges[0]) + 1, x(b.edges[1]) - 1, max(1.0, 48 * b.count / most)
        body.append(f'<rect x="{start:.1f}" y="{base - tall:.1f}" width="{end - start:.1f}" height="{tall:.1f}"')
        body.append(' class="bar"/>')
        body.append(draw_text((start + end) / 2, base - tall - 4, _compact(b.count), kind="tiny", anchor="middle"))
        body.append(draw_line(x(b.confidence), y(b.right), x(b.confidence), y(b.confidence), "gap"))
        body.append(draw_line(x(b.confidence), y(b.low), x(b.confidence), y(b.high), "thin s0"))
    for b in bins:
        hover = f"confidence {percent(b.confidence)}, right {percent(b.right)}, {b.count} images"
        body.append(f'<circle cx="{x(b.confidence):.1f}" cy="{y(b.right):.1f}" r="4.5" class="f0">')
        body.append(f"<title>{hover}</title></circle>")
    spoken = "; ".join(f"at {percent(b.confidence)} right {percent(b.right)} of {b.count}" for b in bins)
    return draw_svg(width, 380, f"Reliability diagram: {spoken}", "".join(body), kind="reliability")


def draw_svg(width: float, height: float, label: str, body: str, *, kind: str = "panel", title: str = "") -> Markup:
    """A drawing from its marks; `label` is read aloud, and is its title unless one is given."""
    name = f"<title>{escape(title or label)}</title>"
    box = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return Markup(f'<svg class="{kind}" {box} role="img" aria-label="{escape(label)}">{name}{body}</svg>')


def draw_text(
    x: float, y: float, text: str, *, kind: str = "", anchor: str = "start", extra: str = "", hover: str = ""
) -> str:
    """Escaped text with its foot at `y`, and more of it on hovering."""
    name = f"<title>{escape(hover)}</title>" if hover else ""
    start = f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{kind}"' if kind else "")
    return f'{start} text-anchor="{anchor}"{extra}>{escape(text)}{name}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of a CSS class."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def draw_legend(names: Sequence[str], *, y: float, width: float) -> str:
    """Names in a row, each behind a stroke of its colour, as many as fit."""
    parts, x = [], 0.0
    for number, name in enumerate(names):
        shown = shorten(name, 18)
        if x + 30 + 6.4 * len(shown) > width - 40:
            parts.append(draw_text(x, y, f"+ {len(names) - number} more", kind="small"))
            break
        parts.append(draw_line(x, y - 4, x + 14, y - 4, f"curve s{number % NUM_COLOURS}"))
        parts.append(draw_text(x + 19, y, shown, kind="small"))
        x += 34 + 6.4 * len(shown)
    return "".join(parts)


def _paths(series: Series, x: Callable[[float], float], y: Callable[[float], float], colour: int) -> str:
    parts = []
    for stage in dict.fromkeys(stage for stage, _, _ in series.points):
        places = [(x(step), y(value)) for name, step, value in series.points if name == stage]
        if len(places) > 1:
            parts.append(f'<path class="curve s{colour}" d="M{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
        if len(places) <= 30:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.1" class="f{colour}"/>' for a, b in places]
    return "".join(parts)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(low), math.floor(high) + 1)
    factors = (1, 2, 5) if high - low < 2 else (1,)
    return [m * 10.0**power for power in powers for m in factors if low <= math.log10(m) + power <= high]


def interval_text(score: Measure) -> str:
    """The ends of a share's interval, such as `91.4–97.4`."""
    return f"{percent(score.low, unit=False)}–{percent(score.high, unit=False)}"


def column_widths(text: str) -> list[int]:
    """Columns that each character takes: two if wide, none if it combines with the one before."""
    return [0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]


def _compact(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k"
