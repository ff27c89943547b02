"""When a training is stopped, what it goes back to, and what its curves say."""

import json
import math

import pytest
import torch
from torch import nn

from finetune.config.recipe import ScheduleSpec
from finetune.errors import RunError
from finetune.planning.lr_schedules import cycle_ends
from finetune.training.watching import (
    RECOVERY_FACTOR,
    WINDOW,
    Curves,
    Divergence,
    EarlyStop,
    Recovery,
    copy_weights,
    is_hopeless,
    symptoms,
    update_ratios,
)


def first_complaint(rule, losses):
    """The step, from 1, at which the rule speaks, and what it says."""
    for step, loss in enumerate(losses, start=1):
        if why := rule.sees(loss):
            return step, why
    return None, None


@pytest.mark.technique("T082")
@pytest.mark.technique("T181")
def test_a_loss_that_jumps_stops_where_the_mean_of_ten_steps_passes_three_times_the_first():
    # of ten steps k are at 23: their mean is 2.3 + 2.07 k, and passes 6.9 with the third
    step, why = first_complaint(Divergence(num_classes=2, ratio=3.0), [2.3] * 30 + [23.0] * 10)
    assert step == 33
    assert why == "step 33: the mean loss of the last 10 steps is 8.51, more than 3 x 2.3 (the first loss)"


@pytest.mark.technique("T082")
def test_a_loss_that_grows_steadily_stops_at_the_step_that_the_formula_gives():
    def loss(step):
        return 2.0 * 1.1 ** (step - 1)

    expected = next(t for t in range(WINDOW, 99) if sum(map(loss, range(t - WINDOW + 1, t + 1))) / WINDOW > 6.0)
    assert first_complaint(Divergence(num_classes=2), map(loss, range(1, 99)))[0] == expected


@pytest.mark.technique("T082")
def test_after_a_probe_the_floor_is_log_k_and_noise_is_no_divergence():
    noisy = [0.05, *([0.4, 0.6] * 50)]  # ten times the first loss, and far below log 10
    assert first_complaint(Divergence(num_classes=10), noisy) == (None, None)
    step, why = first_complaint(Divergence(num_classes=10), [0.05, *[7.0] * 20])
    assert step == 11  # the window is full with step 10, but holds 0.05 until then: 6.3 < 3 log 10
    assert "3 x 2.303 (log 10)" in why


@pytest.mark.technique("T082")
def test_one_bad_batch_is_no_divergence():
    assert first_complaint(Divergence(num_classes=10), [2.3] * 15 + [40.0] + [2.3] * 15) == (None, None)
    assert first_complaint(Divergence(num_classes=10), [2.3, 30.0, *[2.3] * 30]) == (None, None)


@pytest.mark.technique("T081")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ratio", [3.0, None])
def test_a_loss_that_is_not_finite_stops_at_once(bad, ratio):
    for step in (1, 2, 41):
        losses = [2.3] * (step - 1) + [bad]
        assert first_complaint(Divergence(num_classes=10, ratio=ratio), losses) == (
            step,
            f"step {step}: the loss is {bad}",
        )


def test_no_ratio_lets_a_finite_loss_be():
    assert first_complaint(Divergence(num_classes=10, ratio=None), [10.0**step for step in range(30)]) == (None, None)


@pytest.mark.technique("T082")
@pytest.mark.parametrize("cut", [1, 5, 12, 31])
def test_an_interrupted_run_stops_at_the_same_step(cut):
    losses = [2.3] * 30 + [23.0] * 10
    before, after = Divergence(num_classes=2), Divergence(num_classes=2)
    assert first_complaint(before, losses[:cut]) == (None, None)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert cut + first_complaint(after, losses[cut:])[0] == 33
    assert after.steps == 33


@pytest.mark.technique("T081")
def test_too_high_a_rate_is_caught_on_a_real_network_and_a_lower_one_is_not():
    torch.manual_seed(0)
    images, labels = torch.randn(64, 20), torch.arange(64) % 4

    def run(lr):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer, rule = torch.optim.SGD(model.parameters(), lr=lr), Divergence(num_classes=4)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(images), labels)
            if rule.sees(float(loss.detach())):
                return True
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return False

    assert run(300.0)
    assert not run(0.1)


