"""The grid at native resolution: every strategy and rate in cells of sets, sizes, backbones and seeds.

    python benchmarks/grid.py [--shared ../shared] [--work benchmarks/grid] [--processes 1] [--seconds 3600]
                              [--sets ...] [--per-class ...] [--backbones ...] [--seeds ...]
    python benchmarks/grid.py --similarity      # measures it again in every cell that has rows, and trains nothing

A cell is a data set cut to so many labelled images per class (a sixth of them for val), a backbone at its own size, and
a seed. In each the probe is solved once, and every variant of `VARIANTS` is trained at every rate of `RATES` from the
same split. A row holds accuracy, log loss and calibration error on test of the shipped weights, of the probe, of
the mean of both probabilities, and of weights between start and end (WiSE-FT, https://arxiv.org/abs/2109.01903) with a
share of the end of 0.5 (`wise_`) and 0.75 (`wise75_`); and val before training, after the first epoch, and at the end.
Rows are appended to `results/grid.csv` as they come and are not run again; probabilities of test and val are kept in
`--work`, one file a cell, for questions nobody asked yet.

The design: cells are visited so that each prefix covers all levels of every factor about evenly (`ordered_cells`), so a
stopped grid is a balanced one. The same script serves two cores and a GPU with many processes.
"""

import argparse
import copy
import multiprocessing
import os
import subprocess
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from advice import cell_table
from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "grid.csv"
SETS = ("flowers5", "sign_digits", "malaria", "cifar10_20k", "ants_bees")
PER_CLASS = (10, 30, 100, 0)
"""Labelled images per class; 0 stands for all."""
BACKBONES = ("mobilenetv2_100.imagenet_keras", "tf_efficientnet_lite0.imagenet", "mobilenetv2_100.inat_insect",
             "tf_efficientnet_lite2.imagenet")  # fmt: skip
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3)
VARIANTS = {
    "partial": ["train.strategy=partial", "head.init=probe"],
    "probe_then_full": ["train.strategy=full", "head.init=probe"],
    "norms": ["train.strategy=norm_only", "head.init=probe"],
    "full": ["train.strategy=full", "head.init=zero"],
    "partial_ema": ["train.strategy=partial", "head.init=probe", "train.averaging.kind=ema"],
    "full_w20": ["train.strategy=full", "head.init=probe", "train.schedule.warmup_fraction=0.2"],
    "full_w40": ["train.strategy=full", "head.init=probe", "train.schedule.warmup_fraction=0.4"],
    "full_smooth": ["train.strategy=full", "head.init=probe", "regularization.label_smoothing=0.1"],
    "full_medium": ["train.strategy=full", "head.init=probe", "augment.preset=medium"],
    "full_long": ["train.strategy=full", "head.init=probe"],
    "default_full": ["train.strategy=full", "augment.preset=null"],
    "default_partial": ["train.strategy=partial", "augment.preset=null"],
}
"""Overrides; augmentation is light where they do not say otherwise, and the planner's in the last two. `full_long` has
three times the epochs."""
BUDGET, EPOCHS = 8_000, (3, 20)
"""Training images seen in all, as many as a default run on a CPU; fewest and most epochs."""
MOST_JUDGED = 500
"""Images of test that are judged, about."""
KEYS = ("set", "backbone", "per_class", "seed")
FIELDS = (
    *KEYS, "variant", "lr", "num_train", "num_val", "num_test", "epochs", "steps", "pixels", "similarity", "depth",
    "top1", "log_loss", "ece", "probe_top1", "probe_log_loss", "probe_ece", "probe_left_out",
    "mean_top1", "mean_log_loss", "mean_ece", "wise_top1", "wise_log_loss", "wise_ece",
    "wise75_top1", "wise75_log_loss", "wise75_ece",
    "val_start", "val_first", "val_last", "val_loss_start", "val_loss_last", "train_last", "probe_val_loss",
    "seconds", "cpu_seconds", "device", "commit",
)  # fmt: skip


class Cell(NamedTuple):
    set: str
    backbone: str
    per_class: int
    seed: int


def ordered_cells(sets: list[str], backbones: list[str], sizes: list[int], seeds: list[int]) -> list[Cell]:
    """All cells, each prefix about even in every factor: a Latin walk, the backbone shifted by set and size."""
    cells = []
    for seed in seeds:
        for turn in range(len(backbones)):
            for s, size in enumerate(sizes):
                for d, name in enumerate(sets):
                    cells.append(Cell(name, backbones[(turn + s + d + seed) % len(backbones)], size, seed))
    return cells


def wishes_of(cell: Cell, shared: Path, work: Path) -> list[str]:
    table = cell_table(cell.set, cell.per_class or 10**6, cell.seed, shared, work)
    return [f"data.root={table}", f"backbone={cell.backbone}", f"seed={cell.seed}", "data.split.val=0.167",
            "data.split.calibration=0", "evaluate.calibrate=false", "tracking.enabled=false",
            "hardware.workers=0", *SETTINGS]  # fmt: skip


