"""Averages of weights: their closed forms, what they hold, and a model that is itself again afterwards."""

import io
import math

import pytest
import torch
from made_averages import copy_of, is_same, make_classifier
from made_facts import make_facts
from torch import nn

from finetune.config.reading import load_recipe
from finetune.models.batch_norm import exact_statistics, moving_norms, pooled_statistics
from finetune.planning.planner import make_plan
from finetune.training.weight_averaging import WeightAverage

KINDS = pytest.mark.parametrize(("kind", "decay"), [("ema", 0.9), ("swa", None)])


def keep(model):
    """For models whose batch norm is not in question."""


def walk(model, steps, *, size=0.02, seed=0):
    """Move what trains at random, and say after each step where it is."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        yield {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_holds(average, expected, atol=1e-6):
    assert expected
    weights = average.state_dict()["weights"]
    assert weights.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(weights[name].double(), want, rtol=0, atol=atol)


@pytest.mark.technique("T161")
def test_an_exponential_average_is_its_closed_form_after_fifty_updates():
    """d^t w_0 + (1 - d) sum of d^(t - i) w_i."""
    classifier, d = make_classifier(), 0.93
    start = {name: p.detach().double() for name, p in classifier.named_parameters()}
    expected = {name: d**50 * value for name, value in start.items()}
    average = WeightAverage(classifier, kind="ema", decay=d)
    for number, weights in enumerate(walk(classifier, 50), start=1):
        average.update(classifier)
        for name, value in weights.items():
            expected[name] += (1 - d) * d ** (50 - number) * value.double()
    assert_holds(average, expected)
    assert average.num_shown == 50


@pytest.mark.technique("T161")
def test_a_plain_mean_is_the_arithmetic_mean_of_what_it_was_shown():
    classifier = make_classifier()
    average = WeightAverage(classifier, kind="swa")
    for _ in walk(classifier, 5, seed=1):
        pass  # the way to where the mean begins does not enter it
    shown = []
    for weights in walk(classifier, 20):
        average.update(classifier)
        shown.append(weights)
    assert_holds(average, {name: torch.stack([w[name].double() for w in shown]).mean(0) for name in shown[0]})


@pytest.mark.technique("T161")
@KINDS
def test_weights_that_stay_have_themselves_for_average(kind, decay):
    classifier = make_classifier("test_vit")
    before = copy_of(classifier)
    average = WeightAverage(classifier, kind=kind, decay=decay)
    for _ in range(9):
        average.update(classifier)
    average.apply_to(classifier, keep)
    assert is_same(classifier, before)


@pytest.mark.parametrize(("per_class", "epochs"), [(20, 1), (200, 3), (700, 20)])
@pytest.mark.technique("T161")
def test_the_decay_that_is_planned_looks_back_on_a_tenth_of_the_training(per_class, epochs):
    wishes = ["train.strategy=full", "train.averaging.kind=ema", "train.batch_size=20", f"train.epochs={epochs}"]
    plan = make_plan(load_recipe(None, wishes), make_facts(per_class=per_class))
    decay, steps = plan.train.averaging.ema_decay, epochs * (3 * per_class // 20)
    assert decay == pytest.approx(math.exp(-1 / max(1, 0.1 * steps)), rel=1e-9)
    assert 0.9999**500 > 0.95  # where a fixed decay would still be at the start


@KINDS
def test_only_what_trains_takes_memory(kind, decay):
    classifier = make_classifier(stages=1)
    average = WeightAverage(classifier, kind=kind, decay=decay)
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    held = average.state_dict()["weights"]
    assert set(held) == set(classifier.trainable_names())
    assert (
        average.num_bytes == 4 * sum(p.numel() for p in trained) < 4 * sum(p.numel() for p in classifier.parameters())
    )
    assert not {tensor.data_ptr() for tensor in held.values()} & {p.data_ptr() for p in classifier.parameters()}


@KINDS
def test_an_update_leaves_the_model_alone(kind, decay):
    classifier = make_classifier(stages=2)
    before, modes = copy_of(classifier), [module.training for module in classifier.modules()]
    average = WeightAverage(classifier, kind=kind, decay=decay)
    average.update(classifier)
    assert is_same(classifier, before)
    assert [module.training for module in classifier.modules()] == modes
    assert not any(tensor.requires_grad for tensor in average.state_dict()["weights"].values())


@KINDS
def test_a_saved_average_goes_on_as_if_nothing_had_happened(kind, decay):
    def run(breaks):
        classifier = make_classifier(stages=1)
        average = WeightAverage(classifier, kind=kind, decay=decay)
        for number, _ in enumerate(walk(classifier, 12)):
            average.update(classifier)
            if breaks and number == 6:
                file = io.BytesIO()
                torch.save(average.state_dict(), file)
                file.seek(0)
                average = WeightAverage(make_classifier(stages=1), kind=kind, decay=decay)
                average.load_state_dict(torch.load(file, weights_only=True))
        return average.state_dict()

    whole, broken = run(False), run(True)
    assert whole["num_shown"] == broken["num_shown"] == 12
    assert all(torch.equal(whole["weights"][name], value) for name, value in broken["weights"].items())


def test_a_loaded_average_does_not_share_tensors_with_what_it_was_loaded_from():
    classifier = make_classifier(stages=0)
    average = WeightAverage(classifier, kind="swa")
    average.update(classifier)
    state = average.state_dict()
    other = WeightAverage(classifier, kind="swa")
    other.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in state["weights"].items()}
    for _ in walk(classifier, 1):
        other.update(classifier)
    assert all(torch.equal(before[name], tensor) for name, tensor in average.state_dict()["weights"].items())


def test_a_state_of_another_average_is_refused():
    classifier = make_classifier(stages=0)
    average = WeightAverage(classifier, kind="ema", decay=0.9)
    with pytest.raises(ValueError, match=r"is of swa with decay None, not ema with 0\.9"):
        average.load_state_dict(WeightAverage(classifier, kind="swa").state_dict())
    more = WeightAverage(make_classifier(stages=1), kind="ema", decay=0.9).state_dict()
    with pytest.raises(ValueError, match=r"other weights; backbone\.model\.layer4"):
        average.load_state_dict(more)


@pytest.mark.parametrize(("kind", "decay"), [("ema", None), ("ema", 1.0), ("swa", 0.9), ("mean", None)])
def test_a_kind_without_its_decay_is_refused(kind, decay):
    with pytest.raises(ValueError, match="kind"):
        WeightAverage(make_classifier(stages=0), kind=kind, decay=decay)


def test_nothing_to_average_and_nothing_shown_are_said():
    classifier = make_classifier(stages=0)
    average = WeightAverage(classifier, kind="swa")
    before = copy_of(classifier)
    with pytest.raises(ValueError, match="shown no weights yet"), average.swapped(classifier, keep):
        pass
    assert is_same(classifier, before)
    classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter trains"):
        WeightAverage(classifier, kind="swa")


@pytest.fixture
def batches():
    """Of drawn noise (8, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 32, 32, generator=generator), torch.zeros(8, dtype=torch.long)) for _ in range(3)]


