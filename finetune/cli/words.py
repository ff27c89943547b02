"""What the verbs share: their arguments, how words become a recipe, and how an answer is given."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Wish = Annotated[list[str] | None, typer.Argument(help="A recipe or a folder of images, then section.key=value ...")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where run folders are kept. [FINETUNE_RUNS, or runs]")]


def split_words(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_wish(wish: list[str] | None) -> Any:
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


def finish(answer: Any, as_json: bool, text: str) -> None:
    """The one object of `--json`, or text for people."""
    if as_json:
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
