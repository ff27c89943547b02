"""Why this depth: pictures and sentences of a decision, from the facts and the plan.

Every part is drawn where it was measured and left out where it was not: random weights have no probe. The sentences
claim a lead only where it exceeds its standard error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from finetune.config.facts import DepthFacts, Facts, ProfileFacts, ShiftFacts
from finetune.config.plan import Advice, Forecast, Plan
from finetune.reporting.matrix_figure import grid_figure
from finetune.reporting.svg import (
    column_widths,
    draw_legend,
    draw_line,
    draw_svg,
    draw_text,
    nice_ticks,
    percent,
    points,
    shorten,
)
from finetune.reporting.wording import (
    Baseline,
    baseline,
    chirality_sentence,
    depth_sentence,
    duration,
    measure_rows,
    memory,
    number,
)

Scale = Callable[[float], float]

PROBES = {"probe": "logistic probe", "ridge": "ridge", "neighbours": "nearest neighbours"}
"""Curves of the depth figure, in the order of their colours."""
MAX_NAMES = 32
"""Stages whose names stand side by side; of more, every second or third is named."""
MAX_BARS = 24
"""Bars of the shift figure; of more stages we show those that moved most."""


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """What one strategy would give and cost, in words."""

    strategy: str
    gain: str
    interval: str
    """Of the gain; empty where there is none."""
    seconds: str
    memory: str
    mark: str
    """Such as chosen or advised."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the section on the decision shows; what is empty is left out."""

    why: str
    grid: Markup
    forecasts: list[ForecastRow]
    profile: Markup
    depth: str
    measures: list[tuple[str, str]]
    shift: Markup
    chirality: str


def decide(facts: Facts, plan: Plan) -> Decision:
    """What the section on the decision shows."""
    advice, chosen = plan.advice, plan.train.strategy or plan.advice.strategy
    why = advice.why.rstrip(".")
    is_wished = any(one.key == "train.strategy" and one.why == "the recipe says so" for one in plan.reasons)
    if why and chosen != advice.strategy:
        why += f". The advice is {advice.strategy}; the recipe says {chosen}."
    elif why:
        why += f". The advice is {advice.strategy}, and the recipe says so." if is_wished else "."
    profile, similarity, chirality = facts.profile, facts.similarity, facts.chirality
    return Decision(
        why=why[:1].upper() + why[1:],
        grid=grid_figure(advice) if similarity else Markup(""),
        forecasts=forecast_rows(advice, chosen=chosen),
        profile=depth_figure(profile, reference=baseline(facts)) if profile else Markup(""),
        depth=depth_sentence(profile) if profile else "",
        measures=measure_rows(facts),
        shift=shift_figure(similarity.shift if similarity else ()),
        chirality=chirality_sentence(chirality) if chirality else "",
    )


def depth_figure(profile: ProfileFacts, *, reference: Baseline | None = None) -> Markup:
    """Accuracy by depth, from the stem to the top: three probes, the interval of the logistic one as a band.

    `reference` is drawn as a level: what can be had without looking.
    """
    depths, chance = profile.depths, reference[1] if reference else None
    parts = [getattr(depth, probe) for depth in depths for probe in PROBES]
    shares = [end for part in parts for end in (part.value, part.low, part.high)]
    shares += [] if chance is None else [chance]
    low = max(0.0, min(0.8, math.floor(min(shares) * 10 - 0.2) / 10))
    high = min(1.0, max(low + 0.2, math.ceil(max(shares) * 10) / 10))
    every = math.ceil(len(depths) / MAX_NAMES)
    names = [_cut_front(depth.stage, 14) for depth in depths]
    width, left, right, top, bottom = 620, 68, 606 if chance is None else 560, 58, 246
    gap = (right - left) / len(depths)
    columns = max(sum(column_widths(name)) for name in names)
    is_turned = 6.6 * columns > gap - 6

    def x(depth: float) -> float:
        return left + gap * (depth + 0.5)

    def y(share: float) -> float:
        return bottom - (bottom - top) * (min(high, max(low, share)) - low) / (high - low)

    body = [draw_legend(list(PROBES.values()), y=14, width=width)]
    for tick in nice_ticks(low, high):
        body.append(draw_line(left, y(tick), right, y(tick), "grid"))
        body.append(draw_text(left - 8, y(tick) + 4, f"{100 * tick:.0f} %", kind="small", anchor="end"))
    if reference is not None:
        level, name = y(reference[1]), "chance" if reference[0] == "chance" else "majority"
        body.append(draw_line(left, level, right, level, "stage"))
        body.append(draw_text(right + 6, level + 4, name, kind="small"))
    for depth in range(0, len(depths), every):
        turn = f' transform="rotate(-40 {x(depth):.1f} {bottom + 16})"' if is_turned else ""
        whole, anchor = depths[depth].stage, "end" if is_turned else "middle"
        body.append(
            draw_text(x(depth), bottom + 16, names[depth], kind="small", anchor=anchor, extra=turn, hover=whole)
        )
    best = x(profile.best)
    said = f"best: {names[profile.best]}, {percent(depths[profile.best].probe.value)}"
    half = 3.1 * sum(column_widths(said))
    body.append(draw_line(best, top - 8, best, bottom, "stage"))
    place = min(right - half, max(left + half, best))
    body.append(draw_text(place, top - 14, said, kind="small strong", anchor="middle"))
    body.append(_band(depths, x, y))
    for colour, key in reversed(list(enumerate(PROBES))):
        body.append(_curve(depths, key, x, y, colour))
    spoken = "; ".join(f"{depth.stage} {percent(depth.probe.value)}" for depth in depths)
    height = bottom + (26 + 4.2 * columns if is_turned else 26)
    return draw_svg(width, height, f"Accuracy of a logistic probe by depth: {spoken}", "".join(body), kind="wide")


