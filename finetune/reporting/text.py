"""Facts, plans and scores as plain text for a terminal, 100 columns wide."""

import textwrap
from collections.abc import Mapping, Sequence

from finetune.config.facts import Facts, ProfileFacts, RangeFacts
from finetune.config.measures import Measure
from finetune.config.other_data import BackboneElsewhere, RunElsewhere
from finetune.config.plan import Advice, Plan, Stage
from finetune.config.scores import (
    ByRole,
    Conformal,
    Difference,
    MemberRow,
    Paired,
    Scores,
    SplitScores,
    TeacherScores,
)
from finetune.metrics.significance import smallest_difference
from finetune.planning.advisor import UNMEASURED
from finetune.planning.lr_schedules import draw_curve
from finetune.reporting.curve import curve_sentence
from finetune.reporting.decision import ForecastRow, forecast_rows
from finetune.reporting.grid_text import grid_text
from finetune.reporting.wording import (
    baseline,
    chirality_sentence,
    depth_sentence,
    is_uneven,
    lost_classes,
    majority_sentence,
    memory,
    similarity_rows,
)

WIDTH = 100
DISAGREEMENT = 0.1
"""Share of test images on which one of two models alone is right, where there are no two models yet."""
_NAMED = 12
"""Classes listed by name; of more, only the number is told."""
_BAR = 30
"""Columns of a bar of accuracy 1."""
_PLAIN_BARS = str.maketrans("▁▂▃▄▅▆▇█", "_.:-=+*#")
"""From low to high, for terminals that know no blocks."""


def percent(part: Measure | None, *, signed: bool = False) -> str:
    """`95.4 % [90.9, 97.8] of 153`, from a proportion with its interval."""
    if part is None:
        return "-"
    value, low, high = 100 * part.value, 100 * part.low, 100 * part.high
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}] of {part.n}"


def facts_text(facts: Facts) -> str:
    """What was measured."""
    counts = ", ".join(f"{sum(row):,} {role}" for role, row in facts.counts.items())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts.image_kinds.items())
    rows = [
        ("images", f"{facts.num_images:,} in {facts.root}: {counts}"),
        (
            "classes",
            f"{len(facts.classes)}: {', '.join(facts.classes[:_NAMED])}{' ...' if len(facts.classes) > _NAMED else ''}",
        ),
        (
            "per class",
            f"{facts.images_per_class.median:g} training images "
            f"({facts.images_per_class.min} to {facts.images_per_class.max})",
        ),
        ("pixels", f"{facts.median_width:g} x {facts.median_height:g} (median); {kinds}"),
        (
            "backbone",
            f"{facts.backbone.name}: {facts.backbone.params_m:g} M parameters, {facts.backbone.num_features} "
            f"features, from {facts.backbone.pretrained_on}",
        ),
        (
            "view",
            f"{facts.view.size_pixels} px crop of shorter side {facts.view.shorter_pixels}, {facts.view.interpolation}",
        ),
    ]
    if num_test := sum(facts.counts.get("test", ())):
        least = 100 * smallest_difference(num_test, DISAGREEMENT)
        told = f"models that differ on a tenth of {num_test:,} test images are told apart from {least:.1f} points on"
        rows.append(("can show", told if least < 100 else f"{num_test} test images hardly tell models apart"))
    if facts.value_range is not None:
        rows.append(("value range", range_text(facts.value_range, facts.image_kinds)))
    if facts.several_frames:
        rows.append(("frames", facts.frames_text))
    if facts.normalized_images:
        mean, std = (" ".join(f"{value:.3f}" for value in part) for part in (facts.view.mean, facts.view.std))
        rows.append(("constants", f"mean {mean}, std {std}, measured on {facts.normalized_images:,} training images"))
    if facts.size_note:
        rows.append(("image size", facts.size_note))
    if facts.overridden:
        rows.append(("overridden", f"{', '.join(facts.overridden)}: not as the weights were trained"))
    rows += _measures(facts)
    for bad in facts.bad_images[:5]:
        rows.append(("bad image", f"{bad.name}: {bad.reason}; left out"))
    if len(facts.bad_images) > 5:
        rows.append(("bad images", f"{len(facts.bad_images) - 5} more; all are named in facts.json"))
    rows += [("warning", warning) for warning in facts.warnings]
    profile = [profile_text(facts.profile)] if facts.profile else []
    return "\n".join(["Facts", _table(rows), *profile])