@pytest.mark.technique("T081")
def test_the_first_divergence_goes_back_with_lower_rates_and_the_second_says_what_to_set():
    rule = Recovery()
    assert rule.factor == 1.0
    said = rule.after("step 41: the loss is nan", lr=0.01)
    assert rule.factor == RECOVERY_FACTOR
    assert said == ("training diverged (step 41: the loss is nan): going back, with 0.3 of the rates (lr 0.003)")
    resumed = Recovery(times=rule.times)
    with pytest.raises(RunError, match=r"again, at 0\.3 of the rates \(step 50.*set train\.optimizer\.lr to 0\.001 "):
        resumed.after("step 50: the loss is inf", lr=0.01)


def run_to_the_end(rule, losses):
    """The epoch after which the rule stops, and the one it keeps."""
    rule.sees(-1, 9.0)
    for epoch, loss in enumerate(losses):
        rule.sees(epoch, loss)
        if rule.is_over(epoch):
            break
    return epoch, rule.best_epoch


@pytest.mark.technique("T179")
def test_under_cycles_patience_counts_ends_of_cycles_only():
    ends = cycle_ends(ScheduleSpec(name="cyclic", cycles=6), 18)
    assert ends == (3, 6, 9, 12, 15, 18)
    bumps = [1.9, 1.2, 1.0, 1.8, 1.1, 0.9]  # two cycles that each rise after the restart, and get better at their end
    assert run_to_the_end(EarlyStop(patience=2), bumps) == (4, 2)  # the epochs after a restart look like the end
    losses = [*bumps, *[1.5, 1.2, 1.0] * 4]
    assert run_to_the_end(EarlyStop(patience=2, cycle_ends=ends), losses) == (
        11,
        5,
    )  # the ends at 9 and 12 are no better
    assert run_to_the_end(EarlyStop(patience=1, cycle_ends=ends), losses) == (8, 5)


@pytest.mark.technique("T179")
def test_under_growing_cycles_the_same_rule_holds():
    ends = cycle_ends(ScheduleSpec(name="cosine_restarts", cycles=3, growth=2.0), 14)
    assert ends == (2, 6, 14)
    losses = [1.0, 0.5, *[0.9] * 12]
    assert run_to_the_end(EarlyStop(patience=1, cycle_ends=ends), losses) == (5, 1)
    assert run_to_the_end(EarlyStop(patience=2, cycle_ends=ends), losses) == (13, 1)


@pytest.mark.technique("T180")
@pytest.mark.parametrize("ends", [(), (2, 4, 6, 8)], ids=["plain", "cycles"])
def test_the_weights_of_the_earliest_best_epoch_are_what_is_left(ends):
    rule, kept, losses = EarlyStop(patience=2, cycle_ends=ends), None, [0.9, 0.4, math.nan, 0.4, 0.6, 0.7, 0.1, 0.1]
    for epoch, loss in enumerate(losses):
        weights = torch.full((3,), float(epoch))
        if rule.sees(epoch, loss):
            kept = weights
        if rule.is_over(epoch):
            break
    assert epoch == (5 if ends else 3)
    assert kept.tolist() == [1.0, 1.0, 1.0]


def two_parts(head=1.0, backbone=1.0):
    head, backbone = nn.Parameter(torch.full((4,), head)), nn.Parameter(torch.full((9,), backbone))
    still = nn.Parameter(torch.full((2,), 100.0))
    groups = [
        {"params": [head], "part": "head", "lr": 0.01},
        {"params": [backbone], "part": "backbone/layer4", "lr": 0.001},
    ]
    return torch.optim.SGD(groups), head, backbone, still


def test_the_update_ratio_is_rate_times_gradient_over_weight_by_part():
    optimizer, head, backbone, _ = two_parts()
    head.grad, backbone.grad = torch.full((4,), -2.0), torch.full((9,), 3.0)
    before = copy_weights(optimizer)
    optimizer.step()
    ratios = update_ratios(before, optimizer)
    assert ratios.keys() == {"head", "backbone"}
    assert ratios["head"] == pytest.approx(0.02, rel=1e-4)
    assert ratios["backbone"] == pytest.approx(0.003, rel=1e-4)


def test_the_update_ratio_of_weights_that_begin_at_zero_is_one():
    optimizer, head, _, _ = two_parts(head=0.0, backbone=0.0)
    head.grad = torch.ones(4)
    before = copy_weights(optimizer)
    optimizer.step()
    assert update_ratios(before, optimizer) == {"head": pytest.approx(1.0), "backbone": 0.0}


