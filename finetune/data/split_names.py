"""Words: which names of folders, files and cells mean a split, and how names of images and classes are spelt.

One vocabulary serves folders, tables and shards alike. Two words are a matter of taste, and decided here: `dev` is the
development set, on which things are chosen, so val; `eval` is taken as test, looked at once and never chosen on, for
a test set chosen on flatters its score while a validation set left alone costs nothing. `data.splits` overrules all.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.errors import DataError, nearest

Splits = Mapping[str, Sequence[str]]
"""The names that mean each role, as `data.splits` gives them."""

WORDS_OF = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "calibration": ("calibration", "calib"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
"""The words of the field for each role, in lower case; names may add `ORNAMENTS` to them."""
ROLE_OF = {word: role for role, words in WORDS_OF.items() for word in words}
ORNAMENTS = frozenset(
    ["set", "sets", "split", "data", "dataset", "folder", "dir", "file", "files", "image", "images", "img", "imgs"]
) | frozenset(["pic", "pics", "picture", "pictures", "photo", "photos", "sample", "samples"])
"""Words that leave the meaning of a split's name as it is: `test_images`, `Train Data`, `valset`."""
NO_CLASS = frozenset(["unknown", "unlabeled", "unlabelled", "all", "default", "class", "classes"])
"""Names of a lone folder that is there only because some tool wants one."""
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


def role_of(word: str, splits: Splits | None = None) -> str | None:
    """The role that the name of a folder, a shard or a cell means; None where it means none.

    Case, `-`, `_`, blanks, ornaments (`training_set`, `TestImages`, `img-val`) and numbers (`val2017`) do not matter.

    Args:
        word: such as `Training` or `test_images`.
        splits: the only names that count, each as it is written but for case, where the recipe gives them.
    """
    if splits is not None:
        plain = word.strip().strip("/").casefold()
        return next(
            (role for role, names in splits.items() if plain in {one.strip("/").casefold() for one in names}), None
        )
    meant = [role for part in name_parts(word) if (role := _meaning(part)) != ""]
    return meant[0] if len(meant) == 1 else None


def is_generic(name: str, parent: str = "") -> bool:
    """Whether a folder's name says nothing of a class: it repeats its parent's, or is `images`, `unknown`, `test`."""
    parts = name_parts(name)
    plain = all(part in ORNAMENTS or part in NO_CLASS for part in parts)
    return bool(parts) and (plain or parts == name_parts(parent) or role_of(name) is not None)


def name_parts(word: str) -> list[str]:
    """The words a name is made of, in lower case: `Train_Images2017` is train, images, 2017; `held-out` is one word."""
    parts = [part.casefold() for part in _PART.findall(unicodedata.normalize("NFC", word))]
    for first, second in (("hold", "out"), ("held", "out")):
        for at in range(len(parts) - 1):
            if parts[at : at + 2] == [first, second]:
                parts[at : at + 2] = [first + second]
    return parts


def _meaning(part: str) -> str | None:
    """The role of one word; "" for an ornament, None for any other word."""
    if part in ORNAMENTS or part.isdecimal():
        return ""
    glued = next((part.removesuffix(end) for end in ORNAMENTS if part.removesuffix(end) in ROLE_OF), part)
    return ROLE_OF.get(glued)


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


def unknown_split(word: str, where: str, splits: Splits | None = None) -> DataError:
    """An error that points to the nearest name of a split, and to the key that settles it."""
    known = [name for names in splits.values() for name in names] if splits is not None else list(ROLE_OF)
    hint = nearest(word.casefold(), known, otherwise=f"Known are {', '.join(known)}.")
    return DataError(
        f"{where}: {word!r} is not the name of a split. {hint} Rename it or take it away, or say which names are "
        f"which: data.splits: {{train: NAME, test: NAME}}, or {{}} if nothing is a split."
    )


def few(names: Sequence[str]) -> str:
    """The first five names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