def range_text(found: RangeFacts, kinds: Mapping[str, int]) -> str:
    """Which values of how many images become 0 and 255, and why."""
    wide = kinds.get("16-bit", 0)
    others = sum(kinds.values()) - wide
    told = f"{wide:,} 16-bit images; values {found.low:g} to {found.high:g} ({found.why}) are mapped to 0..255"
    return told + (f"; the {others:,} images of 8 bits stay as they are" if others else "")


def plan_text(plan: Plan) -> str:
    """What will be done, and why."""
    lines = ["Plan", _table([(f"{r.key} = {r.value}", r.why) for r in plan.reasons], narrow=44)]
    for number, stage in enumerate(plan.stages, 1):
        if stage.images == "labelled":
            twin = plan.repeated(number - 1) + 1
            lines.append(f"  stage {number}, refit: stage {twin} again, on all labelled images and without val,")
            lines.append("           for as many epochs as are kept of it")
            continue
        lines.append(
            f"  stage {number}, {stage.name}: {_moving(stage)} and the head, at most {stage.epochs} epochs, "
            f"rates {stage.lr_head:g} (head) and {stage.lr_backbone:g} (backbone)"
        )
        averaging = plan.train.averaging
        start = averaging.swa_start if averaging.kind == "swa" and number - 1 == plan.last_stage("train") else None
        curve = draw_curve(stage.schedule, stage.epochs, 100, swa_start=start, swa_lr=averaging.swa_lr)
        lines.append(f"           rate |{curve.translate(_PLAIN_BARS)}| {stage.schedule.name}")
    if not plan.stages:
        lines.append("  no stage: the probe is the model")
    is_measured = plan.pretrained and plan.advice.cell != UNMEASURED
    grid = grid_text(plan.advice) if is_measured else ""  # random weights are similar to nothing
    lines += [text for text in (grid, forecasts_text(plan.advice, chosen=plan.train.strategy)) if text]
    return "\n".join(lines)


def _moving(stage: Stage) -> str:
    """What of the backbone trains in a stage, in words."""
    where = ", ".join(stage.layers) if stage.layers else f"top {stage.trainable_stages} stages"
    what = {"all": "", "norm_only": "norms of the ", "bitfit": "biases of the ", "lora": "low-rank matrices in the "}
    first = " without the first layer" if stage.freezes_first else ""
    fresh = f" ({stage.fresh_stages} drawn anew)" if stage.fresh_stages else ""
    return f"{what[stage.trains]}{where}{first}{fresh}"


