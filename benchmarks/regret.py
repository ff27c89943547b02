"""What following the advisor costs in accuracy, from the runs in `zoo/results.csv` and the facts in `zoo/measures.csv`.

    python benchmarks/regret.py            # seconds; prints the fit and writes results/advice.md

Regret of a choice is the accuracy of the best strategy minus that of the chosen one, in points, on test images: of a
set, size and backbone by the means over seeds, and of single runs. The best of several noisy accuracies is itself too
good, that of single runs more so; even a perfect advisor has some. Each data set is judged by rules that were fitted to
the other data sets alone, and by those in `advice.py`.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.recipe import advice
from finetune.recipe.facts import Measure

HERE = Path(__file__).resolve().parent
ZOO = HERE.parent / "zoo"
STRATEGIES = ("probe", "top_third", "partial", "full", "probe_then_full")
RUNS = {"partial": "partial", "full": "probe_then_full"}
"""The run that a strategy of the advisor stands for."""


PENALTY = 0.1
"""Of the fitted slopes, squared: five data sets say little."""


@dataclass(frozen=True)
class Cell:
    key: tuple[str, str, int, int]
    top1: dict[str, float]
    cpu: dict[str, float]
    num_train: int
    probe: float
    shift: float

    @property
    def name(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Rule:
    center: float
    power: float
    gains: dict[str, tuple[float, float, float]]
    errors: dict[str, float]

    def similarity(self, cell: Cell) -> float:
        return 1 / (1 + (cell.shift / self.center) ** self.power)

    def share(self, strategy: str, cell: Cell) -> float:
        base, per_tenfold, different = self.gains[strategy]
        return base + per_tenfold * math.log10(cell.num_train) + different * (1 - self.similarity(cell))

    def choose(self, cell: Cell) -> str:
        gains = {"probe": 0.0} | {name: self.share(name, cell) * (1 - cell.probe) for name in RUNS}
        chosen = advice.choose(gains)
        return RUNS.get(chosen, chosen)


def read_cells() -> list[Cell]:
    """Cells in which every strategy was run and the facts were measured."""
    runs: defaultdict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in _read("results.csv"):
        runs[_key(row)][row["strategy"]] = row
    cells = []
    for row in _read("measures.csv"):
        found = runs[_key(row)]
        if set(STRATEGIES) <= set(found):
            cells.append(
                Cell(
                    key=_key(row),
                    top1={name: float(found[name]["top1"]) for name in STRATEGIES},
                    cpu={name: float(found[name]["cpu_seconds"]) for name in STRATEGIES},
                    num_train=int(found["probe"]["num_train"]),
                    probe=float(row["probe"]),
                    shift=float(row["early_shift"]),
                )
            )
    return cells


def fit(cells: list[Cell]) -> Rule:
    """The similarity scale and the gains with the least squared error, each cell weighted by the probe's errors.

    Of scales that fit equally well, within a hundredth, the one that calls the fewest images different.
    """
    tried: list[tuple[float, Rule]] = []
    for center in (0.05, 0.07, 0.1, 0.14):
        for power in (1.0, 2.0, 4.0):
            similar = [1 / (1 + (cell.shift / center) ** power) for cell in cells]
            x = np.array([[1, math.log10(cell.num_train), 1 - s] for cell, s in zip(cells, similar, strict=True)])
            weights = np.array([1 - cell.top1["probe"] for cell in cells])
            gains, errors, total = {}, {}, 0.0
            for name, run in RUNS.items():
                y = np.array([(cell.top1[run] - cell.top1["probe"]) / (1 - cell.top1["probe"]) for cell in cells])
                a = x * weights[:, None]
                found = np.linalg.solve(a.T @ a + PENALTY * np.diag([0, 1, 1]), a.T @ (y * weights))
                residual = (y - x @ found) * weights
                gains[name] = tuple(float(value) for value in found)
                errors[name] = float(np.sqrt((residual**2).sum() / (weights**2).sum()))
                total += float((residual**2).sum())
            tried.append((total, Rule(center, power, gains, errors)))
    least = min(total for total, _ in tried)
    return max((rule for total, rule in tried if total <= 1.01 * least), key=lambda rule: (rule.center, rule.power))


def shipped() -> Rule:
    """The rule that `advice.py` applies."""
    return Rule(advice.SHIFT_CENTER, advice.SHIFT_POWER, advice.GAINS, advice.GAIN_ERRORS)


def regrets(cells: list[Cell], choose: Callable[[Cell], str]) -> list[float]:
    return [100 * (max(cell.top1.values()) - cell.top1[choose(cell)]) for cell in cells]


def mean_regrets(cells: list[Cell], choose: Callable[[Cell], str]) -> list[float]:
    """One for each set, size and backbone: the best strategy by the mean over seeds against what was chosen."""
    groups: defaultdict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.key[:3]].append(cell)
    return [
        100
        * (
            max(statistics.mean(cell.top1[name] for cell in own) for name in STRATEGIES)
            - statistics.mean(cell.top1[choose(cell)] for cell in own)
        )
        for own in groups.values()
    ]


def summarize(title: str, cells: list[Cell], choose: Callable[[Cell], str]) -> str:
    runs, means = regrets(cells, choose), mean_regrets(cells, choose)
    cost = sum(cell.cpu[choose(cell)] for cell in cells) / sum(cell.cpu["full"] for cell in cells)
    top1 = statistics.mean(cell.top1[choose(cell)] for cell in cells)
    return (
        f"| {title} | {100 * top1:.1f} | {statistics.mean(means):.2f} | {max(means):.1f} | {statistics.mean(runs):.2f} "
        f"| {max(runs):.1f} | {cost:.2f} |"
    )


def summary(cells: list[Cell]) -> Iterable[str]:
    yield "| choice | mean accuracy | regret, seeds' mean | worst | regret, one run | worst | cost, of always full |"
    yield "|---|---|---|---|---|---|---|"
    for name in STRATEGIES:
        yield summarize(f"always {name.replace('_', ' ')}", cells, lambda cell, name=name: name)
    names = sorted({cell.name for cell in cells})
    rules = {name: fit([cell for cell in cells if cell.name != name]) for name in names}
    yield summarize("**advisor, fitted on other data sets**", cells, lambda cell: rules[cell.name].choose(cell))
    yield summarize("advisor as shipped", cells, shipped().choose)


def frontier(cells: list[Cell]) -> Iterable[str]:
    """The least regret that hindsight could have at each cost: one strategy per set and size, the best for a price."""
    groups: defaultdict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.key[:3]].append(cell)
    whole = sum(cell.cpu["full"] for cell in cells)
    yield "| cost, of always full | mean regret with hindsight |"
    yield "|---|---|"
    known = set()
    for price in (0.0, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 5e-3, 7e-3, 1e-2, 2e-2):  # accuracy per second
        chosen = {}
        for key, own in groups.items():
            value = {name: sum(cell.top1[name] - price * cell.cpu[name] for cell in own) for name in STRATEGIES}
            chosen[key] = max(STRATEGIES, key=value.__getitem__)
        cost = sum(cell.cpu[chosen[cell.key[:3]]] for cell in cells) / whole
        regret = statistics.mean(mean_regrets(cells, lambda cell, chosen=chosen: chosen[cell.key[:3]]))
        if round(cost, 2) not in known:
            known.add(round(cost, 2))
            yield f"| {cost:.2f} | {regret:.2f} |"


def leads(cells: list[Cell]) -> Iterable[str]:
    """What `partial` is ahead of the others in the same cells, by backbone: its depth was chosen on the first."""
    yield "| `partial` minus, in points [95 %] | " + " | ".join(sorted({cell.key[1] for cell in cells})) + " |"
    yield "|---" * (1 + len({cell.key[1] for cell in cells})) + "|"
    for other in ("top_third", "full", "probe_then_full"):
        told = []
        for backbone in sorted({cell.key[1] for cell in cells}):
            own = [100 * (c.top1["partial"] - c.top1[other]) for c in cells if c.key[1] == backbone]
            error = 1.96 * statistics.stdev(own) / len(own) ** 0.5
            mean = statistics.mean(own)
            told.append(f"{mean:+.1f} [{mean - error:+.1f}, {mean + error:+.1f}] in {len(own)} cells")
        yield f"| {other.replace('_then', ', then').replace('_', ' ')} | {' | '.join(told)} |"


def by_cell(cells: list[Cell]) -> Iterable[str]:
    strategies = " | ".join(name.replace("_then", ", then").replace("_", " ") for name in STRATEGIES)
    yield f"| set | backbone | per class | similarity | {strategies} | chosen | regret |"
    yield "|---" * (len(STRATEGIES) + 6) + "|"
    groups: defaultdict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.key[:3]].append(cell)
    rule = shipped()
    for (name, backbone, per_class), own in groups.items():
        shares = " | ".join(f"{100 * statistics.mean(cell.top1[s] for cell in own):.1f}" for s in STRATEGIES)
        chosen = sorted({rule.choose(cell).replace("_", " ").replace("probe then ", "") for cell in own})
        regret = mean_regrets(own, rule.choose)[0]
        similar = statistics.mean(rule.similarity(cell) for cell in own)
        yield (
            f"| `{name}` | {backbone.partition('.')[2]} | {per_class} | {similar:.2f} | {shares} | "
            f"{', '.join(chosen)} | {regret:.1f} |"
        )


def similarity_of(shift: float) -> float:
    """What the product makes of a mean shift; the same arithmetic, so that the two cannot part."""
    return advice.similarity_of_shift([Measure(value=shift, low=shift, high=shift, n=1)])[0]


def _key(row: dict[str, str]) -> tuple[str, str, int, int]:
    return row["set"], row["backbone"], int(row["per_class"]), int(row["seed"])


def _read(name: str) -> list[dict[str, str]]:
    with (ZOO / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    cells = read_cells()
    rule = fit(cells)
    print(f"{len(cells)} cells; fit: center {rule.center:.3f}, power {rule.power:g}")
    for name in RUNS:
        print(f"  {name}: {tuple(round(value, 3) for value in rule.gains[name])}, error {rule.errors[name]:.3f}")
    lines = [*summary(cells), "", *leads(cells), "", *frontier(cells), "", *by_cell(cells)]
    print("\n".join(lines))
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "advice.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
