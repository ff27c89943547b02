"""Does the learning curve foretell what twice the labels give? Forecasts from n images a class, and what 2n gave.

    python benchmarks/curve.py measure [--shared ../shared] [--work benchmarks/curve] [--sets ...]   # resumable
    python benchmarks/curve.py cost    [--shared ../shared] [--work benchmarks/curve]
    python benchmarks/curve.py table                               # seconds; writes results/curve.md

A cell is a data set cut to n labelled images per class, and a seed; images are divided, and the probe is solved, as a
survey does by itself. Its forecast is compared with the probe of a survey of 2n images per class, the first n among
them, on images that neither saw: others of the training folder, which are like the labelled ones (at most 200 per
class), and those of test, which may not be. Features are those of one backbone at 96 px. A forecast covers where the
accuracy as it was measured lies in its interval; the measured images are finite, too, so a perfect one would sometimes
miss. `cost` surveys a few cells with an empty cache and tells the share of processor time that the curve took.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from advice import export_cifar
from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TABLE = RESULTS / "curve.csv"
SETS = ("ants_bees", "malaria", "flowers5", "sign_digits", "cifar10_20k")
PER_CLASS, SEEDS = (10, 20, 50, 100), (0, 1, 2)
BACKBONE, PIXELS, LIKE_PER_CLASS, TEST_PER_CLASS = "mobilenetv2_100.imagenet_keras", 96, 200, 250
COST_CELLS = (("ants_bees", 10), ("flowers5", 20), ("flowers5", 100), ("sign_digits", 100))
KEYS = ("set", "per_class", "seed")
FIELDS = (*KEYS, "num_train", "judged", "now", "twice", "low", "high", "exponent", "like_now", "like_twice",
          "num_like", "test_now", "test_twice", "num_test")  # fmt: skip


class Cell(NamedTuple):
    set: str
    per_class: int
    seed: int


def write_table(cell: Cell, beyond: int, shared: Path, work: Path) -> Path | None:
    """The first images of each class to train on, those after `beyond` and those of test to judge; None: too few."""
    root = shared / "data" / cell.set
    if next(root.glob("*.parquet"), None):
        if not (work / cell.set / "done").exists():
            export_cifar(root, work / cell.set)
        root = work / cell.set
    lines = ["image,label,split"]
    for role, key in (("train", str(cell.seed)), ("test", "test")):
        for folder in sorted(path for path in (root / role).iterdir() if path.is_dir()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            files.sort(key=lambda path: hashlib.blake2b(f"{key} {path.name}".encode()).digest())
            if role == "train" and len(files) < beyond:
                return None
            parts = [("test", files[:TEST_PER_CLASS])]
            if role == "train":
                parts = [("train", files[: cell.per_class]), ("test", files[beyond : beyond + LIKE_PER_CLASS])]
            lines += [f"{path.resolve()},{folder.name},{name}" for name, part in parts for path in part]
    table = work / "tables" / f"{cell.set}-{cell.per_class}-{beyond}-{cell.seed}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def look_at(table: Path, seed: int):
    import finetune as ft
    from finetune.features.survey import look

    wishes = [f"data.root={table}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}", f"seed={seed}"]
    wishes += ["data.split.calibration=0", "data.split.refit=false", "train.strategy=probe", "tracking.enabled=false"]
    return look(ft.load_recipe(None, wishes))


def judge(seen) -> dict[str, tuple[float, int]]:
    """Accuracy of a survey's probe, and on how many images: `like` the labelled ones, and of `test`."""
    right = seen.probe.logits(seen.features("test")).argmax(1) == seen.dataset.labels("test")
    places = [Path(seen.dataset.items[index].name).parent.parent.name for index in seen.dataset.indices("test")]
    found = {}
    for name, folder in (("like", "train"), ("test", "test")):
        own = [bool(hit) for hit, place in zip(right, places, strict=True) if place == folder]
        found[name] = (sum(own) / max(1, len(own)), len(own))
    return found


