"""Compute: what a run computes with, decided once; and the only file that knows the operating system.

A `Compute` says which device, in which precision and why. The rest is what not every system or every build of torch
has: where it is missing, the work is done without it.
"""

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, Self, cast

from finetune import __version__
from finetune.errors import RecipeError, RunError

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda", "mps"]
"""`cuda` is a GPU of Nvidia or AMD, `mps` that of a Mac."""
Precision = Literal["32", "bf16", "fp16"]
KEEP_BYTES = 1 << 30
"""Allocations below this stay with the process when freed."""
_GLIBC_KEEPS = 32 << 20
"""To which glibc's own threshold climbs as blocks are freed, and no further: mallopt(3), M_MMAP_THRESHOLD."""
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


class Hardware(Protocol):
    """The section `hardware`: of a recipe, which may say `auto`, or of a plan."""

    @property
    def devices(self) -> str:
        """A `Device`, or `auto`."""

    @property
    def precision(self) -> str:
        """A `Precision`, or `auto`."""


class Offer(Protocol):
    """What torch was found to offer: a `Machine`, or what facts say of it."""

    @property
    def device(self) -> str:
        """The fastest `Device`."""

    @property
    def has_bf16(self) -> bool:
        """Whether it is a GPU that computes in bf16."""

    @property
    def has_fp16(self) -> bool:
        """Whether it is a GPU that computes in fp16."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What torch and the system offer here."""

    device: Device
    """A GPU where there is one."""
    cores: int
    has_bf16: bool
    """Of the GPU; so is `has_fp16`."""
    has_fp16: bool
    can_fork: bool
    """Whether loader processes are forked, and so share decoded images."""

    @classmethod
    def here(cls, wish: str = "auto") -> Self:
        """This one; with the wish `cpu` as if it had no GPU."""
        import torch

        device: Device = "cpu"
        has_bf16 = has_fp16 = False
        if wish != "cpu" and torch.cuda.is_available():
            device, has_bf16, has_fp16 = "cuda", torch.cuda.is_bf16_supported(), True
        elif wish != "cpu" and torch.backends.mps.is_available():
            device, has_fp16 = "mps", torch.amp.is_autocast_available("mps")
            has_bf16 = has_fp16 and torch.backends.mps.is_macos_or_newer(14, 0)
        return cls(device=device, cores=num_cores(), has_bf16=has_bf16, has_fp16=has_fp16, can_fork=can_fork())


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What to compute with."""

    device: Device
    precision: Precision
    why: str
    """The reason for the precision."""

    @classmethod
    def decide(cls, wish: Hardware, offer: Offer | None = None) -> Self:
        """What a recipe asks for; where it leaves that open, the GPU if there is one, and the precision that suits it.

        Args:
            wish: of the recipe.
            offer: what there is to choose from; None: what torch sees here.

        Raises:
            RecipeError: if torch sees no such device, or the device does not compute in such precision.
        """
        found = Machine.here(wish.devices) if offer is None else offer
        device = cast(Device, found.device if wish.devices == "auto" else wish.devices)
        if device not in ("cpu", found.device):
            seen = "no GPU" if found.device == "cpu" else f"{found.device} alone"
            raise RecipeError(f"hardware.devices is {device}, but torch sees {seen} here; use auto or cpu.")
        if wish.precision != "auto":
            _refuse_precision(wish.precision, device, found)
            return cls(device=device, precision=cast(Precision, wish.precision), why="the recipe says so")
        best: Precision = "bf16" if found.has_bf16 else "fp16" if found.has_fp16 else "32"
        if device == "cuda":
            return cls(device=device, precision=best, why=f"the fastest this GPU trains well in is {best}")
        if device == "mps":
            return cls(device=device, precision="32", why="the GPU of a Mac trains in 32 bit")
        return cls(device="cpu", precision="32", why=PLAIN.why)

    @classmethod
    def of(cls, hardware: Hardware, *, or_cpu: bool = False) -> Self:
        """What a plan has decided.

        Args:
            hardware: of the plan.
            or_cpu: judge on the CPU where the plan's GPU is not here.

        Raises:
            RunError: if it is not here.
        """
        device = cast(Device, hardware.devices)
        if device != "cpu" and Machine.here().device != device:
            if not or_cpu:
                raise RunError(f"the plan is made for a GPU ({device}), and torch sees none such here. Run it there.")
            device = "cpu"
        return cls(device=device, precision=cast(Precision, hardware.precision), why="the plan says so")

    @property
    def cores(self) -> int:
        """Processors that this process may use."""
        return num_cores()

    @property
    def threads(self) -> int:
        """Threads of this process that multiply one matrix."""
        import torch

        return torch.get_num_threads()

    def autocast(self) -> "torch.autocast":
        """A context in which the forward pass of a network is in this precision."""
        import torch

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = kinds.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device, dtype=dtype, enabled=self.precision in kinds)

    def wait(self) -> None:
        """Return when the device has done what it was given, so that a clock can be read."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()

    def describe(self) -> dict[str, Any]:
        """Versions and settings that a number of this run depends on."""
        import torch

        return {
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            "cores": self.cores,
            "threads": self.threads,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else self.device,
            "precision": self.precision,
            "memory_format": "channels_last",
            "freed_memory_kept_below_bytes": KEEP_BYTES,
            "denormals_flushed": True,
            "versions": {"finetune": __version__, **{name: _version(name) for name in _PACKAGES}},
        }


