import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from finetune.metrics.intervals import (
    bootstrap_mean,
    mean_of_differences,
    mean_of_f1,
    mean_of_shares,
    paired_difference,
)
from finetune.metrics.shares import wilson

Z = 1.959963984540054


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 7), (7, 7), (1, 3), (140, 153), (1, 100_000), (50, 100)])
def test_wilson_equals_scipy(hits, n, confidence):
    expected = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    interval = wilson(hits, n, confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval.value == hits / n and interval.n == n


def test_wilson_stays_between_0_and_1_and_holds_its_value():
    for n in (1, 2, 3, 10, 49, 1000):
        for hits in range(0, n + 1):
            interval = wilson(hits, n)
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
            assert interval.high - interval.low > 0
    assert wilson(0, 9).low == 0.0 and wilson(9, 9).high == 1.0


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_a_share_of_nothing_is_refused(hits, n):
    with pytest.raises(ValueError, match="0 <= hits <= n"):
        wilson(hits, n)
    with pytest.raises(ValueError, match="confidence must lie in"):
        wilson(1, 2, confidence=95)


def test_an_interval_becomes_the_json_of_a_share():
    assert list(wilson(2, 4).model_dump()) == ["value", "low", "high", "n"]


def test_paired_difference_equals_published_numbers():
    """Bentur's airway data in Fagerland, Lydersen & Laake 2014, table VI; and R's PropCIs::scoreci.mp."""
    airways = paired_difference(1, 7, 21)
    assert (airways.value, airways.low, airways.high) == pytest.approx((-0.286, -0.517, -0.026), abs=5e-4)
    mentees = paired_difference(28, 25, 618, confidence=0.90)
    assert (mentees.low, mentees.high) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


@pytest.mark.parametrize(("first", "second", "n"), [(9, 3, 40), (1, 7, 21), (5, 0, 30), (40, 60, 100), (0, 2, 300)])
def test_the_ends_of_a_paired_difference_solve_the_score_equation(first, second, n):
    """The nuisance share comes from a numeric likelihood search here, from a formula there."""

    def statistic(difference):
        def negative_likelihood(share):
            cells = (share + difference, share, 1 - 2 * share - difference)
            return -sum(
                k * math.log(max(p, 1e-300)) for k, p in zip((first, second, n - first - second), cells, strict=True)
            )

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        share = optimize.minimize_scalar(
            negative_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}
        ).x
        return (first - second - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))

    interval = paired_difference(first, second, n)
    assert statistic(interval.low) == pytest.approx(Z, abs=1e-4)
    assert statistic(interval.high) == pytest.approx(-Z, abs=1e-4)


def test_without_discordant_pairs_the_difference_is_as_wide_as_wilson_for_no_hits():
    interval = paired_difference(0, 0, 100)
    assert interval.value == 0.0
    assert interval.high == pytest.approx(wilson(0, 100).high, abs=1e-12)
    assert interval.low == pytest.approx(-interval.high, abs=1e-12)


