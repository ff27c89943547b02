"""The run folder: all that remains of a run, never overwritten, every file whole or absent."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from finetune.compute import try_lock
from finetune.config.backbone_names import is_run
from finetune.config.facts import Facts
from finetune.config.membership import Membership
from finetune.config.plan import Images, Plan, read_plan
from finetune.config.scores import Scores
from finetune.config.section import read_value
from finetune.errors import RunError, explain_os_error, names_beside, nearest, os_error_behind

FILES = (
    "card.yaml",
    "classes.txt",
    "curves.csv",
    "environment.json",
    "facts.json",
    "log.txt",
    "model.safetensors",
    "plan.yaml",
    "predictions.npz",
    "probe.safetensors",
    "recipe.yaml",
    "report.html",
    "scores.json",
    "seen.npz",
    "tracking.json",
)
"""What a finished run holds, beside `stages/K-NAME/{last.ckpt,weights.safetensors}`; of a stage that is
refit, `held_out.safetensors`. A run that was trained by a plan holds no `recipe.yaml`: nothing was left open."""


AVERAGE_FILE = "ensemble.json"
"""What makes a run folder an average of several networks."""
SOUP_FILE = "soup.json"
"""What says of which weights a run's were mixed."""


class RunFolder:
    """Paths and whole-file writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.network: object | None = None
        """The network that a program handed in, where the run has one: its folder holds weights alone."""

    @classmethod
    def create(cls, parent: Path, *, name: str, backbone: str) -> Self:
        """A new folder `parent/NAME-BACKBONE-STAMP`; a taken name gets a number."""
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name, backbone = (part.encode()[:90].decode(errors="ignore") for part in (name, backbone))
        stem = "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") or "run" for part in (name, backbone)) + f"-{stamp}"
        for number in range(1000):
            path = parent / (stem if number == 0 else f"{stem}-{number}")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                if parent.is_dir():
                    continue
                raise RunError(f"{parent} is a file, so no run can be kept in it; name a folder.") from None
            except OSError as fault:
                raise RunError(f"no run folder can be made in {parent}: {fault.strerror}.") from fault
            return cls(path)
        raise RunError(f"{parent} holds a thousand runs named {stem}; move some away.")

    def __fspath__(self) -> str:
        """So that a run may stand wherever a path may."""
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, named: "str | os.PathLike[str]") -> Self:
        """An existing run, named as `find_run` says.

        Raises:
            RunError: if there is no such folder, or it holds no plan.
        """
        folder = find_run(named)
        if not (folder / "plan.yaml").exists():
            found = (
                "a run that stopped before its plan: start it again" if (folder / "recipe.yaml").exists() else "no run"
            )
            raise RunError(f"{folder} holds no plan.yaml; it is {found}.")
        run = cls(folder)
        run.network = named.network if isinstance(named, RunFolder) else None
        return run

    def file(self, name: str) -> Path:
        """The path of a file of the run."""
        return self.path / name

    @property
    def has_begun(self) -> bool:
        """Whether it holds all that it needs to go on: the plan, and the probe that training begins from."""
        return self.file("plan.yaml").exists() and self.file("probe.safetensors").exists()

    @property
    def plan(self) -> Plan:
        """The plan, read from the folder."""
        return read_plan(self.file("plan.yaml"))

    @property
    def facts(self) -> Facts:
        """What was measured before anything was decided, read from the folder.

        Raises:
            RunError: if nothing was yet, or the file is damaged.
        """
        mend = "Copy the run again from where it was made."
        return read_value(Facts, self.existing("facts.json"), mend)

    @property
    def scores(self) -> Scores:
        """What was judged, read from the folder.

        Raises:
            RunError: if nothing was yet, or the file is damaged.
        """
        mend = f"`finetune evaluate {self.path}` writes it anew."
        return read_value(Scores, self.existing("scores.json"), mend)

    @property
    def membership(self) -> Membership | None:
        """What the run was made of, where it stands for several; None of a run that was trained.

        Raises:
            RunError: if the file that says so is damaged.
        """
        for name in (AVERAGE_FILE, SOUP_FILE):
            if self.file(name).exists():
                return read_value(Membership, self.file(name), "Make it again from its members.")
        return None

    def stage_folder(self, index: int) -> Path:
        """`stages/K-NAME`, K counted from 1."""
        return self.path / "stages" / f"{index + 1}-{self.plan.stages[index].name}"

    def stage_weights(self, index: int) -> Path:
        """The weights that a stage ends with; their presence means that it is done."""
        return self.stage_folder(index) / self.plan.weights_file(index)

    def stage_names(self, on: Images) -> list[str]:
        """`K-NAME` of the stages on these images, as the curves call them."""
        return [f"{number}-{stage.name}" for number, stage in enumerate(self.plan.stages, 1) if stage.images == on]

    def final_weights(self) -> Path:
        """The weights to judge: of the last stage, or of the probe where there is none."""
        return self._weights_of(len(self.plan.stages) - 1)

    def held_out_weights(self) -> Path:
        """Those that val and calibration judge: before the refit, or the final ones where there is none."""
        return self._weights_of(self.plan.last_stage("train"))

    def _weights_of(self, index: int) -> Path:
        return self.file("probe.safetensors") if index < 0 else self.stage_weights(index)

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file or none."""
        write_whole(self.file(name), lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a whole JSON file or none."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """A JSON file of the run.

        Raises:
            RunError: if it is not there yet.
        """
        return json.loads(self.existing(name).read_text(encoding="utf-8"))

    def existing(self, name: str) -> Path:
        """The path of a file of the run that must be there by now.

        Raises:
            RunError: if it is not.
        """
        if not (path := self.file(name)).exists():
            raise RunError(f"{self.path} has no {name} yet. `finetune resume {self.path}` goes on with the run.")
        return path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one process; the lock goes with the process, however it ends.

        Raises:
            RunError: if another process works on it.
        """
        with self.file("log.txt").open("a", encoding="utf-8") as handle:
            if not try_lock(handle.fileno()):
                raise RunError(f"another process is working on {self.path}; wait for it or stop it.")
            yield


@contextmanager
def faults_told(run: RunFolder, images: str | None) -> Iterator[None]:
    """A full disk, a file that somebody removed and the like as a fault that the user can mend, and how to go on.

    Args:
        run: may be written to.
        images: where they lie; None where no recipe says so.

    Raises:
        RunError: in place of an OSError that is no bug.
    """
    try:
        yield
    except OSError as fault:
        if (told := explain_os_error(fault, [run.path, *([Path(images)] if images else [])])) is None:
            raise
        if run.file("plan.yaml").exists():
            told += f" Then `finetune resume {run.path}` goes on from the last whole epoch."
        raise RunError(told) from fault


def find_run(named: "str | os.PathLike[str]") -> Path:
    """The folder of a run: a path, the name of a folder among the runs or how it alone begins, or `latest`.

    Raises:
        RunError: if there is none, or more than one begins so.
    """
    folder = Path(named).expanduser()
    if is_run(folder):
        return folder
    among = runs_folder()
    if len(folder.parts) == 1 and among.is_dir():
        if (among / folder).is_dir():
            return among / folder
        known = sorted(path.parent for path in among.glob("*/plan.yaml"))
        if folder.name == "latest" and known:
            return max(known, key=lambda path: ((path / "plan.yaml").stat().st_mtime_ns, path.name))
        alike = [path for path in known if path.name.startswith(f"{folder.name}-")]
        if len(alike) > 1:
            some = ", ".join(path.name for path in alike[-5:])
            raise RunError(f"{len(alike)} runs in {among}/ begin with {folder.name}: {some}. Name one, or say latest.")
        if alike:
            return alike[0]
    if folder.is_dir():
        return folder
    raise no_run(folder)


def no_run(folder: Path) -> RunError:
    """An error for a run that is not there, with those that are called nearly so."""
    near = nearest(folder.name, [*names_beside(folder), *names_beside(runs_folder() / "any")])
    return RunError(f"{folder} is no folder. Runs are kept under {runs_folder()}/. {near}".rstrip())


def sweep(folder: Path) -> None:
    """Remove the halves of files that a killed process left; for whoever holds the lock of the run."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it into place.

    Raises:
        OSError: naming `path`, whatever the library that writes calls a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers leave files that only their owner may read
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as fault:
        if (found := os_error_behind(fault)) is None:
            raise
        is_named = found.filename not in (None, str(temporary))
        raise (found if is_named else _naming(path, found)) from fault
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
        OSError: naming `path`.
    """
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as fault:
        raise _naming(path, fault) from fault


def _naming(path: Path, fault: OSError) -> OSError:
    return OSError(fault.errno, fault.strerror or str(fault), str(path))


def runs_folder() -> Path:
    """Where new runs go: FINETUNE_RUNS, or `runs` here."""
    return Path(os.environ.get("FINETUNE_RUNS", "runs"))


class Clock:
    """Seconds by part of the walk, added up over resumptions."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._last, self._laps = run, time.perf_counter(), dict[str, float]()

    def lap(self, name: str) -> None:
        """End the part called `name`, which began where the last one ended."""
        now = time.perf_counter()
        self._laps[name], self._last = round(now - self._last, 2), now

    def write(self) -> None:
        """Add the seconds to those in `environment.json`."""
        known = self._run.read_json("environment.json")
        before = known.get("seconds", {})
        known["seconds"] = {name: round(before.get(name, 0.0) + value, 2) for name, value in self._laps.items()}
        known["seconds"]["total"] = round(sum(known["seconds"].values()), 2)
        self._run.write_json("environment.json", known)
