"""Distances between sets of features: equal to the textbook, without bias, and exact as a linear program."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from finetune.metrics.distances import (
    GAMMA,
    Gaussian,
    class_prototypes,
    emd,
    emd_similarity,
    fit_gaussian,
    frechet,
    frechet_to,
)


def _normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()


def _mixed(n, d, seed):
    """Correlated columns of different scale; another mixture for every seed."""
    return _normal(n, d, seed) @ _normal(d, d, seed + 1000) + _normal(1, d, seed + 2000)


def _points(k, z, d=3):
    """Two weighted sets of points; the weights sum to neither 1 nor each other."""
    weights = [1 + torch.rand(n, generator=torch.Generator().manual_seed(n)).double() for n in (k, z)]
    return _normal(k, d, 1), weights[0], _normal(z, d, 2) + 1, weights[1]


def test_a_gaussian_holds_mean_and_unbiased_covariance():
    x = _mixed(30, 4, 0)
    gaussian = fit_gaussian(x.float())
    torch.testing.assert_close(gaussian.mean, x.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(gaussian.covariance, x.T.cov(), rtol=1e-5, atol=1e-5)
    assert gaussian.n == 30 and gaussian.covariance.dtype == torch.float64


@pytest.mark.technique("T016")
@pytest.mark.parametrize(("n", "d"), [(100, 6), (20, 60)], ids=["N > D", "N < D: a singular covariance"])
def test_a_set_is_at_no_distance_from_itself(n, d):
    gaussian = fit_gaussian(_normal(n, d, 0))
    assert 0 <= frechet(gaussian, gaussian) <= 1e-8


@pytest.mark.technique("T016")
def test_the_frechet_distance_is_the_published_formula_and_symmetric():
    from scipy.linalg import sqrtm

    for seed in range(3):
        a, b = fit_gaussian(_mixed(50, 7, seed)), fit_gaussian(_mixed(40, 7, seed + 10))
        root = sqrtm((a.covariance @ b.covariance).numpy()).real
        plain = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(root)
        assert frechet(a, b) == pytest.approx(plain, rel=1e-9)
        assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-12)


@pytest.mark.technique("T016")
def test_the_frechet_distance_of_known_gaussians():
    eye = torch.eye(6).double()
    unit = Gaussian(mean=torch.zeros(6).double(), covariance=eye, n=1)
    moved = Gaussian(mean=torch.full((6,), 0.5).double(), covariance=9 * eye, n=1)
    assert frechet(unit, moved) == pytest.approx(6 * 0.25 + 6 * (3 - 1) ** 2)


@pytest.mark.technique("T016")
def test_half_a_deviation_in_six_dimensions_measures_one_and_a_half():
    measured = frechet(fit_gaussian(_normal(20_000, 6, 0)), fit_gaussian(_normal(20_000, 6, 1) + 0.5))
    assert measured == pytest.approx(6 * 0.25, abs=0.08)  # three standard errors


@pytest.mark.technique("T016")
@pytest.mark.parametrize(("n", "components"), [(50, 12), (200, 50), (1000, 64)])
def test_few_rows_of_the_source_itself_are_at_no_distance(n, components):
    """Without the correction they are far: the plain distance exceeds the corrected many times."""
    scale = torch.arange(1, 65).double() ** -0.5
    source = Gaussian(mean=torch.ones(64).double(), covariance=scale.square().diag(), n=1_000_000)
    draws = [frechet_to(_normal(n, 64, seed) * scale + 1, source) for seed in range(8)]
    corrected = sum(draw.value for draw in draws) / 8
    baseline = sum(draw.baseline for draw in draws) / 8
    assert {(draw.n, draw.components) for draw in draws} == {(n, components)}
    theory = components / n + components * (components + 1) / (4 * n)  # of the mean, and of the covariance
    assert baseline == pytest.approx(theory, rel=0.1)
    assert abs(corrected) < 0.1 * baseline


@pytest.mark.technique("T016")
def test_the_noise_of_a_small_source_is_corrected_too():
    draws = [frechet_to(_normal(400, 8, seed), fit_gaussian(_normal(200, 8, seed + 50))) for seed in range(40)]
    mean = sum(draw.value for draw in draws) / 40
    plain = sum(draw.value + draw.baseline for draw in draws) / 40
    assert plain > 0.15 and abs(mean) < 0.2 * plain


@pytest.mark.technique("T016")
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_the_corrected_distance_measures_a_shift_of_the_mean(n):
    source = Gaussian(mean=torch.zeros(64).double(), covariance=torch.eye(64).double(), n=1_000_000)
    x = _normal(n, 64, 0)
    found = [frechet_to(x + shift, source) for shift in (0.0, 0.25, 0.5, 1.0)]
    assert [found[i].value < found[i + 1].value for i in range(3)] == [True] * 3
    assert found[3].value == pytest.approx(found[3].components, rel=0.2)  # one deviation, squared, in each


@pytest.mark.technique("T016")
def test_the_scale_of_the_extractor_does_not_matter():
    source, x = _mixed(500, 10, 0), _mixed(80, 10, 3)
    here = frechet_to(x, fit_gaussian(source))
    there = frechet_to(100 * x + 5, fit_gaussian(100 * source + 5))
    assert there.value == pytest.approx(here.value, rel=1e-6)


def test_only_leading_directions_of_the_source_are_compared():
    scale = torch.tensor([3.0, 2.0, 1.0, 0.0]).double()
    source = fit_gaussian(_normal(500, 4, 0) * scale)
    x = _normal(100, 4, 1) * scale
    assert frechet_to(x, source).components == 3  # the fourth does not vary
    moved = x + torch.tensor([0.0, 0.0, 9.0, 9.0])
    seen, unseen = frechet_to(moved, source), frechet_to(moved, source, components=2)
    assert seen.value > 50 and abs(unseen.value) < 0.5 and unseen.components == 2


def test_the_splits_repeat_with_their_seed():
    source, x = fit_gaussian(_normal(500, 8, 0)), _normal(41, 8, 1)
    assert frechet_to(x, source, seed=3) == frechet_to(x, source, seed=3)
    assert frechet_to(x, source, seed=3) != frechet_to(x, source, seed=4)


@pytest.mark.technique("T016")
def test_the_earth_movers_distance_equals_scipy():
    from scipy.stats import wasserstein_distance_nd

    target, supply, source, demand = _points(6, 9)
    expected = wasserstein_distance_nd(target.numpy(), source.numpy(), supply.numpy(), demand.numpy())
    assert emd(target, supply, source, demand) == pytest.approx(expected, rel=1e-9)
    assert emd_similarity(target, supply, source, demand) == pytest.approx(math.exp(-GAMMA * expected))
    assert emd_similarity(target, supply, source, demand, gamma=2.0) == pytest.approx(math.exp(-2 * expected))


@pytest.mark.technique("T016")
def test_equal_weights_make_it_the_best_of_all_pairings():
    target, _, source, _ = _points(5, 5)
    ways = torch.cdist(target, source)
    best = min(sum(float(ways[i, j]) for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
    assert emd(target, torch.ones(5), source, torch.ones(5)) == pytest.approx(best)


@pytest.mark.technique("T016")
def test_it_equals_a_dense_linear_program():
    from scipy.optimize import linprog

    target, supply, source, demand = _points(4, 7)
    rows = [np.outer(np.eye(4)[i], np.ones(7)).ravel() for i in range(4)]
    columns = [np.outer(np.ones(4), np.eye(7)[j]).ravel() for j in range(7)]
    amounts = torch.cat([supply / supply.sum(), demand / demand.sum()]).numpy()
    costs = torch.cdist(target, source).numpy().ravel()
    plain = linprog(costs, A_eq=np.array(rows + columns), b_eq=amounts, method="highs-ipm").fun
    assert emd(target, supply, source, demand) == pytest.approx(plain, rel=1e-6)


@pytest.mark.technique("T016")
def test_equal_sets_are_wholly_similar_in_any_order_of_classes():
    points, weights, other, others = _points(20, 30)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert emd(points, weights, points[order], 5 * weights[order]) == pytest.approx(0, abs=1e-12)
    assert emd_similarity(points, weights, points, weights) == pytest.approx(1, abs=1e-12)
    assert emd_similarity(points[:1], weights[:1], points[:1], weights[:1]) == 1.0
    here, there = emd(points, weights, other, others), emd(points[order], weights[order], other, others)
    assert here == pytest.approx(there, rel=1e-9)
    assert emd(other, others, points, weights) == pytest.approx(here, rel=1e-9)


@pytest.mark.technique("T016")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_shift_moves_the_earth_by_its_length_at_every_scale(scale):
    points, weights, *_ = _points(10, 10)
    shift = scale * torch.tensor([2.0, 3.0, 6.0])
    assert emd(scale * points, weights, scale * points + shift, weights) == pytest.approx(7 * scale, rel=1e-6)


def test_a_class_without_weight_moves_nothing():
    points, weights, other, others = _points(5, 4)
    more, zero = torch.cat([points, torch.full((1, 3), 1e3)]), torch.zeros(1)
    with_it = emd(more, torch.cat([weights, zero]), other, others)
    assert with_it == pytest.approx(emd(points, weights, other, others), rel=1e-7)


def test_prototypes_are_class_means_and_empty_classes_are_left_out():
    x, labels = _normal(40, 3, 0), torch.tensor([0, 3, 3, 1] * 10)
    prototypes, weights = class_prototypes(x.float(), labels, num_classes=5)
    expected = torch.stack([x[labels == label].mean(0) for label in (0, 1, 3)])
    torch.testing.assert_close(prototypes, expected, rtol=0, atol=1e-6)
    assert weights.tolist() == [0.25, 0.25, 0.5] and weights.dtype == prototypes.dtype == torch.float64


def test_features_that_do_not_fit_are_refused():
    source = fit_gaussian(_normal(50, 3, 0))
    for bad in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="features must have shape"):
            fit_gaussian(bad)
    with pytest.raises(ValueError, match="not finite"):
        fit_gaussian(torch.full((4, 3), math.inf))
    with pytest.raises(ValueError, match="a has 3 features but b has 2"):
        frechet(source, fit_gaussian(_normal(50, 2, 0)))
    with pytest.raises(ValueError, match="N >= 4"):
        frechet_to(_normal(3, 3, 0), source)
    with pytest.raises(ValueError, match="4 columns but source has 3"):
        frechet_to(_normal(9, 4, 0), source)
    with pytest.raises(ValueError, match="components must be positive"):
        frechet_to(_normal(9, 3, 0), source, components=0)
    with pytest.raises(ValueError, match="no variance"):
        frechet_to(_normal(9, 3, 0), fit_gaussian(torch.ones(9, 3)))


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 rows but labels"):
        class_prototypes(torch.zeros(4, 2), torch.zeros(3), num_classes=2)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
            class_prototypes(torch.zeros(2, 2), torch.tensor([0, wrong]), num_classes=2)


def test_weights_that_do_not_fit_are_refused():
    points, weights, other, others = _points(3, 4)
    for bad in (weights[:2], -weights, 0 * weights, weights * math.nan):
        with pytest.raises(ValueError, match="target_weights must be 3 finite values"):
            emd(points, bad, other, others)
    with pytest.raises(ValueError, match="target has 3 features but source has 2"):
        emd(points, weights, other[:, :2], others)
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be positive"):
            emd_similarity(points, weights, other, others, gamma=gamma)
