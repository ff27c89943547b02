"""Write the tables of docs/peers.md from results/peers.csv.

    python benchmarks/peers/table.py

What stands between `<!-- peers -->` and `<!-- /peers -->` is replaced. Times are told only of rows measured on a
quiet machine. An interval is that of the test images, for one seed: seeds share them, so more seeds do not narrow
it.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

from judge import from_hex
from run import HERE, PEERS, RESULTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rows import read_rows

from finetune.config.measures import Measure
from finetune.metrics.intervals import paired_difference
from finetune.metrics.shares import wilson

PAGE = HERE.parents[1] / "docs" / "peers.md"
OURS = "ours"
Row = dict[str, str]


def newest(rows: list[Row]) -> list[Row]:
    """The last row of each peer, cell and seed: a later one is a retry."""
    keys = ("set", "per_class", "seed", "backbone", "pixels", "epochs", "peer")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def hits_of(row: Row) -> list[bool]:
    return from_hex(row["hits"], int(row["num_test"])).tolist()


def accuracy(rows: list[Row]) -> Measure:
    """The mean over seeds, with Wilson's interval for the number of test images."""
    n = int(rows[0]["num_test"])
    return wilson(round(sum(float(row["top1"]) for row in rows) / len(rows) * n), n)


def against_ours(rows: list[Row], ours: list[Row]) -> Measure | None:
    """Peer minus ours on the seeds that both have: the mean of the paired differences and of their intervals' ends."""
    beside = {row["seed"]: hits_of(row) for row in ours}
    pairs = [(hits_of(row), beside[row["seed"]]) for row in rows if row["seed"] in beside]
    if not pairs:
        return None
    found = [
        paired_difference(
            sum(a > b for a, b in zip(*pair, strict=True)), sum(a < b for a, b in zip(*pair, strict=True)), len(pair[0])
        )
        for pair in pairs
    ]
    value, low, high = (sum(getattr(one, end) for one in found) / len(found) for end in ("value", "low", "high"))
    return Measure(value=value, low=low, high=high, n=found[0].n)


def mean_of(rows: list[Row], field: str) -> float | None:
    values = [float(row[field]) for row in rows if row[field]]
    return sum(values) / len(values) if values else None


def time_told(rows: list[Row], field: str) -> str:
    """Seconds, where every seed was measured on a quiet machine."""
    value = mean_of(rows, field)
    return f"{value:.0f}" if value is not None and all(row["quiet"] == "yes" for row in rows) else "-"


def line(name: str, rows: list[Row], ours: list[Row]) -> str:
    top1, gap = accuracy(rows), None if name == OURS else against_ours(rows, ours)
    loss, low, high = (mean_of(rows, field) for field in ("log_loss", "log_loss_low", "log_loss_high"))
    cells = [
        f"`{name}`",
        f"{100 * top1.value:.1f} [{100 * top1.low:.1f}, {100 * top1.high:.1f}]",
        "-" if gap is None else f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
        f"{loss:.3f} [{low:.3f}, {high:.3f}]",
        *(time_told(rows, field) for field in ("fit_cpu_seconds", "fit_seconds", "start_seconds")),
        rows[-1]["user_lines"],
        str(len(rows)),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row], title: str) -> list[str]:
    """One cell's peers, the most accurate first, and why others are not in it."""
    scored: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            scored[row["peer"]].append(row)
    lines = [
        title,
        "",
        "| peer | accuracy, % | minus ours, points | log loss | fit, processor s | fit, s | start, s "
        "| user's lines | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(scored, key=lambda name: -accuracy(scored[name]).value)
    lines += [line(name, scored[name], scored.get(OURS, [])) for name in order]
    without = {
        row["peer"]: f"`{row['peer']}` {row['status']}: {clean(row['note'])}"
        for row in rows
        if row["peer"] not in scored
    }
    return [*lines, "", *(f"No score: {text}" + "\n" for text in without.values())]


def clean(text: str) -> str:
    """A message without folders of this machine and without signs that a table would take for its own."""
    return re.sub(r"(/[\w.+-]+)+/", "", text).replace("|", "/") or "no message"


def page(rows: list[Row]) -> str:
    cells: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in newest(rows):
        if row["epochs"] == "advised" and row["peer"] in PEERS:
            cells[row["set"], row["per_class"], row["backbone"], row["pixels"]].append(row)
    lines = []
    for (name, per_class, backbone, pixels), part in cells.items():
        title = f"`{name}`, {per_class} labelled images per class, `{backbone}` at {pixels} px"
        ours = sorted({f"`{row['peer']}` at {row['commit']}" for row in part if PEERS[row["peer"]].environment is None})
        title += f" ({', '.join(ours)}):" if ours else ":"
        lines += table(part, title)
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    text = arguments.page.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- peers -->")
    _, _, tail = rest.partition("<!-- /peers -->")
    filled = f"{head}<!-- peers -->\n{page(read_rows(arguments.results))}\n<!-- /peers -->{tail}"
    arguments.page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
