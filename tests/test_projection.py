"""Projections: principal components and whitening, from training features alone."""

from dataclasses import replace

import pytest
import torch

from finetune.metrics.projection import EPSILON, fit_projection, leave_binary


def _features(n, d, *, seed=0, decay=1.0):
    """Rows of d mixed features off the origin; component j has the variance j^-decay."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)).double())[0]
    scores = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    return (scores * torch.arange(1, d + 1).double() ** (-decay / 2)) @ basis.T + 3


@pytest.mark.technique("T027")
@pytest.mark.parametrize(("n", "d"), [(300, 20), (20, 60), (40, 40)], ids=["N > D", "N < D", "N = D"])
def test_components_of_training_features_are_uncorrelated(n, d):
    x = _features(n, d)
    assert (x.T.cov() - x.T.cov().diagonal().diag()).abs().max() > 0.01
    projection = fit_projection(x, keep=1.0, whiten=False)
    z = projection.apply(x)
    covariance, k = z.T.cov(), z.shape[1]
    assert k == min(n - 1, d)
    assert z.mean(0).abs().max() < 1e-12
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-8 * covariance.diagonal().min()
    torch.testing.assert_close(covariance.diagonal(), projection.variances)
    assert (projection.variances.diff() <= 0).all()
    torch.testing.assert_close(projection.directions.T @ projection.directions, torch.eye(k).double())
    assert float(projection.variances.sum()) == pytest.approx(float(x.T.cov().trace()))


@pytest.mark.technique("T027")
def test_keeping_every_component_keeps_every_distance():
    x, new = _features(50, 8), _features(30, 8, seed=1)
    z = fit_projection(x, keep=8, whiten=False).apply(new)
    torch.testing.assert_close(torch.pdist(z), torch.pdist(new))


@pytest.mark.technique("T028")
def test_whitened_training_features_have_the_identity_as_covariance():
    x = _features(500, 16)
    projection = fit_projection(x, keep=1.0, whiten=True)
    assert projection.floor == pytest.approx(EPSILON * float(x.T.cov().trace()) / 16)
    torch.testing.assert_close(projection.apply(x).T.cov(), torch.eye(16).double(), rtol=0, atol=1e-3)


@pytest.mark.technique("T028")
def test_the_floor_keeps_a_nearly_constant_direction_small():
    x = _features(200, 3, decay=0.0) * torch.tensor([1.0, 1.0, 1e-5])
    assert fit_projection(x, keep=3, whiten=True).apply(x).std(0)[-1] < 0.01


@pytest.mark.technique("T028")
def test_whitening_forgets_scale_and_offset_of_the_extractor():
    """Up to the signs of the directions, which mean nothing."""
    x, new = _features(100, 6), _features(40, 6, seed=1)
    z = fit_projection(x, keep=4, whiten=True).apply(new)
    scaled = fit_projection(1000 * x - 7, keep=4, whiten=True).apply(1000 * new - 7)
    torch.testing.assert_close(scaled.abs(), z.abs())


@pytest.mark.technique("T028")
@pytest.mark.parametrize("whiten", [False, True])
def test_other_features_pass_through_the_constants_of_training(whiten):
    x, new = _features(60, 10), 5 * _features(30, 10, seed=1) + 2
    projection = fit_projection(x, keep=4, whiten=whiten)
    z = projection.apply(new)
    scale = (projection.variances + projection.floor).sqrt() if whiten else torch.ones(4).double()
    torch.testing.assert_close(z, (new - x.mean(0)) @ projection.directions / scale)
    assert torch.equal(projection.apply(torch.cat([new, 1e6 * new]))[:30], z)  # a batch does not see itself
    again = fit_projection(x, keep=4, whiten=whiten)
    for name in ("mean", "directions", "variances"):
        assert torch.equal(getattr(again, name), getattr(projection, name))
    assert z.dtype == torch.float64 and z.shape == (30, 4)


@pytest.mark.technique("T028")
def test_few_rows_do_not_inflate_the_noise_of_new_features():
    x, new = _features(60, 64), _features(4000, 64, seed=1)
    shrunk = fit_projection(x, keep=1.0, whiten=True)
    plain = replace(shrunk, variances=fit_projection(x, keep=1.0, whiten=False).variances)
    assert plain.apply(new).var(0).max() > 50
    assert shrunk.apply(new).var(0).max() < 3
    assert 0.5 < shrunk.apply(new).var(0).mean() < 1.5


@pytest.mark.technique("T028")
def test_the_shrinkage_is_that_of_scikit_learn():
    from sklearn.covariance import ledoit_wolf_shrinkage

    x = _features(30, 80)
    plain, shrunk = (fit_projection(x, keep=1.0, whiten=whiten).variances for whiten in (False, True))
    share = ledoit_wolf_shrinkage(x.numpy())
    assert 0.05 < share < 0.95
    torch.testing.assert_close(shrunk, (1 - share) * plain + share * plain.sum() / 80)


def test_a_float_keeps_a_share_of_variance_and_an_int_a_number_of_components():
    x = torch.zeros(8, 4)
    for column, length in enumerate((4.0, 2.0, 1.0, 0.5)):  # variances 16 : 4 : 1 : 1/4
        x[2 * column, column], x[2 * column + 1, column] = length, -length

    def widths(keep):
        return fit_projection(x, keep=keep, whiten=False).apply(x).shape[1]

    shares = [16 / 21.25, 20 / 21.25, 21 / 21.25, 1.0]
    for number, share in enumerate(shares, start=1):
        assert widths(number) == number
        assert widths(share - 1e-6) == widths(share) == number
        assert number == 4 or widths(share + 1e-6) == number + 1


def test_single_precision_far_from_the_origin_costs_no_digits():
    x = _features(100, 5).float() + 1000
    projection = fit_projection(x, keep=5, whiten=False)
    torch.testing.assert_close(projection.variances, torch.linalg.eigvalsh(x.double().T.cov()).flip(0))


def test_columns_that_do_not_vary_make_no_component():
    x = torch.cat([_features(50, 4), torch.full((50, 2), 7.0)], dim=1)
    assert fit_projection(x, keep=1.0, whiten=True).apply(x).shape[1] == 4
    with pytest.raises(ValueError, match="keep=5 components, but features vary in 4 directions"):
        fit_projection(x, keep=5, whiten=True)


@pytest.mark.technique("T029")
def test_columns_of_zeros_and_ones_are_left_as_they_are():
    x = torch.tensor([[0.0, 0.5, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, -1.0]])
    assert leave_binary(x).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, float("nan"), True, 6])
def test_an_impossible_number_of_components_is_refused(keep):
    with pytest.raises(ValueError, match="keep"):
        fit_projection(_features(20, 5), keep=keep, whiten=False)


def test_features_without_shape_numbers_or_variance_are_refused():
    for bad in (torch.zeros(3), torch.zeros(1, 3), torch.full((4, 3), float("nan"))):
        with pytest.raises(ValueError, match="features must be finite"):
            fit_projection(bad, keep=1, whiten=False)
    for shape in ((4, 3), (3, 4)):
        with pytest.raises(ValueError, match="rows of features are equal"):
            fit_projection(torch.full(shape, 0.1), keep=1, whiten=True)
    with pytest.raises(ValueError, match=r"shape \(M, 5\), got \(2, 4\)"):
        fit_projection(_features(20, 5), keep=1, whiten=False).apply(torch.zeros(2, 4))
