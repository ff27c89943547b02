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
        -0.26, 3.37, 11.04,
        -1.05, 0.48, 5.42,
        -0.26, 3.37, 11.04,
        -0.26, 1.03, 6.93,
        -0.26, 3.37, 11.04,
        -0.26, 3.37, 11.00,
        2.72, 5.71, 11.04,
        2.72, 5.70, 11.00,
    ),
    "full": (
        -0.13, 3.76, 12.08,
        -0.92, 0.87, 6.46,
        -0.13, 3.76, 12.08,
        -0.13, 1.42, 7.97,
        -0.13, 3.76, 12.08,
        -0.13, 3.76, 12.04,
        2.85, 6.10, 12.08,
        2.85, 6.09, 12.04,
    ),
}
"""Points at (size, similarity, error), the last running fastest."""
DEVIATIONS: Mapping[str, Sequence[float]] = {
    "partial": (
        3.30, 3.93, 8.52,
        3.52, 8.36, 4.33,
        2.47, 4.15, 7.71,
        1.14, 6.40, 4.44,
        6.00, 3.81, 11.43,
        1.93, 4.00, 5.01,
        14.08, 12.71, 14.86,
        13.93, 12.65, 14.24,
    ),
    "full": (
        3.31, 3.96, 8.61,
        3.52, 8.37, 4.50,
        2.47, 4.18, 7.81,
        1.15, 6.42, 4.61,
        6.00, 3.84, 11.50,
        1.94, 4.03, 5.16,
        14.08, 12.71, 14.91,
        13.93, 12.66, 14.30,
    ),
}
"""Standard deviation of the fit at each node, in points."""
COST: Mapping[str, float] = {"probe": 0.00, "partial": 1.00, "full": 1.00}
"""Processor time of the training over that of `partial`."""
NOISE: Mapping[str, float] = {"partial": 11.38, "full": 13.29}
"""Standard deviation of a single run around the fit where the probe gets all wrong, in points; it
goes with the root of the errors."""
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
    reach = 1.96 * math.hypot(deviation, NOISE[strategy] * math.sqrt(place.error) / 100)
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
