"""What each peer does on a broken image, a wrong option, and kill -9 in mid-training.

    python benchmarks/peers/conduct.py [--peers fastai ...] [--trials broken misspelt killed]

Small trials on `ants_bees`, ten labelled images per class, 64 px, through the same scripts as `run.py`; each found
is a line of `WORK/conduct.jsonl`, found ones are not tried again without `--again`, and `results/peers-conduct.md`
is written from all of them.

`broken`: one more labelled file, a JPEG cut off in the middle, and one that is no image at all. `misspelt`: an
option that does not exist, in the place where a user sets the rate. `killed`: kill -9 of the process tree some
seconds after the first batch of a longer training; then the peer's own way to go on, where its page names one
(`RESUMES`), is taken in the same folder.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from cells import cell_folder, weights_folder
from environments import WORK
from run import BACKBONE, HERE, PEERS, Cell, last_words, peer_command, peer_variables, run_tree

PAGE = HERE.parent / "results" / "peers-conduct.md"
TRIALS = ("broken", "misspelt", "killed")
CELL = Cell("ants_bees", 10, 0, BACKBONE, 64, 1)
RESUMES = {
    "ours": "`finetune resume RUN`",
    "timm_advised": "`--resume last.pth.tar`",
    "autotimm": '`ckpt_path="last"` of Lightning',
    "transformers": "`resume_from_checkpoint=True`",
    "lightly": "`resume_interrupted=True`",
    "autogluon": "`MultiModalPredictor.load(path, resume=True)`",
}
"""Who has a way to go on after a kill. The others' pages name none for the training that is compared here."""
TRIED = ("ours", "sklearn", "fastai", "timm_advised", "autotimm", "transformers", "lightly", "autogluon", "keras")
LONG, SECONDS = 60, 900.0
WAIT = {"autogluon": 0.3}
"""How long a training goes on before it is killed, as a share of the time to its first batch; 1 where none is named."""


@dataclass(frozen=True)
class Tools:
    """Where things are."""

    work: Path
    shared: Path
    timm_source: Path

    @property
    def weights(self) -> Path:
        return weights_folder(BACKBONE, self.shared / "zoo", self.work)

    def variables(self, name: str) -> dict[str, str]:
        found = peer_variables(self.work, self.shared / "zoo", self.timm_source, 1)
        return found | ({} if PEERS[name].environment else {"PYTHONPATH": str(HERE.parents[1])})

    def fresh(self, name: str, trial: str) -> Path:
        out = self.work / "conduct" / f"{name}-{trial}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        return out


