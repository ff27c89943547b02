"""The matrix: what each strategy gained over the probe, by size, similarity and the probe's errors; read smoothly.

The two-by-two grid of size and similarity that courses teach, measured. `GAINS` holds points of accuracy at nodes of
a lattice: training images per class x similarity x the share of images that the probe gets wrong.
`benchmarks/matrix.py` fits them to the trainings in `benchmarks/results/grid.csv` and writes the table below; between
the nodes it is read linearly (sizes and errors on a log scale), beyond them as at the nearest one. Pure arithmetic.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from finetune.config.section import Prefer

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
        -0.35, 3.60, 11.53,
        -0.35, 0.57, 5.45,
        -0.35, 3.60, 11.53,
        -0.35, 1.58, 7.15,
        -0.35, 3.60, 11.53,
        -0.35, 3.60, 11.04,
        2.78, 5.94, 11.53,
        2.75, 5.83, 11.04,
    ),
    "full": (
        -0.22, 3.99, 12.57,
        -0.22, 0.96, 6.49,
        -0.22, 3.99, 12.57,
        -0.22, 1.97, 8.19,
        -0.22, 3.99, 12.57,
        -0.22, 3.99, 12.08,
        2.91, 6.33, 12.57,
        2.88, 6.22, 12.08,
    ),
}
"""Points at (size, similarity, error), the last running fastest."""
DEVIATIONS: Mapping[str, Sequence[float]] = {
    "partial": (
        4.88, 3.80, 8.14,
        2.89, 7.74, 4.11,
        2.59, 3.53, 6.59,
        1.09, 5.95, 4.23,
        5.90, 3.66, 10.88,
        1.84, 3.78, 4.79,
        13.47, 12.14, 14.19,
        13.31, 12.08, 13.61,
    ),
    "full": (
        4.88, 3.82, 8.22,
        2.89, 7.76, 4.27,
        2.60, 3.56, 6.69,
        1.09, 5.96, 4.38,
        5.90, 3.69, 10.94,
        1.85, 3.80, 4.93,
        13.47, 12.15, 14.23,
        13.31, 12.09, 13.65,
    ),
}
"""Standard deviation of the fit at each node, in points."""
COST: Mapping[str, float] = {"probe": 0.00, "partial": 1.00, "full": 1.02}
"""Processor time of the training over that of `partial`."""
NOISE: Mapping[str, float] = {"partial": 10.87, "full": 12.77}
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
