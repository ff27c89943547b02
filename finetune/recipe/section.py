"""What sections of a recipe have in common: unknown keys are refused, and names may be written as numbers."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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

ROLES = ("train", "val", "calibration", "test")
"""What an image may serve for."""


class Section(BaseModel):
    """A frozen group of keys that refuses the ones it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
