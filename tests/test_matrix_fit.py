"""The matrix that ships is the fit to the committed trainings, and following it costs what the docs say."""

import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
fitting = pytest.importorskip("matrix", reason="benchmarks/ is not beside tests/")


@pytest.fixture(scope="module")
def cells():
    return fitting.read_cells()


@pytest.fixture(scope="module")
def strength(cells):
    return fitting.best_strength(cells)


@pytest.fixture(scope="module")
def sets(cells, strength):
    """By data set, the matrix of all others."""
    return fitting.left_out(cells, strength, lambda cell: cell.name)


def test_the_cells_cover_sets_sizes_and_families(cells):
    assert {cell.name for cell in cells} == set(fitting.CLASSES)
    assert {cell.family for cell in cells} == {"mobilenet", "efficientnet"}
    assert {cell.key[2] for cell in cells} >= {10, 30, 100}


def test_the_shipped_matrix_is_the_fit(cells, strength):
    fitted, shipped = fitting.fit(cells, strength), fitting.shipped()
    for name in ("partial", "full"):
        np.testing.assert_allclose(shipped.gains[name], fitted.gains[name], atol=0.02)
        np.testing.assert_allclose(shipped.deviations[name], fitted.deviations[name], atol=0.02)
        assert shipped.noise[name] == pytest.approx(fitted.noise[name], abs=0.02)
    assert shipped.cost == pytest.approx(fitted.cost, abs=0.01)


@pytest.mark.technique("T009")
def test_on_data_sets_it_was_not_fitted_to_the_matrix_loses_little(cells, sets):
    lost = fitting.regrets(cells, lambda cell: sets[cell.name].choose(cell.place, "accuracy"))
    always = {n: statistics.mean(fitting.regrets(cells, lambda cell, n=n: n)) for n in fitting.ORDER}
    assert statistics.mean(lost) <= min(always.values()) + 0.15
    assert statistics.mean(lost) < always["probe"] - 2


def test_foretold_intervals_hold_what_happens_in_nine_of_ten_left_out_cells(cells, sets):
    assert 0.88 <= fitting.covered(cells, lambda cell: sets[cell.name]) <= 1


def test_more_images_never_lower_the_gain_of_any_strategy(cells, strength):
    found = fitting.fit(cells, strength)
    steps, signs = fitting.differences()
    for name in ("partial", "full"):
        assert (signs * (steps @ found.gains[name])).min() > -1e-6
