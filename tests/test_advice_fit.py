"""The advisor's constants are the fit to the committed runs, and following it costs what the docs say."""

import statistics
import sys
from pathlib import Path

import pytest

from finetune.recipe import advice

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
regret = pytest.importorskip("regret", reason="benchmarks/ is not beside tests/")


@pytest.fixture(scope="module")
def cells():
    return regret.read_cells()


def test_every_cell_was_run_and_measured(cells):
    names = {"ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k"}
    sizes = {(n, seed) for n in (5, 20, 50, 400) for seed in (0, 1, 2)}
    first = [cell.key for cell in cells if cell.key[1] == "mobilenetv2_100.imagenet_keras"]
    second = [cell.key for cell in cells if cell.key[1] == "mobilenetv2_100.inat_insect"]
    assert {(key[0], *key[2:]) for key in first} == {(name, *size) for name in names for size in sizes}
    assert {(key[0], *key[2:]) for key in second} >= {(name, *size) for name in names for size in sizes if size[1] < 2}
    assert len(first) + len(second) == len(cells)


def test_the_shipped_rule_is_the_fit(cells):
    fitted = regret.fit(cells)
    assert (fitted.center, fitted.power) == (advice.SHIFT_CENTER, advice.SHIFT_POWER)
    for strategy, gains in advice.GAINS.items():
        assert gains == pytest.approx(fitted.gains[strategy], abs=6e-4)
        assert advice.GAIN_ERRORS[strategy] == pytest.approx(fitted.errors[strategy], abs=6e-4)


def test_the_product_computes_similarity_as_the_fit_does(cells):
    for cell in cells[:10]:
        assert regret.similarity_of(cell.shift) == pytest.approx(regret.shipped().similarity(cell))


@pytest.mark.technique("T009")
def test_on_data_sets_it_was_not_fitted_to_the_advisor_loses_little(cells):
    rules = {cell.name: regret.fit([other for other in cells if other.name != cell.name]) for cell in cells}
    lost = regret.mean_regrets(cells, lambda cell: rules[cell.name].choose(cell))
    always = {
        name: statistics.mean(regret.mean_regrets(cells, lambda cell, name=name: name)) for name in regret.STRATEGIES
    }
    assert statistics.mean(lost) <= 0.7
    assert max(lost) <= 2.5
    assert all(statistics.mean(lost) < always[name] - 0.3 for name in regret.STRATEGIES if name != "partial")


def test_strange_images_are_less_similar_than_photographs(cells):
    mean = lambda name: statistics.mean(regret.shipped().similarity(c) for c in cells if c.name == name)  # noqa: E731
    assert min(mean("ants_bees"), mean("flowers5"), mean("cifar10_20k")) > 0.8
    assert max(mean("malaria"), mean("sign_digits")) < 0.5
