"""What a refit gives: the model that ends on train, val and calibration, against the one that was held out from them.

    python benchmarks/refit.py probe [--shared ../shared] [--work benchmarks/refit] [--pixels 224] [--seconds 3600]
                                     [--sets ...] [--per-class ...] [--backbones ...] [--seeds ...]
    python benchmarks/refit.py tuned --strategies partial ...       # trains; the same options
    python benchmarks/refit.py table                                # seconds: results/refit.md

A cell is a data set cut to so many labelled images per class, a backbone, and a seed; val and calibration are cut from
these by the default shares (15 and 10 %). Both models of a cell answer the same test images, which neither has seen.
Log loss is told as the network says it and as it is shipped, with the temperature that a run of its kind fits: to the
calibration images where they are 100 or more, and of a refit probe to out-of-fold answers. Rows are appended to
`results/refit.csv` as they come and not run again; features are kept in `--work`.

Intervals are over pairs of a set and a backbone, each the mean of its seeds: cells of one set share test images.
"""

import argparse
import os
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from advice import cell_table
from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "refit.csv"
SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")
PER_CLASS = (10, 30, 100, 300)
"""Labelled images per class at most: train, val and calibration together."""
BACKBONES = ("mobilenetv2_100.imagenet_keras", "tf_efficientnet_lite0.imagenet")
SEEDS = (0, 1, 2)
COVERAGE = 0.9
KEYS = ("set", "backbone", "per_class", "seed", "strategy")
SCORES = ("top1", "raw_log_loss", "log_loss", "ece", "temperature", "coverage", "set_size")
FIELDS = (
    *KEYS, "pixels", "num_train", "num_val", "num_calibration", "num_labelled", "num_test", "chosen_by",
    *(f"held_{name}" for name in SCORES), *(f"refit_{name}" for name in SCORES), "cpu_seconds", "commit",
)  # fmt: skip


class Cell(NamedTuple):
    set: str
    backbone: str
    per_class: int
    seed: int
    strategy: str


def recipe_of(cell: Cell, pixels: int, shared: Path, work: Path):
    import finetune as ft

    table = cell_table(cell.set, cell.per_class, cell.seed, shared, work)
    wishes = [f"data.root={table}", f"backbone={cell.backbone}", f"seed={cell.seed}", f"data.image_size={pixels}",
              f"train.strategy={cell.strategy}", "data.split.refit=true", "tracking.enabled=false",
              "hardware.workers=0"]  # fmt: skip
    return ft.load_recipe(None, wishes)


def run_cell(cell: Cell, pixels: int, shared: Path, work: Path, commit: str) -> dict[str, object]:
    """The row of a cell."""
    import finetune as ft
    from finetune.evaluation.held_out import role_fitting
    from finetune.features.survey import look

    began = time.process_time()
    recipe = recipe_of(cell, pixels, shared, work)
    seen = look(recipe)
    plan = ft.make_plan(recipe, seen.facts)
    judge = judge_probes if cell.strategy == "probe" else judge_tuned
    held, refit, fitting = judge(recipe, seen, plan, work)
    labels, before = seen.dataset.labels("test"), role_fitting(seen.dataset, held, None)
    counts = {f"num_{role}": len(seen.dataset.indices(role)) for role in ("train", "val", "calibration", "test")}
    return {
        **cell._asdict(), **counts, "pixels": pixels, "num_labelled": sum(seen.facts.labelled),
        "chosen_by": seen.facts.probe.chosen_by if seen.facts.probe else "", "commit": commit,
        **{f"held_{name}": value for name, value in scores(held["test"], labels, before).items()},
        **{f"refit_{name}": value for name, value in scores(refit["test"], labels, fitting).items()},
        "cpu_seconds": f"{time.process_time() - began:.1f}",
    }  # fmt: skip


def judge_probes(recipe, seen, plan, work):
    """What the probe before and after the refit says by role, and what a temperature of the latter is fitted to."""
    from finetune.evaluation.held_out import probe_fitting
    from finetune.features.answers import probe_answers

    held = probe_answers(seen, plan.model_copy(update={"probe_on": "train"}))
    refit = probe_answers(seen, plan)
    return held.by_role, refit.by_role, probe_fitting(seen.dataset, plan, refit)


def judge_tuned(recipe, seen, plan, work):
    """The same of a network, whose refit is judged by the temperature of the one before."""
    import finetune as ft
    from finetune.evaluation.held_out import role_fitting
    from finetune.inference.loading import load_final, load_held_out
    from finetune.inference.predict import predict_probabilities

    run = ft.train(recipe, runs=work / "runs", say=lambda text: None)
    held, refit = (
        {role: predict_probabilities(load(run), seen.dataset.store, seen.dataset.indices(role), run.plan, "center")
         for role in ("val", "test", "calibration")}
        for load in (load_held_out, load_final)
    )  # fmt: skip
    shutil.rmtree(run.path)
    return held, refit, role_fitting(seen.dataset, held, None)