PLAIN = Compute(device="cpu", precision="32", why="a CPU repeats 32-bit training to the last bit")


def _refuse_precision(wish: str, device: str, offer: Offer) -> None:
    if device == "cpu":
        if wish == "fp16":
            raise RecipeError("hardware.precision is fp16, which needs a GPU; use 32 or bf16 on a CPU.")
    elif not {"32": True, "bf16": offer.has_bf16, "fp16": offer.has_fp16}[wish]:
        raise RecipeError(
            f"hardware.precision is {wish}, but torch does not compute in {wish} on {device} here; use 32."
        )


def exact(values: "torch.Tensor") -> "torch.Tensor":
    """The same numbers in float64; on the CPU where their device has none, as `mps`."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def free_gpu_memory(device: "torch.device") -> None:
    """Return what torch keeps of freed memory to the GPU; nothing on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def gpu_draws() -> Callable[[], None]:
    """What puts the generators of GPUs back to where they are now."""
    import torch

    if torch.cuda.is_initialized():
        return partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    if torch.backends.mps.is_built() and torch.backends.mps.is_available():
        return partial(torch.mps.set_rng_state, torch.mps.get_rng_state())
    seed = torch.initial_seed()  # that a GPU begins with, if anything wakes it
    return lambda: torch.cuda.manual_seed_all(seed) if torch.cuda.is_initialized() else None


def search_kernels(*, searches: bool) -> bool:
    """Whether cudnn times its kernels and takes the fastest, not always the same one; and what it did before."""
    import torch

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = searches
    return before


@contextmanager
def own_draws(seed: int, device: "str | torch.device") -> Iterator[None]:
    """What is drawn inside follows `seed`; the generators of the CPU and of `device` are then as they were."""
    import torch

    place = torch.device(device)
    on_mac = torch.mps.get_rng_state() if place.type == "mps" else None
    with torch.random.fork_rng(_gpu_of(place) if place.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if on_mac is not None:
                torch.mps.set_rng_state(on_mac)


def _gpu_of(place: "torch.device") -> list[int]:
    import torch

    return [torch.cuda.current_device() if place.index is None else place.index]


def keep_freed_memory(*, keeps: bool = True) -> None:
    """Let glibc keep freed blocks below `KEEP_BYTES`; or, as it ends up by itself, below `_GLIBC_KEEPS`."""
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES if keeps else _GLIBC_KEEPS)
        libc.mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES if keeps else 2 * _GLIBC_KEEPS)


def give_back_memory() -> None:
    """Return freed memory that the process keeps to the system: what one part of a run needed, the next may not."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    is_here = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL("libc.so.6") if is_here else None


def num_cores() -> int:
    """Processors this process may use; those of the machine where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Whether a loader process is forked, and so shares what is in memory; macOS and Windows start it anew."""
    return sys.platform == "linux"


def after_fork(renew: Callable[[], None]) -> None:
    """Call `renew` in every child that is forked off this process; Windows forks none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Go on as another program; on Windows, where the terminal would not wait for it, run it and end as it does."""
    if sys.platform == "win32":
        sys.exit(subprocess.run(command, env=dict(environment), check=False).returncode)
    os.execve(command[0], list(command), dict(environment))


def start_method() -> str:
    """How loader processes are started, for `multiprocessing`."""
    return "fork" if can_fork() else "spawn"


def open_to_lock(path: Path) -> int | None:
    """A handle of a file, which is made if need be, or of a folder; None where no folder can be opened (Windows)."""
    if not path.is_dir():
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    return None if sys.platform == "win32" else os.open(path, os.O_RDONLY)


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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
