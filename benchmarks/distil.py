"""An ensemble taught to one network, against the control that is usually forgotten: as many epochs on labels alone.

    python benchmarks/distil.py run [--shared ../shared]     # about an hour on one thread; resumable
    python benchmarks/distil.py table                        # seconds; writes results/distil.md

Three times over, each with seeds of its own: three `single` runs, the `ensemble` that averages their answers, a
`student` of it with twice the epochs of one run, and as `control` a run with as many epochs and no teacher. Full
fine-tuning from the probe, everything else as the planner decides it, 64 px, at most 50 labelled images per class, the
same test images throughout (`data.split.seed`). Scores are those of `scores.json`, after the temperature.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "distil.csv"
BACKBONE, PIXELS, PER_CLASS = "mobilenetv2_100.imagenet_keras", 64, 50
SETS, TIMES, MEMBERS, EPOCHS = ("sign_digits", "flowers5"), 3, 3, 15
FIELDS = ("set", "time", "variant", "seed", "epochs", "networks", "top1", "log_loss", "num_test", "seconds", "commit")
VARIANTS = {
    "single": "one run",
    "ensemble": f"average of {MEMBERS} runs",
    "student": "student of the average, twice the epochs",
    "control": "one run, twice the epochs",
}


class Series:
    """All runs of one set and one time: begun, gone on with, or found finished."""

    def __init__(self, name: str, time: int, arguments: argparse.Namespace) -> None:
        self.name, self.time, self.epochs = name, time, arguments.epochs
        self.folder = arguments.work / "runs" / f"{name}-{time}"
        self.results = arguments.results
        self.common = [f"data.root={arguments.shared / 'data' / name}", f"backbone={BACKBONE}"]
        self.common += [f"data.image_size={PIXELS}", f"data.max_train_per_class={PER_CLASS}", "data.split.seed=0"]
        self.common += ["train.strategy=full", "train.checkpoint=last", "tracking.enabled=false"]

    def is_known(self, variant: str, seed: int) -> bool:
        wanted = (self.name, str(self.time), variant, str(seed))
        return any(tuple(row[key] for key in FIELDS[:4]) == wanted for row in read_rows(self.results))

    def train(self, variant: str, seed: int, epochs: int, *wishes: str):
        """The finished run of one variant and seed, wherever an earlier process left it."""
        import finetune as ft

        runs = self.folder / f"{variant}-{seed}"
        begun = sorted(path for path in runs.glob("*") if (path / "recipe.yaml").exists())
        if begun and (begun[0] / "scores.json").exists():
            return ft.Run.open(begun[0])
        if begun:
            return ft.resume(begun[0], say=lambda text: None)
        recipe = ft.load_recipe(None, [*self.common, f"seed={seed}", f"train.epochs={epochs}", *wishes])
        return ft.train(recipe, runs=runs, say=lambda text: None)

    def average(self, members: list):
        from finetune.ensembling import ensemble
        from finetune.runs.folder import RunFolder

        runs = self.folder / "ensemble"
        done = sorted(path.parent for path in runs.glob("*/scores.json"))
        if done:
            return RunFolder.open(done[0])
        shutil.rmtree(runs, ignore_errors=True)  # half of one, which nothing goes on with
        return ensemble([member.path for member in members], runs=runs, say=lambda text: None)

    def write(self, variant: str, seed: int, epochs: int, networks: int, run) -> None:
        if self.is_known(variant, seed):
            return
        test = run.read_json("scores.json")["test"]
        row = {
            "set": self.name,
            "time": self.time,
            "variant": variant,
            "seed": seed,
            "epochs": epochs,
            "networks": networks,
            "top1": f"{test['top1']['value']:.4f}",
            "log_loss": f"{test['log_loss']['value']:.4f}",
            "num_test": test["top1"]["n"],
            "seconds": run.read_json("environment.json")["seconds"].get("training", ""),
            "commit": _commit(),
        }
        append_row(self.results, FIELDS, row)
        print(json.dumps(row), flush=True)

    def walk(self) -> None:
        seeds = [MEMBERS * self.time + number for number in range(MEMBERS)]
        if self.is_known("control", seeds[0]):
            return
        singles = []
        for seed in seeds:
            singles.append(self.train("single", seed, self.epochs))
            self.write("single", seed, self.epochs, 1, singles[-1])
        average = self.average(singles)
        self.write("ensemble", seeds[0], self.epochs, MEMBERS, average)
        teacher = f"train.distillation.teacher={average.path}"
        for variant, wishes in (("student", [teacher]), ("control", [])):
            run = self.train(variant, seeds[0], 2 * self.epochs, *wishes)
            self.write(variant, seeds[0], 2 * self.epochs, 1, run)
        shutil.rmtree(self.folder)


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def run_all(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"FINETUNE_ZOO": str(arguments.shared / "zoo"), "FINETUNE_CACHE": str(arguments.work / "cache")}
    for time in range(arguments.times):
        for name in arguments.sets:
            Series(name, time, arguments).walk()


def table(results: Path) -> str:
    found: defaultdict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(results):
        found[row["set"], row["variant"]].append(row)
    sets = [name for name in SETS if any(key[0] == name for key in found)]
    lines = [f"| | networks at test | {' | '.join(f'`{name}`' for name in sets)} |", "|---" * (len(sets) + 2) + "|"]
    for variant, words in VARIANTS.items():
        cells = [_cell(found[name, variant]) for name in sets]
        lines.append(f"| {words} | {MEMBERS if variant == 'ensemble' else 1} | {' | '.join(cells)} |")
    for other in ("control", "ensemble"):
        cells = [_difference(found[name, "student"], found[name, other]) for name in sets]
        lines.append(f"| student minus {other} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, str]]) -> str:
    """Mean and deviation of top-1 in %, and the mean log loss."""
    if not rows:
        return ""
    top1 = [100 * float(row["top1"]) for row in rows]
    return f"{_spread(top1)} ({statistics.mean(float(row['log_loss']) for row in rows):.3f})"


def _difference(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> str:
    """Mean and deviation over the times, in points of top-1, and the mean difference of log losses."""
    by_time = {row["time"]: row for row in theirs}
    pairs = [(row, by_time[row["time"]]) for row in ours if row["time"] in by_time]
    if not pairs:
        return ""
    points = [100 * (float(one["top1"]) - float(other["top1"])) for one, other in pairs]
    losses = [float(one["log_loss"]) - float(other["log_loss"]) for one, other in pairs]
    return f"{_spread(points, '+')} ({statistics.mean(losses):+.3f})"


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "distil")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    arguments.shared, arguments.work = arguments.shared.resolve(), arguments.work.resolve()
    if arguments.what == "run":
        run_all(arguments)
    text = table(arguments.results)
    arguments.results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
