"""Why this depth: pictures and sentences of a decision, from `facts.json` and `plan.yaml` as they were read.

Every part is drawn where its numbers are there and left out where they are not: random weights have no probe,
and older runs measured less. The sentences claim a lead only where it exceeds its standard error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from finetune.reporting.figures import (
    column_widths,
    draw_legend,
    draw_line,
    draw_svg,
    draw_text,
    is_number,
    nice_ticks,
    percent,
    points,
    shorten,
)
from finetune.reporting.matrix_figure import grid_figure
from finetune.reporting.sentences import (
    Baseline,
    Part,
    baseline,
    chirality_sentence,
    depth_sentence,
    duration,
    measure_rows,
    memory,
    number,
)

Scale = Callable[[float], float]
ENDS = ("value", "low", "high")

PROBES = {"probe": "logistic probe", "ridge": "ridge", "neighbours": "nearest neighbours"}
"""Curves of the depth figure, in the order of their colours."""
MAX_NAMES = 32
"""Stages whose names stand side by side; of more, every second or third is named."""
MAX_BARS = 24
"""Bars of the shift figure; of more stages we show those that moved most."""


def decision_context(facts: Part, plan: Part) -> dict[str, Any]:
    """What the section on the decision shows; empty where nothing of it is known."""
    advice, profile, similarity, chirality = (
        part if isinstance(part, Mapping) else {}
        for part in (plan.get("advice"), *(facts.get(key) for key in ("profile", "similarity", "chirality")))
    )
    advised = str(advice.get("strategy") or "")
    chosen = str((plan.get("train") or {}).get("strategy") or advised)
    shift, why = similarity.get("shift") or (), str(advice.get("why") or "").rstrip(".")
    reasons = {reason.get("key"): reason.get("why") for reason in plan.get("reasons") or ()}
    is_wished = reasons.get("train.strategy") == "the recipe says so"
    if why and chosen != advised:
        why += f". The advice is {advised}; the recipe says {chosen}."
    elif why:
        why += f". The advice is {advised}, and the recipe says so." if is_wished else "."
    context = {
        "why": why[:1].upper() + why[1:],
        "grid": grid_figure(advice) if similarity else Markup(""),
        "forecasts": forecast_rows(advice, chosen=chosen),
        "profile": depth_figure(profile, reference=baseline(facts)),
        "depth": depth_sentence(profile),
        "measures": measure_rows(facts) if similarity else [],
        "shift": shift_figure(shift),
        "chirality": chirality_sentence(chirality),
    }
    return {**context, "advice": advice} if any(context.values()) else {}


def depth_figure(profile: Part, *, reference: Baseline | None = None) -> Markup:
    """Accuracy by depth, from the stem to the top: three probes, the interval of the logistic one as a band.

    `reference` is drawn as a level: what can be had without looking.
    """
    chance = reference[1] if reference else None
    depths = profile.get("depths") or ()
    if not any(is_number((depth.get("probe") or {}).get("value")) for depth in depths):
        return Markup("")
    parts = [part for depth in depths for probe in PROBES if (part := depth.get(probe))]
    shares = [float(v) for v in (*(part.get(end) for part in parts for end in ENDS), chance) if is_number(v)]  # type: ignore[arg-type]
    low = max(0.0, min(0.8, math.floor(min(shares) * 10 - 0.2) / 10))
    high = min(1.0, max(low + 0.2, math.ceil(max(shares) * 10) / 10))
    every = math.ceil(len(depths) / MAX_NAMES)
    names = [_cut_front(str(depth.get("stage", "")), 14) for depth in depths]
    width, left, right, top, bottom = 620, 68, 560 if is_number(chance) else 606, 58, 246
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
    if is_number(chance):
        body.append(draw_line(left, y(chance), right, y(chance), "stage"))  # type: ignore[arg-type]
        name = "chance" if reference and reference[0] == "chance" else "majority"
        body.append(draw_text(right + 6, y(chance) + 4, name, kind="small"))  # type: ignore[arg-type]
    for depth in range(0, len(depths), every):
        turn = f' transform="rotate(-40 {x(depth):.1f} {bottom + 16})"' if is_turned else ""
        whole, anchor = str(depths[depth].get("stage", "")), "end" if is_turned else "middle"
        body.append(
            draw_text(x(depth), bottom + 16, names[depth], kind="small", anchor=anchor, extra=turn, hover=whole)
        )
    best = profile.get("best")
    if isinstance(best, int) and 0 <= best < len(depths):
        said = f"best: {names[best]}, {percent(depths[best]['probe']['value'])}"
        half = 3.1 * sum(column_widths(said))
        body.append(draw_line(x(best), top - 8, x(best), bottom, "stage"))
        place = min(right - half, max(left + half, x(best)))
        body.append(draw_text(place, top - 14, said, kind="small strong", anchor="middle"))
    body.append(_band(depths, x, y))
    for colour, key in reversed(list(enumerate(PROBES))):
        body.append(_curve(depths, key, x, y, colour))
    spoken = "; ".join(f"{depth.get('stage')} {percent(depth['probe']['value'])}" for depth in depths)
    height = bottom + (26 + 4.2 * columns if is_turned else 26)
    return draw_svg(width, height, f"Accuracy of a logistic probe by depth: {spoken}", "".join(body), kind="wide")


def shift_figure(shift: Sequence[Part]) -> Markup:
    """How far the images move each stage's batch-norm inputs, a bar with its interval per stage."""
    known = [part for part in shift if is_number((part.get("mean") or {}).get("value"))]
    most = sorted(known, key=lambda part: -part["mean"]["value"])[:MAX_BARS]
    rows = [part for part in known if part in most]
    if not rows:
        return Markup("")
    ends = [float(v) for part in rows for end in ENDS if is_number(v := part["mean"].get(end))]
    names, largest, left, full = [_cut_front(str(part.get("stage", "")), 18) for part in rows], max(ends), 0.0, 360.0
    left = 6.8 * max(sum(column_widths(name)) for name in names) + 14

    def x(value: float) -> float:
        return left + (full - left) * (max(0.0, value) / largest if largest > 0 else 0.0)

    body = []
    for place, (name, part) in enumerate(zip(names, rows, strict=True)):
        mean, y = part["mean"], 20 * place + 10
        body.append(draw_text(0, y + 4, name, kind="small", hover=str(part.get("stage", ""))))
        for end, kind in ((full, "track"), (x(mean["value"]), "bar")):
            body.append(f'<rect x="{left:.1f}" y="{y - 4}" width="{end - left:.1f}" height="8" rx="4" class="{kind}"/>')
        if is_number(mean.get("low")) and is_number(mean.get("high")):
            low, high = x(mean["low"]), x(mean["high"])
            body += [
                draw_line(low, y, high, y, "tip"),
                *(draw_line(end, y - 4, end, y + 4, "tip") for end in (low, high)),
            ]
        body.append(draw_text(full + 10, y + 4, number(mean["value"]), kind="small"))
    spoken = "; ".join(f"{part.get('stage')} {number(part['mean']['value'])}" for part in rows)
    return draw_svg(420, 20 * len(rows), f"Shift of batch-norm inputs: {spoken}", "".join(body), kind="bars")


