"""Compute: what a process sets once before it computes, and what not every operating system has.

On CPUs glibc hands freed activations back to the kernel and pays page faults to get them again, and
arithmetic on denormal numbers is many times slower than on others; both are settings of the process, recorded in
`environment.json`. Whatever macOS or Windows lacks is asked for here alone.
"""

import ctypes
import errno
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from finetune import __version__

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""The environment in which no library calls home, or writes on our standard output."""
_LENT: dict[str, tuple[str | None, int]] = {}
"""By variable: what was there before, and how many hold it."""
_LENDING = threading.RLock()
KEEP_BYTES = 1 << 30
"""Allocations below this stay with the process when freed."""
SHARED_PRODUCTS = 2.5e8
"""Multiplications of a matrix product that are worth more than one thread: some milliseconds of a core."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOCKED_BYTE = 2**30
"""Of a file that Windows locks: far behind its end, for others may not read what is locked."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What network drives answer that know no locks."""
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "albumentations",
    "mlflow",
    "numpy",
    "pillow",
)


SECONDS_BETWEEN_LINES = 5


def every_few_seconds(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """What to call with what is counted, how many are done, and of how many: now and then it says so."""
    last = [time.perf_counter()]

    def progress(what: str, done: int, total: int) -> None:
        if time.perf_counter() - last[0] > SECONDS_BETWEEN_LINES:
            last[0] = time.perf_counter()
            say(f"{what}: {done:,} of {total:,}")

    return progress


def tune_process() -> None:
    """Keep freed memory, flush denormals, and hide no deterministic choice behind a benchmark run."""
    import torch

    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = False


def give_back_memory() -> None:
    """Return freed memory that `tune_process` keeps to the system: what one part of a run needed, the next may not."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    is_here = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL("libc.so.6") if is_here else None


@contextmanager
def threads_for(products: float) -> Iterator[None]:
    """Compute with one thread where the largest matrix product has fewer multiplications than `SHARED_PRODUCTS`.

    Threads that wait for the next small product keep their cores busy: several times the processor time, and where the
    cores have other work, more seconds too.
    """
    import torch

    before = torch.get_num_threads()
    if products < SHARED_PRODUCTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quiet_environment() -> dict[str, str]:
    """The environment of every process that is ours: that of the user, and `QUIET`."""
    return {**os.environ, **QUIET}


@contextmanager
def lend_environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Hold variables in the environment of a process that may be somebody else's; the last holder puts all back."""
    with _LENDING:
        for name, value in wanted.items():
            before, holders = _LENT.get(name, (os.environ.get(name), 0))
            _LENT[name] = before, holders + 1
            os.environ[name] = value
    try:
        yield
    finally:
        with _LENDING:
            for name in wanted:
                _give_back(name)


def _give_back(name: str) -> None:
    before, holders = _LENT[name]
    _LENT[name] = before, holders - 1
    if holders > 1:
        return
    del _LENT[name]
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


def num_cores() -> int:
    """Processors this process may use; those of the machine where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def after_fork(renew: Callable[[], None]) -> None:
    """Call `renew` in every child that is forked off this process; Windows forks none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def try_lock(handle: int) -> bool:
    """Whether an open file or folder is ours alone from now on, until it is closed or this process ends.

    Where the system or the drive knows no locks the answer is yes.
    """
    try:
        fcntl = import_module("fcntl")
    except ImportError:
        return _try_lock_byte(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        if fault.errno not in _NO_LOCKS:
            raise
    return True


def _try_lock_byte(handle: int) -> bool:
    """The way of Windows."""
    try:
        msvcrt = import_module("msvcrt")
    except ImportError:
        return True
    os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def describe_environment(device: str, precision: str) -> dict[str, Any]:
    """Versions and settings that a number of this run depends on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": precision,
        "memory_format": "channels_last",
        "freed_memory_kept_below_bytes": KEEP_BYTES,
        "denormals_flushed": True,
        "versions": {"finetune": __version__, **{name: _version(name) for name in _PACKAGES}},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
