"""The door: one verb per public function, nothing decided here.

A verb takes a recipe, a folder of images or a run, then overrides `section.key=value`. With `--json`
standard output holds one JSON object and nothing else; everything for people goes to standard error.
Exit codes: 0 done, 1 a check found something, 2 you can mend it, 3 our bug, 130 interrupted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import FinetuneError, RunError

app = typer.Typer(
    name="finetune",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Fine-tuning without surprises: measured choices, right defaults, honest scores.",
)
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Shipped recipes: list, show, copy, check.")
zoo_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Backbones: list, show, add, verify, rank.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(zoo_app, name="zoo")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Wish = Annotated[list[str] | None, typer.Argument(help="A recipe or a folder of images, then section.key=value ...")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where run folders are kept. [FINETUNE_RUNS, or runs]")]


def main() -> None:
    """Run the command line and exit by the rules above."""
    try:
        code = app(standalone_mode=False)
    except FinetuneError as fault:
        print(f"finetune: {fault}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as fault:  # noqa: BLE001 - whatever else there is, is ours
        if hasattr(fault, "format_message"):  # a wrong word on the command line, as click reports it
            print(f"finetune: {fault.format_message()} `finetune --help` lists the verbs.", file=sys.stderr)
            sys.exit(2)
        import traceback

        traceback.print_exc()
        print("finetune: this is our bug; please report it with the lines above.", file=sys.stderr)
        sys.exit(3)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from finetune import __version__

        print(f"finetune {__version__}")
        raise typer.Exit()


@app.command()
def demo(as_json: Json = False, runs: Runs = None) -> None:
    """Fine-tune the bundled backbone on bundled handwritten digits, offline, in under a minute."""
    from finetune.demo import run_demo

    _finish(run_demo(runs), as_json, "")


@app.command()
def train(wish: Wish = None, as_json: Json = False, runs: Runs = None) -> None:
    """From images to a scored, tracked, reported run."""
    recipe = _recipe(wish)
    from finetune.pipeline import summarize
    from finetune.pipeline import train as start

    _finish(summarize(start(recipe, runs=runs)), as_json, "")


@app.command()
def plan(
    wish: Wish = None,
    pilot: Annotated[
        float | None, typer.Option(help="Seconds for short trainings of the closest candidates, which then decide.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Such as 2/8: only look at that part of the images, for a later plan or train.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure and decide, but do nothing: Facts, and the Plan with its reasons."""
    recipe = _recipe(wish)
    if part is not None:
        from finetune.pipeline import extract

        seen = extract(recipe, part)
        _finish(seen, as_json, f"part {part}: {seen['misses']:,} images looked at, {seen['hits']:,} known before")
        return
    from finetune.pipeline import plan as decide
    from finetune.reporting.terminal import facts_text, plan_text

    facts, decided = decide(recipe, pilot_seconds=pilot)
    found = {"facts": facts.model_dump(mode="json"), "plan": decided.model_dump(mode="json")}
    _finish(found, as_json, f"{facts_text(facts)}\n{plan_text(decided)}")


@app.command()
def resume(run: Run, as_json: Json = False) -> None:
    """Go on with a stopped run, to the same end."""
    from finetune.pipeline import resume as go_on
    from finetune.pipeline import summarize

    _finish(summarize(go_on(run)), as_json, "")


@app.command()
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
    _finish(scores, as_json, scores_text(scores))


@app.command()
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
    _finish({"predictions": [asdict(answer) for answer in answers]}, as_json, "\n".join(lines))
    if any(answer.fault for answer in answers):
        raise typer.Exit(1)


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write a run's HTML page again, and send to MLflow what is still unsent."""
    from finetune.pipeline import report as rewrite

    page = rewrite(run)
    _finish({"report": str(page)}, as_json, str(page))


@app.command()
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


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """Shipped recipes, a line each."""
    from finetune.recipe.shelf import list_recipes, recipe_summary

    found = {name: recipe_summary(path) for name, path in list_recipes().items()}
    _finish({"recipes": found}, as_json, "\n".join(f"{name:<18}  {line}" for name, line in found.items()))


@recipes_app.command("show")
def recipes_show(
    name: str,
    images: Annotated[
        Path | None, typer.Option(help="A folder: draw what training by this recipe will see of its images instead.")
    ] = None,
    sheet: Annotated[Path, typer.Option(help="The picture to write.")] = Path("training-views.png"),
    as_json: Json = False,
) -> None:
    """A shipped recipe as it is written, or a picture of what training by it sees."""
    path = _shipped(name)
    if images is not None:
        from finetune.pipeline import show_images
        from finetune.recipe.reading import load_recipe

        drawn = show_images(load_recipe(path, [f"data.root={images}"]), sheet)
        _finish({"sheet": str(drawn)}, as_json, str(drawn))
        return
    text = path.read_text(encoding="utf-8")
    _finish({"name": name, "text": text}, as_json, text.rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: str, to: Annotated[Path | None, typer.Argument(help="A file; NAME.yaml here.")] = None, as_json: Json = False
) -> None:
    """Copy a shipped recipe, to be changed."""
    path, target = _shipped(name), to or Path(f"{name}.yaml")
    if target.exists():
        raise RunError(f"{target} is there already; name another file.")
    target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    _finish({"recipe": str(target)}, as_json, str(target))