def forecast_rows(advice: Part, *, chosen: str = "") -> list[dict[str, str]]:
    """Gain and cost of each strategy in words, and whether it is `chosen` (the advised one unless said)."""
    advised = advice.get("strategy")
    rows = []
    for forecast in advice.get("forecasts") or ():
        name = str(forecast.get("strategy", ""))
        is_gain_known = bool(forecast.get("is_gain_known", True))
        gain, low, high = (forecast.get(key) if is_gain_known else None for key in ("gain", "gain_low", "gain_high"))
        is_base = gain == low == high == 0
        marks = {"chosen": name == (chosen or advised), "advised": name == advised}
        marks |= {"runner-up": name == advice.get("runner_up"), "gain not measured": not is_gain_known}
        rows.append(
            {
                "strategy": name.replace("_", " "),
                "gain": "0" if is_base else points(gain) if gain is not None and is_number(gain) else "–",
                "interval": "" if is_base or low is None or high is None else f"{points(low)} to {points(high)}",
                "seconds": duration(forecast.get("seconds")),
                "memory": memory(forecast.get("memory_mb")),
                "mark": next((mark for mark, holds in marks.items() if holds), ""),
            }
        )
    return rows


def _curve(depths: Sequence[Part], key: str, x: Scale, y: Scale, colour: int) -> str:
    known = [(i, d[key]) for i, d in enumerate(depths) if is_number((d.get(key) or {}).get("value"))]
    line = " ".join(f"{x(i):.1f},{y(part['value']):.1f}" for i, part in known)
    kind = f"curve s{colour}" if colour == 0 else f"curve light s{colour}"
    dots = [f'<polyline points="{line}" class="{kind}"/>'] if len(known) > 1 else []
    for i, part in known:
        hover = f"{depths[i].get('stage')}, {PROBES[key]}: {percent(part['value'])}"
        size = 3.4 if colour == 0 else 2.1
        dots.append(f'<circle cx="{x(i):.1f}" cy="{y(part["value"]):.1f}" r="{size}" class="f{colour}">')
        dots.append(f"<title>{escape(hover)}</title></circle>")
    return "".join(dots)


def _band(depths: Sequence[Part], x: Scale, y: Scale) -> str:
    """The probe's interval as a band over the depths; over a single one, as a whisker."""
    ends = [
        (x(i), d["probe"]) for i, d in enumerate(depths) if _are_numbers(d["probe"].get("low"), d["probe"].get("high"))
    ]
    if len(ends) == 1:
        ((place, part),) = ends
        return draw_line(place, y(part["low"]), place, y(part["high"]), "whisker s0")
    around = [(place, y(p["high"])) for place, p in ends] + [(place, y(p["low"])) for place, p in reversed(ends)]
    return f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in around)}" class="band"/>' if ends else ""


def _cut_front(name: str, columns: int) -> str:
    shown = shorten(name[::-1], columns)[::-1]  # stages differ at their ends
    return shown if shown == name else "…" + shown.lstrip("…._")


def _are_numbers(*values: object) -> bool:
    return all(is_number(value) for value in values)
