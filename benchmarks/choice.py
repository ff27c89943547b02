"""Does `finetune zoo rank` pick the best backbone after fine-tuning? Every measure it shows, against what came of it.

    python benchmarks/choice.py measure [--shared ../shared] [--work benchmarks/choice] [--sets ...] [--per-class ...]
    python benchmarks/choice.py judge [--variants default_partial partial] [--lr 0.001] [--column top1]

A cell is a data set cut to so many labelled images per class, and a seed, as in `grid.py`. `measure` asks
`finetune zoo rank` about the six backbones of the shared zoo, each at its own size, and judges the probe of each on
test; a row for each backbone goes to `results/choice-measures.csv`, and cells that are there are not measured again.

`judge` takes seconds and writes `results/choice.md`. It joins the rows with the accuracy on test of one variant in
`results/grid.csv`: in each cell the one of `--variants` that most backbones have. Of each measure it tells the mean
rank correlation with that accuracy inside a cell, and the regret: the accuracy of the best backbone minus that of the
one with the highest measure (of equals their mean), in points, with an interval from drawing data sets with
replacement.
The accuracy of the probe on test stands beside fine-tuning, for all six backbones have it everywhere.
"""

import argparse
import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from advice import cell_table
from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TABLE, GRID = RESULTS / "choice-measures.csv", RESULTS / "grid.csv"
SETS = ("ants_bees", "malaria", "flowers5", "sign_digits", "cifar10_20k")
PER_CLASS, SEEDS = (10, 30, 100), (0,)
KEYS = ("set", "per_class", "seed")
FIELDS = (*KEYS, "backbone", "num_train", "num_test", "num_classes", "pixels", "place", "is_tied", "probe",
          "neighbours", "logme", "h_score", "leep", "nce", "source_top1", "milliseconds", "probe_top1",
          "probe_log_loss", "commit")  # fmt: skip
DRAWS = 10_000
LEAST = 2
"""Backbones of a cell whose choice can be judged; a correlation asks for one more."""


class Cell(NamedTuple):
    set: str
    per_class: int
    seed: int


class Measured(NamedTuple):
    """What is known of one backbone in one cell."""

    row: Mapping[str, str]
    accuracy: float
    """Of what the measures are asked to foretell, a share of the test images."""


Score = Callable[[Mapping[str, str]], float]


def _number(name: str) -> Score:
    return lambda row: float(row[name]) if row[name] else -1e9  # without the measure it is chosen last


MEASURES: dict[str, Score] = {
    "`zoo rank`": lambda row: -float(row["place"]),
    "probe": _number("probe"),
    "k-NN": _number("neighbours"),
    "LogME": _number("logme"),
    "H-score": _number("h_score"),
    "LEEP": _number("leep"),
    "NCE": _number("nce"),
    "ImageNet accuracy": _number("source_top1"),
}


def measure(cells: Sequence[Cell], shared: Path, work: Path) -> None:
    """Append the rows of every cell that has none."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    for cell in cells:
        known = {(row["set"], int(row["per_class"]), int(row["seed"])) for row in read_rows(TABLE)}
        if cell not in known:
            for row in measure_cell(cell, shared, work):
                append_row(TABLE, FIELDS, {**cell._asdict(), **row, "commit": commit})
            print(*cell, flush=True)


def measure_cell(cell: Cell, shared: Path, work: Path) -> list[dict[str, object]]:
    """A row for each backbone of the zoo."""
    import torch.nn.functional as F

    import finetune as ft
    from finetune.config.backbone_names import read_zoo
    from finetune.features.survey import look
    from finetune.model_selection.ranking import rank_backbones

    table = cell_table(cell.set, cell.per_class, cell.seed, shared, work)
    wishes = [f"data.root={table}", f"seed={cell.seed}", "data.split.val=0.167", "data.split.calibration=0",
              "data.split.refit=false", "train.strategy=probe", "tracking.enabled=false"]  # fmt: skip
    cards = {name: card for name, card in read_zoo().items() if (shared / "zoo" / name).is_dir()}
    ranking = rank_backbones(ft.load_recipe(None, wishes), cards)
    rows: list[dict[str, object]] = []
    for place, own in enumerate(ranking.rows, 1):
        seen = look(ft.load_recipe(None, [*wishes, f"backbone={own.name}"]))
        assert seen.probe is not None
        labels, logits = seen.dataset.labels("test"), seen.probe.logits(seen.features("test"))
        rows.append({
            "backbone": own.name, "num_train": ranking.num_images, "num_test": len(labels),
            "num_classes": len(ranking.classes), "pixels": own.image_size, "place": place,
            "is_tied": int(own.is_tied), "probe": f"{own.probe.value:.4f}", "neighbours": f"{own.neighbours.value:.4f}",
            "logme": f"{own.logme:.5f}", "h_score": f"{own.h_score:.5f}",
            "leep": "" if own.leep is None else f"{own.leep:.5f}", "nce": "" if own.nce is None else f"{own.nce:.5f}",
            "source_top1": "" if own.top1 is None else own.top1, "milliseconds": f"{own.milliseconds:.1f}",
            "probe_top1": f"{float((logits.argmax(1) == labels).double().mean()):.4f}",
            "probe_log_loss": f"{float(F.cross_entropy(logits, labels)):.4f}",
        })  # fmt: skip
    return rows


def probed() -> dict[Cell, list[Measured]]:
    """Each cell's backbones with the accuracy of their probes on test."""
    found: defaultdict[Cell, list[Measured]] = defaultdict(list)
    for row in read_rows(TABLE):
        cell = Cell(row["set"], int(row["per_class"]), int(row["seed"]))
        found[cell].append(Measured(row, float(row["probe_top1"])))
    return dict(found)


