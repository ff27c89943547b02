"""The verdict on a run: what the numbers allow us to say of it, in sentences.

Where classes are uneven it speaks of balanced accuracy: a share of all images is there mostly a share of the largest
class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.reporting.figures import interval_text, is_number, percent, points, shorten
from finetune.reporting.sentences import is_uneven, lost_classes, majority_sentence

FEW_IMAGES = 100


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the numbers allow us to say, in sentences."""

    tone: str
    """better | worse | undecided | probe | alone (nothing to compare with) | none (no scores)."""
    headline: str
    comparison: str
    notes: tuple[str, ...]


def judged_role(scores: Mapping[str, Any]) -> str:
    """`test` where test images were scored, otherwise `val`."""
    return "test" if (scores.get("test") or {}).get("n") else "val"


def judge(scores: Mapping[str, Any], *, is_probe_only: bool) -> Verdict:
    """The verdict on the test images, or on the validation images where there is no test set."""
    role = judged_role(scores)
    final, word = scores.get(role) or {}, {"test": "test", "val": "validation"}[role]
    top1, n = final.get("top1") or {}, final.get("n") or 0
    if not n or not is_number(top1.get("value")):
        return Verdict(tone="none", headline="This run was not scored on any image.", comparison="", notes=())
    paired = (scores.get("paired") or {}).get(role) or {}
    probe = (scores.get("probe") or {}).get(role) or {}
    uneven = is_uneven(final)
    main = final["balanced_accuracy"] if uneven else top1
    told = f"Balanced accuracy {percent(main['value'])} on" if uneven else f"{percent(main['value'])} of"
    headline = f"{told} {n:,} {word} images{'' if uneven else ' right'}"
    if is_number(main.get("low")) and is_number(main.get("high")):
        headline += f" (95 % interval {interval_text(main)})"
    if uneven:
        paired = {**paired, **(paired.get("balanced") or {})} if "balanced" in paired else {}
    key = "balanced_accuracy" if uneven else "top1"
    tone, comparison = _compare(paired, probe.get(key) or {}, role=word, is_probe_only=is_probe_only)
    notes = (
        _role_note(role), _majority_note(final), _few_images_note(n), _weakest_class_note(final.get("per_class") or ())
    )  # fmt: skip
    return Verdict(tone=tone, headline=headline + ".", comparison=comparison, notes=tuple(n for n in notes if n))


def _majority_note(final: Mapping[str, Any]) -> str:
    """Where classes are uneven: top-1 beside what the largest class alone gives, and which classes are not found."""
    if not (said := majority_sentence(final)):
        return ""
    lost = lost_classes(final)
    also = f" {lost[0].upper()}{lost[1:]}." if lost else ""
    return f"Classes are uneven: top-1 is {percent(final['top1']['value'])}, where {said}.{also}"


def _compare(paired: Mapping[str, Any], probe: Mapping[str, Any], *, role: str, is_probe_only: bool) -> tuple[str, str]:
    if is_probe_only:
        return "probe", "This is the probe itself: a linear classifier on the frozen backbone. Nothing was fine-tuned."
    if not (is_number(probe.get("value")) and all(is_number(paired.get(k)) for k in ("difference", "low", "high"))):
        return "alone", "No probe was scored beside it, so what fine-tuning added is not known."
    alone = f"The probe alone gets {percent(probe['value'])}; "
    if paired.get("only_final_right") == 0 and paired.get("only_probe_right") == 0:
        return "undecided", alone + "fine-tuning answered exactly the same images rightly, so it changed nothing here."
    by = f"{points(abs(paired['difference']), signed=False)} points"
    interval = f"({points(paired['low'])} to {points(paired['high'])})"
    if paired["low"] > 0:
        return "better", f"{alone}fine-tuning raised that by {by} {interval}, more than chance explains."
    if paired["high"] < 0:
        told = (
            f"{alone}fine-tuning lowered that by {by} {interval}, so the probe is the better model here: keep the probe"
        )
        return "worse", f"{told} (train.strategy=probe)."
    change = f"fine-tuning changed that by {points(paired['difference'])} points {interval}"
    told = f"{alone}{change}, so on this {role} set the difference cannot be told from chance"
    return "undecided", f"{told}: keep the probe, which is simpler, unless more images say otherwise."


def _role_note(role: str) -> str:
    if role == "test":
        return ""
    return "No test images were set aside. Validation images also guided training, so this score is optimistic."


def _few_images_note(n: int) -> str:
    if n >= FEW_IMAGES:
        return ""
    return f"With only {n} images, one image more or less moves the score by {100 / n:.1f} points: read it as a sketch."


def _weakest_class_note(per_class: Sequence[Mapping[str, Any]]) -> str:
    known = [c for c in per_class if c.get("n") and is_number((c.get("recall") or {}).get("value"))]
    if len(known) < 2:
        return ""
    weakest = min(known, key=lambda c: (c["recall"]["value"], -c["n"]))
    recall = weakest["recall"]
    if recall["value"] >= 1:
        return "Every image of every class was recognised."
    interval = f" ({interval_text(recall)})" if is_number(recall.get("low")) else ""
    share = f"{percent(recall['value'])} of its {weakest['n']:,} images{interval}"
    return f"The weakest class is “{shorten(str(weakest['name']), 60)}”: {share} recognised."
