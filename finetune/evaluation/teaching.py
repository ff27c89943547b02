"""Teaching: a finished run as the teacher of another, and its answers beside those of its student."""

from pathlib import Path

import numpy as np
import torch

from finetune.evaluation.prediction import load_final
from finetune.features.survey import Look
from finetune.recipe.plan import Plan
from finetune.recipe.runs import RunFolder
from finetune.training.distilling import Teacher


def load_teacher(plan: Plan) -> Teacher | None:
    """The network, or the average of several, that the plan wants to be taught by; None where it wants none.

    Raises:
        BackboneError: if the card of a backbone is not at hand.
        RunError: if it is no run.
    """
    path = plan.train.distillation.teacher
    if path is None:
        return None
    run = RunFolder.open(path)
    return Teacher(load_final(run), run.plan.view, plan.view)


def read_answers(run: RunFolder, seen: Look, roles: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """Probabilities (N, K) of the teacher of `run` by role, in the order of the images of `seen`.

    From the student's own `predictions.npz` where they are kept there already, so that it can be judged again without
    its teacher; else from the teacher's. Nothing is computed anew.

    Returns:
        None where neither has them, or not for all of these images: names may have changed where contents have not.
    """
    folder = Path(str(run.plan.train.distillation.teacher))
    for path, prefix in ((run.file("predictions.npz"), "teacher_"), (folder / "predictions.npz", "")):
        if not path.exists():
            continue
        with np.load(path) as stored:
            found = {role: _ordered(stored, role, prefix, seen) for role in roles}
        answers = {role: rows for role, rows in found.items() if rows is not None}
        if len(answers) == len(roles):
            return answers
    return None


def _ordered(stored: np.lib.npyio.NpzFile, role: str, prefix: str, seen: Look) -> torch.Tensor | None:
    """(N, K) of one role by name; None where an image is missing."""
    names, key = f"{role}_names", f"{prefix}{role}_probabilities"
    if names not in stored or key not in stored:
        return None
    rows, place = stored[key], {str(name): row for row, name in enumerate(stored[names])}
    wanted = [place.get(seen.items[index].name) for index in seen.indices(role)]
    return None if None in wanted else torch.from_numpy(rows[np.array(wanted, dtype=int)])
