"""Combining: several finished runs, or several members of one, into a run that is judged like any other."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from finetune.ensembles.build import make_ensemble
from finetune.errors import FinetuneError, RunError
from finetune.pipeline import evaluate
from finetune.preparing import say_on_stderr
from finetune.process import as_guest
from finetune.run import Run
from finetune.runs.folder import RunFolder, runs_folder

HOW = ("average", "greedy", "soup", "greedy_soup", "wise")
MEMBERS = ("final", "snapshots", "last", "all")


@as_guest()
def ensemble(
    paths: Sequence[str | PathLike[str]],
    *,
    how: str = "average",
    members: str = "final",
    average: str = "probability",
    runs: Path | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Run:
    """A run that stands for all of `paths`, judged and with a page of its own.

    Args:
        paths: finished runs, or their folders or names, on the same images.
        how: average all predictions, those that val chooses (greedy), the weights (soup, greedy_soup), or weights
            between the start and the end of one training (wise).
        members: of each run its final weights, its snapshots, its last epochs, or all of them.
        average: of predictions: probability or logit.
        runs: where the run folder is made; None: FINETUNE_RUNS, or `runs` here.
        say: gets every line for people.

    Raises:
        RunError: if a word is unknown, or the runs do not fit together.
    """
    for what, word, known in (("how", how, HOW), ("members", members, MEMBERS)):
        if word not in known:
            raise RunError(f"--{what} is {word!r}; it may be {', '.join(known)}.")
    if average not in ("probability", "logit") or (average == "logit" and how not in ("average", "greedy")):
        raise RunError(f"--average {average} does not go with --how {how}; averages are of probability or logit.")
    found = [RunFolder.open(path) for path in paths]
    if not found:
        raise RunError("no run is named. Give one or more run folders.")
    plan = found[0].plan
    created = RunFolder.create(
        runs or runs_folder(), name=f"{plan.name}-{how}", backbone=plan.backbone.replace("/", "_")
    )
    try:
        target = make_ensemble(
            found,
            how=how,  # type: ignore[arg-type]
            members=members,  # type: ignore[arg-type]
            average=average,
            folder=created.path,
            say=say,
        )
    except FinetuneError:
        if not any(created.path.iterdir()):
            created.path.rmdir()
        raise
    evaluate(target.path, say=say)
    return Run(target.path)
