"""Conformal sets: what they promise holds, exactly where theory is exact, and too few images promise nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics.conformal import (
    EVERYTHING,
    describe,
    expected_range,
    fit_threshold,
    least_images,
    prediction_set,
)


def _drawn(n, num_classes=5, seed=0):
    """Probabilities that are too sure by a factor, and labels: the promise asks nothing of a classifier."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return (3 * logits).softmax(dim=1), labels


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 40), coverage=st.sampled_from([0.5, 0.7, 0.8, 0.9, 0.95]), seed=st.integers(0, 10_000))
def test_each_image_left_out_in_turn_is_covered_exactly_as_often_as_promised(n, coverage, seed):
    """The proof of the promise, carried out: of n + 1 exchangeable images any may be the new one."""
    probabilities, labels = _drawn(n + 1, seed=seed)
    covered = 0
    for new in range(n + 1):
        others = [index for index in range(n + 1) if index != new]
        threshold = fit_threshold(probabilities[others], labels[others], coverage)
        covered += bool(prediction_set(probabilities[new : new + 1], threshold)[0, labels[new]])
    promised = min(n + 1, math.ceil(round((n + 1) * coverage, 9)))
    assert covered == promised
    assert coverage <= covered / (n + 1) <= coverage + 1 / (n + 1)


def test_the_mean_coverage_over_400_resamples_lies_within_its_bounds():
    """100 calibration images and 0.9 promised: between 0.9 and 0.9 + 1 / 101."""
    probabilities, labels = _drawn(3000)
    shares = []
    for seed in range(400):
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
        calibration, test = order[:100], order[100:]
        sets = prediction_set(probabilities[test], fit_threshold(probabilities[calibration], labels[calibration], 0.9))
        shares.append(float(sets.gather(1, labels[test, None]).double().mean()))
    assert 0.9 - 0.003 < sum(shares) / 400 < 0.9 + 1 / 101 + 0.003  # two standard errors of 400
    low, high = expected_range(100, 0.9)
    assert 0.92 < sum(low <= share <= high for share in shares) / 400 < 0.98


def test_the_threshold_is_the_higher_quantile_of_one_minus_the_probability_of_the_label():
    own = torch.tensor([0.9, 0.2, 0.7, 0.5, 0.8, 0.6, 0.3, 0.95, 0.4], dtype=torch.float64)
    probabilities = torch.stack([own, 1 - own], dim=1)
    labels = torch.zeros(9, dtype=torch.long)
    assert fit_threshold(probabilities, labels, 0.9) == pytest.approx(1 - 0.2)  # the ninth of nine
    assert fit_threshold(probabilities, labels, 0.5) == pytest.approx(1 - 0.6)  # the fifth
    sets = prediction_set(torch.tensor([[0.65, 0.35], [0.5, 0.5], [0.6, 0.4]]).double(), 0.4)
    assert sets.tolist() == [[True, False], [False, False], [True, False]]


def test_a_class_as_probable_as_the_threshold_is_in_the_set():
    """Where all images are alike none may fall out: ties cover more than was promised, never less."""
    probabilities, labels = torch.full((12, 2), 0.5), torch.arange(12) % 2
    assert prediction_set(probabilities, fit_threshold(probabilities, labels, 0.8)).all()


@pytest.mark.parametrize(("n", "coverage", "rank"), [(99, 0.55, 55), (99, 0.07, 7), (19, 0.95, 19), (9, 0.9, 9)])
def test_rounding_of_floats_asks_for_no_image_more(n, coverage, rank):
    own = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    probabilities = torch.stack([own, 1 - own], dim=1)
    threshold = fit_threshold(probabilities, torch.zeros(n, dtype=torch.long), coverage)
    assert threshold == pytest.approx(rank / (n + 1))


@pytest.mark.parametrize(("coverage", "least"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_too_few_images_give_all_classes_and_say_so(coverage, least):
    assert least_images(coverage) == least
    probabilities, labels = _drawn(least)
    assert fit_threshold(probabilities, labels, coverage) < EVERYTHING
    threshold = fit_threshold(probabilities[1:], labels[1:], coverage)
    assert threshold == EVERYTHING
    found = describe(probabilities, labels, threshold, coverage=coverage, num_calibration=least - 1)
    assert found.mean_size.value == 5 and found.coverage.value == 1 and found.empty == 0
    assert f"takes {least}" in found.note and "all classes" in found.note


def test_a_description_counts_what_the_sets_hold():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]]).double()
    labels = torch.tensor([0, 0, 1, 2])
    found = describe(probabilities, labels, 0.655, coverage=0.8, num_calibration=50)
    assert prediction_set(probabilities, 0.655).sum(dim=1).tolist() == [1, 1, 2, 0]
    assert (found.single, found.single_right, found.empty, found.largest) == (2, 1, 1, 2)
    assert found.coverage.value == 0.5 and found.coverage.n == 4
    assert found.coverage.low < 0.5 < found.coverage.high
    assert found.mean_size.value == 1.0
    assert found.note.startswith("1 sets are empty")


def test_a_coverage_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\), got 90"):
        fit_threshold(*_drawn(20), 90)
    with pytest.raises(ValueError, match="labels"):
        fit_threshold(_drawn(20)[0], torch.zeros(3, dtype=torch.long), 0.9)
