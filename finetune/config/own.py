"""What a Python program hands in instead of naming it: never kept, but named in the plan, so that a run that goes on
goes on with the same.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from finetune.config.section import Section
from finetune.errors import RunError

Argument = Literal["model", "dataset", "loss", "callbacks", "logger", "vary"]
"""Of `train` and `resume`, by which it is handed in."""
ALWAYS = ("model", "dataset")
"""What a run needs to be looked at again; the others only change what is still to be trained."""
_PLAIN = (bool, int, float, str)
_MEANS = {
    "model": "the network",
    "dataset": "the images",
    "loss": "the loss",
    "callbacks": "callbacks of Lightning",
    "logger": "a logger of Lightning",
    "vary": "a change of training images",
}


class OwnThing(Section):
    """One thing that was handed in."""

    argument: Argument
    name: str
    """Where its class or function is defined, `module.name`."""
    digest: str = ""
    """Of its content, code and settings, as far as they can be had; empty where they cannot."""

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:12]})" if self.digest else self.name


def describe(argument: Argument, thing: Any, *, has_settings: bool = True) -> OwnThing:
    """The name of a function or an object, and the digest of its code and of the settings that say what it does.

    What listens changes as it does so, and has no settings that would be the same again.
    """
    if not has_settings:
        return OwnThing(argument=argument, name=qualified_name(thing))
    return OwnThing(argument=argument, name=qualified_name(thing), digest=_digest_code(thing))


def qualified_name(thing: Any) -> str:
    """`module.name` of a function or class, or of the class of anything else."""
    if isinstance(thing, functools.partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def has_own_loss(things: Sequence[OwnThing]) -> bool:
    """Whether a loss was handed in."""
    return any(thing.argument == "loss" for thing in things)


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
    return hashlib.sha256("".join(_told(thing)).encode()).hexdigest()[:12]


def _told(thing: Any) -> Iterator[str]:
    """What can be told of a function or an object: its code, and settings that are plain values or tensors."""
    if isinstance(thing, functools.partial):
        yield from _told(thing.func)
        yield repr((_plain(thing.args), _plain(thing.keywords.items())))
    elif (code := getattr(thing, "__code__", None)) is not None:
        yield _code(code)
        closed = [cell.cell_contents for cell in thing.__closure__ or ()]
        if settings := [_plain(part) for part in (closed, thing.__defaults__, thing.__kwdefaults__) if part]:
            yield repr(settings)
    else:
        yield type(thing).__qualname__
        for name in ("__call__", "forward"):
            if (code := getattr(getattr(type(thing), name, None), "__code__", None)) is not None:
                yield _code(code)
        own = {name: value for name, value in getattr(thing, "__dict__", {}).items() if not name.startswith("_")}
        if settings := _plain(sorted((name, value) for name, value in own.items() if name != "training")):
            yield repr(settings)
        if callable(state := getattr(thing, "state_dict", None)):
            yield from (f"{name} {value!r}" for name, value in state().items())


def _code(code: Any) -> str:
    return repr((code.co_code, code.co_names, [part for part in code.co_consts if isinstance(part, _PLAIN)]))


def _plain(values: Any) -> list[Any]:
    """What is plain of some values, or of the values of pairs."""
    if isinstance(values, dict):
        values = values.items()
    return [one for one in values if isinstance(one[1] if isinstance(one, tuple) and len(one) == 2 else one, _PLAIN)]
