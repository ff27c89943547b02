"""What sections of a recipe, and other files, have in common: unknown keys are refused, names may be numbers."""

import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.errors import RunError

V = TypeVar("V", bound=BaseModel)


def as_text(value: object) -> object:
    """YAML reads `32` and `2024` as numbers; where a name is meant, they are names."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_texts(value: object) -> object:
    """One name stands for a list of one; yes and no are words of a table's column."""
    names = value if isinstance(value, list | tuple) else [value]
    return tuple(str(name) if isinstance(name, bool | int | float) else name for name in names)


Text = Annotated[str, BeforeValidator(as_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

Prefer = Literal["accuracy", "balanced", "speed"]
"""What counts more where a choice costs time."""
ROLES = ("train", "val", "calibration", "test")
"""What an image may serve for."""


class Section(BaseModel):
    """A frozen group of keys that refuses the ones it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def read_value(kind: type[V], path: Path, mend: str) -> V:
    """The value that a JSON file holds, of this version or an older one.

    Args:
        kind: of the value.
        path: of the file.
        mend: what to do where it holds anything else.

    Raises:
        RunError: if it does, naming the keys that are wrong.
    """
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as fault:
        word = kind.__name__.lower()
        raise RunError(f"{path} holds no {word} of this version, or is damaged ({_told(fault)}). {mend}") from fault


def _told(fault: ValueError, most: int = 3) -> str:
    """What is wrong, key by key; of many faults the first `most`."""
    if not isinstance(fault, ValidationError):
        return str(fault)
    errors = fault.errors(include_url=False)
    told = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in errors[:most]]
    more = f"; and {len(errors) - most} more" if len(errors) > most else ""
    return "; ".join(told) + more
