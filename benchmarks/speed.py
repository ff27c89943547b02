"""Speed as ratios within one run on one machine, whole processes each: nothing else may run meanwhile.

    python benchmarks/speed.py [--shared ../shared] [--only start|probe|train] [--rounds 3]

`start`: seconds until `--help`, the lists and the bare import answer. `probe`: a cold and a warm probe run
on flowers5 at 128 px against decoding and one forward pass in plain PyTorch (`bare.py probe`). `train`:
images per second of a full fine-tuning against the two loops of `bare.py train`. Rounds alternate
between the sides; the medians and the median ratio are printed and written to `results/speed.json`.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BACKBONE, PIXELS, PER_CLASS = "mobilenetv2_100.imagenet_keras", 128, 120


def run(words: list[str], **env: str) -> tuple[float, str]:
    """Wall seconds of the whole process, and its standard output."""
    began = time.perf_counter()
    done = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
    return time.perf_counter() - began, done.stdout


def finetune(*words: str, **env: str) -> tuple[float, str]:
    return run([sys.executable, "-m", "finetune", *words], **env)


def start(rounds: int) -> dict:
    seconds = {}
    for words in (["--help"], ["recipes", "list"], ["zoo", "list"]):
        seconds[" ".join(words)] = statistics.median(finetune(*words)[0] for _ in range(rounds + 2))
    nothing = [run([sys.executable, "-c", "pass"])[0] for _ in range(rounds + 2)]
    loaded = [run([sys.executable, "-c", "import finetune"])[0] for _ in range(rounds + 2)]
    seconds["import finetune"] = statistics.median(loaded) - statistics.median(nothing)
    return seconds


def probe(shared: Path, rounds: int) -> dict:
    data, card = shared / "data" / "flowers5", shared / "zoo" / BACKBONE
    words = [
        "train",
        "--json",
        f"data.root={data}",
        f"backbone={BACKBONE}",
        f"data.image_size={PIXELS}",
        "train.strategy=probe",
    ]
    sides: dict[str, list[float]] = {"cold": [], "warm": [], "bare": [], "bare_two_workers": []}
    with tempfile.TemporaryDirectory() as work:
        env = {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_RUNS": f"{work}/runs", "FINETUNE_CACHE": f"{work}/cache"}
        bare = [sys.executable, str(HERE / "bare.py"), "probe", str(data), str(card), str(PIXELS)]
        run(bare)  # the files are then in memory for every side
        for _ in range(rounds):
            shutil.rmtree(f"{work}/cache", ignore_errors=True)
            sides["cold"].append(finetune(*words, **env)[0])
            sides["warm"].append(finetune(*words, **env)[0])
            sides["bare"].append(json.loads(run(bare)[1])["seconds"])
            sides["bare_two_workers"].append(json.loads(run([*bare, "--workers", "2"])[1])["seconds"])
    found = {name: statistics.median(values) for name, values in sides.items()}
    best = min(found["bare"], found["bare_two_workers"])
    return {**found, "allowed_cold": 1.3 * best + 6, "cold_over_best_bare": found["cold"] / best}


def train(shared: Path, rounds: int) -> dict:
    data, card = shared / "data" / "flowers5" / "train", shared / "zoo" / BACKBONE
    sides: dict[str, list[float]] = {"finetune": [], "tuned": [], "default": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as work:
            env = {
                "FINETUNE_ZOO": str(shared / "zoo"),
                "FINETUNE_RUNS": f"{work}/runs",
                "FINETUNE_CACHE": f"{work}/cache",
            }
            _, answer = finetune(
                "train",
                "--json",
                f"data.root={data}",
                f"backbone={BACKBONE}",
                f"data.image_size={PIXELS}",
                f"data.max_train_per_class={PER_CLASS}",
                "train.strategy=full",
                "train.epochs=2",
                "augment.preset=light",
                "train.batch_norm=frozen",
                "data.invariances=[hflip]",
                **env,
            )
            with (Path(json.loads(answer)["run"]) / "curves.csv").open() as lines:
                rows = [row for row in csv.DictReader(lines) if row["name"] == "images_per_second"]
            sides["finetune"].append(float(rows[-1]["value"]))
        for side in ("tuned", "default"):
            words = [sys.executable, str(HERE / "bare.py"), "train", str(data), str(card), str(PIXELS), f"--{side}"]
            sides[side].append(json.loads(run([*words, "--per-class", str(PER_CLASS)])[1])["images_per_second"][-1])
    found = {name: statistics.median(values) for name, values in sides.items()}
    over = {
        side: statistics.median(a / b for a, b in zip(sides["finetune"], sides[side], strict=True))
        for side in ("tuned", "default")
    }
    return {**found, "over_tuned": over["tuned"], "over_default": over["default"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--only", choices=["start", "probe", "train"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    parts = {
        "start": lambda: start(arguments.rounds),
        "probe": lambda: probe(arguments.shared, arguments.rounds),
        "train": lambda: train(arguments.shared, arguments.rounds),
    }
    path = HERE / "results" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    for name in [arguments.only] if arguments.only else parts:
        found = {key: round(value, 3) for key, value in parts[name]().items()}
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: found}, indent=1) + "\n")
        print(name, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