def trained(variants: Sequence[str], lr: str, column: str) -> dict[Cell, list[Measured]]:
    """Each cell's backbones with the accuracy after training, where at least two of them were trained."""
    accuracy: defaultdict[Cell, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(GRID):
        if row["variant"] in variants and float(row["lr"]) == float(lr) and row[column]:
            cell = Cell(row["set"], int(row["per_class"]), int(row["seed"]))
            accuracy[cell][row["variant"]][row["backbone"]] = float(row[column])
    found = {}
    for cell, backbones in probed().items():
        own = max((accuracy[cell][variant] for variant in variants), key=len)
        known = [one._replace(accuracy=own[name]) for one in backbones if (name := one.row["backbone"]) in own]
        if len(known) >= LEAST:
            found[cell] = known
    return found


def regret(known: Sequence[Measured], score: Score) -> float:
    """Points lost by taking the backbone with the highest score; of equals the mean."""
    scores = [score(one.row) for one in known]
    taken = [one.accuracy for one, own in zip(known, scores, strict=True) if own == max(scores)]
    return 100 * (max(one.accuracy for one in known) - sum(taken) / len(taken))


def correlations(known: Sequence[Measured], score: Score) -> tuple[float, float] | None:
    """Spearman's and Kendall's; 0 where the score ties all, None where the accuracies do or there are too few."""
    from scipy.stats import kendalltau, spearmanr

    scores, accuracies = [score(one.row) for one in known], [one.accuracy for one in known]
    if len(known) <= LEAST or len(set(accuracies)) == 1:
        return None
    if len(set(scores)) == 1:
        return 0.0, 0.0
    return float(spearmanr(scores, accuracies).statistic), float(kendalltau(scores, accuracies).statistic)


def interval(values: Mapping[Cell, float]) -> tuple[float, float]:
    """95 % of the mean over cells when data sets are drawn with replacement, each with all its cells."""
    sets = sorted({cell.set for cell in values})
    sums = np.array([[sum(v for c, v in values.items() if c.set == name), sum(c.set == name for c in values)]
                     for name in sets])  # fmt: skip
    drawn = sums[np.random.default_rng(0).integers(len(sets), size=(DRAWS, len(sets)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return float(low), float(high)


def table_of(cells: Mapping[Cell, Sequence[Measured]]) -> str:
    """A row per measure, the least regret first; then what taking always one backbone, or any, would cost."""
    names = sorted({one.row["backbone"] for known in cells.values() for one in known})
    always: dict[str, Score] = {
        f"always `{name}`": lambda row, name=name: float(row["backbone"] == name)  # type: ignore[misc]
        for name in names
        if all(any(one.row["backbone"] == name for one in known) for known in cells.values())
    }
    rules = {**MEASURES, **always, "any of them": lambda row: 0.0}
    rows = []
    for name, score in rules.items():
        lost = {cell: regret(known, score) for cell, known in cells.items()}
        agreed = [both for known in cells.values() if (both := correlations(known, score)) and name in MEASURES]
        told = [f"{sum(part) / len(agreed):+.2f}" for part in zip(*agreed, strict=True)] or ["–", "–"]
        mean, (low, high) = sum(lost.values()) / len(lost), interval(lost)
        best = sum(value == 0 for value in lost.values())
        line = (
            f"| {name} | {' | '.join(told)} | {mean:.2f} [{low:.2f}, {high:.2f}] | {max(lost.values()):.1f} | {best} |"
        )
        rows.append((name not in MEASURES, mean, line))
    head = ["| taken by | Spearman | Kendall | mean regret | worst | best taken |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(line for *_, line in sorted(rows))])


def _sizes(cells: Mapping[Cell, Sequence[Measured]]) -> str:
    counts = Counter(len(known) for known in cells.values())
    return ", ".join(f"{number} with {count} backbones" for count, number in sorted(counts.items(), reverse=True))


def judge(variants: Sequence[str], lr: str, column: str) -> str:
    """Both tables, and what they rest on."""
    parts = []
    for title, cells in (
        (
            f"Accuracy on test after training (`{column}` of {', '.join(variants)} at {lr})",
            trained(variants, lr, column),
        ),
        ("Accuracy of the probe on test", probed()),
    ):
        told = f"{len(cells)} cells: {_sizes(cells)}" if cells else "no cell has two backbones yet"
        parts += [f"{title}; {told}.", *([table_of(cells)] if cells else [])]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "judge"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "choice")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--per-class", nargs="+", type=int, default=PER_CLASS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--variants", nargs="+", default=["default_partial", "partial"], help="of grid.csv")
    parser.add_argument("--lr", default="0.001", help="the head's rate of the variant")
    parser.add_argument("--column", default="top1", help="such as wise75_top1, where that is what ships")
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    if arguments.what == "measure":
        cells = [Cell(name, size, seed) for seed in arguments.seeds for size in arguments.per_class
                 for name in arguments.sets]  # fmt: skip
        measure(cells, shared, work)
    else:
        text = judge(arguments.variants, arguments.lr, arguments.column)
        print(text)
        (RESULTS / "choice.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