def test_exchanging_the_classifiers_mirrors_the_difference():
    for first, second, n in [(9, 3, 40), (0, 4, 4), (0, 5, 90), (50, 49, 99)]:
        here, there = paired_difference(first, second, n), paired_difference(second, first, n)
        assert (here.low, here.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
        assert -1 <= here.low <= here.value <= here.high <= 1
    assert paired_difference(5, 0, 5).high == 1.0


@pytest.mark.parametrize("cells", [(0.10, 0.04), (0.03, 0.0), (0.3, 0.2)])
def test_paired_differences_cover_the_truth_as_often_as_promised(cells):
    draws = np.random.default_rng(0).multinomial(80, [*cells, 1 - sum(cells)], size=2000)
    tables, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    truth = cells[0] - cells[1]
    intervals = [paired_difference(int(first), int(second), 80) for first, second in tables]
    covers = np.array([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.935 <= (covers * times).sum() / times.sum() <= 0.995  # rare pairs: a little too often


@pytest.mark.parametrize(("first", "second", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_pairs_are_refused(first, second, n):
    with pytest.raises(ValueError, match="discordant pairs do not fit"):
        paired_difference(first, second, n)


def test_the_mean_of_one_share_is_that_share():
    one, mean = wilson(7, 9), mean_of_shares([7], [9])
    assert (mean.value, mean.low, mean.high, mean.n) == pytest.approx((one.value, one.low, one.high, one.n))


def test_a_mean_of_perfect_shares_keeps_a_width():
    interval = mean_of_shares([3, 20], [3, 20])
    assert interval.value == interval.high == 1.0
    assert wilson(3, 3).low < interval.low < wilson(23, 23).low


def test_the_mean_of_shares_covers_where_a_stratified_bootstrap_does_not():
    """The reason for not bootstrapping balanced accuracy: one class of three images."""
    counts, truths = np.array([40, 40, 3]), np.array([0.95, 0.90, 0.80])
    rng = np.random.default_rng(0)
    ours = theirs = 0
    for _ in range(300):
        hits = rng.binomial(counts, truths)
        interval = mean_of_shares(hits.tolist(), counts.tolist())
        ours += interval.low <= truths.mean() <= interval.high
        replicates = (rng.binomial(counts, hits / counts, size=(300, 3)) / counts).mean(axis=1)
        low, high = np.quantile(replicates, [0.025, 0.975])
        theirs += low <= truths.mean() <= high
    assert ours / 300 >= 0.92
    assert theirs / 300 < 0.70


def test_a_perfect_f1_keeps_a_width_and_the_value_is_the_formula():
    assert mean_of_f1([3, 20], [0, 0], 23).value == mean_of_f1([3, 20], [0, 0], 23).high == 1.0
    assert mean_of_f1([3, 20], [0, 0], 23).low < 0.9
    found = mean_of_f1([6, 2], [4, 4], 12)
    assert found.value == pytest.approx((12 / 16 + 4 / 8) / 2) and found.n == 12
    assert 0 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(
    ("counts", "errors"), [([50, 50], (0.1, 0.1)), ([47, 3], (0.01, 0.05)), ([470, 30], (0.05, 0.3))]
)
def test_the_interval_of_macro_f1_covers_and_that_of_a_bootstrap_does_not_always(counts, errors):
    rng, rates, ours, theirs = np.random.default_rng(0), np.array(errors), 0, 0

    def mean_f1(wrong):  # (..., 2): images of each class that were called the other
        right = np.array(counts) - wrong
        return (2 * right / (2 * right + wrong.sum(-1, keepdims=True))).mean(-1)

    truth = mean_f1(np.array(counts) * rates)
    for _ in range(200):
        wrong = rng.binomial(counts, rates)
        found = mean_of_f1((np.array(counts) - wrong).tolist(), [int(wrong.sum())] * 2, sum(counts))
        ours += found.low <= truth <= found.high
        low, high = np.quantile(mean_f1(rng.binomial(counts, wrong / counts, size=(300, 2))), [0.025, 0.975])
        theirs += low <= truth <= high
    assert ours / 200 >= 0.93
    assert counts != [47, 3] or theirs / 200 < 0.7


def test_the_mean_of_differences_is_that_of_the_classes_and_keeps_a_width():
    one, mean = paired_difference(3, 1, 20), mean_of_differences([3], [1], [20])
    assert (mean.value, mean.low, mean.high, mean.n) == pytest.approx((one.value, one.low, one.high, one.n))
    found = mean_of_differences([0, 2], [0, 0], [100, 2])  # the rare class alone has changed
    assert found.value == pytest.approx(0.5) and -0.2 < found.low < 0.5 < found.high <= 1
    assert mean_of_differences([0, 0], [0, 0], [5, 5]).low < 0


def test_no_mean_of_no_classes():
    with pytest.raises(ValueError, match="must match and not be 0"):
        mean_of_f1([], [], 0)
    with pytest.raises(ValueError, match="there must be one"):
        mean_of_differences([1], [1, 2], [3])


def test_no_mean_of_no_shares():
    with pytest.raises(ValueError, match="must match and not be 0"):
        mean_of_shares([], [])
    with pytest.raises(ValueError, match="must match"):
        mean_of_shares([1], [1, 2])


def test_the_bootstrap_repeats_with_its_seed_and_changes_with_another():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_the_bootstrap_agrees_with_the_normal_theory_for_many_values():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    interval = bootstrap_mean(values, seed=0)
    half = Z * float(values.std()) / math.sqrt(len(values))
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert interval.low < interval.value < interval.high


def test_bootstrap_means_cover_the_truth_of_a_skewed_loss():
    losses = torch.empty(300, 60, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    intervals = [bootstrap_mean(row, seed=seed, resamples=400) for seed, row in enumerate(losses)]
    assert 0.89 <= sum(interval.low <= 1 <= interval.high for interval in intervals) / 300 <= 0.98


@pytest.mark.parametrize("values", [torch.empty(0), torch.zeros(2, 2), torch.tensor([1.0, math.nan])])
def test_no_mean_of_nothing_or_of_nan(values):
    with pytest.raises(ValueError, match="finite values of shape"):
        bootstrap_mean(values, seed=0)