def broken_cell(tools: Tools) -> Path:
    """The cell, and in its first class a truncated JPEG and a text called one."""
    whole = cell_folder(CELL.set, CELL.per_class, CELL.seed, tools.shared, tools.work)
    folder = tools.work / "cells" / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    place = sorted(path for path in (folder / "train").iterdir())[0]
    data = sorted(place.iterdir())[0].read_bytes()
    (place / "zz_truncated.jpg").write_bytes(data[: len(data) // 2])
    (place / "zz_text.jpg").write_text("not an image", encoding="utf-8")
    return folder


def named(log: Path) -> str:
    """Which of the two broken files the log names."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [name for name in ("zz_truncated.jpg", "zz_text.jpg") if name in text]
    return f"names {' and '.join(found)}" if found else "names no file"


def try_broken(name: str, tools: Tools) -> str:
    out, folder = tools.fresh(name, "broken"), broken_cell(tools)
    command = peer_command(PEERS[name], CELL, folder, tools.weights, out, tools.work)
    spent = run_tree(command, out / "log.txt", tools.variables(name), SECONDS, 1)
    end = "trains on" if not spent.code else f"ends with {spent.code}: {last_words(out / 'log.txt')}"
    return f"{end}; {named(out / 'log.txt')}"


def try_misspelt(name: str, tools: Tools) -> str:
    out = tools.fresh(name, "misspelt")
    folder = cell_folder(CELL.set, CELL.per_class, CELL.seed, tools.shared, tools.work)
    command = [*peer_command(PEERS[name], CELL, folder, tools.weights, out, tools.work), "--misspelt"]
    spent = run_tree(command, out / "log.txt", tools.variables(name), SECONDS, 1)
    marks = json.loads((out / "marks.json").read_text()) if (out / "marks.json").exists() else {}
    when = "after the first batch" if "first_batch" in marks else "before any image"
    if not spent.code:
        return "trains on, the option without effect"
    return f"refused {when}: {last_words(out / 'log.txt')}"


def try_killed(name: str, tools: Tools) -> str:
    """Kill a training of many epochs, then go on in the same folder with the peer's own means."""
    if name not in RESUMES:
        return "its page names no way to go on: all is lost"
    out = tools.fresh(name, "killed")
    folder = cell_folder(CELL.set, CELL.per_class, CELL.seed, tools.shared, tools.work)
    longer = Cell(CELL.set, CELL.per_class, CELL.seed, BACKBONE, CELL.pixels, LONG)
    command = peer_command(PEERS[name], longer, folder, tools.weights, out, tools.work)
    if not kill_after_a_while(command, out, tools.variables(name), WAIT.get(name, 1.0)):
        return "not tried: it had ended, or had not begun, when it was to be killed"
    spent = run_tree([*command, "--resume"], out / "resumed.txt", tools.variables(name), SECONDS, 1)
    end = "goes on to its end" if not spent.code else f"ends with {spent.code}: {last_words(out / 'resumed.txt')}"
    return f"{RESUMES[name]}: {end}"


def kill_after_a_while(command: list[str], out: Path, variables: dict[str, str], share: float) -> bool:
    """Start, wait for the first batch and `share` of that time again, kill -9; whether it was in mid-training."""
    began = time.time()
    with (out / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**variables, "PEER_STARTED": str(began)},
        )
    seen = None
    while process.poll() is None and time.time() - began < SECONDS:
        if seen is None and (out / "marks.json").exists():
            seen = time.time()
        if seen is not None and time.time() - seen > share * (seen - began):
            break
        time.sleep(0.2)
    is_training = process.poll() is None and seen is not None
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return is_training


DO = {"broken": try_broken, "misspelt": try_misspelt, "killed": try_killed}


def write_page(found: dict[tuple[str, str], str], path: Path) -> None:
    """One row per peer, one column per trial."""
    lines = [
        "# What each does when something is wrong",
        "",
        "Written by `python benchmarks/peers/conduct.py`: `ants_bees`, ten labelled images per class, 64 px. `broken`:",
        "a truncated JPEG and a text called `.jpg` among the images; `misspelt`: an option that does not exist;",
        "`killed`: kill -9 in mid-training.",
        "",
        "| peer | broken | misspelt | killed |",
        "|---|---|---|---|",
    ]
    for name in TRIED:
        cells = [found.get((name, trial), "not tried yet") for trial in TRIALS]
        if any((name, trial) in found for trial in TRIALS):
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_found(path: Path) -> dict[tuple[str, str], str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {(row["peer"], row["trial"]): row["found"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=TRIED, default=list(TRIED))
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("FINETUNE_SHARED", HERE.parents[2] / "shared"))
    )
    parser.add_argument("--again", action="store_true", help="also what was found before; the newest finding counts")
    arguments = parser.parse_args()
    work, told = arguments.work.resolve(), arguments.work.resolve() / "conduct.jsonl"
    tools = Tools(work, arguments.shared.resolve(), work / "pytorch-image-models")
    for name in arguments.peers:
        for trial in arguments.trials:
            if arguments.again or (name, trial) not in read_found(told):
                from table import clean

                row = {"peer": name, "trial": trial, "found": clean(DO[trial](name, tools))}
                with told.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            write_page(read_found(told), PAGE)


if __name__ == "__main__":
    main()
