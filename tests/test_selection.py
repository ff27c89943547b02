"""Averages of predictions and the choice of members: facts that hold for any numbers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.metrics.classification import log_loss
from finetune.metrics.selection import AVERAGES, average, disagreement, ensemble_table, greedy_selection
from finetune.metrics.shares import wilson

SEEDS = st.integers(0, 2**31)
QUICK = settings(max_examples=40, deadline=None, database=None)


def drawn(seed, members=4, images=30, classes=3, sharpness=2.0):
    """Members that know something, each in its own way, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = sharpness * torch.randn(members, images, classes, generator=generator, dtype=torch.float64)
    logits += torch.nn.functional.one_hot(labels, classes)
    return logits.softmax(-1), labels


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_one_is_that_one_bit_for_bit(kind):
    probabilities = drawn(0)[0].float()
    assert torch.equal(average(probabilities[:1], kind), probabilities[0])
    assert torch.equal(average(probabilities[:1], kind, [0.3]), probabilities[0])


def test_identical_members_average_to_one_of_them_bit_for_bit():
    one = drawn(0)[0][0].float()
    for number in (2, 3, 7):
        assert torch.equal(average(one.expand(number, -1, -1)), one)
    torch.testing.assert_close(average(one.expand(3, -1, -1), "logit"), one)


@pytest.mark.parametrize("kind", AVERAGES)
@QUICK
@given(seed=SEEDS)
def test_order_does_not_matter(kind, seed):
    probabilities = drawn(seed)[0]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
    weights = [4.0, 1.0, 2.0, 3.0]
    torch.testing.assert_close(
        average(probabilities[order], kind, [weights[at] for at in order]),
        average(probabilities, kind, weights),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.technique("T156")
@pytest.mark.parametrize("kind", AVERAGES)
@QUICK
@given(seed=SEEDS, sharpness=st.integers(1, 4))
def test_the_log_loss_of_the_mean_is_never_above_the_mean_log_loss(kind, seed, sharpness):
    probabilities, labels = drawn(seed, sharpness=sharpness)
    mean = sum(log_loss(member, labels) for member in probabilities) / len(probabilities)
    assert log_loss(average(probabilities, kind), labels) <= mean + 1e-12


def test_a_weight_is_as_many_copies_of_the_member():
    probabilities = drawn(1)[0]
    for kind in AVERAGES:
        twice = average(probabilities[[0, 0, 1]], kind)
        torch.testing.assert_close(average(probabilities[:2], kind, [2, 1]), twice)


def test_the_two_averages_are_the_arithmetic_and_the_normalised_geometric_mean():
    probabilities = torch.tensor([[[0.8, 0.1, 0.1]], [[0.2, 0.6, 0.2]]], dtype=torch.float64)
    torch.testing.assert_close(average(probabilities)[0], torch.tensor([0.5, 0.35, 0.15], dtype=torch.float64))
    roots = torch.tensor([0.16, 0.06, 0.02], dtype=torch.float64).sqrt()
    torch.testing.assert_close(average(probabilities, "logit")[0], roots / roots.sum())


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ([1.0], "probability", "weights must be 4 numbers"),
        ([1.0, 1, 1, -1], "probability", "none negative"),
        ([0.0, 0, 0, 0], "probability", "not all 0"),
        (None, "median", "kind must be one of probability, logit, got 'median'"),
    ],
)
def test_a_wrong_average_is_refused(weights, kind, message):
    with pytest.raises(ValueError, match=message):
        average(drawn(0)[0], kind, weights)


def test_no_member_is_refused():
    with pytest.raises(ValueError, match="M >= 1"):
        average(torch.empty(0, 3, 2))


@pytest.mark.technique("T158")
@pytest.mark.parametrize("kind", AVERAGES)
@QUICK
@given(seed=SEEDS)
def test_the_log_loss_never_rises_along_the_greedy_path_and_each_step_saves_more_than_the_tolerance(kind, seed):
    probabilities, labels = drawn(seed, members=6)
    path = greedy_selection(probabilities, labels, tolerance=1e-3, kind=kind)
    losses = [log_loss(average(probabilities[list(path[:size])], kind), labels) for size in range(1, len(path) + 1)]
    assert all(after < before - 1e-3 + 1e-12 for before, after in pairwise(losses))
    assert losses[0] == min(log_loss(member, labels) for member in probabilities)
    for member in range(6) if len(set(path)) < 5 else set(path):  # nothing that could be added would save more
        assert log_loss(average(probabilities[[*path, member]], kind), labels) >= losses[-1] - 1e-3 - 1e-12