def run_cell(cell: Cell, wanted: list[tuple[str, float]], known: set[tuple[str, str]], shared: Path, work: Path,
             results: Path, commit: str) -> int:  # fmt: skip
    """Append a row for every `wanted` variant and rate of a cell that is not `known`; how many."""
    import numpy as np
    import torch

    import finetune as ft
    from finetune.features.survey import look
    from finetune.process import tune_process

    tune_process()
    wishes = wishes_of(cell, shared, work)
    seen = look(ft.load_recipe(None, [*wishes, "train.strategy=partial"]))
    num_train = len(seen.dataset.indices("train"))
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(BUDGET / num_train)))
    probe = {"test": _probe(seen, "test"), "val": _probe(seen, "val")}
    common = {**cell._asdict(), "num_train": num_train, "num_val": len(seen.dataset.indices("val")), "epochs": epochs,
              "num_test": len(probe["test"]), "commit": commit}  # fmt: skip
    kept: dict[str, np.ndarray] = {f"probe_{role}": rows.numpy().astype(np.float32) for role, rows in probe.items()}
    kept |= {f"labels_{role}": seen.dataset.labels(role)[_some(seen.dataset, role)].numpy() for role in ("test", "val")}
    count = 0
    for name, lr in wanted:
        if (name, f"{lr:g}") in known:
            continue
        more = [
            "augment.preset=light",
            *VARIANTS[name],
            f"train.optimizer.lr={lr}",
            f"train.epochs={epochs * (3 if name == 'full_long' else 1)}",
        ]
        recipe = ft.load_recipe(None, [*wishes, *more])
        row, arrays = run_variant(recipe, seen, probe)
        row = {**common, "epochs": epochs * (3 if name == "full_long" else 1), "variant": name, "lr": f"{lr:g}", **row}
        append_row(results, FIELDS, row)  # one short write, so that processes may share the file
        told = (*KEYS, "variant", "lr", "top1", "probe_top1", "log_loss", "probe_log_loss", "seconds")
        print(" ".join(str(row[key]) for key in told), flush=True)
        count += 1
        kept |= {f"{name}_{lr:g}_{part}": value for part, value in arrays.items()}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    folder = work / "probabilities"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / ("-".join(map(str, cell)) + f"-{os.getpid()}.npz"), **kept)
    return count


