"""The verdict on a run: what the numbers allow us to say of it, in sentences.

Where classes are uneven it speaks of balanced accuracy: a share of all images is there mostly a share of the largest
class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.measures import Measure
from finetune.config.scores import ClassScore, Scores, SplitScores
from finetune.reporting.svg import interval_text, percent, points, shorten
from finetune.reporting.wording import is_uneven, lost_classes, majority_sentence

FEW_IMAGES = 100
_PROBE_ONLY = (
    "probe",
    "This is the probe itself: a linear classifier on the frozen backbone. Nothing was fine-tuned.",
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the numbers allow us to say, in sentences."""

    tone: str
    """better | worse | undecided | probe | alone (nothing to compare with) | none (no scores)."""
    headline: str
    comparison: str
    notes: tuple[str, ...]


def judged_role(scores: Scores) -> str:
    """`test` where test images were scored, otherwise `val`."""
    return "test" if scores.test is not None else "val"


def judge(scores: Scores, *, is_probe_only: bool) -> Verdict:
    """The verdict on the test images, or on the validation images where there is no test set."""
    role = judged_role(scores)
    final, word = scores.of(role), {"test": "test", "val": "validation"}[role]
    if final is None:
        return Verdict(tone="none", headline="This run was not scored on any image.", comparison="", notes=())
    uneven, main = is_uneven(final), main_score(final)
    told = f"Balanced accuracy {percent(main.value)} on" if uneven else f"{percent(main.value)} of"
    headline = f"{told} {final.n:,} {word} images{'' if uneven else ' right'} (95 % interval {interval_text(main)})."
    tone, comparison = _PROBE_ONLY if is_probe_only else _compare(scores, role, word)
    notes = (
        _role_note(role), _majority_note(final), _few_images_note(final.n), _weakest_class_note(final.per_class)
    )  # fmt: skip
    return Verdict(tone=tone, headline=headline, comparison=comparison, notes=tuple(n for n in notes if n))


def main_score(score: SplitScores) -> Measure:
    """The score to look at first: balanced accuracy where classes are uneven, else top-1 accuracy."""
    return score.balanced_accuracy if is_uneven(score) else score.top1


def _majority_note(final: SplitScores) -> str:
    """Where classes are uneven: top-1 beside what the largest class alone gives, and which classes are not found."""
    if not (said := majority_sentence(final)):
        return ""
    lost = lost_classes(final)
    also = f" {lost[0].upper()}{lost[1:]}." if lost else ""
    return f"Classes are uneven: top-1 is {percent(final.top1.value)}, where {said}.{also}"


def _compare(scores: Scores, role: str, word: str) -> tuple[str, str]:
    """Tone and sentence of the final model beside the probe, by the score that is looked at first."""
    probe = scores.probe.of(role) if scores.probe else None
    paired = scores.paired.of(role) if scores.paired else None
    gap = paired.balanced if paired and probe and is_uneven(probe) else paired
    if probe is None or paired is None or gap is None:
        return "alone", "No probe was scored beside it, so what fine-tuning added is not known."
    alone = f"The probe alone gets {percent(main_score(probe).value)}; "
    if paired.only_final_right == paired.only_probe_right == 0:
        return "undecided", alone + "fine-tuning answered exactly the same images rightly, so it changed nothing here."
    by = f"{points(abs(gap.difference), signed=False)} points"
    interval = f"({points(gap.low)} to {points(gap.high)})"
    if gap.low > 0:
        return "better", f"{alone}fine-tuning raised that by {by} {interval}, more than chance explains."
    if gap.high < 0:
        told = (
            f"{alone}fine-tuning lowered that by {by} {interval}, so the probe is the better model here: keep the probe"
        )
        return "worse", f"{told} (train.strategy=probe)."
    change = f"fine-tuning changed that by {points(gap.difference)} points {interval}"
    told = f"{alone}{change}, so on this {word} set the difference cannot be told from chance"
    return "undecided", f"{told}: keep the probe, which is simpler, unless more images say otherwise."


def _role_note(role: str) -> str:
    if role == "test":
        return ""
    return "No test images were set aside. Validation images also guided training, so this score is optimistic."


def _few_images_note(n: int) -> str:
    if n >= FEW_IMAGES:
        return ""
    return f"With only {n} images, one image more or less moves the score by {100 / n:.1f} points: read it as a sketch."


def _weakest_class_note(per_class: Sequence[ClassScore]) -> str:
    known = [(row.recall.value, -row.n, row.recall, row) for row in per_class if row.recall is not None]
    if len(known) < 2:
        return ""
    share, _, recall, weakest = min(known, key=lambda one: one[:2])
    if share >= 1:
        return "Every image of every class was recognised."
    found = f"{percent(share)} of its {weakest.n:,} images ({interval_text(recall)})"
    return f"The weakest class is “{shorten(weakest.name, 60)}”: {found} recognised."
