"""Verbs that judge, predict, compare and show."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.words import Json, Run, Runs, finish, tell
from finetune.errors import RunError


def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run folder.")] = None,
    views: Annotated[
        str | None,
        typer.Option(help="center, flip, five, ten, multiscale, ... or a list; as planned if not given."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Other images than the run's own.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Instead of a run: a backbone with the classifier it came with, on --data.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge a finished run again, perhaps in other views or on other images; or a backbone as it comes."""
    from finetune.config.recipe import VIEWS_PATTERN
    from finetune.reporting.text import scores_text

    if (run is None) == (backbone is None) or (backbone is not None and data is None):
        raise RunError("name a run folder, or --backbone NAME with --data FOLDER.")
    if views is not None and not re.fullmatch(VIEWS_PATTERN, views):
        raise RunError(f"--views is {views!r}; it may be center, flip, five, ten, multiscale or a list of views.")
    if data is not None:
        from finetune.config.other_data import BackboneElsewhere, RunElsewhere
        from finetune.evaluation.other_data import evaluate_backbone, evaluate_elsewhere
        from finetune.reporting.text import elsewhere_text
        from finetune.runs.folder import RunFolder

        if backbone is not None:
            found: BackboneElsewhere | RunElsewhere = evaluate_backbone(backbone, data, views=views or "center")
        else:
            found = evaluate_elsewhere(RunFolder.open(str(run)), data, views=views)
        finish(found, as_json, elsewhere_text(found))
        return
    from finetune.pipeline import evaluate as judge

    scores = judge(str(run), views=views)
    finish(scores, as_json, scores_text(scores))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more finished runs on the same images.")],
    as_json: Json = False,
) -> None:
    """Which run is better, as far as their test images can tell."""
    from finetune.evaluation.compare import compare as weigh
    from finetune.reporting.comparison_text import comparison_text

    found = weigh(runs)
    finish(found, as_json, comparison_text(found))


def ensemble(
    runs_to_join: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs on the same images.")],
    how: Annotated[str, typer.Option(help="average, greedy, soup, greedy_soup or wise.")] = "average",
    members: Annotated[str, typer.Option(help="Of each run: final, snapshots, last or all.")] = "final",
    average: Annotated[str, typer.Option(help="Of predictions: probability or logit.")] = "probability",
    as_json: Json = False,
    runs: Runs = None,
) -> None:
    """Several runs, or several members of one, as one run that is judged like any other."""
    from finetune.ensembling import ensemble as join
    from finetune.reporting.text import scores_text

    made = join(runs_to_join, how=how, members=members, average=average, runs=runs)
    scores = made.scores
    told = {"run": str(made.path), "scores": scores.model_dump(mode="json")}
    finish(told, as_json, f"{scores_text(scores)}\n{made.path}")


def predict(
    run: Run,
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders, patterns, or - for names on standard input.")
    ],
    top: Annotated[int | None, typer.Option(help="How many of the likeliest classes to tell.")] = None,
    sets: Annotated[float | None, typer.Option(help="Prediction sets of this coverage, such as 0.9.")] = None,
    out: Annotated[Path | None, typer.Option(help="A file to write: .csv, .jsonl or .parquet.")] = None,
    as_json: Json = False,
) -> None:
    """Class and probability of new images."""
    from dataclasses import asdict

    from finetune.inference.batch_predict import predict_stream, save_predictions
    from finetune.process import tune_process
    from finetune.runs.folder import RunFolder

    tune_process()
    answers = _with_notes(predict_stream(RunFolder.open(run), images, top_k=top, coverage=sets))
    if out is not None:
        faults = save_predictions(answers, out)
        finish({"out": str(out), "faults": faults}, as_json, str(out))
    elif as_json:
        found = [asdict(answer) for answer in answers]
        faults = sum(answer["fault"] is not None for answer in found)
        finish({"predictions": found}, as_json, "")
    else:
        faults = 0
        for answer in answers:  # as they come
            faults += answer.fault is not None
            several = "" if answer.labels is None else "\t{" + ", ".join(answer.labels) + "}"
            told = f"-\t{answer.fault}" if answer.fault is not None else f"{_likeliest(answer, top)}{several}"
            tell(f"{answer.name}\t{told}")
    if faults:
        raise typer.Exit(1)


def _with_notes(answers: Iterable[Any]) -> Iterator[Any]:
    """The answers as they come, and at their end what their notes say, once for all that say the same."""
    noted: dict[str, list[str]] = {}
    for answer in answers:
        if answer.note is not None:
            noted.setdefault(answer.note, []).append(answer.name)
        yield answer
    for note, names in noted.items():
        print(f"note: {names[0]}{f' and {len(names) - 1:,} more' * (len(names) > 1)}: {note}", file=sys.stderr)


def _likeliest(answer: Any, top: int | None) -> str:
    """The class and its probability; where more are asked for, those that follow behind it."""
    if top is None:
        return f"{answer.label}\t{answer.probability:.4f}"
    return "\t".join(f"{label}\t{share:.4f}" for label, share in answer.probabilities.items())


def export(
    run: Run,
    to: Annotated[str, typer.Option(help="What will load it: timm.")] = "timm",
    out: Annotated[Path | None, typer.Option(help="The folder to make; NAME-timm here.")] = None,
    as_json: Json = False,
) -> None:
    """The model as plain timm loads it, checked against the run: weights, config.json, classes and a card."""
    from finetune.export.timm_folder import export_timm
    from finetune.runs.folder import RunFolder

    if to != "timm":
        raise RunError(f"--to is {to!r}; it may be timm.")
    source = RunFolder.open(run)
    made = export_timm(source, out or Path(f"{source.path.resolve().name}-timm"))
    seen = f"{made.images} {'images of the run' if made.are_real else 'pictures of noise, for its images are gone'}"
    told = f"{made.folder}: answers as the run does (within {made.difference:.1g} on {seen})"
    finish(made, as_json, told)


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
    from finetune.compute import become
    from finetune.process import quiet_environment
    from finetune.runs.folder import runs_folder
    from finetune.tracking.tracker import ui_command

    folder = runs or runs_folder()
    if not (folder / "mlflow.db").exists():
        raise RunError(f"{folder} holds no mlflow.db yet. `finetune train` or `finetune demo` makes one.")
    command, url = ui_command(folder, port), f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    if as_json:
        print(json.dumps({"command": command, "url": url}))
        return
    print(f"MLflow UI at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    become(command, quiet_environment())