def measure(cells: Iterable[Cell], shared: Path, work: Path) -> None:
    """Append the row of every cell that has none and whose set has twice the images."""
    known = {tuple(row[key] for key in KEYS) for row in read_rows(TABLE)}
    for cell in cells:
        double = cell._replace(per_class=2 * cell.per_class)
        tables = [write_table(one, double.per_class, shared, work) for one in (cell, double)]
        if None in tables or tuple(map(str, cell)) in known:
            continue
        before, after = (look_at(table, cell.seed) for table in tables if table)
        now, then, curve = judge(before), judge(after), before.facts.learning_curve
        assert curve is not None
        if curve.twice is None or curve.now is None or curve.exponent is None:
            continue
        row = {
            **cell._asdict(), "num_train": curve.num_images, "judged": curve.judged,
            "now": f"{curve.now.value:.4f}", "twice": f"{curve.twice.value:.4f}", "low": f"{curve.twice.low:.4f}",
            "high": f"{curve.twice.high:.4f}", "exponent": f"{curve.exponent.value:.3f}",
        }  # fmt: skip
        for name in ("like", "test"):
            row |= {f"{name}_now": f"{now[name][0]:.4f}", f"{name}_twice": f"{then[name][0]:.4f}",
                    f"num_{name}": then[name][1]}  # fmt: skip
        append_row(TABLE, FIELDS, row)
        print(*row.values(), flush=True)


def cost(shared: Path, work: Path) -> None:
    """Processor time of a survey with an empty cache, and the share of it that the curve takes."""
    import torch

    import finetune as ft
    from finetune.features import measuring

    torch.set_num_threads(1)
    spent = []
    plain = measuring.measure_curve

    def timed(*args, **kwargs):
        began = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            spent.append(time.process_time() - began)

    measuring.measure_curve = timed
    lines = ["| set | per class | strategy | seconds of a survey | of the curve | share |", "|---|---|---|---|---|---|"]
    for (name, per_class), strategy in ((cell, s) for cell in COST_CELLS for s in ("probe", "null")):
        table = write_table(Cell(name, per_class, 0), per_class, shared, work)
        assert table is not None
        lines_kept = [line for line in table.read_text(encoding="utf-8").splitlines() if not line.endswith(",test")]
        table.write_text("\n".join(line.rpartition(",")[0] for line in lines_kept) + "\n", encoding="utf-8")
        with tempfile.TemporaryDirectory() as cache:
            os.environ["FINETUNE_CACHE"] = cache
            wishes = [f"data.root={table}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}",
                      f"train.strategy={strategy}"]  # fmt: skip
            began = time.process_time()
            ft.survey(ft.load_recipe(None, wishes))
            whole, own = time.process_time() - began, spent.pop()
        told = "the probe alone" if strategy == "probe" else "open"
        lines.append(f"| `{name}` | {per_class} | {told} | {whole:.1f} | {own:.2f} | {100 * own / whole:.1f} % |")
        print(lines[-1], flush=True)
    (RESULTS / "curve-cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """How often intervals covered and how far forecasts were off, in points, by images per class."""
    lines = [
        "| images per class | cells | told | covered, like the labelled | covered, test | width of the interval | "
        "accuracy off by | gain foretold | gain measured | gain off by | no gain off by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = [(str(size), [row for row in rows if row["per_class"] == str(size)]) for size in PER_CLASS]
    groups += [("all", list(rows)), ("all that are told", [row for row in rows if _is_told(row)])]
    for name, own in groups:
        if own:
            lines.append(f"| {name} | {' | '.join(_summary(own))} |")
    return "\n".join(lines)


def _is_told(row: dict[str, str]) -> bool:
    from finetune.features.learning_curve import WIDEST

    return float(row["high"]) - float(row["low"]) <= WIDEST


def _summary(rows: Sequence[dict[str, str]]) -> list[str]:
    def mean(values: Iterable[float]) -> float:
        return 100 * statistics.fmean(values)

    def covered(name: str) -> float:
        return mean(float(r["low"]) <= float(r[f"{name}_twice"]) <= float(r["high"]) for r in rows)

    off = mean(abs(float(r["twice"]) - float(r["like_twice"])) for r in rows)
    width = mean(float(r["high"]) - float(r["low"]) for r in rows)
    foretold = [float(r["twice"]) - float(r["now"]) for r in rows]
    measured = [float(r["like_twice"]) - float(r["like_now"]) for r in rows]
    missed = mean(abs(one - other) for one, other in zip(foretold, measured, strict=True))
    told = sum(map(_is_told, rows))
    return [str(len(rows)), str(told), f"{covered('like'):.0f} %", f"{covered('test'):.0f} %", f"{width:.1f}",
            f"{off:.1f}", f"{mean(foretold):+.1f}", f"{mean(measured):+.1f}", f"{missed:.1f}",
            f"{mean(map(abs, measured)):.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "cost", "table"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "curve")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--per-class", nargs="+", type=int, default=PER_CLASS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    if arguments.what == "measure":
        measure((Cell(name, size, seed) for name in arguments.sets for seed in arguments.seeds
                 for size in arguments.per_class), shared, work)  # fmt: skip
    elif arguments.what == "cost":
        cost(shared, work)
    else:
        table = table_of(read_rows(TABLE))
        print(table)
        (RESULTS / "curve.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
