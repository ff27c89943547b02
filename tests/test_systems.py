"""Linux, macOS and Windows: one file asks the system, and what a system lacks is done without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
from finetune import compute
from finetune.config.card import View
from finetune.config.recipe import DataSpec
from finetune.data import loading
from finetune.data.augmentation import Augmentation
from finetune.data.dataset import Dataset
from finetune.data.loading import Batches

ROOT = Path(finetune.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "compute.py"]
MODULES = {"ctypes", "fcntl", "grp", "msvcrt", "platform", "posix", "pwd", "resource", "termios", "winreg"}
OF_OS = {"name", "uname", "umask", "fork", "sched_getaffinity", "register_at_fork", "execve", "execv", "getuid",
         "geteuid", "getloadavg", "nice", "setsid", "killpg", "mkfifo", "chown"}  # fmt: skip
NAMES = {"os": OF_OS, "sys": {"platform", "getwindowsversion"}, "torch": {"cuda", "mps", "backends", "accelerator"}}
SIGNALS = {"SIGTERM", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD"}
VIEW = View(size_pixels=32, shorter_pixels=36, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)


def system_names(path):
    """What a file says of the operating system or of the builds of torch, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names if one.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = NAMES.get(node.module, MODULES if node.module.split(".")[0] not in MODULES else set())
            wanted = {one.name for one in node.names} & names or {node.module} & MODULES
            yield from ((node.lineno, name) for name in wanted)
        elif isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in NAMES.get(of, set()) or node.attr in SIGNALS or node.attr == "is_cuda":
                yield node.lineno, f"{of}.{node.attr}"


def test_one_file_alone_knows_the_operating_system_and_what_torch_was_built_for():
    assert len(FILES) > 100
    own = {name for _, name in system_names(ROOT / "compute.py")}
    assert {"ctypes", "sys.platform", "torch.cuda", "torch.mps"} <= own
    found = [f"{path.relative_to(ROOT)}:{line} {name}" for path in FILES for line, name in system_names(path)]
    assert not found, found


WITHOUT = """
import os, sys, importlib, multiprocessing.context, pathlib, subprocess, asyncio
import torch, pytorch_lightning, albumentations, mlflow, timm, sqlalchemy, alembic, pyarrow, typer, PIL.Image
import mlflow.store.tracking.sqlalchemy_store, mlflow.server, torch.utils.data, torchvision, huggingface_hub
hidden = sys.argv[1].split()
for name in hidden:
    module, _, attribute = name.rpartition(".")
    if module:
        assert hasattr(sys.modules[module], attribute), name
        delattr(sys.modules[module], attribute)
    else:
        sys.modules[name] = None
import finetune
for path in sorted(pathlib.Path(finetune.__file__).parent.rglob("*.py")):
    name = ".".join(path.relative_to(pathlib.Path(finetune.__file__).parents[1]).with_suffix("").parts)
    if path.name != "__main__.py":
        importlib.import_module(name.removesuffix(".__init__"))
from finetune.cli import main
sys.argv = ["finetune", *sys.argv[2:]]
main()
"""
HIDEABLE = ["fcntl", "resource", "os.sched_getaffinity", "os.register_at_fork", "os.umask", "os.fork", "os.uname"]


def train_without(hidden, shapes, runs):
    small = ["backbone=test_resnet.r160_in1k", "pretrained=false", "data.image_size=64", "train.strategy=full"]
    words = ["train", str(shapes), *small, "train.epochs=1", "tracking.enabled=false", "--runs", str(runs), "--json"]
    return subprocess.run([sys.executable, "-c", WITHOUT, hidden, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", HIDEABLE)
def test_a_training_needs_nothing_that_a_system_may_lack(hidden, shapes, tmp_path):
    done = train_without(hidden, shapes, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_training_needs_nothing_of_all_that_a_system_may_lack(shapes, tmp_path):
    done = train_without(" ".join(HIDEABLE), shapes, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"scores"' in done.stdout and len(list(tmp_path.glob("*/report.html"))) == 1


def make_batches(shapes, workers):
    dataset = Dataset.open(DataSpec(root=str(shapes)), 0)
    dataset.divide()
    store = dataset.see(VIEW)
    vary = Augmentation("medium", size_pixels=32, interpolation="bilinear", invariances=("hflip",))
    rows = dataset.indices("train")[:12]
    labels = dataset.items.labels[rows].tolist()
    return Batches(store, rows, labels, batch_size=6, augmentation=vary, shuffle=True, seed=1, workers=workers)


@pytest.mark.slow
def test_loader_processes_that_are_not_forked_give_the_same_batches(shapes, monkeypatch):
    alone, ways = list(make_batches(shapes, 0)), []

    def open_loader(*rest, **more):
        ways.append(more["multiprocessing_context"])
        return torch.utils.data.DataLoader(*rest, **more)

    monkeypatch.setattr(loading, "DataLoader", open_loader)
    monkeypatch.setattr(compute, "can_fork", lambda: False)
    spawned = list(make_batches(shapes, 1))
    assert ways == ["spawn"] and len(alone) == len(spawned) == 2
    for mine, theirs in zip(alone, spawned, strict=True):
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(("system", "forks"), [("linux", True), ("darwin", False), ("win32", False)])
def test_processes_are_forked_where_that_is_sound(system, forks, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    assert compute.can_fork() is forks
    assert compute.Machine.here("cpu").can_fork is forks


def test_on_windows_a_folder_is_not_locked_but_a_file_is(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "win32")
    assert compute.open_to_lock(tmp_path) is None
    handle = compute.open_to_lock(tmp_path / "lock")
    assert handle is not None and (tmp_path / "lock").exists()


def test_on_windows_another_program_is_waited_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as left:
        compute.become([sys.executable, "-c", "import os; raise SystemExit(int(os.environ['CODE']))"], {"CODE": "7"})
    assert left.value.code == 7


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_memory_is_left_to_systems_that_are_not_glibc(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(compute.ctypes, "CDLL", lambda name: pytest.fail("a library of Linux was asked for"))
    compute.keep_freed_memory()
    compute.give_back_memory()
