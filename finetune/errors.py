"""The errors a user can cause, each mended by the user. Anything else that is raised is our bug.

    FinetuneError
    ├── RecipeError      a recipe, an override or a plan says something we cannot do
    ├── DataError        images, tables or splits that cannot be learned from
    ├── BackboneError    a backbone that is unknown, missing, damaged or of the wrong kind
    └── RunError         a run folder that is missing, incomplete or of another making

Every message says what is wrong, where, what was found, and what to do about it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class FinetuneError(Exception):
    """Something the user can mend; the command line prints it as one paragraph and exits with 2."""


class RecipeError(FinetuneError):
    """A recipe, an override or a plan names an unknown key or holds a value outside its range."""


class DataError(FinetuneError):
    """Images, tables or splits that cannot be learned from."""


class BackboneError(FinetuneError):
    """A backbone that is unknown, missing, damaged or of the wrong kind."""


class RunError(FinetuneError):
    """A run folder that is missing, incomplete or of another making."""


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """A sentence with the known names closest to `name`, or `otherwise` where none is close."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"Nearest: {', '.join(near)}." if near else otherwise


def names_beside(path: Path) -> list[str]:
    """What stands in the folder where `path` is missing, for `nearest`; nothing where that folder cannot be read."""
    try:
        return sorted(one.name for one in path.parent.iterdir())
    except OSError:
        return []
