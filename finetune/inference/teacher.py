"""Teaching: a finished run as the teacher of another, and its answers beside those of its student."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.config.backbone_names import read_zoo
from finetune.config.card import OWN
from finetune.config.facts import TeacherFacts
from finetune.config.plan import Images, Plan
from finetune.data.dataset import Dataset
from finetune.errors import BackboneError
from finetune.inference.loading import load_final, load_held_out
from finetune.inference.whole_model import CARD, needs_network
from finetune.models.backbones import refuse_unknown
from finetune.runs.folder import RunFolder
from finetune.runs.teacher import KEY, list_networks, read_teacher
from finetune.training.distillation import Teacher


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a teacher said when it was judged."""

    views: str
    """In which it looked at images."""
    probabilities: dict[str, torch.Tensor]
    """(N, K) by role, in the order of the student's images."""


def find_teacher(named: str | None) -> TeacherFacts | None:
    """As `read_teacher`, and sure that the backbones of all its networks are at hand; no weights are read.

    Raises:
        BackboneError: if one is not.
        RunError: if it is no run, or not trained and judged to its end.
    """
    known = read_teacher(named)
    if known is None:
        return None
    zoo = read_zoo()
    for member in list_networks(RunFolder.open(known.run)):
        if member.plan.arch.startswith(OWN):
            raise _not_at_hand(member, needs_network(member))
        if member.file(CARD).exists():
            continue
        try:
            refuse_unknown(member.plan.backbone, zoo)
        except BackboneError as fault:
            raise _not_at_hand(member, fault) from fault
    return known


def load_teacher(plan: Plan, on: Images = "train") -> Teacher | None:
    """The network, or the average of several, that the plan wants to be taught by; None where it wants none.

    Args:
        plan: of the student.
        on: the images that it teaches on. A student that val will judge is taught by its teacher before a refit, which
            has not seen val either.

    Raises:
        BackboneError: if the card of a backbone is not at hand.
        RunError: if it is no run.
    """
    path = plan.train.distillation.teacher
    if path is None:
        return None
    run = RunFolder.open(path)
    try:
        load = load_held_out if on == "train" else load_final
        return Teacher(load(run), run.plan.view, plan.view)
    except BackboneError as fault:
        raise _not_at_hand(run, fault) from fault


def read_answers(run: RunFolder, dataset: Dataset, roles: tuple[str, ...]) -> Answers | None:
    """What the teacher of `run` said of the images of `dataset`.

    From the student's own `predictions.npz` where they are kept there already, so that it can be judged again without
    its teacher; else from the teacher's. Nothing is computed anew.

    Returns:
        None where neither has them, or not for all of these images: names may have changed where contents have not.
    """
    named = run.plan.train.distillation.teacher
    places = [(run, "teacher_"), *([(RunFolder(Path(named)), "")] if named else [])]
    for folder, prefix in places:
        if not folder.file("predictions.npz").exists():
            continue
        with np.load(folder.file("predictions.npz")) as stored:
            views = str(stored["teacher_views"]) if prefix and "teacher_views" in stored else None
            found = {role: _ordered(stored, role, prefix, dataset) for role in roles}
        if not prefix and folder.file("scores.json").exists():
            views = folder.scores.views
        answers = {role: rows for role, rows in found.items() if rows is not None}
        if views is not None and len(answers) == len(roles):
            return Answers(views=views, probabilities=answers)
    return None


def _not_at_hand(run: RunFolder, fault: BackboneError) -> BackboneError:
    return BackboneError(f"{KEY}: {run.path} needs a backbone that is not at hand. {fault}")


def _ordered(stored: np.lib.npyio.NpzFile, role: str, prefix: str, dataset: Dataset) -> torch.Tensor | None:
    """(N, K) of one role by name; None where an image is missing."""
    names, key = f"{role}_names", f"{prefix}{role}_probabilities"
    if names not in stored or key not in stored:
        return None
    rows, place = stored[key], {str(name): row for row, name in enumerate(stored[names])}
    wanted = [place.get(dataset.items[index].name) for index in dataset.indices(role)]
    return None if None in wanted else torch.from_numpy(rows[np.array(wanted, dtype=int)])
