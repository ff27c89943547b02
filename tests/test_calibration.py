import math

import pytest
import torch
import torch.nn.functional as F
from scipy import optimize

from finetune.metrics.calibration import apply_temperature, fit_temperature, log_probabilities
from finetune.metrics.classification import decide


def _calibrated(n=5000, num_classes=6, seed=0):
    """Logits, and labels drawn from their own softmax: the best temperature is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.4])
def test_a_planted_temperature_is_found(factor):
    logits, labels = _calibrated()
    fitted = fit_temperature(factor * logits, labels)
    assert fitted.value == pytest.approx(factor, rel=0.05)
    assert fitted.n == 5000
    if factor == 3:
        assert fitted.ece_after < 0.03 < 0.1 < fitted.ece_before


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("factor", [8.0, 1.5, 0.1])
def test_the_temperature_is_that_of_a_scalar_search(seed, factor):
    logits, labels = _calibrated(n=120, num_classes=3 + seed, seed=seed)
    logits = factor * logits + torch.randn(1, 3 + seed, generator=torch.Generator().manual_seed(seed))
    search = optimize.minimize_scalar(
        lambda log_t: float(F.cross_entropy(logits / math.exp(log_t), labels)),
        bounds=(math.log(0.02), math.log(90)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit_temperature(logits, labels).value == pytest.approx(math.exp(search.x), abs=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_log_loss_never_rises_and_no_decision_changes(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 10 ** (seed % 5 - 2) * torch.randn(30, 4, generator=generator)
    labels = torch.where(torch.rand(30, generator=generator) < 0.5, logits.argmax(dim=1), torch.arange(30) % 4)
    fitted = fit_temperature(logits, labels)
    assert fitted.value is not None  # at any scale of the logits
    assert fitted.log_loss_after <= fitted.log_loss_before
    assert fitted.log_loss_after == pytest.approx(float(F.cross_entropy(logits.double() / fitted.value, labels)))
    assert torch.equal(decide(apply_temperature(logits, fitted.value).softmax(dim=1)), logits.argmax(dim=1))


def test_fitting_again_finds_nothing_left_to_mend():
    logits, labels = _calibrated(n=500)
    first = fit_temperature(5 * logits, labels)
    assert fit_temperature(5 * logits / first.value, labels).value == pytest.approx(1.0, abs=1e-8)


def test_averages_are_scaled_through_their_log_probabilities():
    logits, labels = _calibrated(n=300)
    average = torch.stack([(2 * logits).softmax(dim=1), (3 * logits).softmax(dim=1)]).mean(dim=0)
    fitted = fit_temperature(log_probabilities(average), labels)
    assert fitted.value > 1.5
    torch.testing.assert_close(apply_temperature(log_probabilities(average), 1.0).softmax(dim=1), average)
    scaled_before = torch.stack([((k * logits) / fitted.value).softmax(dim=1) for k in (2, 3)]).mean(dim=0)
    scaled_after = apply_temperature(log_probabilities(average), fitted.value).softmax(dim=1)
    assert not torch.allclose(scaled_after, scaled_before, atol=1e-3)


def test_log_probabilities_are_finite_for_zeros():
    assert log_probabilities(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.0, math.log(1e-38)])


@pytest.mark.parametrize(
    "logits",
    [torch.eye(4) * 3, torch.eye(4) * 300, -torch.eye(4), torch.zeros(4, 4)],
    ids=["all right", "all very right", "all misled", "constant"],
)
def test_no_temperature_where_the_images_name_none(logits):
    fitted = fit_temperature(logits, torch.arange(4))
    assert fitted.value is None
    assert (fitted.log_loss_after, fitted.ece_after) == (fitted.log_loss_before, fitted.ece_before)
    assert fitted.value is None


def test_one_mistake_is_enough_to_name_a_temperature():
    fitted = fit_temperature(torch.eye(4)[[0, 1, 2, 3]] * 30, torch.tensor([0, 1, 2, 0]))
    assert fitted.value == pytest.approx(30 / math.log(9), rel=1e-6)  # softmax of the winner is then 3/4


def test_what_cannot_be_scaled_is_refused():
    labels = torch.arange(2)
    with pytest.raises(ValueError, match="take `log_probabilities`"):
        fit_temperature(torch.eye(2).log(), labels)
    with pytest.raises(ValueError, match="N >= 1"):
        fit_temperature(torch.empty(0, 2), labels[:0])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        fit_temperature(torch.eye(2), labels + 1)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            apply_temperature(torch.eye(2), temperature)