def profile_text(profile: ProfileFacts) -> str:
    """A line per depth with a bar of its accuracy, the best one marked, and what follows."""
    lines = ["  Depths, from the stem to the top: logistic probe [95 %]; ridge; nearest neighbours, in %"]
    narrow = max((len(_cut(depth.stage)) for depth in profile.depths), default=0)
    for place, depth in enumerate(profile.depths):
        bar = "#" * round(_BAR * min(1.0, max(0.0, depth.probe.value)))
        probe, low, high = (100 * part for part in (depth.probe.value, depth.probe.low, depth.probe.high))
        lines.append(
            f"  {'*' if place == profile.best else ' '} {_cut(depth.stage):<{narrow}}  {bar:<{_BAR}} {probe:5.1f} "
            f"[{low:.1f}, {high:.1f}]; {100 * depth.ridge.value:.1f}; {100 * depth.neighbours.value:.1f}"
        )
    said = _ascii(depth_sentence(profile))
    return "\n".join([*lines, *textwrap.wrap(said, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")])


def forecasts_text(advice: Advice, *, chosen: str = "") -> str:
    """What each strategy would give and cost; nothing where nothing was forecast."""
    rows = forecast_rows(advice, chosen=chosen)
    if not rows:
        return ""
    cells = [("strategy", "gain in points [95 %]", "time", "memory", "")]
    cells += [(_cut(row.strategy), _with_interval(row), row.seconds, row.memory, row.mark) for row in rows]
    a, b, c, d = (max(len(cell[i]) for cell in cells) for i in range(4))
    lines = (f"  {s:<{a}}  {gain:<{b}}  {time:>{c}}  {size:>{d}}  {mark}" for s, gain, time, size, mark in cells)
    return "\n".join(_ascii(line).rstrip() for line in lines)


def scores_text(scores: Scores) -> str:
    """The final model beside the probe, each with its interval."""
    columns: dict[str, Scores | ByRole[SplitScores] | TeacherScores | None]
    columns = {"probe": scores} if scores.is_probe else {"final": scores, "probe": scores.probe}
    columns |= {"teacher": scores.teacher} if scores.teacher else {}
    narrow = max(6, *map(len, columns))
    lines = [f"Scores ({scores.views} view; 95 % intervals)"]
    if scores.views_note:
        lines.append(f"  {scores.views_note}")
    for role in ("val", "test"):
        shown = {name: own for name, part in columns.items() if part and (own := part.of(role))}
        lines += [
            f"  {role:<5} {name:<{narrow}} balanced accuracy {percent(own.balanced_accuracy)}, "
            f"macro F1 {_without_count(own.macro_f1)}"
            for name, own in shown.items()
            if is_uneven(own)
        ]
        lines += [
            f"  {role:<5} {name:<{narrow}} top-1 {percent(own.top1):<32} "
            f"log loss {own.log_loss.value:.3f}   ECE {100 * own.ece.value:.1f} %"
            for name, own in shown.items()
        ]
    if scores.refit:
        lines += _wrapped(scores.refit.note)
    lines += _uneven_lines(scores)
    lines += _difference_lines(scores)
    if scores.conformal is not None:
        lines += _set_lines(scores.conformal)
    if scores.chosen_by_val:
        keys = ", ".join(dict.fromkeys(flag.partition(":")[0] for flag in scores.chosen_by_val))
        lines += _wrapped(_ascii(f"val is no estimate, for it chose: {keys}; test chose nothing"))
    if scores.members and scores.members.test:
        lines += _member_lines(scores.members.test)
    if found := scores.next:
        lines += _wrapped(f"next to try: {found.key}={found.value}, for {found.why}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")


def _without_count(part: Measure | None) -> str:
    return percent(part).rpartition(" of ")[0] or "-"


def _set_lines(conformal: Conformal) -> list[str]:
    """What the prediction sets of test hold; nothing without test images."""
    if (sets := conformal.test) is None:
        return []
    size = sets.mean_size.value
    told = (
        f"  sets promised to hold the true class of {100 * sets.promised:g} %: they do for {percent(sets.coverage)}, "
        f"with {size:.2f} classes on average{', some with none' if size < 1 else ''}"
    )
    return [told, *([f"  their threshold: {conformal.held_out}"] if conformal.held_out else [])]


def _uneven_lines(scores: Scores) -> list[str]:
    """Where classes are uneven: what naming the largest one gives, and which classes are as good as not found."""
    lines = []
    for role in ("val", "test"):
        own = scores.of(role)
        if own is not None and (said := majority_sentence(own)):
            lost = "" if role == "val" and scores.test else lost_classes(own)
            lines += _wrapped(_ascii(f"{role}: {said}" + (f"; {lost}" if lost else "")))
    return lines


def _difference_lines(scores: Scores) -> list[str]:
    """What training, a teacher, more views and draws changed on the same test images."""
    uneven, lines = scores.test is not None and is_uneven(scores.test), []
    if scores.paired and scores.paired.test:
        lines += _both("final minus probe", scores.paired.test, uneven=uneven)
    if teacher := scores.teacher:
        if teacher.paired and teacher.paired.test:
            lines += _both("final minus teacher", teacher.paired.test, _passes(teacher), uneven=uneven)
        for note in filter(None, (teacher.note, teacher.views_note)):
            lines += _wrapped(f"teacher: {note}")
    if scores.views_gain and scores.views_gain.test:
        passes = f", for {scores.views_gain.crops} times the passes"
        lines.append(_difference(f"{scores.views} minus center", scores.views_gain.test, passes))
    if scores.draws and scores.draws.sentence:
        lines += _wrapped(scores.draws.sentence)
    return lines


def _difference(what: str, pair: Difference, rest: str = "") -> str:
    return f"  {what} on test: {percent(pair.measure, signed=True)}{_judge(pair)}{rest}"


def _both(what: str, pair: Paired, rest: str = "", *, uneven: bool) -> list[str]:
    """A difference in top-1 accuracy; where classes are uneven, that in balanced accuracy before it."""
    if not uneven or pair.balanced is None:
        return [_difference(what, pair, rest)]
    told = (
        _difference(f"{what} in balanced accuracy", pair.balanced),
        _difference(f"{what} in top-1", pair, rest),
    )
    return [part for text in told for part in textwrap.wrap(text, WIDTH, subsequent_indent="    ")]


def _passes(teacher: TeacherScores) -> str:
    """What an answer of the student costs in place of the teacher's, where that is another number of passes."""
    ours, theirs = teacher.student_passes, teacher.passes
    if ours is None or ours == theirs:
        return ""
    return f", for {ours} pass{'es' if ours > 1 else ''} in place of {theirs}"


def _member_lines(rows: Sequence[MemberRow]) -> list[str]:
    """The table of an ensemble on test."""
    lines = ["  on test, before any temperature:      accuracy   log loss   ECE %   disagree %   networks"]
    for row in rows:
        lines.append(
            f"    {_end(_ascii(row.name)):<32} {100 * row.accuracy:>8.1f} {row.log_loss:>10.3f} "
            f"{100 * row.ece:>7.1f} {100 * row.disagreement:>12.1f} {row.cost:>10}"
        )
    return lines


def elsewhere_text(found: RunElsewhere | BackboneElsewhere) -> str:
    """A run, or a backbone as it came, on images of another folder."""
    own = found.scores
    balanced = f"balanced accuracy {percent(own.balanced_accuracy)}; " if is_uneven(own) else ""
    part = "the images of role test" if found.role == "test" else "all images"
    name = found.run if isinstance(found, RunElsewhere) else found.backbone
    lines = [
        f"{name} on {part} of {found.data}",
        f"  {found.views} view; {balanced}top-1 {percent(own.top1)} (95 %); "
        f"log loss {own.log_loss.value:.3f}; ECE {100 * own.ece.value:.1f} %",
    ]
    notes = [found.views_note]
    if isinstance(found, RunElsewhere):
        if found.own_test:
            lines.append(f"  at home, on its own test images: top-1 {percent(found.own_test)}")
        if missing := found.missing_classes:
            more = " and others" if len(missing) > _NAMED else ""
            lines.append(f"  no images of {', '.join(missing[:_NAMED])}{more}")
        notes.append(found.seen.note)
    notes += [*found.warnings]
    notes += [f"{bad.name} cannot be read ({bad.reason}); left out" for bad in found.bad_images[:5]]
    lines += [f"  note: {_ascii(note)}" for note in notes if note]
    return "\n".join(lines)


def _measures(facts: Facts) -> list[tuple[str, str]]:
    rows = []
    if facts.probe:
        rows.append(("probe", _probe_words(facts)))
    if facts.knn:
        rows.append(("neighbours", f"{percent(facts.knn.val)} val images right (k = {facts.knn.k})"))
    if facts.learning_curve:
        rows.append(("more labels", curve_sentence(facts.learning_curve)))
    if facts.similarity:
        found = facts.similarity
        value = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
        rows.append(("similarity", f"{value} (1: as the images of pretraining, 0: unlike them)"))
        told = dict(similarity_rows(found))
        shown = {"Random weights": "control", "Batch norm": "batch norm", "Source classes": "source"}
        shown |= {"Distance": "distance", "Earth mover": "earth mover"}
        rows += [(short, _ascii(told[name])) for name, short in shown.items() if name in told]
    if facts.chirality:
        rows.append(("mirroring", _ascii(chirality_sentence(facts.chirality))))
    if facts.features:
        hits, misses, size = (facts.features.get(key, 0) for key in ("hits", "misses", "bytes"))
        rows.append(("features", f"{hits:,} from the cache, {misses:,} computed; {memory(size / 1e6)}"))
    return rows


def _probe_words(facts: Facts) -> str:
    """How the probe fares on val beside what needs no look at the images."""
    assert facts.probe is not None
    right = f"{percent(facts.probe.val)} val images right"
    name, share = baseline(facts)
    if name == "chance":
        return f"{right}; chance {100 * share:.1f} %"
    return (
        f"balanced accuracy {percent(facts.probe.balanced_accuracy)} val images, macro F1 "
        f"{percent(facts.probe.macro_f1)}; {right}, where {name} gives {100 * share:.1f} %"
    )


def _with_interval(row: ForecastRow) -> str:
    return f"{row.gain} [{row.interval}]" if row.interval else row.gain


def _ascii(text: str) -> str:
    """Our own dashes and letters as a plain terminal shows them."""
    return text.translate({ord("–"): "-", ord("−"): "-", ord("é"): "e", ord("…"): "..."})


def _end(text: str) -> str:
    return text if len(text) <= 32 else f"...{text[-29:]}"


def _cut(text: str) -> str:
    return text if len(text) <= 20 else text[:17] + "..."


def _judge(pair: Difference) -> str:
    if pair.low > 0:
        return ": better"
    return ": worse" if pair.high < 0 else ": no difference that these images could show"


def _table(rows: list[tuple[str, str]], narrow: int = 12) -> str:
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - narrow - 4) or [""]
        fits = len(name) <= narrow
        lines += [] if fits else [f"  {name}"]
        names = [name if fits else "", *[""] * (len(wrapped) - 1)]
        lines += [f"  {left:<{narrow}}  {right}" for left, right in zip(names, wrapped, strict=True)]
    return "\n".join(lines)
