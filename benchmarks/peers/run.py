r"""Peers and ours, each through its own front door: same images, weights, pixels and cores, one after the other.

    python benchmarks/peers/environments.py                       # once; gigabytes
    git clone --branch v1.0.28 https://github.com/huggingface/pytorch-image-models \
        benchmarks/peers/work/pytorch-image-models
    python benchmarks/peers/run.py --sets flowers5 --per-class 30 --seeds 0 1 2 [--peers fastai timm_advised ours]
    python benchmarks/peers/table.py                              # docs/peers.md

Every peer in `PEERS` has a script in `doors/` that says where its settings are advised, and an environment. Each is
a process tree of its own, held to `--cores` cores and as many threads; nothing else of this benchmark runs beside
it. A row is appended to `results/peers.csv` when a peer is done, and cells that have a row are left out, so a
stopped benchmark goes on; rows that failed are tried again with `--retry`, and ours whenever `finetune/` has
changed. `--quiet yes` says that nothing else ran on the machine: only then are its times told anywhere. Accuracy and
log loss are judged here, from the probabilities that a peer writes for the test files.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cells import cell_folder, weights_folder
from environments import WORK, python_of
from judge import AnswersError, judge, to_hex

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "peers.csv"
BACKBONE = "mobilenetv2_100.imagenet_keras"
SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")


@dataclass(frozen=True)
class Peer:
    """Which script, in which environment, with which of its variants. No environment: the one of this script."""

    script: str
    environment: str | None
    variant: str = ""


PEERS = {
    "ours": Peer("with_finetune", None, "defaults"),
    "ours_probe": Peer("with_finetune", None, "probe"),
    "sklearn": Peer("with_sklearn", "timm"),
    "fastai": Peer("with_fastai", "fastai"),
    "fastai_lr_find": Peer("with_fastai", "fastai", "lr_find"),
    "fastai_batch16": Peer("with_fastai", "fastai", "batch16"),
    "timm_shipped": Peer("with_timm", "timm", "shipped"),
    "timm_advised": Peer("with_timm", "timm", "advised"),
    "autotimm": Peer("with_autotimm", "autotimm"),
    "transformers": Peer("with_transformers", "transformers"),
    "transformers_raised": Peer("with_transformers", "transformers", "raised"),
    "lightly": Peer("with_lightly", "lightly"),
    "autogluon": Peer("with_autogluon", "autogluon"),
    "keras": Peer("with_keras", "keras"),
    "bit_rule_128": Peer("with_bit_rule", "timm", "batch128"),
    "bit_rule_32": Peer("with_bit_rule", "timm", "batch32"),
}
KEYS = ("set", "per_class", "seed", "backbone", "pixels", "epochs", "peer")
FIELDS = (
    *KEYS,
    "status",
    "top1",
    "top1_low",
    "top1_high",
    "log_loss",
    "log_loss_low",
    "log_loss_high",
    "num_train",
    "num_test",
    "fit_cpu_seconds",
    "cpu_seconds",
    "fit_seconds",
    "wall_seconds",
    "start_seconds",
    "peak_mb",
    "user_lines",
    "threads",
    "quiet",
    "versions",
    "commit",
    "note",
    "hits",
)


@dataclass(frozen=True)
class Cell:
    """One cell, and what all peers are told of it."""

    set: str
    per_class: int
    seed: int
    backbone: str
    pixels: int
    epochs: int | None

    def key(self, peer: str) -> tuple[str, ...]:
        """What names a row."""
        values = (self.set, self.per_class, self.seed, self.backbone, self.pixels, self.epochs or "advised", peer)
        return tuple(map(str, values))


@dataclass(frozen=True)
class Spent:
    """What a process tree took."""

    code: int
    """Its exit code; minus the signal that ended it."""
    was_stopped: bool
    wall_seconds: float
    cpu_seconds: float
    """User and system, of the process and of all its children that ended before it."""
    peak_mb: float
    """Resident, of the largest process."""


def run_tree(command: list[str], log: Path, environment: dict[str, str], seconds: float, cores: int) -> Spent:
    """Run a command and its children on `cores` cores, for `seconds` at most."""
    held = sorted(os.sched_getaffinity(0))[:cores]
    began = time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment, "PEER_STARTED": str(began)},
            start_new_session=True,
        )
    os.sched_setaffinity(process.pid, held)
    was_stopped, done = False, 0
    try:
        while not done:
            time.sleep(0.2)
            was_stopped = was_stopped or time.time() - began > seconds
            if was_stopped:
                os.killpg(process.pid, signal.SIGKILL)
            done, status, used = os.wait4(process.pid, os.WNOHANG)
    finally:
        with suppress(ProcessLookupError):  # children that outlived it, or all of them where this script is ended
            os.killpg(process.pid, signal.SIGKILL)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Spent(
        process.returncode, was_stopped, time.time() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    )


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that `finally` ends the peer too


def peer_variables(work: Path, zoo: Path, timm_source: Path, cores: int) -> dict[str, str]:
    """The environment of every peer: threads, no hub, and nothing of ours."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "FINETUNE_CACHE", "FINETUNE_RUNS", "MLFLOW_TRACKING_URI")
    plain = {key: value for key, value in os.environ.items() if key not in ours}
    threads = {
        key: str(cores)
        for key in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "TF_NUM_INTRAOP_THREADS",
            "TF_NUM_INTEROP_THREADS",
        )
    }
    return (
        plain
        | threads
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
            "MPLBACKEND": "Agg",
            "CUDA_VISIBLE_DEVICES": "",
            "FINETUNE_ZOO": str(zoo),
            "PEER_TIMM_SOURCE": str(timm_source),
            "PYTHONUNBUFFERED": "1",
        }
    )


