"""The matrix of the advice, fitted to the native grid, and what following it costs.

    python benchmarks/matrix.py            # seconds; prints the fit and writes results/matrix.md
    python benchmarks/matrix.py --write    # also the table in finetune/planning/matrix.py

Every cell of `results/grid.csv` in which a strategy was trained at the default rate says what that strategy, as it
would ship, gained over the probe. The gains at the nodes of the matrix are those that fit the cells best while
differing little from their neighbours (a ridge on differences along each axis; its strength is the one that foretells
left-out data sets best), with their posterior deviations. `partial` is fitted to its cells; the lead of `full` over it
is one share of the probe's errors, from the cells that have both: so few cannot say where it is larger.

Regret of a choice in a cell is the accuracy of the best strategy minus that of the chosen one, on test. Each cell is
judged by a matrix that saw neither its data set nor (second table) its family of backbones, and by the shipped one.
A best of several single runs is partly luck, so no choice has a regret of zero: `luck` says what one would have that
knew each strategy's mean in every cell, from cells that were trained with several seeds.
"""

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rows import read_rows
from scipy.optimize import minimize

from finetune.planning import matrix
from finetune.planning.matrix import ERRORS, ORDER, SIMILARITIES, SIZES, Place

HERE = Path(__file__).resolve().parent
GRID, TABLE = HERE / "results" / "grid.csv", HERE / "results" / "matrix.md"
MODULE = HERE.parent / "finetune" / "planning" / "matrix.py"
RATE = "0.001"
VARIANTS = {
    "partial": "partial", "probe_then_full": "full", "default_partial": "partial", "default_full": "full",
}  # fmt: skip
"""Of the grid, by the strategy of the advice; where a cell has both, the later one, augmented as a default run is."""
SHIPS = ("wise75_", "wise_")
"""Columns of the grid that hold what ships, or what was measured nearest to it: rows of a GPU have no 0.75."""
Fit = tuple[np.ndarray, np.ndarray, float]
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the ridge on differences between neighbours, in cells."""

CLASSES = {"ants_bees": 2, "flowers5": 5, "sign_digits": 10, "malaria": 2, "cifar10_20k": 10}


@dataclass(frozen=True)
class Cell:
    key: tuple[str, str, int, int]
    place: Place
    probe: float
    """Accuracy on test; so are the gains."""
    gains: dict[str, float]
    losses: dict[str, float]
    """Log loss minus that of the probe."""
    seconds: dict[str, float]
    is_cpu: bool

    @property
    def name(self) -> str:
        return self.key[0]

    @property
    def family(self) -> str:
        return "mobilenet" if "mobilenet" in self.key[1] else "efficientnet"


@dataclass(frozen=True)
class Matrix:
    gains: dict[str, np.ndarray]
    """Points at each node."""
    deviations: dict[str, np.ndarray]
    noise: dict[str, float]
    cost: dict[str, float]

    def gain(self, strategy: str, place: Place) -> float:
        """Points that are expected."""
        return 0.0 if strategy == "probe" else float(weights_of(place) @ self.gains[strategy])

    def interval(self, strategy: str, place: Place) -> tuple[float, float]:
        """Points within which a single run falls 95 times of 100."""
        noise = self.noise[strategy] * math.sqrt(place.error)
        reach = 1.96 * math.hypot(float(weights_of(place) @ self.deviations[strategy]), noise)
        value = self.gain(strategy, place)
        return value - reach, value + reach

    def choose(self, place: Place, prefer: str = "balanced") -> str:
        return matrix.choose({name: self.gain(name, place) / 100 for name in ORDER}, prefer)  # type: ignore[arg-type]


def weights_of(place: Place) -> np.ndarray:
    row = np.zeros(len(SIZES) * len(SIMILARITIES) * len(ERRORS))
    for node, share in matrix.node_shares(place):
        row[node] += share
    return row


def read_cells(ships: Sequence[str] = SHIPS) -> list[Cell]:
    """Cells in which `partial` was trained at the default rate, and what else was."""
    found: defaultdict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in read_rows(GRID):
        if row["variant"] in VARIANTS and row["lr"] == RATE:
            key = (row["set"], row["backbone"], int(row["per_class"]), int(row["seed"]))
            strategy = VARIANTS[row["variant"]]
            if strategy not in found[key] or row["variant"].startswith("default"):
                found[key][strategy] = row
    cells = []
    for key, runs in found.items():
        if "partial" not in runs:
            continue
        row = runs["partial"]
        images = int(row["num_train"]) / CLASSES[key[0]]
        error = 1 - float(row["probe_left_out"])
        gap, losses = {}, {}
        for name, run in runs.items():
            column = next(column for column in ships if run[f"{column}top1"])
            gap[name] = (float(run[f"{column}top1"]) - float(run["probe_top1"])) * 100
            losses[name] = float(run[f"{column}log_loss"]) - float(run["probe_log_loss"])
        cells.append(
            Cell(
                key=key,
                place=Place(images, float(row["similarity"]), max(error, 0.5 / int(row["num_train"]))),
                probe=float(row["probe_top1"]),
                gains={"probe": 0.0} | gap,
                losses={"probe": 0.0} | losses,
                seconds={name: float(run["cpu_seconds"]) for name, run in runs.items()},
                is_cpu=row["device"] == "cpu",
            )
        )
    return cells


def differences() -> tuple[np.ndarray, np.ndarray]:
    """One row for every pair of neighbouring nodes, the later minus the earlier; and the sign that order gives it."""
    shape = (len(SIZES), len(SIMILARITIES), len(ERRORS))
    at = np.arange(np.prod(shape)).reshape(shape)
    rows, signs = [], []
    for axis, sign in enumerate((1, -1, 1)):
        for a, b in zip(np.delete(at, -1, axis).ravel(), np.delete(at, 0, axis).ravel(), strict=True):
            rows.append(np.zeros(at.size))
            rows[-1][a], rows[-1][b] = -1, 1
            signs.append(sign)
    return np.array(rows), np.array(signs)


def solve(cells: Sequence[Cell], y: np.ndarray, strength: float) -> Fit:
    """Values at the nodes, their deviations, and the deviation of a cell around them; in points.

    They grow with size and with the probe's errors, and fall with similarity: what the noise of few cells says against
    that is not believed. A cell counts by one over the probe's errors in it, for what a training changes there, by
    skill or by chance, goes with their root; the deviation of a cell is that where the probe gets all wrong. Deviations
    are those of the same fit without order.
    """
    scale = np.sqrt([cell.place.error for cell in cells])
    x, y = np.array([weights_of(cell.place) for cell in cells]) / scale[:, None], y / scale
    steps, signs = differences()
    curvature = x.T @ x + strength * steps.T @ steps + 1e-6 * np.eye(x.shape[1])
    found = minimize(
        lambda v: 0.5 * v @ curvature @ v - v @ (x.T @ y),
        np.linalg.solve(curvature, x.T @ y),
        jac=lambda v: curvature @ v - x.T @ y,
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda v: signs * (steps @ v),
            "jac": lambda v: signs[:, None] * steps,
        },
        options={"maxiter": 1000, "ftol": 1e-10},
    )
    assert found.success, found.message
    values = found.x
    freedom = float(np.trace(np.linalg.solve(curvature, x.T @ x)))
    noise = math.sqrt(float(((y - x @ values) ** 2).sum()) / max(1.0, len(cells) - freedom))
    return values, noise * np.sqrt(np.diag(np.linalg.inv(curvature))), noise


def fit(cells: Sequence[Cell], strength: float) -> Matrix:
    """The matrix of some cells."""
    both = [cell for cell in cells if "full" in cell.gains]
    partial = solve(cells, np.array([cell.gains["partial"] for cell in cells]), strength)
    ahead = [cell.gains["full"] - cell.gains["partial"] for cell in both]
    errors = [cell.place.error for cell in both]
    lead = sum(ahead) / sum(errors)  # least squares with weights of one over the errors
    spread = math.sqrt(sum((a - lead * e) ** 2 / e for a, e in zip(ahead, errors, strict=True)) / (len(both) - 1))
    at_nodes = np.tile(ERRORS, len(SIZES) * len(SIMILARITIES))
    return Matrix(
        gains={"partial": partial[0], "full": partial[0] + lead * at_nodes},
        deviations={
            "partial": partial[1],
            "full": np.hypot(partial[1], at_nodes * spread / math.sqrt(sum(errors))),
        },
        noise={"partial": partial[2], "full": math.hypot(partial[2], spread)},
        cost={"probe": 0.0, "partial": 1.0, "full": cost_of_full(both)},
    )


def cost_of_full(cells: Sequence[Cell]) -> float:
    """Processor time of `full` over that of `partial`, the median of cells that were trained on a CPU; 1 at least."""
    ratios = [cell.seconds["full"] / cell.seconds["partial"] for cell in cells if cell.is_cpu]
    return max(1.0, statistics.median(ratios)) if ratios else matrix.COST["full"]


def left_out(cells: Sequence[Cell], strength: float, group: Callable[[Cell], str]) -> dict[str, Matrix]:
    """By group, the matrix of all cells that are not in it."""
    return {name: fit([c for c in cells if group(c) != name], strength) for name in {group(c) for c in cells}}


def best_strength(cells: Sequence[Cell]) -> float:
    """The one whose matrices foretell the gains of left-out data sets best."""

    def error(strength: float) -> float:
        found = left_out(cells, strength, lambda cell: cell.name)
        gaps = [cell.gains[n] - found[cell.name].gain(n, cell.place) for cell in cells for n in cell.gains]
        return statistics.mean(gap**2 for gap in gaps)

    return min(STRENGTHS, key=error)


def regrets(cells: Sequence[Cell], choose: Callable[[Cell], str]) -> list[float]:
    """Points lost in each cell that has both trainings."""
    full = [cell for cell in cells if "full" in cell.gains]
    return [max(cell.gains.values()) - cell.gains[choose(cell)] for cell in full]


def seed_noise(cells: Sequence[Cell]) -> tuple[float, float, int] | None:
    """Deviations of the gain of `partial`, and of the lead of `full` over it, between seeds of one cell.

    In points, where the probe gets all wrong: they go with the root of the errors. Third: how many seeds there are
    beyond the first of each cell. None where no cell has two.
    """
    groups: defaultdict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        if "full" in cell.gains:
            groups[cell.key[:3]].append(cell)
    found, freedom = [], 0
    for gain in (lambda c: c.gains["partial"], lambda c: c.gains["full"] - c.gains["partial"]):
        total, freedom = 0.0, 0
        for group in groups.values():
            scaled = [gain(cell) / math.sqrt(cell.place.error) for cell in group]
            total += sum((value - statistics.mean(scaled)) ** 2 for value in scaled)
            freedom += len(group) - 1
        found.append(total)
    return (math.sqrt(found[0] / freedom), math.sqrt(found[1] / freedom), freedom) if freedom else None


def luck(cells: Sequence[Cell], found: Matrix, draws: int = 4000) -> tuple[float, float, int] | None:
    """Mean and worst regret, in single runs, of who knows the mean gain of every strategy; and seeds behind it.

    The matrix stands for the means, `seed_noise` for what seeds do to them.
    """
    noise = seed_noise(cells)
    if noise is None:
        return None
    generator, both = np.random.default_rng(0), [cell for cell in cells if "full" in cell.gains]
    lost = np.zeros((draws, len(both)))
    for column, cell in enumerate(both):
        means = np.array([found.gain(name, cell.place) for name in ("probe", "partial", "full")])
        partial, lead = generator.normal(size=(2, draws)) * np.array(noise[:2])[:, None] * math.sqrt(cell.place.error)
        gains = means + np.stack([np.zeros(draws), partial, partial + lead], axis=1)
        lost[:, column] = gains.max(1) - gains[:, means.argmax()]
    return float(lost.mean()), float(lost.max(1).mean()), noise[2]


def covered(cells: Sequence[Cell], found: Callable[[Cell], Matrix]) -> float:
    """Share of the trained strategies whose gain fell into the interval that was foretold."""
    inside = []
    for cell in cells:
        for name in set(cell.gains) - {"probe"}:
            low, high = found(cell).interval(name, cell.place)
            inside.append(low <= cell.gains[name] <= high)
    return sum(inside) / len(inside)


def shipped() -> Matrix:
    """The matrix that the product reads."""
    return Matrix(
        gains={name: np.array(values) for name, values in matrix.GAINS.items()},
        deviations={name: np.array(values) for name, values in matrix.DEVIATIONS.items()},
        noise=dict(matrix.NOISE),
        cost=dict(matrix.COST),
    )


def report(cells: Sequence[Cell], strength: float) -> str:
    """The tables of docs/advice.md."""
    sets = left_out(cells, strength, lambda cell: cell.name)
    families = left_out(cells, strength, lambda cell: cell.family)
    whole = fit(cells, strength)
    rules: dict[str, Callable[[Cell], str]] = {f"always {name}": lambda cell, name=name: name for name in ORDER}
    for prefer in ("accuracy", "balanced", "speed"):
        rules[f"**matrix, left-out sets**, {prefer}"] = lambda c, p=prefer: sets[c.name].choose(c.place, p)
    rules["matrix, left-out families, balanced"] = lambda cell: families[cell.family].choose(cell.place)
    rules["matrix as fitted to all, balanced"] = lambda cell: whole.choose(cell.place)
    both = [cell for cell in cells if "full" in cell.gains]
    lines = [
        "| choice | mean gain over the probe | mean change of log loss | regret | worst | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in rules.items():
        lost = regrets(cells, rule)
        gain = statistics.mean(cell.gains[rule(cell)] for cell in both)
        loss = statistics.mean(cell.losses[rule(cell)] for cell in both)
        spent = statistics.mean(whole.cost[rule(cell)] for cell in both) / whole.cost["full"]
        lines.append(
            f"| {name} | {gain:+.1f} | {loss:+.3f} | {statistics.mean(lost):.2f} | {max(lost):.1f} | {spent:.2f} |"
        )
    if (best := luck(cells, whole)) is not None:
        lines.append(f"| whoever knows the means | – | – | {best[0]:.2f} | {best[1]:.1f} | – |")
    told = [
        "",
        f"{len(both)} cells with every strategy, {len(cells)} with `partial`. Intervals for left-out sets hold "
        f"{100 * covered(cells, lambda cell: sets[cell.name]):.0f} % of the gains, for left-out families "
        f"{100 * covered(cells, lambda cell: families[cell.family]):.0f} %.", "",
    ]  # fmt: skip
    lines += told
    lines += [
        "| images per class | similarity | probe wrong | partial | full | cells near |",
        "|---|---|---|---|---|---|",
    ]
    near = np.array([weights_of(cell.place) for cell in cells]).sum(0)
    for node in range(len(near)):
        size, rest = divmod(node, len(SIMILARITIES) * len(ERRORS))
        similarity, error = divmod(rest, len(ERRORS))
        place = Place(SIZES[size], SIMILARITIES[similarity], ERRORS[error])
        said = []
        for name in ("partial", "full"):
            reach = 1.96 * whole.deviations[name][node]
            said.append(f"{whole.gains[name][node]:+.1f} ± {reach:.1f}")
        lines.append(f"| {place.images:g} | {place.similarity:g} | {100 * place.error:g} % | {said[0]} | {said[1]} | "
                     f"{near[node]:.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def write_module(found: Matrix) -> None:
    """Put the fit between the marks of the product's table."""

    def rows(parts: dict[str, np.ndarray]) -> str:
        inner = "".join(
            f'    "{name}": (\n'
            + "".join(
                "        " + ", ".join(f"{v:.2f}" for v in values[start : start + len(ERRORS)]) + ",\n"
                for start in range(0, len(values), len(ERRORS))
            )
            + "    ),\n"
            for name, values in parts.items()
        )
        return "{\n" + inner + "}"

    noise = ", ".join(f'"{name}": {value:.2f}' for name, value in found.noise.items())
    cost = ", ".join(f'"{name}": {value:.2f}' for name, value in found.cost.items())
    text = (
        "# fitted: begin\n# fmt: off\n"
        f"SIZES = {SIZES}\nSIMILARITIES = {SIMILARITIES}\nERRORS = {ERRORS}\n"
        f"GAINS: Mapping[str, Sequence[float]] = {rows(found.gains)}\n"
        '"""Points at (size, similarity, error), the last running fastest."""\n'
        f"DEVIATIONS: Mapping[str, Sequence[float]] = {rows(found.deviations)}\n"
        '"""Standard deviation of the fit at each node, in points."""\n'
        f"COST: Mapping[str, float] = {{{cost}}}\n"
        '"""Processor time of the training over that of `partial`."""\n'
        f"NOISE: Mapping[str, float] = {{{noise}}}\n"
        '"""Standard deviation of a single run around the fit where the probe gets all wrong, in points; it\n'
        'goes with the root of the errors."""\n'
        "# fmt: on\n# fitted: end\n"
    )
    whole = MODULE.read_text(encoding="utf-8")
    MODULE.write_text(
        re.sub(r"# fitted: begin\n.*# fitted: end\n", lambda _: text, whole, flags=re.S), encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="the table in finetune/planning/matrix.py")
    parser.add_argument("--ships", nargs="+", default=SHIPS, help="beginnings of the columns of what ships")
    arguments = parser.parse_args()
    cells = read_cells(arguments.ships)
    strength = best_strength(cells)
    text = report(cells, strength)
    print(f"strength {strength:g}\n{text}")
    if arguments.write:
        write_module(fit(cells, strength))
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
