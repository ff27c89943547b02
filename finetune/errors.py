"""The errors a user can cause, each mended by the user. Anything else that is raised is our bug.

    FinetuneError
    ├── RecipeError      a recipe, an override or a plan says something we cannot do
    ├── DataError        images, tables or splits that cannot be learned from
    ├── BackboneError    a backbone that is unknown, missing, damaged or of the wrong kind
    └── RunError         a run folder that is missing, incomplete or of another making

Every message says what is wrong, where, what was found, and what to do about it. An `OSError` is the user's to mend
where its cause lies outside of us: a full disk, a folder that may not be written to, a file that somebody removed.
"""

import difflib
import errno
import os
import re
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


_CAUSES = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("your share of the disk is used up", "Free some space, or ask for a larger share"),
    errno.EFBIG: ("the file would be larger than this process may write", "Raise the limit, `ulimit -f`"),
    errno.EROFS: ("the file system is read-only", "Name a folder that can be written to"),
    errno.EACCES: ("permission is denied", "Give yourself the right, or name another place"),
    errno.EPERM: ("the system does not permit it", "Give yourself the right, or name another place"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "Give a shorter one"),
    errno.EIO: ("the disk answers with an error", "See whether the disk or network drive is well"),
    errno.ESTALE: ("the network drive has lost it", "See whether the drive is connected"),
    errno.ENOTCONN: ("the network drive is not connected", "Connect it"),
    errno.ENODEV: ("the device is gone", "Connect it again"),
    errno.EMFILE: ("too many files are open", "Raise the limit, `ulimit -n`, or set hardware.workers=0"),
    errno.ENFILE: ("too many files are open on this machine", "Close other programs"),
    errno.ENOMEM: ("the machine has no memory left", "Close other programs"),
    errno.ELOOP: ("links lead in a circle", "Remove one of them"),
}
_MISNAMED = {
    errno.ENOENT: ("it is not there", "Check the name, and whether somebody removed it"),
    errno.ENOTDIR: ("a part of the path is a file and no folder", "Check the name"),
    errno.EISDIR: ("it is a folder", "Name a file"),
    errno.EEXIST: ("it is there already", "Name another"),
}


def explain_os_error(fault: OSError, named: Iterable[Path] = ()) -> str | None:
    """Which file, why, and what to do, in words; None where the fault is ours.

    Args:
        fault: what the operating system refused.
        named: files and folders of the user: that one of them, or something in it, is missing is theirs to mend.
    """
    told = _CAUSES.get(fault.errno or 0)
    if told is None and _is_among(fault.filename, named):
        told = _MISNAMED.get(fault.errno or 0)
    if told is None:
        return None
    where = f"{os.fsdecode(fault.filename)}: " if isinstance(fault.filename, str | bytes) else ""
    return f"{where}{told[0]} ({fault.strerror}). {told[1]}."


def os_error_behind(fault: BaseException) -> OSError | None:
    """The fault of the operating system that `fault` is, follows from, or tells of, as libraries in Rust do."""
    one: BaseException | None = fault
    while one is not None:
        if isinstance(one, OSError):
            return one
        if found := re.search(r"\(os error (\d+)\)", str(one)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        one = one.__cause__ or one.__context__
    return None


def _is_among(filename: object, named: Iterable[Path]) -> bool:
    if not isinstance(filename, str):
        return False
    path = Path(filename).absolute()
    mine = [one.expanduser().absolute() for one in named]
    return any(path.is_relative_to(one) or one.is_relative_to(path) for one in mine)