@recipes_app.command("check")
def recipes_check(
    files: Annotated[list[Path] | None, typer.Argument(help="Recipes; the shipped ones if none is named.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema for editors instead.")] = False,
    as_json: Json = False,
) -> None:
    """Every fault of every recipe, with its line."""
    from finetune.errors import RecipeError
    from finetune.recipe.reading import load_recipe
    from finetune.recipe.schema import Recipe
    from finetune.recipe.shelf import list_recipes

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    faults: dict[str, str] = {}
    paths = files or list(list_recipes().values())
    for path in paths:
        try:
            load_recipe(path)
        except RecipeError as fault:
            faults[str(path)] = str(fault)
    _finish(
        {"checked": len(paths), "faults": faults},
        as_json,
        "\n".join(faults.values()) or f"{len(paths)} recipes are right",
    )
    if faults:
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """Cards at hand, a line each; any timm or torchvision name works without one."""
    from finetune.zoo import card_object, list_cards

    cards = list_cards()
    lines = [
        f"{card.name:<32} {card.params_m or 0:>7.2f} M  {card.input_size[1]:>4} px  {card.licence:<12} "
        f"{card.pretrained_on}"
        for card in cards.values()
    ]
    _finish({"cards": [card_object(card) for card in cards.values()]}, as_json, "\n".join(lines))


@zoo_app.command("show")
def zoo_show(name: str, as_json: Json = False) -> None:
    """All that is known of a backbone."""
    from finetune.zoo import card_object, card_text, show_card

    card = show_card(name)
    _finish(card_object(card), as_json, card_text(card).rstrip())


@zoo_app.command("add")
def zoo_add(
    path: Annotated[Path, typer.Argument(help="A folder with card.yaml and its weights.")],
    statistics: Annotated[
        Path | None,
        typer.Option(help="Images of its source, to measure its features on; PATH may then be a card in the zoo."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a backbone into the zoo, its hash verified."""
    from finetune.zoo import add_card, card_object

    card = add_card(path, statistics=statistics)
    _finish(card_object(card), as_json, f"{card.name} is now in {card.weights and card.weights.parent.parent}")


@zoo_app.command("verify")
def zoo_verify(as_json: Json = False) -> None:
    """Compare every card's hash with its weights."""
    from finetune.zoo import verify_cards

    faults = verify_cards()
    _finish(
        {"cards": faults}, as_json, "\n".join(fault or f"{name}: as its card says" for name, fault in faults.items())
    )
    if any(faults.values()):
        raise typer.Exit(1)


@zoo_app.command("rank")
def zoo_rank(
    wish: Wish = None,
    among: Annotated[str, typer.Option(help="Only these: cards, timm or torchvision names, with commas.")] = "",
    max_params: Annotated[float | None, typer.Option(help="Most parameters, in millions.")] = None,
    licence: Annotated[str, typer.Option(help="Only these licences, or parts of their names, with commas.")] = "",
    as_json: Json = False,
) -> None:
    """Which backbone suits the images: probe, transferability and cost, on training images alone."""
    recipe = _recipe(wish)
    from finetune.reporting.ranking_text import ranking_text
    from finetune.zoo import rank_cards

    found = rank_cards(recipe, among=_words(among), max_params=max_params, licences=_words(licence))
    _finish(found.model_dump(mode="json"), as_json, ranking_text(found))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _recipe(wish: list[str] | None) -> Any:
    """The recipe that a verb's words mean: at most one source, the rest overrides."""
    from finetune.errors import RecipeError
    from finetune.recipe.reading import load_recipe

    words = wish or []
    sources = [word for word in words if "=" not in word]
    if len(sources) > 1:
        raise RecipeError(
            f"one recipe or folder at a time, got {', '.join(sources)}. Overrides are written section.key=value."
        )
    return load_recipe(sources[0] if sources else None, [word for word in words if "=" in word])


def _shipped(name: str) -> Path:
    from finetune.errors import RecipeError, nearest
    from finetune.recipe.shelf import list_recipes

    recipes = list_recipes()
    if name not in recipes:
        hint = nearest(name, recipes, otherwise=f"There are {', '.join(recipes)}.")
        raise RecipeError(f"{name!r} is no shipped recipe. {hint}")
    return recipes[name]


def _finish(answer: Any, as_json: bool, text: str) -> None:
    """The one object of `--json`, or text for people."""
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
    elif text:
        print(text)
