"""Scores as runs leave them, made of a few numbers."""

from finetune.config.measures import Measure, Proportion
from finetune.config.scores import AgainstProbe, ByRole, ClassScore, Scores, SplitScores


def measure(value, n=153, half=0.03):
    return Measure(value=value, low=value - half, high=value + half, n=n)


def split_scores(top1=0.9, n=153, *, per_class=(), **changes):
    """The scores of one split of two even classes, `top1` of the images right, or those that are given."""
    rows = per_class or [ClassScore(name=name, n=n // 2, recall=Proportion(value=top1, low=0.8, high=0.99, n=n // 2))
                         for name in ("a", "b")]  # fmt: skip
    share = Proportion(value=top1, low=top1 - 0.04, high=top1 + 0.02, n=n)
    known = {
        "n": n,
        "majority": 0.5,
        "balanced_accuracy": measure(top1, n),
        "macro_f1": measure(top1, n),
        "top1": share,
    }
    known |= {"log_loss": measure(0.5, n), "ece": measure(0.05, n), "per_class": tuple(rows)}
    return SplitScores(**{**known, **changes})


def against_probe(difference, n=153, *, half=0.02, gained=5, fell=3, balanced=None):
    ends = {"low": difference - half, "high": difference + half}
    return AgainstProbe(difference=difference, n=n, **ends, balanced=balanced, only_final_right=gained,
                        only_probe_right=fell)  # fmt: skip


def make_scores(test=None, *, probe=None, paired=None, **changes):
    """Scores of a run; `probe` and `paired` are of test."""
    known = {"views": "center", "classes": ("a", "b"), "test": test}
    if probe is not None:
        known["probe"] = ByRole[SplitScores](test=probe)
    if paired is not None:
        known["paired"] = ByRole[AgainstProbe](test=paired)
    return Scores(**{**known, **changes})
