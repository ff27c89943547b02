"""Regret of the advisor: every strategy run in every cell, and what the advisor would have chosen there.

    python benchmarks/advice.py train [--shared ../shared] [--work benchmarks/advice]     # hours; resumable
    python benchmarks/advice.py measure                                                   # minutes
    python benchmarks/regret.py                                                           # seconds

A cell is a data set cut to so many labelled images per class, a backbone, and a seed (of the cut, the split, the order
and the augmentation). `train` runs each strategy in each cell with an equal budget of training images and appends a row
to `zoo/results.csv`; rows that are there are not run again. `measure` writes the facts of each cell to
`zoo/measures.csv`; `regret.py` fits the advisor's rules to both and says what following them costs.

Sized for one thread of a small machine: 64 px, at most 400 images per class, at most 10,000 training images per run.
Cost is processor time, not time on the wall, so that other work on the machine does not count.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "zoo" / "results.csv"
SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")
BACKBONES = ("mobilenetv2_100.imagenet_keras", "mobilenetv2_100.inat_insect")
PER_CLASS = (5, 20, 50, 400)
SEEDS = (0, 1, 2)
PIXELS, TEST_PER_CLASS, BUDGET, EPOCHS = 64, 250, 10_000, (3, 20)
STRATEGIES = {
    "top_third": ["train.strategy=partial", "train.depth=3", "head.init=probe", "train.optimizer.backbone_lr_ratio=1"],
    "partial": ["train.strategy=partial", "head.init=probe"],
    "full": ["train.strategy=full", "head.init=zero"],
    "probe_then_full": ["train.strategy=full", "head.init=probe"],
}
"""The probe itself is scored in every one of these runs. Of eight stages, `partial` trains six, at half the head's
rate."""
FIELDS = ("set", "backbone", "per_class", "seed", "strategy", "num_train", "epochs", "top1", "num_test", "cpu_seconds",
          "pixels", "commit")  # fmt: skip


def export_cifar(source: Path, target: Path) -> None:
    """The parquet set as PNG files, bytes as they are, so that a table can name them."""
    from finetune.data.sources import open_source, read_bytes

    found = open_source(source)
    for item in found.items:
        path = target / str(item.role) / found.classes[item.label] / f"{item.name.replace('#', '-')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(item))
    (target / "done").touch()


def cell_table(name: str, per_class: int, seed: int, shared: Path, work: Path) -> Path:
    """A table of `per_class` training images per class, nested in larger ones of the same seed, and the test images."""
    root = shared / "data" / name
    if next(root.glob("*.parquet"), None) or not (root / "train").is_dir():
        if not (work / name / "done").exists():
            export_cifar(root, work / name)
        root = work / name
    lines = ["image,label,split"]
    for role, limit, key in (("train", per_class, f"{seed}"), ("test", TEST_PER_CLASS, "test")):
        for folder in sorted(path for path in (root / role).iterdir() if path.is_dir()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            files.sort(key=lambda path: hashlib.blake2b(f"{key} {path.name}".encode()).digest())
            lines += [f"{path.resolve()},{folder.name},{role}" for path in files[:limit]]
    table = work / "cells" / f"{name}-{per_class}-{seed}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def cell_recipe(name: str, backbone: str, per_class: int, seed: int, shared: Path, work: Path, more: list[str]):
    import finetune as ft

    table = cell_table(name, per_class, seed, shared, work)
    wishes = [f"data.root={table}", f"backbone={backbone}", f"data.image_size={PIXELS}", f"seed={seed}"]
    wishes += ["data.split.calibration=0", "evaluate.calibrate=false", "tracking.enabled=false", *more]
    return ft.load_recipe(None, wishes)


def cells() -> list[tuple[str, str, int, int]]:
    return [(name, backbone, per_class, seed) for backbone in BACKBONES for seed in SEEDS for per_class in PER_CLASS
            for name in SETS]  # fmt: skip


def train_cell(cell: tuple[str, str, int, int], strategy: str, shared: Path, work: Path, commit: str) -> None:
    import finetune as ft

    name, backbone, per_class, seed = cell
    classes = sum(path.is_dir() for path in (shared / "data" / name / "train").iterdir()) if name != SETS[4] else 10
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(BUDGET / (0.85 * per_class * classes))))
    more = [*STRATEGIES[strategy], f"train.epochs={epochs}", *SETTINGS]
    recipe = cell_recipe(name, backbone, per_class, seed, shared, work, more)
    ft.survey(recipe)  # so that no strategy pays alone for features that all of a cell share
    began = time.process_time()
    run = ft.train(recipe, runs=work / "runs", say=lambda text: None)
    scores, facts = run.read_json("scores.json"), run.read_json("facts.json")
    spent = time.process_time() - began
    common = dict(zip(FIELDS[:4], cell, strict=True)) | {
        "num_train": sum(facts["counts"]["train"]), "pixels": PIXELS, "commit": commit}  # fmt: skip
    survey = sum(facts["seconds"].values())
    done = {(row["set"], row["backbone"], int(row["per_class"]), int(row["seed"])) for row in read_rows(RESULTS)
            if row["strategy"] == "probe"}  # fmt: skip
    pairs = [(strategy, scores["test"], epochs, spent)]
    if cell not in done:
        pairs.append(("probe", scores["probe"]["test"], 0, survey))
    for label, part, count, seconds in pairs:
        top1 = part["top1"]
        row = {"strategy": label, "epochs": count, "top1": f"{top1['value']:.4f}", "num_test": top1["n"]}
        append_row(RESULTS, FIELDS, {**common, **row, "cpu_seconds": f"{seconds:.1f}"})
    found = {label: part["top1"]["value"] for label, part, _, _ in pairs}
    print(json.dumps({"cell": cell, "top1": found, "cpu_seconds": round(spent, 1)}), flush=True)
    shutil.rmtree(run.path)


MEASURES = ("num_classes", "num_train", "train_per_class", "probe", "probe_low", "knn", "top_ridge", "lead",
            "lead_error", "best_share", "control", "shift", "early_shift", "effective", "confidence")  # fmt: skip


def measure_all(shared: Path, work: Path) -> None:
    """The Facts of every cell that was trained, flat, into `zoo/measures.csv`; rows that are there are kept."""
    import finetune as ft
    from finetune.recipe.advice import early_shift

    table = RESULTS.with_name("measures.csv")
    known = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
    done = {tuple(row[key] for key in FIELDS[:4]) for row in known}
    for cell in sorted({tuple(row[key] for key in FIELDS[:4]) for row in read_rows(RESULTS)} - done):
        name, backbone, per_class, seed = cell
        facts = ft.survey(cell_recipe(name, backbone, int(per_class), int(seed), shared, work, []))
        profile, similar = facts.profile, facts.similarity
        assert profile and similar and facts.probe and facts.knn
        shift = [part.mean.value for part in similar.shift]
        probe, knn = facts.probe.left_out or facts.probe.val, facts.knn.left_out or facts.knn.val
        response = similar.response
        values = (len(facts.classes), sum(facts.counts["train"]), facts.images_per_class.median, probe.value, probe.low,
                  knn.value, profile.depths[-1].ridge.value, profile.lead, profile.lead_error,
                  profile.best / (len(profile.depths) - 1), similar.control and similar.control.value,
                  sum(shift) / len(shift), early_shift([part.mean for part in similar.shift]),
                  response and response.effective.value, response and response.confidence.value)  # fmt: skip
        is_new = not table.exists()
        with table.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow([*FIELDS[:4], *MEASURES])
            writer.writerow([*cell, *(f"{value:.5g}" for value in values)])


SETTINGS = ["augment.preset=light"]
"""The same in every run, so that strategies differ in nothing else."""


def train_all(shared: Path, work: Path, backbones: list[str]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    for cell in (cell for cell in cells() if cell[1] in backbones):
        for strategy in STRATEGIES:
            done = {
                (r["set"], r["backbone"], int(r["per_class"]), int(r["seed"]), r["strategy"])
                for r in read_rows(RESULTS)
            }
            if (*cell, strategy) not in done:
                train_cell(cell, strategy, shared, work, commit.stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "advice")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES, help="for one process each")
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    if arguments.what == "train":
        train_all(shared, work, arguments.backbones)
    else:
        measure_all(shared, work)


if __name__ == "__main__":
    main()
