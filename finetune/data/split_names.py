"""Words: which names of folders, files and cells mean a split, and how names of images and classes are spelt."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from finetune.data.items import ROLES
from finetune.errors import DataError, nearest

ROLE_OF = {role: role for role in ROLES} | {"valid": "val", "validation": "val"}
"""The role that a word means, in lower case."""


def item_name(file: Path, root: Path) -> str:
    """Path below `root` with "/"; the whole path where the file lies elsewhere."""
    try:
        name = file.relative_to(root).as_posix()
    except ValueError:  # a table may name absolute paths
        name = file.as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def normal_text(text: str) -> str:
    """One spelling for names that look alike: macOS stores accents decomposed, others composed."""
    return unicodedata.normalize("NFC", text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")).strip()


def unknown_split(word: str, where: str) -> DataError:
    """An error that points to the nearest name of a split."""
    known = ", ".join(ROLE_OF)
    hint = nearest(word.casefold(), ROLE_OF, otherwise=f"Known are {known}.")
    return DataError(f"{where}: {word!r} is not the name of a split. {hint} Rename it or take it away.")


def few(names: Sequence[str]) -> str:
    """The first five names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
