"""The matrix: read linearly between its nodes, as at the nearest beyond them; ordered; and the choice that follows."""

import itertools

import pytest

from finetune.planning import matrix
from finetune.planning.matrix import ERRORS, ORDER, SIMILARITIES, SIZES, STEP, Place, choose, choose_at, gain_at

NODES = list(itertools.product(SIZES, SIMILARITIES, ERRORS))
TRAINED = pytest.mark.parametrize("strategy", ["partial", "full"])


@TRAINED
def test_at_a_node_the_table_is_read(strategy):
    assert len(matrix.GAINS[strategy]) == len(matrix.DEVIATIONS[strategy]) == len(NODES)
    for node, points in zip(NODES, matrix.GAINS[strategy], strict=True):
        assert gain_at(strategy, Place(*node)).value == pytest.approx(points / 100)


@TRAINED
def test_half_way_between_two_nodes_lies_their_mean(strategy):
    (low, high), similarity, error = SIZES[:2], SIMILARITIES[0], ERRORS[1]
    ends = [gain_at(strategy, Place(size, similarity, error)).value for size in (low, high)]
    assert gain_at(strategy, Place((low * high) ** 0.5, similarity, error)).value == pytest.approx(sum(ends) / 2)
    ends = [gain_at(strategy, Place(low, value, error)).value for value in SIMILARITIES[:2]]
    between = Place(low, sum(SIMILARITIES[:2]) / 2, error)
    assert gain_at(strategy, between).value == pytest.approx(sum(ends) / 2)


@TRAINED
def test_beyond_the_nodes_nothing_is_extrapolated(strategy):
    last = Place(SIZES[-1], SIMILARITIES[0], ERRORS[-1])
    assert gain_at(strategy, Place(1e7, -1.0, ERRORS[-1])) == gain_at(strategy, last)
    assert gain_at(strategy, Place(1e7, -1.0, 0.99)).value == gain_at(strategy, last).value
    first = gain_at(strategy, Place(SIZES[0], SIMILARITIES[-1], ERRORS[0]))
    assert gain_at(strategy, Place(0.0, 2.0, ERRORS[0])) == first


def test_the_interval_holds_the_noise_of_a_run_and_grows_where_little_is_known():
    wide = {}
    for node in NODES:
        gain = gain_at("partial", Place(*node))
        wide[node] = gain.value - gain.low
        assert wide[node] >= 1.96 * matrix.NOISE["partial"] * node[2] ** 0.5 / 100
    known = dict(zip(NODES, matrix.DEVIATIONS["partial"], strict=True))
    for error in ERRORS:
        alike = [node for node in NODES if node[2] == error]
        assert max(alike, key=wide.__getitem__) == max(alike, key=known.__getitem__)


def test_gains_of_training_grow_with_size_and_errors_and_fall_with_similarity():
    table = dict(zip(NODES, matrix.GAINS["partial"], strict=True))
    for axis, sign in enumerate((1, -1, 1)):
        knots = (SIZES, SIMILARITIES, ERRORS)[axis]
        for node in NODES:
            at = knots.index(node[axis])
            if at + 1 < len(knots):
                after = (*node[:axis], knots[at + 1], *node[axis + 1 :])
                assert sign * (table[after] - table[node]) >= -0.011, (node, after)


def test_a_dearer_strategy_must_pay_its_cost():
    more = matrix.COST["full"] - matrix.COST["partial"]
    assert matrix.COST["probe"] == 0 < matrix.COST["partial"] <= matrix.COST["full"]
    for prefer, step in STEP.items():
        just, short = step * matrix.COST["partial"] + 1e-4, step * matrix.COST["partial"] - 1e-4
        assert choose({"probe": 0.0, "partial": just, "full": just}, prefer) == "partial"
        assert choose({"probe": 0.0, "partial": short, "full": short}, prefer) == "probe"
        assert choose({"probe": 0.0, "partial": just, "full": just + step * more + 1e-4}, prefer) == "full"
        assert choose({"probe": 0.0, "partial": just, "full": just + step * more - 1e-4}, prefer) == "partial"
    assert list(STEP.values()) == sorted(STEP.values())


def test_the_probe_gains_nothing_and_is_taken_where_training_is_expected_to_harm():
    for node in NODES:
        place = Place(*node)
        assert gain_at("probe", place) == (0.0, 0.0, 0.0)
        if all(gain_at(name, place).value < 0 for name in ORDER[1:]):
            assert {choose_at(place, prefer) for prefer in STEP} == {"probe"}
