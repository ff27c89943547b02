"""What a Python program hands in instead of naming it: never kept, but named in the plan, so that a run that goes on
goes on with the same.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from finetune.errors import RunError
from finetune.recipe.section import Section

Argument = Literal["model", "dataset", "vary"]
"""Of `train` and `resume`, by which it is handed in."""
ALWAYS = ("model", "dataset")
"""What a run needs to be looked at again; the others only change what is still to be trained."""
_MEANS = {"model": "the network", "dataset": "the images", "vary": "a change of training images"}


class OwnThing(Section):
    """One thing that was handed in."""

    argument: Argument
    name: str
    """Where its class or function is defined, `module.name`."""
    digest: str = ""
    """Of its content, code and settings, as far as they can be had; empty where they cannot."""

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:12]})" if self.digest else self.name


def describe(argument: Argument, thing: Any) -> OwnThing:
    """The name and digest of a function, or of an object whose settings say what it does."""
    return OwnThing(argument=argument, name=qualified_name(thing), digest=_digest_code(thing))


def qualified_name(thing: Any) -> str:
    """`module.name` of a function or class, or of the class of anything else."""
    if isinstance(thing, functools.partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def refuse_other_things(
    then: Sequence[OwnThing], now: Sequence[OwnThing], *, run: object, is_trained: bool, verb: str = "resume"
) -> None:
    """Nothing, where what is handed in now is what a run was begun with.

    Args:
        then: what its plan names.
        now: what is here.
        run: for messages.
        is_trained: whether nothing is left to train, so that only what is looked at matters.
        verb: the function that was called.

    Raises:
        RunError: naming what is missing, another, or was not there.
    """
    faults = []
    for argument in dict.fromkeys(thing.argument for thing in (*then, *now)):
        old, new = ([one for one in things if one.argument == argument] for things in (then, now))
        if old == new or (is_trained and argument not in ALWAYS):
            continue
        begun, got = (", ".join(map(str, things)) or "none" for things in (old, new))
        do = f"Hand in the same: finetune.{verb}(run, {argument}=...)" if old else f"Leave {argument}= out"
        faults.append(f"{run} was begun with {begun} for {argument} ({_MEANS[argument]}), and gets {got} now. {do}.")
    if faults:
        raise RunError("\n".join(faults))


def _digest_code(thing: Any) -> str:
    code = getattr(thing, "__code__", None)
    plain = [part for part in code.co_consts if isinstance(part, bool | int | float | str)] if code else []
    text = repr((code.co_code, code.co_names, plain)) if code else type(thing).__qualname__
    return hashlib.sha256(text.encode()).hexdigest()[:12]
