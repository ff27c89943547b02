"""A finished run as a teacher: what is known of it, whether it may teach, and that it stays the same.

Read from its files alone, weights as bytes, so that a wrong teacher is refused before any image is looked at.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.config.facts import TeacherFacts
from finetune.config.imbalance import decide_imbalance
from finetune.config.plan import Plan
from finetune.config.recipe import DistillationSpec, Recipe
from finetune.errors import RunError
from finetune.runs.folder import RunFolder

KEY = "train.distillation.teacher"
_CHUNK = 1 << 20


def name_teacher(recipe: Recipe) -> Recipe:
    """The recipe with the whole path of its teacher, so that a run can be resumed from anywhere."""
    spec = recipe.train.distillation
    if spec.teacher is None:
        return recipe
    spec = spec.model_copy(update={"teacher": str(Path(spec.teacher).expanduser().absolute())})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"distillation": spec})})


def read_teacher(named: str | None) -> TeacherFacts | None:
    """What is known of the run that a recipe names as its teacher; None where it names none.

    Raises:
        RunError: if it is no run, or not trained and judged to its end.
    """
    if named is None:
        return None
    path = str(Path(named).expanduser().absolute())
    try:
        run = RunFolder.open(path)
        plan, members = run.plan, list_networks(run)
    except RunError as fault:
        raise RunError(f"{KEY}: {fault}") from fault
    if not all(member.final_weights().exists() for member in (run, *members)):
        raise RunError(f"{KEY}: {path} is not trained to its end. `finetune resume {path}` goes on.")
    if len({member.plan.view for member in members}) > 1:
        raise RunError(
            f"{KEY}: {path} averages networks that look at images in different views, but a teacher looks at those of "
            "its student. Name one of its members, or an average of networks with one view."
        )
    if not run.file("predictions.npz").exists():
        raise RunError(f"{KEY}: {path} is not judged yet. `finetune evaluate {path}` does so.")
    return TeacherFacts(
        run=path,
        networks=len(members),
        weights_digest=_digest(run, members),
        split_digest=plan.split_digest,
        classes=plan.classes,
        view=plan.view,
        crop_pct=plan.data.crop_pct,
        imbalances=tuple(dict.fromkeys(_imbalance(member.plan) for member in members)),
    )


def list_networks(run: RunFolder) -> list[RunFolder]:
    """The run folders whose networks answer: those of an average's members, or the run itself."""
    if (found := run.membership) is None or found.average is None:
        return [run]
    return [RunFolder.open(run.file(str(one.folder))) for one in found.members]


def refuse_other_teacher(run: RunFolder) -> None:
    """Nothing, where the teacher is the one that `run` began with, or has taught all there was to teach.

    Raises:
        RunError: if it is gone, or says other things now.
    """
    known = run.read_json("facts.json").get("teacher")
    if known is None or run.final_weights().exists():
        return
    if not Path(known["run"]).is_dir():
        raise RunError(
            f"{KEY}: {known['run']} is gone, and has not taught to the end. Put it back, or start a new run."
        )
    now = read_teacher(known["run"])
    assert now is not None
    if now.weights_digest != known["weights_digest"]:
        raise RunError(
            f"{KEY}: {known['run']} has changed since the plan was made ({known['weights_digest'][:12]}, now "
            f"{now.weights_digest[:12]}). Put it back, or start a new run: two teachers would have taught this one."
        )


def decide_distillation(
    wish: DistillationSpec, known: TeacherFacts | None, decide: Callable[[str, Any, Any, str], Any]
) -> DistillationSpec:
    """The section with nothing open, and a line on who teaches where somebody does."""
    if known is None:
        return wish
    who = "one network" if known.networks == 1 else f"an average of {known.networks} networks"
    why = (
        f"{who} teaches: {100 * wish.weight:g} % of the loss is its word at temperature {wish.temperature:g}, the rest "
        "that of the labels; its passes come on top of every training step, and none at test"
    )
    decide(KEY, None, Path(known.run).name, why)
    return wish.model_copy(update={"teacher": known.run})


def inherit_imbalance(known: TeacherFacts | None, counts: Sequence[int]) -> tuple[str, str]:
    """A kind of `ImbalanceSpec` and why: the teacher's, where there is one and all its networks had the same."""
    if known is not None and len(known.imbalances) == 1:
        return known.imbalances[0], "as its teacher was trained: the two speak of classes equally common"
    kind, why = decide_imbalance(counts)
    if known is not None:
        why += f"; its teacher's networks differ in this ({', '.join(known.imbalances)}), so it sets no example"
    return kind, why


def idle_distillation(wish: DistillationSpec) -> list[tuple[str, str]]:
    """Keys that are set and mean nothing without a teacher, each with what would read it."""
    if wish.teacher is not None:
        return []
    return [(f"train.distillation.{key}", KEY) for key in ("temperature", "weight") if key in wish.model_fields_set]


def _imbalance(plan: Plan) -> str:
    """What was done about uneven classes; nothing for a probe, whose plan may name a kind that it never read."""
    return plan.train.imbalance.kind if plan.stages else "none"


def _digest(run: RunFolder, members: list[RunFolder]) -> str:
    """Of all that the answers depend on: weights, networks, what these are given, and how they are averaged."""
    digest = hashlib.sha256()
    for plan in (one.plan for one in (run, *members)):
        words = [plan.backbone, plan.head.model_dump(mode="json"), plan.view.digest, plan.classes]
        digest.update(json.dumps(words, sort_keys=True).encode())
    average = run.file("ensemble.json")
    if average.exists():
        digest.update(average.read_bytes())
    for member in members:
        plan = member.plan
        digest.update(b"" if plan.stages else plan.weights_digest.encode())  # a probe's file holds its head alone
        with member.final_weights().open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
