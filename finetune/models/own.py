"""What a survey is given instead of looking it up: images and, later, a network that a Python program holds."""

from dataclasses import dataclass

from finetune.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Given:
    """Handed in by a program; None where the recipe names it."""

    source: Source | None = None


NOTHING = Given()
