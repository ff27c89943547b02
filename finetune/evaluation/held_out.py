"""Which model says what of which images: the final one of test, and the one before a refit of val and calibration.

A refit has seen val and calibration, so no number on them may be its own. Here stands who answers for whom, and what a
temperature and a conformal threshold are fitted to, in words that go with the numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from finetune.config.plan import Plan
from finetune.config.scores import Refit
from finetune.data.dataset import Dataset
from finetune.inference.loading import load_final, load_held_out
from finetune.metrics.answers import ProbeAnswers
from finetune.models.classifier import Classifier
from finetune.runs.folder import RunFolder
from finetune.runs.teacher import list_networks

ROLES = ("val", "test", "calibration")
What = Literal["model", "probe"]
Answers = Mapping[str, torch.Tensor]
"""Probabilities (N, K) by role."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Answers that a temperature or a threshold is fitted to, each by a model that never saw the image."""

    probabilities: torch.Tensor  # (N, K)
    labels: torch.Tensor  # (N,)
    rows: tuple[int, ...] = ()
    """The images, where they are of several roles: out-of-fold; else those of role calibration."""
    note: str | None = None
    """Who answered, where it is not the model that is shipped."""


def networks(run: RunFolder) -> dict[str, Classifier]:
    """The network that answers for the images of each role; one and the same where nothing was refit."""
    final = load_final(run)
    other = load_held_out(run) if is_refit(run) else final
    return {role: final if role == "test" else other for role in ROLES}


def is_refit(run: RunFolder) -> bool:
    """Whether the model, or a member of it, ends on all labelled images."""
    return any(one.plan.is_refit for one in list_networks(run))


def probe_fitting(dataset: Dataset, plan: Plan, probe: ProbeAnswers) -> Fitting:
    """Out-of-fold answers where there are any, else those of the calibration images."""
    if probe.out_of_fold is not None:
        labels = torch.from_numpy(dataset.items.labels[list(probe.rows)]).long()
        note = "out-of-fold: each labelled image by a probe that was solved without it"
        return Fitting(probabilities=probe.out_of_fold, labels=labels, rows=probe.rows, note=note)
    return role_fitting(dataset, probe.by_role, "probe" if plan.probe_on == "labelled" else None)


def role_fitting(dataset: Dataset, answers: Answers, what: What | None) -> Fitting:
    """The answers of the calibration images; `what` was refit since, None: nothing was."""
    note = None if what is None else held_out_note(what)
    return Fitting(probabilities=answers["calibration"], labels=dataset.labels("calibration"), note=note)


def held_out_note(what: What) -> str:
    """Who answers for val and calibration, beside numbers on them."""
    return f"held out: by the {what} before refit"


def refit_record(dataset: Dataset, plan: Plan, *, is_refit: bool) -> Refit | None:
    """What the scores say of a refit, and the sentence for people; None where there was none.

    Args:
        dataset: the images of the run.
        plan: of the run.
        is_refit: of the model or of a member of it; the probe beside it may be all that was.
    """
    if not is_refit and plan.probe_on == "train":
        return None
    rows = dataset.labelled()
    roles = {role: sum(dataset.roles[row] == role for row in rows) for role in ("train", "val", "calibration")}
    what = "model" if plan.stages else "probe"
    told = ", ".join(f"{count:,} {role}" for role, count in roles.items() if count)
    images = f"all {len(rows):,} labelled images ({told})"
    if is_refit:
        note = f"test is answered by the {what} trained again on {images}; val and calibration by the one before that"
    else:
        note = f"the probe beside the model ends on {images}; of val it answers as it was before that"
    return Refit(model=is_refit, probe=plan.probe_on == "labelled", num_images=roles, note=note)