@pytest.fixture
def curves(tmp_path):
    written = Curves(tmp_path / "curves.csv")

    def write(stage, **columns):
        for name, values in columns.items():
            for epoch, value in enumerate(values):
                written.append(stage, epoch, epoch, {name.replace("__", "/"): value})
        return written.rows()

    return write


@pytest.mark.technique("T079")
def test_a_loss_that_barely_changes_is_said_to_be_too_low_a_rate(curves):
    rows = curves("1-full", train__loss=[2.303, 2.302, 2.302, 2.301], train__top1=[0.1, 0.12, 0.11, 0.12])
    (said,) = symptoms(rows)
    assert said.startswith("1-full: loss 2.303 to 2.301 (-0.1%), accuracy 10.0% to 12.0%: the loss barely changes.")
    assert "too low" in said


@pytest.mark.technique("T080")
def test_accuracy_that_jumps_while_the_loss_is_flat_is_learning_and_both_are_shown(curves):
    rows = curves("1-full", train__loss=[2.303, 2.300, 2.296, 2.290], train__top1=[0.1, 0.14, 0.19, 0.21])
    (said,) = symptoms(rows)
    assert "loss 2.303 to 2.29 (-0.6%), accuracy 10.0% to 21.0%" in said
    assert "it is learning" in said
    assert "probably low" in said
    assert "barely" not in said


@pytest.mark.technique("T081")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["train__loss", "train__running_loss", "val__loss"])
def test_a_curve_that_is_not_finite_means_too_high_a_rate(curves, bad, name):
    rows = curves("2-full", **{name: [2.3, 2.2, bad, bad]}, train__top1=[0.1] * 4)
    (said,) = symptoms(rows)
    assert said.startswith("2-full: ")
    assert "exploded" in said
    assert "too high" in said


def test_a_loss_that_rises_means_too_high_a_rate(curves):
    (said,) = symptoms(curves("1-full", train__loss=[1.0, 1.2, 1.4], train__top1=[0.5, 0.4, 0.3]))
    assert "+40.0%" in said
    assert "too high" in said


@pytest.mark.parametrize(
    ("losses", "top1"),
    [
        ([2.3, 1.5, 1.0, 0.7], [0.1, 0.4, 0.6, 0.8]),
        ([0.02, 0.02, 0.02], [0.99, 0.99, 0.99]),
        ([2.3, 2.3], [0.1, 0.1]),
    ],
    ids=["learns", "has learned", "too short to say"],
)
def test_a_training_without_symptoms_gets_none(curves, losses, top1):
    rows = curves("1-full", train__loss=losses, train__top1=top1, update_ratio=[1.0, 2e-3, 1e-3, 5e-5, 3e-4])
    assert symptoms(rows) == ()


@pytest.mark.parametrize(
    ("ratio", "said"), [(1e-6, "1-full: steps of the head are small"), (0.3, "1-full: steps of the head are large")]
)
def test_steps_far_from_a_thousandth_of_the_weights_are_named(curves, ratio, said):
    rows = curves("1-full", update_ratio__head=[1.0, ratio, ratio], update_ratio__backbone=[1e-3] * 3)
    (found,) = symptoms(rows)
    assert found.startswith(said)


def test_stages_are_judged_apart(curves):
    curves("1-head", train__loss=[2.3, 1.5, 1.0], train__top1=[0.1, 0.5, 0.7])
    (said,) = symptoms(curves("2-full", train__loss=[1.0, 1.0, 1.0], train__top1=[0.7, 0.7, 0.7]))
    assert said.startswith("2-full: ")


@pytest.mark.technique("T181")
def test_a_trial_behind_the_median_of_the_others_is_broken_off():
    others = [[1.0, 0.8, 0.6], [1.1, 0.7, 0.5], [1.2, 0.9, 0.9]]
    assert not is_hopeless([1.1], others)
    assert is_hopeless([1.15], others)  # the median of the others' first epochs is 1.1
    assert not is_hopeless([1.15, 0.79], others)  # and of their best two 0.8: it has caught up
    assert is_hopeless([1.15, math.nan], others)
    assert not is_hopeless([9.0, 9.0], others[:2])  # two trials are no yardstick
    assert not is_hopeless([9.0] * 4, others)  # nobody else came so far
    assert not is_hopeless([], others)