def moved(classifier, batches, kind="swa", decay=None):
    """An average over a short walk, with batch norm following it."""
    average = WeightAverage(classifier, kind=kind, decay=decay)
    for _ in walk(classifier, 4, size=0.05):
        with torch.no_grad():
            classifier(batches[0][0])
        average.update(classifier)
    return average


@KINDS
@pytest.mark.parametrize("fails", [False, True])
def test_raw_weights_and_statistics_come_back_bit_for_bit(batches, kind, decay, fails):
    classifier = make_classifier(stages=3)
    average = moved(classifier, batches, kind, decay)
    with torch.no_grad():  # a weight that is no number must come back as well
        classifier.head.linear.bias[0] = torch.nan
    before, modes = copy_of(classifier), [module.training for module in classifier.modules()]
    bits = {name: tensor.view(torch.uint8).clone() for name, tensor in before.items() if tensor.ndim}
    try:
        with average.swapped(classifier, lambda model: pooled_statistics(model, batches, device="cpu")):
            changed = {n for n, tensor in classifier.state_dict().items() if not torch.equal(tensor, before[n])}
            assert set(classifier.trainable_names()) <= changed
            assert f"{moving_norms(classifier)[0]}.running_mean" in changed
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = classifier.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), value) for name, value in bits.items())
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(after[name], before[name]) for name in before if name.endswith("num_batches_tracked"))


@pytest.mark.technique("T161")
@pytest.mark.technique("T068")
def test_an_average_has_statistics_of_its_own_and_not_those_of_the_last_weights(batches):
    """Where batch norm trains they change what is said; where it is frozen there is nothing to change."""
    images = batches[0][0]
    for batch_norm in ("train", "frozen"):
        classifier = make_classifier(batch_norm=batch_norm)
        average = moved(classifier, batches)
        with torch.no_grad():
            with average.swapped(classifier, keep):
                stale = classifier.eval()(images)
            with average.swapped(classifier, lambda model: exact_statistics(model, batches, device="cpu")):
                fresh = classifier.eval()(images)
                state = copy_of(classifier)
        assert torch.equal(stale, fresh) == (batch_norm == "frozen")
        classifier.load_state_dict(state)
        exact_statistics(classifier, batches, device="cpu")
        assert is_same(classifier, state)  # they are those of the averaged weights


@pytest.mark.technique("T162")
def test_one_pass_of_a_mean_head_says_what_all_heads_say_on_average():
    """Where only a linear head trains, the mean of logits is the logits of the mean: M models for the price of one."""
    classifier = make_classifier(stages=0).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    average, said = WeightAverage(classifier, kind="swa"), []
    with torch.no_grad():
        for _ in walk(classifier, 4, size=0.5):
            average.update(classifier)
            said.append(classifier(images))
        average.apply_to(classifier, keep)
        torch.testing.assert_close(classifier(images), torch.stack(said).mean(0), rtol=1e-4, atol=1e-4)
        assert float((said[0] - said[1]).abs().mean()) > 0.1


@pytest.mark.technique("T162")
def test_averaged_weights_stand_for_an_ensemble_up_to_second_order():
    """Izmailov et al. 2018, section 3.5: half the distance between members is a quarter of the difference."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    gaps, spreads = [], []
    for size in (4e-4, 2e-4):
        classifier = make_classifier("test_vit").double().eval()
        average, said = WeightAverage(classifier, kind="swa"), []
        with torch.no_grad():
            for _ in walk(classifier, 3, size=size):
                average.update(classifier)
                said.append(classifier(images))
            average.apply_to(classifier, keep)
            mean = torch.stack(said).mean(0)
            gaps.append(float((classifier(images) - mean).norm()))
            spreads.append(float((said[0] - mean).norm()))
    assert spreads[0] / spreads[1] == pytest.approx(2, rel=0.1)
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.15)
    assert gaps[0] < 0.2 * spreads[0]


def test_buffers_are_never_averaged():
    """A mask of minus infinity would become NaN, and a counter a fraction."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("count", torch.tensor(0))

    model = Masked()
    average = WeightAverage(model, kind="ema", decay=0.5)
    for number, _ in enumerate(walk(model, 3), start=1):
        model.count.fill_(number)
        average.update(model)
    average.apply_to(model, keep)
    assert model.mask.tolist() == [0.0, -torch.inf]
    assert int(model.count) == 3