def shift_figure(shift: Sequence[ShiftFacts]) -> Markup:
    """How far the images move each stage's batch-norm inputs, a bar with its interval per stage."""
    most = sorted(shift, key=lambda part: -part.mean.value)[:MAX_BARS]
    rows = [part for part in shift if part in most]
    if not rows:
        return Markup("")
    largest = max(end for part in rows for end in (part.mean.value, part.mean.low, part.mean.high))
    names, full = [_cut_front(part.stage, 18) for part in rows], 360.0
    left = 6.8 * max(sum(column_widths(name)) for name in names) + 14

    def x(value: float) -> float:
        return left + (full - left) * (max(0.0, value) / largest if largest > 0 else 0.0)

    body = []
    for place, (name, part) in enumerate(zip(names, rows, strict=True)):
        y, low, high = 20 * place + 10, x(part.mean.low), x(part.mean.high)
        body.append(draw_text(0, y + 4, name, kind="small", hover=part.stage))
        for end, kind in ((full, "track"), (x(part.mean.value), "bar")):
            body.append(f'<rect x="{left:.1f}" y="{y - 4}" width="{end - left:.1f}" height="8" rx="4" class="{kind}"/>')
        body.append(draw_line(low, y, high, y, "tip"))
        body += [draw_line(end, y - 4, end, y + 4, "tip") for end in (low, high)]
        body.append(draw_text(full + 10, y + 4, number(part.mean.value), kind="small"))
    spoken = "; ".join(f"{part.stage} {number(part.mean.value)}" for part in rows)
    return draw_svg(420, 20 * len(rows), f"Shift of batch-norm inputs: {spoken}", "".join(body), kind="bars")


def forecast_rows(advice: Advice, *, chosen: str = "") -> list[ForecastRow]:
    """Gain and cost of each strategy in words, and whether it is `chosen` (the advised one unless said)."""
    return [_forecast_row(one, advice, chosen or advice.strategy) for one in advice.forecasts]


def _forecast_row(forecast: Forecast, advice: Advice, chosen: str) -> ForecastRow:
    name, gain, low, high = forecast.strategy, forecast.gain, forecast.gain_low, forecast.gain_high
    is_base = forecast.is_gain_known and gain == low == high == 0
    marks = {"chosen": name == chosen, "advised": name == advice.strategy, "runner-up": name == advice.runner_up}
    marks["gain not measured"] = not forecast.is_gain_known
    shown = ("0", "") if is_base else (points(gain), f"{points(low)} to {points(high)}")
    return ForecastRow(
        strategy=name,
        gain=shown[0] if forecast.is_gain_known else "–",
        interval=shown[1] if forecast.is_gain_known else "",
        seconds=duration(forecast.seconds),
        memory=memory(forecast.memory_mb),
        mark=next((mark for mark, holds in marks.items() if holds), ""),
    )


def _curve(depths: Sequence[DepthFacts], key: str, x: Scale, y: Scale, colour: int) -> str:
    shares = [getattr(depth, key).value for depth in depths]
    line = " ".join(f"{x(i):.1f},{y(share):.1f}" for i, share in enumerate(shares))
    kind = f"curve s{colour}" if colour == 0 else f"curve light s{colour}"
    dots = [f'<polyline points="{line}" class="{kind}"/>'] if len(shares) > 1 else []
    for i, share in enumerate(shares):
        hover = f"{depths[i].stage}, {PROBES[key]}: {percent(share)}"
        size = 3.4 if colour == 0 else 2.1
        dots.append(f'<circle cx="{x(i):.1f}" cy="{y(share):.1f}" r="{size}" class="f{colour}">')
        dots.append(f"<title>{escape(hover)}</title></circle>")
    return "".join(dots)


def _band(depths: Sequence[DepthFacts], x: Scale, y: Scale) -> str:
    """The probe's interval as a band over the depths; over a single one, as a whisker."""
    ends = [(x(i), depth.probe) for i, depth in enumerate(depths)]
    if len(ends) == 1:
        ((place, part),) = ends
        return draw_line(place, y(part.low), place, y(part.high), "whisker s0")
    around = [(place, y(p.high)) for place, p in ends] + [(place, y(p.low)) for place, p in reversed(ends)]
    return f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in around)}" class="band"/>'


def _cut_front(name: str, columns: int) -> str:
    shown = shorten(name[::-1], columns)[::-1]  # stages differ at their ends
    return shown if shown == name else "…" + shown.lstrip("…._")