@pytest.mark.technique("T158")
@QUICK
@given(seed=SEEDS)
def test_a_planted_useless_member_is_never_first(seed):
    probabilities, labels = drawn(seed, members=3, sharpness=0.5)
    useless = (probabilities[0] * 0 + 1e-3).scatter(1, ((labels + 1) % 3)[:, None], 1 - 2e-3)
    for place in range(4):
        pool = torch.cat([probabilities[:place], useless[None], probabilities[place:]])
        assert greedy_selection(pool, labels)[0] != place


def test_a_good_member_is_taken_more_than_once():
    probabilities, labels = drawn(3, members=8, images=60, sharpness=1.5)
    path = greedy_selection(probabilities, labels, tolerance=1e-6)
    assert len(path) > len(set(path))


def test_only_so_many_members_differ():
    probabilities, labels = drawn(3, members=8, images=300, sharpness=3.0)
    assert len(set(greedy_selection(probabilities, labels, tolerance=1e-6))) == 5
    assert len(set(greedy_selection(probabilities, labels, tolerance=1e-6, most=2))) == 2
    assert len(set(greedy_selection(probabilities, labels, most=1))) == 1


def test_of_equal_members_the_first_is_taken_once():
    probabilities, labels = drawn(0)
    assert greedy_selection(probabilities[[0, 0, 0]], labels) == (0,)


@pytest.mark.parametrize(("most", "tolerance"), [(0, 1e-4), (5, 0.0), (5, float("nan"))])
def test_a_selection_without_an_end_is_refused(most, tolerance):
    with pytest.raises(ValueError, match="most must be at least 1 and tolerance above 0"):
        greedy_selection(*drawn(0), most=most, tolerance=tolerance)


def test_disagreement_is_the_share_of_pairs_and_images_that_differ():
    one, other = torch.eye(2)[[0, 0, 0, 0]], torch.eye(2)[[0, 0, 0, 1]]
    assert disagreement(torch.stack([one, one])) == 0
    assert disagreement(torch.stack([one, other])) == 0.25
    assert disagreement(torch.stack([one, one, other])) == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert disagreement(one[None]) == 0


@pytest.mark.technique("T157")
def test_the_table_shows_members_their_mean_and_what_each_size_of_ensemble_gains_and_costs():
    probabilities, labels = drawn(5, members=3, images=400)
    table = ensemble_table(probabilities, labels, names=["a", "b", "c"])
    assert [row.name for row in table] == ["a", "b", "c", "mean of members", "ensemble of 2", "ensemble of 3"]
    assert [row.cost for row in table] == [1, 1, 1, 1, 2, 3]
    members, mean, whole = table[:3], table[3], table[-1]
    right = [int((member.argmax(1) == labels).sum()) for member in probabilities]
    assert [row.interval for row in members] == [wilson(hits, 400) for hits in right]
    assert mean.accuracy == pytest.approx(sum(right) / 1200)
    assert mean.interval is None
    assert whole.log_loss == log_loss(average(probabilities), labels) < mean.log_loss
    assert whole.gain == pytest.approx(whole.accuracy - mean.accuracy)
    assert whole.gain > 0.01  # independent mistakes are outvoted
    assert whole.disagreement == pytest.approx(disagreement(probabilities))
    assert members[0].disagreement == pytest.approx(
        (disagreement(probabilities[:2]) + disagreement(probabilities[[0, 2]])) / 2
    )
    assert whole.model_dump()["interval"]["n"] == 400


def test_the_table_of_one_member_shows_an_ensemble_that_is_that_member():
    probabilities, labels = drawn(0, members=1)
    member, _, whole = ensemble_table(probabilities, labels)
    assert (whole.log_loss, whole.accuracy, whole.ece, whole.gain) == (member.log_loss, member.accuracy, member.ece, 0)
