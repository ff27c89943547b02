"""The door: one verb per public function, nothing decided here.

A verb takes a recipe, a folder of images or a run, then overrides `section.key=value`. With `--json`
standard output holds one JSON object and nothing else; everything for people goes to standard error.
Exit codes: 0 done, 1 a check found something, 2 you can mend it, 3 our bug, 130 interrupted.
"""

import gc
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from finetune.cli import judging, training
from finetune.cli.catalogue import recipes_app, zoo_app
from finetune.errors import FinetuneError, explain_os_error
from finetune.process import QUIET

app = typer.Typer(
    name="finetune",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tuning without surprises: measured choices, right defaults, honest scores.",
)
for verb in (
    training.demo,
    training.train,
    training.plan,
    training.resume,
    judging.evaluate,
    judging.predict,
    judging.compare,
    judging.ensemble,
    judging.export,
    judging.report,
    judging.ui,
):
    app.command()(verb)
app.add_typer(recipes_app, name="recipes")
app.add_typer(zoo_app, name="zoo")


GARBAGE_AT = 50_000
"""New objects between two searches for garbage; with Python's 700 they take a fifth of the time of a start."""


def main() -> None:
    """Run the command line and exit by the rules above."""
    gc.set_threshold(GARBAGE_AT)
    os.environ.update(QUIET)  # the process is ours, and so are those that it starts
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        code = app(prog_name="finetune", standalone_mode=False)
    except FinetuneError as fault:
        _leave(str(fault))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        _hush()
        sys.exit(0)
    except Exception as fault:  # noqa: BLE001 - whatever else there is, is ours
        if hasattr(fault, "format_message"):  # a wrong word on the command line, as click reports it
            if type(fault).__name__ == "NoArgsIsHelpError":
                print(fault.format_message())
                sys.exit(0)
            _leave(_about_words(fault))
        if isinstance(fault, OSError) and (told := explain_os_error(fault, _named())):
            _hush()
            _leave(told)
        import traceback

        traceback.print_exc()
        print("finetune: this is our bug; please report it with the lines above.", file=sys.stderr)
        sys.exit(3)
    sys.exit(code if isinstance(code, int) else 0)


def _about_words(fault: Any) -> str:
    """What is wrong with a word of the command line, and where to look."""
    context = getattr(fault, "ctx", None)
    here = context.command_path if context is not None else "finetune"
    told = fault.format_message()
    if context is not None and context.parent is None and hasattr(fault, "option_name"):
        told = f"{told} Options of a verb stand behind it: `finetune VERB {fault.option_name}`."
    return f"{told} `{here} --help` {'lists the verbs' if here == 'finetune' else 'says what it takes'}."


def _leave(told: str) -> NoReturn:
    """One paragraph for the user, who can mend it."""
    print(f"finetune: {told}", file=sys.stderr)
    sys.exit(2)


def _named() -> list[Path]:
    """What the words of the command line would be as files and folders."""
    return [Path(word.rpartition("=")[2]) for word in sys.argv[1:]]


def _hush() -> None:
    """Nothing more to standard output, which perhaps cannot take it: Python would try again at the end."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from finetune import __version__

        print(f"finetune {__version__}")
        raise typer.Exit()
