"""What every peer's script shares: its arguments, its marks in time, and the file of its answers.

A script is run as `python doors/NAME.py CELL WEIGHTS OUT [options]` by `run.py`, in the peer's own environment, and
imports nothing but the peer, the standard library, numpy and this file. What a user of the peer would write stands
between `# user code` and `# end of user code`; `run.py` counts those lines.

It writes `OUT/answers.npz` (`names`, files below `CELL/test`; `probabilities` (N, K); `classes`) and
`OUT/marks.json` (`first_batch`, `fitted`: seconds since the process was started; `fitted_cpu`: user and system
seconds until then, of this process and of children that have ended; `versions`). A trial of conduct adds
`--misspelt`, or `--resume`.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

STARTED = float(os.environ.get("PEER_STARTED", time.time()))
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass
class Task:
    """One peer, one cell."""

    cell: Path
    """Holds `train/CLASS/*` and `test/CLASS/*`."""
    weights: Path
    """Holds `config.json` and `model.safetensors` as timm writes them, `backbone.pth`, and the card."""
    out: Path
    pixels: int
    seed: int
    variant: str
    epochs: int | None
    """A number for all peers, for trials; None: what each one's own page advises."""
    misspelt: bool
    resume: bool
    marks: dict[str, object] = field(default_factory=dict)

    @property
    def config(self) -> dict:
        """The backbone as timm describes it: `architecture`, `model_args`, `pretrained_cfg`."""
        return json.loads((self.weights / "config.json").read_text(encoding="utf-8"))

    @property
    def classes(self) -> list[str]:
        return sorted(path.name for path in (self.cell / "train").iterdir() if path.is_dir())

    @property
    def test_files(self) -> list[Path]:
        return sorted(path for path in (self.cell / "test").rglob("*") if path.suffix.lower() in SUFFIXES)

    @property
    def num_train(self) -> int:
        return sum(path.suffix.lower() in SUFFIXES for path in (self.cell / "train").rglob("*"))

    def option(self, wrong: str) -> dict[str, float]:
        """An option that does not exist, for the trial that gives one; none otherwise."""
        return {wrong: 1e-3} if self.misspelt else {}

    def mark_first_batch(self, *_: object, **__: object) -> None:
        """Note when the first image goes through the network; called again, nothing."""
        if "first_batch" not in self.marks:
            self.marks["first_batch"] = round(time.time() - STARTED, 2)
            self._write_marks()

    def watch_torch(self) -> None:
        """Call `mark_first_batch` when any torch module sees a batch of images, whatever library drives it."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        def look(module: object, inputs: tuple) -> None:
            if inputs and getattr(inputs[0], "ndim", 0) == 4:
                handle.remove()
                self.mark_first_batch()

        handle = register_module_forward_pre_hook(look)

    def mark_fitted(self) -> None:
        """Training is over; what follows is the judging of the test files."""
        spent = os.times()
        self.marks["fitted"] = round(time.time() - STARTED, 2)
        self.marks["fitted_cpu"] = round(spent.user + spent.system + spent.children_user + spent.children_system, 2)

    def write(self, names: list[str], probabilities: object, classes: list[str], libraries: tuple[str, ...]) -> None:
        """The answers: `names` below `CELL/test`, `probabilities` (N, K) in the order of `classes`."""
        import numpy as np

        np.savez_compressed(
            self.out / "answers.npz",
            names=np.array(names),
            classes=np.array(classes),
            probabilities=np.asarray(probabilities, dtype=np.float64),
        )
        self.marks["versions"] = {name: metadata.version(name) for name in libraries}
        self._write_marks()

    def name_of(self, path: Path) -> str:
        return Path(path).relative_to(self.cell / "test").as_posix()

    def _write_marks(self) -> None:
        (self.out / "marks.json").write_text(json.dumps(self.marks), encoding="utf-8")


def read_task() -> Task:
    """The task that stands on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cell", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pixels", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--misspelt", action="store_true")
    parser.add_argument("--resume", action="store_true")
    return Task(**vars(parser.parse_args()))


def divide(task: Task, to: Path, val_name: str, val: float = 0.2) -> Path:
    """`to/train` and `to/VAL_NAME`, links to the labelled images, for peers that divide nothing."""
    import random

    for name in task.classes:
        files = sorted(path for path in (task.cell / "train" / name).iterdir())
        random.Random(task.seed).shuffle(files)
        num_val = max(1, round(val * len(files)))
        for role, part in ((val_name, files[:num_val]), ("train", files[num_val:])):
            folder = to / role / name
            folder.mkdir(parents=True, exist_ok=True)
            for path in part:
                if not (folder / path.name).exists():
                    (folder / path.name).symlink_to(path)
    return to
