"""The solver of logistic regression: each step goes downhill, and its guess of the curvature can be divided by."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from finetune.features.curvature import guess_inverse
from finetune.features.logistic import LogisticProblem


def blobs(n, d, k, *, seed=0):
    """Features (n, d) of k overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    return torch.randn(k, d, generator=generator)[labels] + torch.randn(n, d, generator=generator), labels


def objective(problem, features, labels, weights, l2):
    """Mean cross-entropy plus penalty of weights in the solver's coordinates."""
    logits = problem.logits(problem.inside(features), weights)
    return float(F.cross_entropy(logits, labels) + l2 / 2 * weights[:-1].square().sum())


@pytest.mark.parametrize(("n", "d"), [(120, 10), (40, 90)], ids=["N > D", "N < D"])
def test_where_the_path_points_to_is_better_than_where_it_ended(n, d):
    features, labels = blobs(n, d, 4)
    problem = LogisticProblem(features, labels, 4)
    before = problem.improve(problem.zero(), 1.0)
    last = problem.improve(before, 0.3)
    for l2 in (0.1, 0.01, 1e-4):
        ahead = problem.follow(last, before, l2)
        ended, pointed = (objective(problem, features, labels, point.weights, l2) for point in (last, ahead))
        assert pointed < 0.98 * ended
        logits = problem.logits(problem.inside(features), ahead.weights)
        torch.testing.assert_close((ahead.logits - logits).var(1), torch.zeros(n), rtol=0, atol=1e-6)


def test_no_step_goes_uphill():
    """Newton's own step would: far from the minimum the objective is not quadratic."""
    features, labels = blobs(200, 12, 5)
    problem = LogisticProblem(features, labels, 5)
    point = problem.improve(problem.zero(), 10.0)
    losses = [objective(problem, features, labels, point.weights, 1e-5)]
    for _ in range(8):
        point = problem.improve(point, 1e-5)
        losses.append(objective(problem, features, labels, point.weights, 1e-5))
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(problem.solve(point.weights, 1e-5).objective, rel=0.02)


def test_the_guess_is_the_hessian_where_it_takes_all_images_as_they_are():
    """Of one class against all others, for which no image is left over."""
    features, labels = blobs(30, 6, 2)
    problem = LogisticProblem(features, labels, 2)
    x = problem.inside(features)
    x = x - x.mean(0)
    chances = torch.full((30, 2), 0.5)
    divide = guess_inverse(x, x.square().mean(0), chances, 0.1)
    slope = torch.randn(7, 1, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, -1.0])
    ones = torch.cat([x, torch.ones(30, 1)], 1)
    hessian = 0.25 * ones.T @ ones / 30 + torch.diag(torch.tensor([0.1] * 6 + [0.0]))
    torch.testing.assert_close(hessian @ divide(slope), slope, rtol=0, atol=0.1)


def test_the_guess_stays_positive_on_many_copies_and_a_penalty_of_next_to_nothing():
    x = 1e3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(8, 50)
    divide = guess_inverse(x, torch.full((50,), 1e6), torch.full((8, 3), 1 / 3), 1e-9)
    slope = torch.randn(51, 3, generator=torch.Generator().manual_seed(1))
    divided = divide(slope)
    assert divided.isfinite().all()
    assert float((slope * divided).sum()) > 0