def measure_again(results: Path, shared: Path, work: Path) -> None:
    """Write the similarity that this version measures into the rows of every cell, and leave the rest as it is."""
    import finetune as ft
    from finetune.process import tune_process

    tune_process()
    rows = read_rows(results)
    cells = dict.fromkeys(Cell(row["set"], row["backbone"], int(row["per_class"]), int(row["seed"])) for row in rows)
    found = {}
    for cell in cells:
        facts = ft.survey(ft.load_recipe(None, [*wishes_of(cell, shared, work), "train.strategy=partial"]))
        found[cell] = f"{facts.similarity.value:.3f}"
        print(*cell, found[cell], flush=True)
    for row in rows:
        row["similarity"] = found[Cell(row["set"], row["backbone"], int(row["per_class"]), int(row["seed"]))]
    lines = [",".join(FIELDS), *(",".join(row[key] for key in FIELDS) for row in rows)]
    results.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_variant(recipe, seen, probe):
    """One training from the state that was surveyed: its row, and its probabilities."""
    import numpy as np
    import torch

    import finetune as ft
    from finetune.training.fit import fit
    from finetune.training.setup import make_batches, make_classifier
    from finetune.training.watching import Curves

    plan = ft.make_plan(recipe, seen.facts)
    weights = {"weight": seen.probe.weight.float(), "bias": seen.probe.bias.float()}
    began, cpu = time.perf_counter(), time.process_time()
    classifier = make_classifier(plan, copy.deepcopy(seen.backbone), weights, seen.facts.counts["train"])
    start = {key: value.detach().clone() for key, value in classifier.state_dict().items()}
    train, val = make_batches(plan, seen.dataset)
    with tempfile.TemporaryDirectory() as folder:
        here, curves = Path(folder), Curves(Path(folder) / "curves.csv")
        fit(plan, 0, classifier, train, val, here, curves, members=here, say=lambda _: None, notify=lambda: None)
        curve = {(row["name"], int(row["epoch"])): float(row["value"]) for row in curves.rows()}
    spent = time.perf_counter() - began, time.process_time() - cpu
    final = {role: answer(classifier, seen.dataset, role, plan) for role in ("test", "val")}
    end = {key: value.detach().cpu().clone() for key, value in classifier.state_dict().items()}
    wise = {}
    for share in (0.5, 0.75):
        mixed = {key: torch.lerp(start[key], value, share) if value.is_floating_point() else value
                 for key, value in end.items()}  # fmt: skip
        classifier.load_state_dict(mixed)
        wise["wise_" if share == 0.5 else "wise75_"] = answer(classifier, seen.dataset, "test", plan)
    labels = seen.dataset.labels("test")[_some(seen.dataset, "test")]
    mean = (final["test"] + probe["test"]) / 2
    judged = {"": final["test"], "probe_": probe["test"], "mean_": mean, **wise}
    row = {prefix + key: value for prefix, rows in judged.items() for key, value in _scores(rows, labels).items()}
    last = max(epoch for name, epoch in curve if name == "val/top1")
    facts = seen.facts
    row |= {
        "steps": len(train) * plan.stages[0].epochs, "pixels": plan.view.size_pixels,
        "similarity": f"{facts.similarity.value:.3f}", "depth": plan.stages[0].trainable_stages,
        "probe_left_out": f"{(facts.probe.left_out or facts.probe.val).value:.4f}",
        "probe_val_loss": f"{facts.probe.log_loss:.4f}",
        "val_start": f"{curve['val/top1', -1]:.4f}", "val_first": f"{curve['val/top1', 0]:.4f}",
        "val_last": f"{curve['val/top1', last]:.4f}", "val_loss_start": f"{curve['val/loss', -1]:.4f}",
        "val_loss_last": f"{curve['val/loss', last]:.4f}",
        "train_last": f"{curve.get(('train/top1', last), float('nan')):.4f}",
        "seconds": f"{spent[0]:.1f}", "cpu_seconds": f"{spent[1]:.1f}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    arrays = {f"final_{role}": rows.numpy().astype(np.float32) for role, rows in final.items()}
    arrays |= {f"{kind}test": rows.numpy().astype(np.float32) for kind, rows in wise.items()}
    return row, arrays


def answer(classifier, dataset, role, plan):
    """Probabilities (N, K) of the images of a role that are judged, in the centre view."""
    from finetune.inference.predict import predict_probabilities

    return predict_probabilities(classifier, dataset.store, dataset.indices(role)[_some(dataset, role)], plan, "center")


def _probe(seen, role):
    return seen.probe.logits(seen.features(role)).softmax(1).float()[_some(seen.dataset, role)]


def _some(dataset, role) -> slice:
    """Every image of a role or, of more than `MOST_JUDGED`, every second or third."""
    return slice(None, None, -(-len(dataset.indices(role)) // MOST_JUDGED) or 1)


def _scores(probabilities, labels) -> dict[str, str]:
    from finetune.metrics.classification import expected_calibration_error, log_loss

    top1 = float((probabilities.argmax(1) == labels).double().mean())
    ece = expected_calibration_error(probabilities, labels)
    return {"top1": f"{top1:.4f}", "log_loss": f"{log_loss(probabilities, labels):.4f}", "ece": f"{ece:.4f}"}


SETTINGS: list[str] = []
"""More overrides for every run, from the command line."""


def _begin(settings: list[str], threads: int) -> None:
    import torch

    SETTINGS[:] = settings
    torch.set_num_threads(threads)


def run_all(cells: list[Cell], arguments: argparse.Namespace, shared: Path, work: Path) -> None:
    """Cells in several processes, which append their rows; nothing new is begun after the time is up."""
    commit = arguments.commit or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    known: dict[Cell, set[tuple[str, str]]] = {}
    for row in read_rows(arguments.results):
        cell = Cell(row["set"], row["backbone"], int(row["per_class"]), int(row["seed"]))
        known.setdefault(cell, set()).add((row["variant"], row["lr"]))
    head = ",".join(FIELDS)
    if arguments.results.exists() and arguments.results.read_text(encoding="utf-8").partition("\n")[0] != head:
        raise SystemExit(f"{arguments.results} has other columns than this script writes; give another file.")
    if not arguments.results.exists():
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(head + "\n", encoding="utf-8")
    wanted = [(name, rate) for name in arguments.variants for rate in arguments.rates]
    asked = {(name, f"{rate:g}") for name, rate in wanted}
    waiting = iter([cell for cell in cells if asked - known.get(cell, set())])
    began, context = time.monotonic(), multiprocessing.get_context("spawn")
    running: dict[Future[int], Cell] = {}
    with ProcessPoolExecutor(
        arguments.processes, context, initializer=_begin, initargs=(arguments.settings, arguments.threads)
    ) as pool:
        while True:
            while len(running) < arguments.processes and time.monotonic() - began < arguments.seconds:
                cell = next(waiting, None)
                if cell is None:
                    break
                task = (cell, wanted, known.get(cell, set()), shared, work, arguments.results, commit)
                running[pool.submit(run_cell, *task)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                fault = future.exception()
                told = f"{type(fault).__name__}: {fault}" if fault else f"{future.result()} rows"
                print(f"{time.monotonic() - began:.0f} s, {' '.join(map(str, cell))}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "grid")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--commit", default="", help="where there is no git")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--per-class", nargs="+", type=int, default=PER_CLASS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--settings", nargs="*", default=[], help="overrides for every run, such as data.image_size=64")
    parser.add_argument("--similarity", action="store_true", help="only measure it again")
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    if arguments.similarity:
        measure_again(arguments.results, shared, work)
        return
    cells = ordered_cells(list(arguments.sets), list(arguments.backbones), arguments.per_class, arguments.seeds)
    run_all(cells, arguments, shared, work)


if __name__ == "__main__":
    main()