def peer_command(peer: Peer, cell: Cell, folder: Path, weights: Path, out: Path, work: Path) -> list[str]:
    """The command line of one peer in one cell."""
    python = Path(sys.executable) if peer.environment is None else python_of(work, peer.environment)
    words = [
        python,
        HERE / "doors" / f"{peer.script}.py",
        folder,
        weights,
        out,
        "--pixels",
        cell.pixels,
        "--seed",
        cell.seed,
    ]
    words += ["--variant", peer.variant] if peer.variant else []
    words += ["--epochs", cell.epochs] if cell.epochs else []
    return [str(word) for word in words]


def user_lines(script: Path) -> int:
    """Lines between the marks of a peer's script, without blank ones and comments: what its user would write."""
    count, is_user = 0, False
    for line in script.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text in ("# user code", "# end of user code"):
            is_user = text == "# user code"
        elif is_user and text and not text.startswith("#"):
            count += 1
    return count


def last_words(log: Path) -> str:
    """The last line of a log that tells an error, or else the last that says something; shortened."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace")).replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip(" │╰╯╭╮─")]
    errors = [line for line in lines if re.match(r"([\w.]+(Error|Exception)|finetune|\S+: error)\b", line)]
    return (errors or lines or [""])[-1][:200]


def make_row(name: str, cell: Cell, folder: Path, out: Path, spent: Spent) -> dict[str, object]:
    """The row of one peer: its scores where it answered, what it took, or why not."""
    marks = json.loads((out / "marks.json").read_text()) if (out / "marks.json").exists() else {}
    row: dict[str, object] = dict(zip(KEYS, cell.key(name), strict=True)) | {
        "num_train": sum(path.is_file() for path in (folder / "train").rglob("*")),
        "cpu_seconds": f"{spent.cpu_seconds:.1f}",
        "wall_seconds": f"{spent.wall_seconds:.1f}",
        "peak_mb": f"{spent.peak_mb:.0f}",
        "fit_cpu_seconds": marks.get("fitted_cpu", ""),
        "fit_seconds": marks.get("fitted", ""),
        "start_seconds": marks.get("first_batch", ""),
        "user_lines": user_lines(HERE / "doors" / f"{PEERS[name].script}.py"),
        "versions": " ".join(f"{key}={value}" for key, value in marks.get("versions", {}).items()),
    }
    if spent.was_stopped or spent.code:
        return row | {"status": "stopped" if spent.was_stopped else "failed", "note": last_words(out / "log.txt")}
    try:
        found = judge(out / "answers.npz", folder / "test")
    except (AnswersError, OSError) as fault:
        return row | {"status": "failed", "note": str(fault)[:200]}
    return row | {
        "status": "ok",
        "num_test": found.top1.n,
        "hits": to_hex(found.hits),
        "top1": f"{found.top1.value:.4f}",
        "top1_low": f"{found.top1.low:.4f}",
        "top1_high": f"{found.top1.high:.4f}",
        "log_loss": f"{found.log_loss.value:.4f}",
        "log_loss_low": f"{found.log_loss.low:.4f}",
        "log_loss_high": f"{found.log_loss.high:.4f}",
    }


def missing(
    cells: list[Cell], peers: list[str], rows: list[dict[str, str]], retry: bool, commit: str
) -> list[tuple[Cell, str]]:
    """Which peers have no row yet, cell by cell; with `retry`, those whose last row is no score either.

    A row of ours is one only of this `commit` of ours; other peers stand still.
    """
    done = {
        tuple(row[key] for key in KEYS): row["status"]
        for row in rows
        if row["commit"] == commit or (row["peer"] in PEERS and PEERS[row["peer"]].environment is not None)
    }
    return [
        (cell, name)
        for cell in cells
        for name in peers
        if done.get(cell.key(name)) is None or (retry and done[cell.key(name)] != "ok")
    ]


def run_peer(name: str, cell: Cell, arguments: argparse.Namespace) -> dict[str, object]:
    """Run one peer in one cell and score it; of its folder, log and answers are kept."""
    work, zoo = arguments.work, arguments.shared / "zoo"
    folder = cell_folder(cell.set, cell.per_class, cell.seed, arguments.shared, work)
    weights = weights_folder(cell.backbone, zoo, work)
    out = work / "out" / "-".join(cell.key(name))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = peer_command(PEERS[name], cell, folder, weights, out, work)
    variables = peer_variables(work, zoo, arguments.timm_source, arguments.cores)
    if PEERS[name].environment is None:
        variables["PYTHONPATH"] = str(HERE.parents[1])
    spent = run_tree(command, out / "log.txt", variables, arguments.seconds, arguments.cores)
    row = make_row(name, cell, folder, out, spent)
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return row | {"threads": arguments.cores, "quiet": arguments.quiet, "commit": arguments.commit}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["flowers5", "ants_bees"])
    parser.add_argument("--per-class", nargs="+", type=int, default=[30])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", default=[BACKBONE])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--epochs", type=int, help="the same for all, to try the scripts; default: as each is advised")
    parser.add_argument("--seconds", type=float, default=7200.0, help="a peer that takes longer is stopped")
    parser.add_argument("--cores", type=int, default=1, help="cores and threads of each peer")
    parser.add_argument("--quiet", choices=["yes", "no"], default="no", help="whether the machine does nothing else")
    parser.add_argument("--retry", action="store_true", help="try again what failed or was stopped")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("FINETUNE_SHARED", HERE.parents[2] / "shared"))
    )
    parser.add_argument(
        "--timm-source", type=Path, help="clone of timm's repository; default: WORK/pytorch-image-models"
    )
    arguments = parser.parse_args()
    arguments.work, arguments.shared = arguments.work.resolve(), arguments.shared.resolve()
    arguments.timm_source = (arguments.timm_source or arguments.work / "pytorch-image-models").resolve()
    words = ["git", "log", "-1", "--format=%h", "--", "finetune"]  # ours may have changed when other files have not
    told = subprocess.run(words, cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    arguments.commit = told.stdout.strip()
    return arguments


def main() -> None:
    signal.signal(signal.SIGTERM, _leave)
    arguments = read_arguments()
    cells = [
        Cell(name, per_class, seed, backbone, arguments.pixels, arguments.epochs)
        for backbone in arguments.backbones
        for seed in arguments.seeds
        for per_class in arguments.per_class
        for name in arguments.sets
    ]
    for cell, name in missing(cells, arguments.peers, read_rows(arguments.results), arguments.retry, arguments.commit):
        row = run_peer(name, cell, arguments)
        append_row(arguments.results, FIELDS, row)
        told = {key: row.get(key) for key in ("set", "peer", "status", "top1", "log_loss", "cpu_seconds", "note")}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
