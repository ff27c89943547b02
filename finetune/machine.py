"""What a process sets once before it computes, and why. Recorded in `environment.json`.

On CPUs glibc hands freed activations back to the kernel and pays page faults to get them again, and
arithmetic on denormal numbers is many times slower than on others; both are settings of the process.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PACKAGES = (
    "finetune",
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "albumentations",
    "mlflow",
    "numpy",
    "pillow",
)


def tune_process() -> None:
    """Keep freed memory, flush denormals, and hide no deterministic choice behind a benchmark run."""
    import torch

    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = False


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


def describe_environment(device: str, precision: str) -> dict[str, Any]:
    """Versions and settings that a number of this run depends on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": precision,
        "memory_format": "channels_last",
        "freed_memory_kept_below_bytes": KEEP_BYTES,
        "denormals_flushed": True,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
