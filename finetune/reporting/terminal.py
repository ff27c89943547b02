"""Facts, plans and scores as plain text for a terminal, 100 columns wide."""

import textwrap
from collections.abc import Mapping
from typing import Any

from finetune.recipe.facts import Facts, Proportion
from finetune.recipe.plan import Plan

WIDTH = 100
_NAMED = 12
"""Classes listed by name; of more, only the number is told."""


def percent(part: Mapping[str, Any] | Proportion | None, *, signed: bool = False) -> str:
    """`95.4 % [90.9, 97.8] of 153`, from a proportion with its interval."""
    if part is None:
        return "-"
    values = part.model_dump() if isinstance(part, Proportion) else part
    value, low, high = (100 * values[key] for key in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}] of {values['n']}"


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
    if facts.normalized_images:
        mean, std = (" ".join(f"{value:.3f}" for value in part) for part in (facts.view.mean, facts.view.std))
        rows.append(("constants", f"mean {mean}, std {std}, measured on {facts.normalized_images:,} training images"))
    if facts.overridden:
        rows.append(("overridden", f"{', '.join(facts.overridden)}: not as the weights were trained"))
    if facts.probe and facts.knn and facts.similarity is not None:
        rows += [
            ("probe", f"{percent(facts.probe.val)} val images right; chance {100 * facts.chance:.1f} %"),
            ("neighbours", f"{percent(facts.knn.val)} val images right (k = {facts.knn.k})"),
            ("similarity", f"{facts.similarity:.2f} (0: features tell nothing of the classes, 1: everything)"),
            ("features", f"{facts.features['hits']:,} from the cache, {facts.features['misses']:,} computed"),
        ]
    for bad in facts.bad_images[:5]:
        rows.append(("bad image", f"{bad.name}: {bad.reason}; left out"))
    if len(facts.bad_images) > 5:
        rows.append(("bad images", f"{len(facts.bad_images) - 5} more; all are named in facts.json"))
    rows += [("warning", warning) for warning in facts.warnings]
    return "Facts\n" + _table(rows)


def plan_text(plan: Plan) -> str:
    """What will be done, and why."""
    lines = ["Plan", _table([(f"{r.key} = {r.value}", r.why) for r in plan.reasons], narrow=44)]
    for number, stage in enumerate(plan.stages, 1):
        lines.append(
            f"  stage {number}, {stage.name}: top {stage.trainable_stages} stages and the head, at most {stage.epochs} "
            f"epochs, rates {stage.lr_head:g} (head) and {stage.lr_backbone:g} (backbone)"
        )
    if not plan.stages:
        lines.append("  no stage: the probe is the model")
    return "\n".join(lines)


def scores_text(scores: Mapping[str, Any]) -> str:
    """The final model beside the probe, each with its interval."""
    is_probe = "probe" in scores and "paired" not in scores
    columns = {"probe": scores} if is_probe else {"final": scores, "probe": scores.get("probe")}
    lines = [f"Scores ({scores['views']} view; 95 % intervals)"]
    if scores.get("views_note"):
        lines.append(f"  {scores['views_note']}")
    for role in ("val", "test"):
        for name, part in columns.items():
            if part and role in part:
                own = part[role]
                lines.append(
                    f"  {role:<5} {name:<6} top-1 {percent(own['top1']):<32} log loss {own['log_loss']['value']:.3f}   "
                    f"ECE {100 * own['ece']['value']:.1f} %"
                )
    if pair := scores.get("paired", {}).get("test"):
        lines.append(
            f"  final minus probe on test: {percent({**pair, 'value': pair['difference']}, signed=True)}{_judge(pair)}"
        )
    return "\n".join(lines)


def _judge(pair: Mapping[str, Any]) -> str:
    if pair["low"] > 0:
        return ": better"
    return ": worse" if pair["high"] < 0 else ": no difference that these images could show"


def _table(rows: list[tuple[str, str]], narrow: int = 12) -> str:
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, WIDTH - narrow - 4) or [""]
        fits = len(name) <= narrow
        lines += [] if fits else [f"  {name}"]
        names = [name if fits else "", *[""] * (len(wrapped) - 1)]
        lines += [f"  {left:<{narrow}}  {right}" for left, right in zip(names, wrapped, strict=True)]
    return "\n".join(lines)
