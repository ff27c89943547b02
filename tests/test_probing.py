"""Probes: exact, the same whatever the order and the route, and fitted to training images alone."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from finetune.features.logistic import EXCESS, scale_of
from finetune.features.penalties import L2_GRID
from finetune.features.probing import fit_probe, guess_near, knn_predict, sweep_probe
from finetune.models.heads import make_head
from finetune.process import SHARED_PRODUCTS, threads_for


def _blobs(n, d, k, *, seed=0, spread=1.0):
    """Features (n, d) float32 of k overlapping classes, columns of very different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=torch.Generator().manual_seed(99)) * spread
    labels = torch.arange(n) % k
    features = centres[labels] + 2 * torch.randn(n, d, generator=generator)
    scale = torch.logspace(-2, 2, d)
    return features * scale + 3 * scale, labels


def _objective(probe, features, labels, l2):
    """J from the probe's raw weights alone, penalty on the standardised scale."""
    inside = probe.weight * scale_of(features)
    return float(F.cross_entropy(probe.logits(features), labels) + l2 / 2 * inside.square().sum())


@pytest.mark.technique("T004")
@pytest.mark.technique("T108")
@pytest.mark.parametrize(("n", "d"), [(300, 12), (30, 60)], ids=["more images", "more features"])
@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_the_probe_reaches_the_optimum_of_scikit_learn(n, d, l2):
    from sklearn.linear_model import LogisticRegression

    features, labels = _blobs(n, d, 4)
    probe = fit_probe(features, labels, num_classes=4, l2=l2)
    x = features.double()
    x = ((x - x.mean(0)) / scale_of(x)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = LogisticRegression(C=1 / (l2 * n), tol=1e-10, max_iter=20_000).fit(x, labels.numpy())
    logits = torch.from_numpy(x @ other.coef_.T + other.intercept_)
    theirs = float(F.cross_entropy(logits, labels)) + l2 / 2 * float((other.coef_**2).sum())
    assert probe.objective == pytest.approx(theirs, rel=1e-6)
    assert _objective(probe, features, labels, l2) == pytest.approx(probe.objective, rel=1e-9)
    torch.testing.assert_close(probe.logits(features).softmax(1), logits.softmax(1), rtol=0, atol=2e-4)


@pytest.mark.technique("T108")
@pytest.mark.parametrize(("n", "d"), [(200, 20), (20, 50)])
@pytest.mark.parametrize("l2", [1e-5, 1e-2, 10.0])
def test_the_gradient_vanishes_at_the_solution(n, d, l2):
    features, labels = _blobs(n, d, 3)
    probe = fit_probe(features, labels, num_classes=3, l2=l2)
    mean, std = features.double().mean(0), scale_of(features)
    weight = (probe.weight * std).requires_grad_()
    bias = (probe.bias + probe.weight @ mean).requires_grad_()
    x = (features.double() - mean) / std
    (F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()).backward()
    norm = float(torch.cat([weight.grad.flatten(), bias.grad]).norm())
    assert norm <= 1e-6
    assert norm == pytest.approx(probe.gradient_norm, abs=1e-9)
    assert norm**2 / (2 * l2) <= 2 * EXCESS * probe.objective


@pytest.mark.parametrize(("n", "d"), [(120, 10), (24, 40)])
def test_the_order_of_images_does_not_matter(n, d):
    features, labels = _blobs(n, d, 3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    one = fit_probe(features, labels, num_classes=3, l2=0.01)
    other = fit_probe(features[order], labels[order], num_classes=3, l2=0.01)
    assert one.objective == pytest.approx(other.objective, rel=1e-8)
    torch.testing.assert_close(one.logits(features), other.logits(features), rtol=0, atol=1e-3)


def test_a_head_made_of_the_probe_gives_the_logits_of_the_standardised_one():
    features, labels = _blobs(200, 16, 4)
    probe = fit_probe(features, labels, num_classes=4, l2=0.1)
    mean, std = features.double().mean(0), scale_of(features)
    standardised = (features.double() - mean) / std
    plain = standardised @ (probe.weight * std).T + (probe.bias + probe.weight @ mean)
    torch.testing.assert_close(probe.logits(features), plain, rtol=0, atol=1e-5)
    assert float((probe.bias + probe.weight @ mean).mean()) == pytest.approx(0, abs=1e-9)
    small = features / features.std(0)  # as a network's features: float32 holds them to 1e-5
    probe = fit_probe(small, labels, num_classes=4, l2=0.1)
    head = make_head(16, 4, init="probe", weight=probe.weight, bias=probe.bias)
    torch.testing.assert_close(head(small).double(), probe.logits(small), rtol=0, atol=1e-5)


@pytest.mark.technique("T020")
def test_standardisation_comes_from_training_images_alone():
    features, labels = _blobs(90, 8, 3)
    scaled, moved = features * 1000, features + 1000 * features.std(0)
    one = fit_probe(features, labels, num_classes=3, l2=0.05)
    for other in (scaled, moved):  # the common unit and the offset of a column do not matter
        probe = fit_probe(other, labels, num_classes=3, l2=0.05)
        torch.testing.assert_close(probe.logits(other), one.logits(features), rtol=0, atol=5e-3)
    val_features, val_labels = _blobs(30, 8, 3, seed=1)
    found, _ = sweep_probe(features, labels, val_features * 100 + 7, val_labels, num_classes=3, grid=[0.05])
    torch.testing.assert_close(found.weight, one.weight, rtol=1e-3, atol=1e-6)


@pytest.mark.technique("T020")
def test_a_constant_feature_is_neither_divided_by_zero_nor_used():
    features, labels = _blobs(60, 5, 3)
    features[:, 2] = 0.1
    probe = fit_probe(features, labels, num_classes=3, l2=0.05)
    without = fit_probe(features[:, [0, 1, 3, 4]], labels, num_classes=3, l2=0.05)
    assert probe.weight.isfinite().all()
    assert probe.objective == pytest.approx(without.objective, rel=1e-7)
    assert float(probe.weight[:, 2].abs().max()) < 1e-3


def test_a_feature_that_rarely_fires_does_not_drown_the_others():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    told = torch.where(labels == 0, -1.0, 1.0)[:, None] + torch.randn(20, 4, generator=generator)
    rare = torch.zeros(20, 30)
    rare[torch.arange(30) % 20, torch.arange(30)] = 0.05  # each fires once, a little
    known = torch.cat([told, rare], 1)
    probe = fit_probe(known, labels, num_classes=2, l2=0.01)
    fired = torch.cat([torch.ones(1, 4), torch.ones(1, 30)], 1)  # later, all fire at once
    calm = torch.cat([torch.ones(1, 4), torch.zeros(1, 30)], 1)
    lead, calm_lead = (float(logits[0, 1] - logits[0, 0]) for logits in (probe.logits(fired), probe.logits(calm)))
    assert 0.5 * calm_lead < lead < 2 * calm_lead
    assert float(scale_of(known)[4:].min()) > 5 * float(rare.std(0, correction=0).max())


def test_an_endless_penalty_leaves_the_log_of_the_number_of_classes():
    features, labels = _blobs(100, 6, 5)
    probe = fit_probe(features, labels, num_classes=5, l2=1e9)
    assert probe.objective == pytest.approx(math.log(5), abs=1e-6)


def test_where_a_fit_begins_changes_nothing_but_the_time():
    features, labels = _blobs(40, 90, 3)
    near = fit_probe(features, labels, num_classes=3, l2=0.03)
    cold, warm = (fit_probe(features, labels, num_classes=3, l2=0.01, start=start) for start in (None, near))
    assert warm.objective == pytest.approx(cold.objective, rel=1e-7)
    again = fit_probe(features, labels, num_classes=3, l2=0.01, start=cold)
    assert again.iterations <= 1
    assert again.objective == pytest.approx(cold.objective, rel=1e-7)


def test_a_class_without_images_keeps_its_column_and_disturbs_no_other():
    features, labels = _blobs(60, 6, 3)
    moved = torch.tensor([0, 2, 3])[labels]  # class 1 of 4, and class 4 of 5, have no images
    probe, plain = (
        fit_probe(features, moved, num_classes=5, l2=0.1),
        fit_probe(features, labels, num_classes=3, l2=0.1),
    )
    assert probe.weight.shape == (5, 6)
    torch.testing.assert_close(probe.logits(features)[:, [0, 2, 3]], plain.logits(features), rtol=0, atol=1e-6)
    assert float(probe.logits(features).softmax(1)[:, [1, 4]].max()) < 1 / 60
    alone = fit_probe(features, torch.zeros(60, dtype=torch.long), num_classes=2, l2=0.1)
    assert (alone.logits(features).argmax(1) == 0).all()


@pytest.mark.technique("T004")
@pytest.mark.parametrize(("n", "d"), [(200, 20), (40, 80)])
def test_the_sweep_finds_the_penalty_that_separate_exact_fits_find(n, d):
    features, labels = _blobs(n, d, 4)
    val_features, val_labels = _blobs(100, d, 4, seed=1)
    probe, choice = sweep_probe(features, labels, val_features, val_labels, num_classes=4)
    exact = {
        l2: float(F.cross_entropy(fit_probe(features, labels, num_classes=4, l2=l2).logits(val_features), val_labels))
        for l2 in L2_GRID
    }
    assert probe.l2 == choice.l2 == min(exact, key=exact.__getitem__)
    assert probe.gradient_norm <= 1e-6
    assert probe.objective == pytest.approx(fit_probe(features, labels, num_classes=4, l2=probe.l2).objective, rel=1e-7)
    assert choice.losses[probe.l2] / 100 == pytest.approx(exact[probe.l2], rel=1e-3)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_small_problems_are_solved_with_one_thread(monkeypatch):
    """Waiting threads cost several times the processor time of the sweep itself."""
    used = []

    def seen(original):
        return lambda *rest, **options: used.append(torch.get_num_threads()) or original(*rest, **options)

    monkeypatch.setattr(F, "cross_entropy", seen(F.cross_entropy))
    monkeypatch.setattr(torch.Tensor, "log_softmax", seen(torch.Tensor.log_softmax))
    features, labels = _blobs(60, 8, 3)
    for solve in (
        lambda: fit_probe(features, labels, num_classes=3, l2=1.0),
        lambda: sweep_probe(features, labels, features, labels, num_classes=3),
        lambda: guess_near(features, labels, features, num_classes=3, l2=1.0),
    ):
        used.clear()
        solve()
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
    monkeypatch.setattr("finetune.process.SHARED_PRODUCTS", 60 * 8 * 3)
    used.clear()
    fit_probe(features, labels, num_classes=3, l2=1.0)
    assert set(used) == {2}


@pytest.mark.usefixtures("two_threads")
def test_the_threads_are_put_back_also_after_an_error():
    with threads_for(SHARED_PRODUCTS):
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(SHARED_PRODUCTS - 1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="l2 must be positive"):
        fit_probe(*_blobs(60, 8, 3), num_classes=3, l2=0.0)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": 0.0}, "l2 must be positive"),
        ({"l2": float("nan")}, "l2 must be positive"),
        ({"labels": torch.tensor([0, 1, 2, 9])}, "labels must lie in 0 to 2, got 0 to 9"),
        ({"labels": torch.tensor([0, 1])}, r"got \(4, 2\) and \(2,\)"),
        ({"features": torch.full((4, 2), float("inf"))}, "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    given = {"features": torch.randn(4, 2), "labels": torch.tensor([0, 1, 2, 0]), "num_classes": 3, "l2": 1.0} | change
    with pytest.raises(ValueError, match=message):
        fit_probe(**given)


def test_neighbours_vote_by_cosine_and_weight():
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.05, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    asked = torch.tensor([[50.0, 1.0], [0.001, 0.1], [1.0, 0.2]])  # length does not count
    assert knn_predict(known, labels, asked, num_classes=3, k=5).tolist() == [0, 1, 0]
    assert knn_predict(known, labels, asked, num_classes=3, k=2, chunk=1).tolist() == [0, 1, 0]
    assert knn_predict(known, labels, known, num_classes=3, k=1).tolist() == labels.tolist()
    with pytest.raises(ValueError, match="k must lie in 1 to 5"):
        knn_predict(known, labels, asked, num_classes=3, k=6)
