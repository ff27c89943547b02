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
        0.09, 3.43, 12.28,
        -1.12, 1.10, 5.45,
        0.09, 3.43, 12.28,
        -0.23, 1.10, 7.24,
        0.09, 3.43, 12.28,
        -0.23, 3.43, 11.24,
        3.07, 6.18, 12.28,
        2.93, 5.95, 11.24,
    ),
    "full": (
        0.68, 4.01, 12.86,
        -0.53, 1.68, 6.03,
        0.68, 4.01, 12.86,
        0.36, 1.68, 7.82,
        0.68, 4.01, 12.86,
        0.36, 4.01, 11.82,
        3.65, 6.76, 12.86,
        3.51, 6.53, 11.82,
    ),
}
"""Points at (size, similarity, error), the last running fastest."""
DEVIATIONS: Mapping[str, Sequence[float]] = {
    "partial": (
        5.17, 3.24, 5.44,
        4.03, 5.99, 2.72,
        5.05, 3.52, 5.57,
        3.71, 4.76, 2.80,
        5.83, 3.66, 7.83,
        3.72, 3.62, 3.20,
        9.78, 8.73, 10.14,
        9.64, 8.68, 9.69,
    ),
    "full": (
        5.21, 3.30, 5.47,
        4.07, 6.02, 2.78,
        5.09, 3.57, 5.61,
        3.76, 4.80, 2.86,
        5.86, 3.71, 7.86,
        3.77, 3.66, 3.26,
        9.80, 8.75, 10.16,
        9.66, 8.70, 9.71,
    ),
}
"""Standard deviation of the fit at each node, in points."""
COST: Mapping[str, float] = {"probe": 0.00, "partial": 1.00, "full": 1.00}
"""Processor time of the training over that of `partial`."""
NOISE: Mapping[str, float] = {"partial": 4.47, "full": 5.28}
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
