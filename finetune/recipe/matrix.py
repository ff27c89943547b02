"""The matrix: what each strategy gained over the probe, by size, similarity and the probe's errors; read smoothly.

The mission's two-by-two grid, measured. `GAINS` holds points of accuracy at the nodes of a lattice: training images per
class x similarity x the share of images that the probe gets wrong. `benchmarks/matrix.py` fits them to the trainings in
`zoo/matrix.csv` and writes the table below; between the nodes it is read linearly (sizes and errors on a log scale),
beyond them as at the nearest one. Pure arithmetic.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

Prefer = Literal["accuracy", "balanced", "speed"]
ORDER = ("probe", "partial", "full")
"""From cheap to dear."""
STEP = {"accuracy": 0.0, "balanced": 0.005, "speed": 0.03}
"""Accuracy that a training at the cost of `partial` must be expected to add, by `train.prefer`."""


class Place(NamedTuple):
    """Where a data set stands."""

    images: float
    """Training images of the class in the middle."""
    similarity: float
    """In [0, 1]."""
    error: float
    """Share of images that the probe gets wrong."""


class Gain(NamedTuple):
    """Accuracy above the probe's, as a share; with the 95 % interval of a single run."""

    value: float
    low: float
    high: float


# fitted: begin
# fmt: off
SIZES = (8.0, 25.0, 83.0, 333.0)
SIMILARITIES = (0.0, 1.0)
ERRORS = (0.05, 0.15, 0.4)
GAINS: Mapping[str, Sequence[float]] = {
    "partial": (
        0.08, 3.47, 12.48,
        -1.17, 1.60, 5.43,
        0.08, 3.47, 12.48,
        -0.19, 2.02, 7.53,
        0.08, 3.47, 12.48,
        -0.19, 3.47, 11.27,
        3.10, 6.26, 12.48,
        2.97, 5.99, 11.27,
    ),
    "full": (
        0.52, 3.91, 12.93,
        -0.72, 2.04, 5.87,
        0.52, 3.91, 12.93,
        0.25, 2.46, 7.97,
        0.52, 3.91, 12.93,
        0.25, 3.91, 11.72,
        3.55, 6.70, 12.93,
        3.41, 6.43, 11.72,
    ),
}
"""Points at (size, similarity, error), the last running fastest."""
DEVIATIONS: Mapping[str, Sequence[float]] = {
    "partial": (
        5.26, 3.30, 5.53,
        4.10, 6.10, 2.76,
        5.14, 3.58, 5.72,
        3.78, 5.17, 2.88,
        5.93, 3.72, 7.97,
        3.79, 3.68, 3.26,
        9.95, 8.88, 10.31,
        9.81, 8.83, 9.86,
    ),
    "full": (
        5.30, 3.35, 5.57,
        4.14, 6.13, 2.83,
        5.18, 3.63, 5.75,
        3.83, 5.20, 2.95,
        5.96, 3.78, 7.99,
        3.84, 3.73, 3.31,
        9.97, 8.90, 10.33,
        9.83, 8.85, 9.88,
    ),
}
"""Standard deviation of the fit at each node, in points."""
COST: Mapping[str, float] = {"probe": 0.00, "partial": 1.00, "full": 1.00}
"""Processor time of the training over that of `partial`."""
NOISE: Mapping[str, float] = {"partial": 4.55, "full": 5.34}
"""Standard deviation of a single run around the fit, in points."""
# fmt: on
# fitted: end


def gain_at(strategy: str, place: Place) -> Gain:
    """What `strategy` is expected to add to the probe's accuracy at `place`; never more than the probe's errors.

    Raises:
        KeyError: for a strategy that the matrix does not know.
    """
    if strategy == "probe":
        return Gain(0.0, 0.0, 0.0)
    shares = dict(node_shares(place))
    value = sum(share * GAINS[strategy][node] for node, share in shares.items()) / 100
    deviation = sum(share * DEVIATIONS[strategy][node] for node, share in shares.items()) / 100
    reach = 1.96 * math.hypot(deviation, NOISE[strategy] / 100)
    return Gain(*(min(place.error, end) for end in (value, value - reach, value + reach)))


def choose_at(place: Place, prefer: Prefer = "balanced") -> str:
    """The strategy to take at `place`: the one with the most gain left when its cost is paid; of equals the cheaper."""
    return choose({strategy: gain_at(strategy, place).value for strategy in ORDER}, prefer)


def choose(gains: Mapping[str, float], prefer: Prefer = "balanced") -> str:
    """The same by the gain that is expected of each of `ORDER`."""
    return max(ORDER, key=lambda strategy: gains[strategy] - STEP[prefer] * COST[strategy])


def node_shares(place: Place) -> Iterator[tuple[int, float]]:
    """The nodes around `place` and the share of each; shares add up to 1."""
    axes = (
        _between([math.log(size) for size in SIZES], math.log(max(place.images, 1e-9))),
        _between(SIMILARITIES, place.similarity),
        _between([math.log(error) for error in ERRORS], math.log(max(place.error, 1e-9))),
    )
    for (size, a), (similarity, b), (error, c) in product(*axes):
        yield (size * len(SIMILARITIES) + similarity) * len(ERRORS) + error, a * b * c


def _between(knots: Sequence[float], value: float) -> list[tuple[int, float]]:
    """The two knots around `value` with their shares; at or beyond an end that end alone."""
    if value <= knots[0]:
        return [(0, 1.0)]
    if value >= knots[-1]:
        return [(len(knots) - 1, 1.0)]
    above = next(at for at, knot in enumerate(knots) if knot > value)
    share = (value - knots[above - 1]) / (knots[above] - knots[above - 1])
    return [(above - 1, 1 - share), (above, share)]
