"""Members: the weights of one training at several moments, kept to be judged together.

A member is one file with what training can have changed and its own batch-norm statistics; frozen weights are not
written again. The file's name is the member's, so a run that is killed and goes on writes the same member over
itself, and never a second one.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.errors import RunError
from finetune.runs.folder import write_whole

Fact = float | int | str
_NAME = re.compile(r"([a-z]+)-([0-9]+)")


@dataclass(frozen=True)
class Member:
    """One set of weights on disk."""

    name: str
    """Such as `cycle-1`: a kind and a number."""
    path: Path
    facts: Mapping[str, Fact]
    """What was known of it when it was saved."""
    num_bytes: int
    """Of the file."""


def save_member(folder: Path, name: str, classifier: nn.Module, facts: Mapping[str, Fact]) -> Member:
    """The member `name` of `folder`, written whole; an older one of that name is replaced.

    After each cycle of the rate, before it rises, it is one of a snapshot ensemble (Huang et al., ICLR 2017,
    https://arxiv.org/abs/1704.00109); after each of the last epochs it is a plain checkpoint. Kept are the parameters
    that train, the head, and every buffer: buffers are little beside the weights, and no statistic that moved is
    forgotten.

    Args:
        folder: is made where it is missing.
        name: a kind and a number, such as `cycle-1` or `last-12`.
        classifier: frozen as it was in training.
        facts: plain values, such as the epoch and the val loss.

    Raises:
        ValueError: if the name is not so made.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"a member is named by a kind and a number, such as cycle-1; got {name!r}.")
    frozen = _frozen_names(classifier)
    state = {key: value.contiguous() for key, value in classifier.state_dict().items() if key not in frozen}
    path = folder / f"{name}.safetensors"
    metadata = {"facts": json.dumps(dict(facts))}
    write_whole(path, lambda temporary: save_file(state, temporary, metadata=metadata))
    return _read(path)


def read_members(folder: Path) -> list[Member]:
    """The members of `folder` by kind and number (`cycle-2` before `cycle-10`); none where there is no folder.

    Raises:
        RunError: if a file is damaged.
    """
    paths = [path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.stem)]
    return [_read(path) for path in sorted(paths, key=lambda path: _order(path.stem))]


def load_member(classifier: nn.Module, member: Member) -> None:
    """Give `classifier`, which holds the run's weights, what the member changed; then it is the member, bit for bit.

    Raises:
        RunError: if the file is damaged or of another network.
    """
    try:
        tensors = load_file(member.path)
    except (SafetensorError, OSError) as fault:
        raise _damaged(member.path, fault) from fault
    state = classifier.state_dict()
    weights = {name for name, _ in classifier.named_parameters() if not name.startswith("head.")}
    odd = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
    odd += sorted(state.keys() - weights - tensors.keys())  # only weights of the backbone may be left out
    if odd:
        raise RunError(
            f"{member.path} does not fit this network: {odd[0]} is missing or of another shape "
            f"({len(odd)} of {len(tensors)} tensors). Use the backbone and the head that it was trained with."
        )
    classifier.load_state_dict(tensors, strict=False)


def keep_newest(folder: Path, kind: str, count: int) -> None:
    """Delete the members of one kind, such as `last`, but for the `count` with the highest numbers."""
    mine = [member for member in read_members(folder) if member.name.partition("-")[0] == kind]
    for member in mine[: max(0, len(mine) - count)]:
        member.path.unlink()


def _read(path: Path) -> Member:
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            facts = json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as fault:
        raise _damaged(path, fault) from fault
    return Member(name=path.stem, path=path, facts=facts, num_bytes=path.stat().st_size)


def _damaged(path: Path, fault: Exception) -> RunError:
    return RunError(f"{path} is no whole member ({fault}). Delete it; the others can be judged without it.")


def _frozen_names(classifier: nn.Module) -> set[str]:
    return {
        name
        for name, parameter in classifier.named_parameters()
        if not parameter.requires_grad and not name.startswith("head.")
    }


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("-")
    return kind, int(number)