def scores(answers, labels, fitting) -> dict[str, str]:
    """Of one model on test, raw and at the temperature of `fitting`."""
    from finetune.inference.predict import temper
    from finetune.metrics.calibration import fit_temperature, log_probabilities
    from finetune.metrics.classification import expected_calibration_error, log_loss
    from finetune.metrics.conformal import fit_threshold, prediction_set
    from finetune.planning.planner import LEAST_CALIBRATION

    temperature, threshold = 1.0, 1.0
    if len(fitting.labels) >= LEAST_CALIBRATION:
        temperature = fit_temperature(log_probabilities(fitting.probabilities), fitting.labels).value or 1.0
    if len(fitting.labels):
        threshold = fit_threshold(fitting.probabilities, fitting.labels, COVERAGE)
    sets = prediction_set(answers, threshold)
    shipped = temper(answers, temperature)
    found = {
        "top1": float((answers.argmax(1) == labels).double().mean()),
        "raw_log_loss": log_loss(answers, labels),
        "log_loss": log_loss(shipped, labels),
        "ece": expected_calibration_error(shipped, labels),
        "temperature": temperature,
        "coverage": float(sets.gather(1, labels[:, None]).double().mean()),
        "set_size": float(sets.sum(1).double().mean()),
    }
    return {name: f"{value:.4f}" for name, value in found.items()}


def run_all(cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Append the rows that are not there; nothing new is begun after the time is up."""
    import torch

    from finetune.errors import RunError
    from finetune.process import tune_process

    tune_process()
    torch.set_num_threads(arguments.threads)
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    key = (*KEYS, "pixels")
    known, began = {tuple(row[name] for name in key) for row in read_rows(arguments.results)}, time.monotonic()
    for cell in cells:
        if (*map(str, cell), str(arguments.pixels)) in known or time.monotonic() - began > arguments.seconds:
            continue
        try:
            row = run_cell(cell, arguments.pixels, shared, work, commit)
        except RunError as fault:  # a training that diverges ships nothing, refit or not
            print(*cell, fault, flush=True)
            continue
        append_row(arguments.results, FIELDS, row)
        print(*cell, *(row[f"{kind}_{name}"] for name in ("top1", "log_loss") for kind in ("held", "refit")),
              row["cpu_seconds"], flush=True)  # fmt: skip


def table(results: Path) -> str:
    """Refit minus held out by strategy and labelled images per class."""
    lines = [
        "| model | labelled per class | labelled images | val images | pairs, cells | held out, % | refit, points | "
        "log loss, raw | log loss, shipped | sets hold the true class of, %: held out, refit | classes in a set |",
        "|---" * 11 + "|",
    ]
    groups: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(results):
        groups[row["strategy"], int(row["per_class"])].append(row)
    for (strategy, per_class), rows in sorted(groups.items(), key=lambda item: (item[0][0] != "probe", *item[0])):
        labelled, val = ([int(row[f"num_{name}"]) for row in rows] for name in ("labelled", "val"))
        pairs = {(row["set"], row["backbone"]) for row in rows}
        cover, size = ([mean(float(row[f"{kind}_{name}"]) for row in rows) for kind in ("held", "refit")]
                       for name in ("coverage", "set_size"))  # fmt: skip
        lines.append(
            f"| {strategy} | {per_class} | {min(labelled):,} to {max(labelled):,} | {min(val)} to {max(val)} | "
            f"{len(pairs)}, {len(rows)} | {100 * mean(float(row['held_top1']) for row in rows):.1f} | "
            f"{gap(rows, 'top1', 100, 2)} | {gap(rows, 'raw_log_loss', 1, 4)} | {gap(rows, 'log_loss', 1, 4)} | "
            f"{100 * cover[0]:.1f}, {100 * cover[1]:.1f} | {size[0]:.2f}, {size[1]:.2f} |"
        )
    return "\n".join(lines)


def gap(rows: list[dict[str, str]], name: str, scale: float, digits: int) -> str:
    """The mean difference over pairs of a set and a backbone, with its 95 % interval."""
    from finetune.metrics.significance import aggregate_seeds

    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        pairs[row["set"], row["backbone"]].append(scale * (float(row[f"refit_{name}"]) - float(row[f"held_{name}"])))
    found = aggregate_seeds([mean(gaps) for gaps in pairs.values()])
    interval = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["probe", "tuned", "table"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "refit")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--per-class", nargs="+", type=int, default=PER_CLASS)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--strategies", nargs="+", default=["partial"], help="of `tuned`")
    arguments = parser.parse_args()
    if arguments.what != "table":
        strategies = ["probe"] if arguments.what == "probe" else arguments.strategies
        run_all([Cell(name, backbone, size, seed, strategy) for seed in arguments.seeds
                 for backbone in arguments.backbones for size in arguments.per_class for name in arguments.sets
                 for strategy in strategies], arguments)  # fmt: skip
    if arguments.results.exists():
        text = table(arguments.results)
        arguments.results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
