"""Process: what we set in a process that may be somebody else's, and how all of it is put back.

The command line has its process for itself. A Python program has lent us its own: every public function is
`as_guest`, and the last guest to leave puts back what the first one found.
"""

import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from finetune.compute import give_back_memory, gpu_draws, keep_freed_memory, search_kernels

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""The environment in which no library calls home, or writes on our standard output."""
SHARED_PRODUCTS = 2.5e8
"""Multiplications of a matrix product that are worth more than one thread: some milliseconds of a core."""
_LENT: dict[str, tuple[Callable[[], object], int]] = {}
"""By what is lent: what puts it back, and how many hold it."""
_PROMISED: dict[str, Callable[[], object]] = {}
"""What guests have changed of the process, and what puts it back."""
_LENDING = threading.RLock()


@contextmanager
def lend(what: str, take: Callable[[], Callable[[], object]]) -> Iterator[None]:
    """Hold a setting that many may hold, in any threads.

    Args:
        what: its name.
        take: called by the first holder; what it returns is called when the last has left, and puts all back.
    """
    with _LENDING:
        put_back, holders = _LENT.get(what) or (take(), 0)
        _LENT[what] = put_back, holders + 1
    try:
        yield
    finally:
        with _LENDING:
            put_back, holders = _LENT.pop(what)
            if holders > 1:
                _LENT[what] = put_back, holders - 1
            else:
                put_back()


@contextmanager
def as_guest() -> Iterator[None]:
    """Work as `tune_process` sets it, and leave the process as it was; guests may overlap.

    Put back are random generators, filters of warnings, and all that `put_back_later` was told. Whether denormals are
    flushed is a matter of each thread: that of the caller has its own back.
    """
    import torch

    flushed = flushes_denormals()
    with lend_filters(), lend("process", _take_process):
        try:
            tune_process()
            yield
        finally:
            torch.set_flush_denormal(flushed)


def lend_filters() -> AbstractContextManager[None]:
    """Hold the filters of warnings, so that they may be changed in any thread; the last holder puts them back."""
    return lend("filters of warnings", _take_filters)


def _take_filters() -> Callable[[], None]:
    kept = ExitStack()
    kept.enter_context(warnings.catch_warnings())
    return kept.close


def _take_process() -> Callable[[], None]:
    import numpy as np
    import torch

    kept = ExitStack()
    kept.callback(torch.set_rng_state, torch.get_rng_state())
    kept.callback(gpu_draws())
    kept.callback(np.random.set_state, np.random.get_state())
    kept.callback(random.setstate, random.getstate())
    kept.callback(_keep_promises)
    return kept.close


def _keep_promises() -> None:
    for put_back in reversed(_PROMISED.values()):
        put_back()
    _PROMISED.clear()


def put_back_later(what: str, put_back: Callable[[], object]) -> None:
    """Say what puts a setting back before it is changed; of each name the first counts, and the last guest calls it.

    Where nobody is a guest the process is our own, and keeps what is set.
    """
    with _LENDING:
        if "process" in _LENT:
            _PROMISED.setdefault(what, put_back)


def quieten(logger: str, level: int) -> None:
    """Let a logger tell nothing below `level`."""
    found = logging.getLogger(logger)
    put_back_later(f"logger {logger}", partial(found.setLevel, found.level))
    found.setLevel(level)


def tune_process() -> None:
    """Keep freed memory, flush denormals, and hide no deterministic choice behind a benchmark run.

    On CPUs glibc hands freed activations back to the kernel and pays page faults to get them again, and arithmetic on
    denormal numbers is many times slower than on others. What is set is recorded in `environment.json`.
    """
    import torch

    put_back_later("freed memory", _keep_no_memory)
    keep_freed_memory()
    torch.set_flush_denormal(True)
    before = search_kernels(searches=False)
    put_back_later("kernels", partial(search_kernels, searches=before))


def _keep_no_memory() -> None:
    keep_freed_memory(keeps=False)
    give_back_memory()


def flushes_denormals() -> bool:
    """Whether this thread takes numbers too small for full precision for zero; torch can set it, and not tell."""
    return sys.float_info.min * 0.5 == 0.0


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
    """Hold variables in the environment of a process that may be somebody else's."""
    with ExitStack() as held:
        for name, value in wanted.items():
            held.enter_context(lend(f"variable {name}", partial(_take_variable, name)))
            os.environ[name] = value
        yield


def _take_variable(name: str) -> Callable[[], object]:
    before = os.environ.get(name)
    return partial(os.environ.pop, name, None) if before is None else partial(os.environ.__setitem__, name, before)


@contextmanager
def lend_levels(levels: Mapping[str, int]) -> Iterator[None]:
    """Let loggers be set to any level meanwhile; then they have these."""
    with ExitStack() as held:
        for name, level in levels.items():
            back = partial(logging.getLogger(name).setLevel, level)
            held.enter_context(lend(f"logger {name}", lambda back=back: back))  # type: ignore[misc]
        yield
