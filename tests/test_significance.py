"""Comparing two classifiers: exact numbers from textbooks, and power that simulations have, too."""

import numpy as np
import pytest
import torch
from scipy import stats

from finetune.metrics.significance import (
    adjust,
    aggregate_seeds,
    images_needed,
    mcnemar,
    mean_difference,
    smallest_difference,
)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (0, 6), (3, 9), (7, 7), (40, 61), (400, 500)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(first, second):
    total = first + second
    expected = stats.binomtest(first, total, 0.5).pvalue if total else 1.0
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(expected, rel=1e-12)


def test_five_against_none_is_not_significant_and_six_is():
    assert mcnemar(5, 0) == 0.0625 and mcnemar(6, 0) == 0.03125


def test_counts_below_zero_are_refused():
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)
    with pytest.raises(ValueError, match="do not fit"):
        images_needed(3, 4, 6)
    with pytest.raises(ValueError, match="difference must lie"):
        images_needed(3, 4, 60, difference=0)


def test_adjusted_p_values_are_holms_and_come_back_in_order():
    """Holm's step-down by hand: 0.01 * 3, max of that and 0.02 * 2, max of that and 0.3."""
    assert adjust([0.3, 0.01, 0.02]) == pytest.approx([0.3, 0.03, 0.04])
    assert adjust([0.04, 0.03]) == pytest.approx([0.06, 0.06])  # never in another order than before
    assert adjust([0.02]) == [0.02] and adjust([]) == []
    assert adjust([0.9, 0.8]) == [1.0, 1.0]


def test_holm_errs_in_one_comparison_of_twenty_at_most():
    random = np.random.default_rng(0)
    families = random.uniform(size=(2000, 10))
    wrong = sum(min(adjust(list(family))) < 0.05 for family in families)
    assert wrong / 2000 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("discordant", "difference"), [(6, 0.01), (20, 0.03), (40, 0.05)])
def test_as_many_images_as_needed_show_four_differences_of_five(discordant, difference):
    """Simulated: the share of samples in which McNemar's test without correction finds the difference."""
    needed = images_needed(discordant // 2, discordant - discordant // 2, 200, difference)
    share = discordant / 200
    cells = [(share + difference) / 2, (share - difference) / 2, 1 - share]
    first, second, _ = np.random.default_rng(0).multinomial(needed, cells, size=4000).T
    found = (first - second) ** 2 > 1.96**2 * (first + second)
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    fewer = np.random.default_rng(1).multinomial(needed // 2, cells, size=4000).T
    assert ((fewer[0] - fewer[1]) ** 2 > 1.96**2 * (fewer[0] + fewer[1])).mean() < 0.6


def test_one_point_takes_about_2900_images_where_one_in_27_tells():
    assert images_needed(3, 3, 162) == pytest.approx(2900, rel=0.01)
    assert images_needed(0, 0, 153) == images_needed(1, 0, 100)  # one point takes one image in a hundred at least


@pytest.mark.parametrize("n", [20, 153, 2000, 100_000])
@pytest.mark.parametrize("discordance", [0.0, 0.04, 0.3, 1.0])
def test_the_smallest_difference_is_the_one_that_needs_n_images(n, discordance):
    least = smallest_difference(n, discordance)
    count = round(discordance * 1000)
    assert images_needed(count, 0, 1000, least) == pytest.approx(n, abs=1.01)
    assert smallest_difference(4 * n, discordance) < least
    assert images_needed(count, 0, 1000, least / 2) > n


def test_three_images_show_no_difference_at_all():
    assert smallest_difference(3, 0.5) == 1.0
    with pytest.raises(ValueError, match="n >= 1"):
        smallest_difference(0, 0.5)


def test_a_paired_difference_of_losses_is_narrower_than_what_each_varies():
    generator = torch.Generator().manual_seed(0)
    hardness = 3 * torch.rand(200, generator=generator)
    first, second = hardness + 0.1 * torch.rand(200, generator=generator), hardness
    found = mean_difference(first, second)
    assert found.value == pytest.approx(float((first - second).mean())) and found.n == 200
    assert 0 < found.low < found.value < found.high < 0.06
    turned = mean_difference(second, first)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-3)
    with pytest.raises(ValueError, match="same images"):
        mean_difference(first, second[:9])


def test_seeds_have_the_interval_of_student():
    values = [0.91, 0.93, 0.90, 0.94]
    found = aggregate_seeds(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert (found.mean, found.spread) == pytest.approx((0.92, np.std(values, ddof=1)))


def test_intervals_over_three_seeds_cover_the_mean_as_often_as_they_say():
    drawn = np.random.default_rng(0).normal(0.9, 0.02, size=(2000, 3))
    covered = [found.low <= 0.9 <= found.high for found in map(aggregate_seeds, drawn.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_spread_and_none_has_no_mean():
    found = aggregate_seeds([0.9])
    assert (found.mean, found.spread, found.low, found.high, found.n) == (0.9, None, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        aggregate_seeds([])
