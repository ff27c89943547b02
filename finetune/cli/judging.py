"""Verbs that judge, predict, compare and show."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.words import Json, Run, Runs, finish
from finetune.errors import RunError


def evaluate(
    run: Run,
    views: Annotated[str | None, typer.Option(help="center, five or ten; as planned if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a finished run again, perhaps in other views."""
    if views not in (None, "center", "five", "ten"):
        raise RunError(f"--views is {views!r}; it may be center, five or ten.")
    from finetune.pipeline import evaluate as judge
    from finetune.reporting.terminal import scores_text

    scores = judge(run, views=views)
    finish(scores, as_json, scores_text(scores))


def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    as_json: Json = False,
) -> None:
    """Class and probability of new images."""
    from dataclasses import asdict

    from finetune.evaluation.prediction import predict as look_at
    from finetune.machine import tune_process
    from finetune.recipe.runs import RunFolder

    tune_process()
    answers = look_at(RunFolder.open(run), images)
    lines = [f"{a.name}\t{a.label or '-'}\t{a.probability if a.fault is None else a.fault}" for a in answers]
    finish({"predictions": [asdict(answer) for answer in answers]}, as_json, "\n".join(lines))
    if any(answer.fault for answer in answers):
        raise typer.Exit(1)


def report(run: Run, as_json: Json = False) -> None:
    """Write a run's HTML page again, and send to MLflow what is still unsent."""
    from finetune.pipeline import report as rewrite

    page = rewrite(run)
    finish({"report": str(page)}, as_json, str(page))


def ui(
    runs: Runs = None,
    port: Annotated[int, typer.Option(help="Of the local server.")] = 5000,
    as_json: Json = False,
) -> None:
    """Open the MLflow UI on the store beside the runs."""
    from finetune.recipe.runs import runs_folder
    from finetune.training.tracking import ui_command

    folder = runs or runs_folder()
    if not (folder / "mlflow.db").exists():
        raise RunError(f"{folder} holds no mlflow.db yet. `finetune train` or `finetune demo` makes one.")
    command = ui_command(folder, port)
    if as_json:
        print(json.dumps({"command": command, "url": f"http://127.0.0.1:{port}"}))
        return
    print(f"MLflow UI at http://127.0.0.1:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    os.execv(command[0], command)
