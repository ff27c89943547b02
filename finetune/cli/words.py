"""What the verbs share: their arguments, how words become a recipe, and how an answer is given."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Wish = Annotated[list[str] | None, typer.Argument(help="A recipe or a folder of images, then section.key=value ...")]
Run = Annotated[Path, typer.Argument(help="A run: its folder, its name among the runs or how that begins, or latest.")]
Runs = Annotated[
    Path | None, typer.Option("--runs", "--out", help="Where run folders are kept. [FINETUNE_RUNS, or runs]")
]


Backbone = Annotated[str | None, typer.Option(help="Short for backbone=NAME.")]
Strategy = Annotated[str | None, typer.Option(help="Short for train.strategy=NAME.")]
Epochs = Annotated[str | None, typer.Option(metavar="N", help="Short for train.epochs=N.")]
Rate = Annotated[str | None, typer.Option("--lr", metavar="RATE", help="Short for train.optimizer.lr=RATE.")]
ImageSize = Annotated[str | None, typer.Option(metavar="PIXELS", help="Short for data.image_size=PIXELS.")]
Seed = Annotated[str | None, typer.Option(metavar="N", help="Short for seed=N.")]


def split_words(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_wish(wish: list[str] | None, *, takes_plan: bool = False, **short: str | None) -> Any:
    """The recipe that a verb's words mean: at most one source, the rest overrides.

    Args:
        wish: the words.
        takes_plan: the source may be the file of a plan, which is then what they mean.
        short: values given by the short forms of overrides, by key with __ for each dot.
    """
    from finetune.config.reading import load_recipe
    from finetune.errors import RecipeError
    from finetune.runs.plan_files import as_plan

    words = list(wish or [])
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    sources = [word for word in words if word not in overrides]
    overrides += [f"{key.replace('__', '.')}={value}" for key, value in short.items() if value is not None]
    keys = [word.partition("=")[0].strip() for word in overrides]
    if "" in keys:
        raise RecipeError("overrides are written without blanks: section.key=value, such as train.epochs=3.")
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise RecipeError(f"{', '.join(twice)} stands there more than once; keep one.")
    if bare := [word for word in sources if _is_key(word)]:
        raise RecipeError(f"{bare[0]} is a key of the recipe and lacks its value: {bare[0]}=VALUE, without blanks.")
    if len(sources) > 1:
        raise RecipeError(
            f"one recipe or folder at a time, got {', '.join(sources)}. Overrides are written section.key=value."
        )
    plan = as_plan(sources[0], overrides) if takes_plan and sources else None
    return plan or load_recipe(sources[0] if sources else None, overrides)


def _is_key(word: str) -> bool:
    from finetune.config.recipe import recipe_keys

    return "." in word and word in recipe_keys() and not Path(word).exists()


def finish(answer: object, as_json: bool, text: str) -> None:
    """The one object of `--json`, or text for people.

    Args:
        answer: a mapping, or a value that becomes one; no value is dumped in vain.
        as_json: whether the object is asked for.
        text: for people.
    """
    if as_json:
        if dump := getattr(answer, "model_dump", None):
            answer = dump(mode="json")
        is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
        tell(json.dumps(answer, ensure_ascii=not is_utf8))
    elif text:
        tell(text)


def tell(text: str) -> None:
    """Lines for standard output, there before we go on.

    Raises:
        OSError: naming standard output, where it does not take them.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read has read enough
        raise
    except OSError as fault:
        raise OSError(fault.errno, fault.strerror, "standard output") from fault
