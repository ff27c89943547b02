"""What should ship: the end of a training, its mean with the probe, or weights between start and end.

    python benchmarks/ships.py [--work benchmarks/grid]      # seconds; writes results/ships.md

From the rows of `results/grid.csv` at the default rate, in two groups: augmented as a default run is (`default_full`,
`default_partial`), and lightly (`partial`, `probe_then_full`, most of them on a GPU, without 0.75): points of accuracy
and log loss on test minus those of the probe in the same cell, means over cells with 95 % intervals (t of the
cells, for two strategies in one cell are averaged first). The last column counts the trainings that are clearly worse
than their probe: the 95 % interval of the paired difference on the same test images lies below zero. It needs the
probabilities that `grid.py` keeps in `--work`.
"""

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from rows import read_rows
from scipy.stats import t

from finetune.metrics.intervals import paired_difference

HERE = Path(__file__).resolve().parent
GRID, TABLE = HERE / "results" / "grid.csv", HERE / "results" / "ships.md"
WAYS = {"": "the end of the training", "mean_": "mean of its and the probe's probabilities",
        "wise_": "weights, half of the end", "wise75_": "weights, three quarters of the end"}  # fmt: skip
ARRAYS = {"": "final_test", "wise_": "wise_test", "wise75_": "wise75_test"}
KEYS = ("set", "backbone", "per_class", "seed")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and how far its 95 % interval reaches."""
    reach = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(reach)


def by_cell(rows: list[dict[str, str]], key: str, of: str) -> list[float]:
    """One difference for each cell: `key` of one way minus that of `of`, the mean of its strategies."""
    found: defaultdict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in KEYS)].append(float(row[key]) - float(row[of]))
    return [statistics.mean(values) for values in found.values()]


def clearly_worse(work: Path, rows: list[dict[str, str]], way: str) -> str:
    """How many trainings lie below their probe by more than chance explains, of how many."""
    worse = seen = 0
    for row in rows:
        for path in (work / "probabilities").glob("-".join(row[name] for name in KEYS) + "-*.npz"):
            kept, name = np.load(path), f"{row['variant']}_{row['lr']}_"
            if f"{name}final_test" not in kept or len(kept["labels_test"]) != int(row["num_test"]):
                continue
            labels, probe = kept["labels_test"], kept["probe_test"]
            said = (kept[f"{name}final_test"] + probe) / 2 if way == "mean_" else kept[name + ARRAYS[way]]
            ours, theirs = said.argmax(1) == labels, probe.argmax(1) == labels
            if abs(float(ours.mean()) - float(row[f"{way}top1"])) > 1e-3:
                continue  # of another version
            gap = paired_difference(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(labels))
            worse, seen = worse + (gap.high < 0), seen + 1
            break
    return f"{worse} of {seen}" if seen else "–"


def table(rows: list[dict[str, str]], ways: list[str], chosen: str, work: Path) -> str:
    """Each way against the probe, and the chosen one against the others."""
    cells = {tuple(row[name] for name in KEYS) for row in rows}
    lines = ["| what ships | points above the probe | log loss above the probe | clearly worse than it |",
             "|---|---|---|---|"]  # fmt: skip

    def told(way: str, of: str) -> str:
        gain, loss = (interval(by_cell(rows, f"{way}{key}", f"{of}{key}")) for key in ("top1", "log_loss"))
        return f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f} | {loss[0]:+.3f} ± {loss[1]:.3f}"

    for way in ways:
        lines.append(f"| {WAYS[way]} | {told(way, 'probe_')} | {clearly_worse(work, rows, way)} |")
    for other in ways:
        if other != chosen:
            lines.append(f"| {WAYS[chosen]}, minus {WAYS[other]} | {told(chosen, other)} | |")
    return "\n".join([*lines, "", f"{len(rows)} trainings in {len(cells)} cells."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "grid")
    arguments = parser.parse_args()
    rows = [row for row in read_rows(GRID) if row["lr"] == "0.001"]
    own = [row for row in rows if row["variant"].startswith("default_")]
    light = [row for row in rows if row["variant"] in ("partial", "probe_then_full") and row["wise_top1"]]
    text = f"Augmented as a default run is:\n\n{table(own, list(WAYS), 'wise75_', arguments.work)}\n"
    text += f"Augmented lightly:\n\n{table(light, list(WAYS)[:3], 'wise_', arguments.work)}"
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
