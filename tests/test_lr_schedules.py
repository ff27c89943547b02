"""Schedules: every rate is its formula, and torch's where torch has it; cycles are whole; drops come in time."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from finetune.config.recipe import ScheduleSpec
from finetune.planning.lr_schedules import (
    CYCLIC,
    MOST_DROPS,
    Plateau,
    cycle_ends,
    draw_curve,
    rate_factor,
    suggest_drops,
    whole_epochs,
)

NAMES = (
    *("constant", "step", "multistep", "exponential", "inverse", "linear", "cosine", "plateau", "one_cycle"),
    *CYCLIC,
)
FORMULAS = {
    "constant": lambda t, n, s: 1.0,
    "plateau": lambda t, n, s: 1.0,
    "step": lambda t, n, s: s.gamma ** math.floor(t / max(1, round(s.every * n))),
    "multistep": lambda t, n, s: math.prod(s.gamma for share in s.milestones if t >= round(share * n)),
    "exponential": lambda t, n, s: math.exp(-s.decades * math.log(10) / n * t),
    "inverse": lambda t, n, s: 1 / (1 + (10**s.decades - 1) / n * t),
    "linear": lambda t, n, s: 1 - (1 - s.end) * t / n,
    "cosine": lambda t, n, s: s.end + (1 - s.end) / 2 * (1 + math.cos(math.pi * t / n)),
}
"""The share of the peak at `t` of the `n` steps after warm-up."""


def _rates(spec, epochs, steps_per_epoch, **options):
    steps = range(epochs * steps_per_epoch)
    return [rate_factor(spec, step, epochs=epochs, steps_per_epoch=steps_per_epoch, **options) for step in steps]


def _torch_rates(make, steps):
    """What a scheduler of torch gives a peak of 1 over `steps` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _draws(name, count=20):
    """Random numbers for a schedule, seeded by its name."""
    draw = random.Random(name)
    for _ in range(count):
        spec = ScheduleSpec(
            name=name,
            warmup_fraction=draw.choice([0.0, 0.05, draw.uniform(0, 0.5)]),
            gamma=draw.uniform(0.1, 1),
            every=draw.uniform(0.1, 1),
            milestones=tuple(sorted(draw.uniform(0, 1) for _ in range(draw.randint(0, 4)))),
            end=draw.choice([0.0, draw.uniform(0, 0.9)]),
            decades=draw.uniform(0.1, 4),
            cycles=draw.randint(1, 5),
            growth=draw.choice([1.0, 2.0, 3.0]),
        )
        yield spec, draw.randint(1, 30), draw.randint(1, 12), draw


@pytest.mark.technique("T111")
@pytest.mark.technique("T112")
@pytest.mark.technique("T113")
@pytest.mark.technique("T114")
@pytest.mark.parametrize("name", FORMULAS)
def test_every_schedule_is_its_formula_after_a_linear_warm_up(name):
    for spec, epochs, steps_per_epoch, draw in _draws(name):
        steps = epochs * steps_per_epoch
        step, warmup = draw.randrange(steps), math.ceil(spec.warmup_fraction * steps)
        after = FORMULAS[name](step - warmup, max(1, steps - warmup), spec)
        want = (step + 1) / warmup if step < warmup else after
        got = rate_factor(spec, step, epochs=epochs, steps_per_epoch=steps_per_epoch)
        assert got == pytest.approx(want, rel=1e-12, abs=1e-12), (spec, step, steps)


TORCH = {
    "step": (
        ScheduleSpec(name="step", warmup_fraction=0, every=0.3, gamma=0.4),
        lambda optimizer: lr_scheduler.StepLR(optimizer, 36, 0.4),
    ),
    "multistep": (
        ScheduleSpec(name="multistep", warmup_fraction=0, milestones=(0.5, 0.75), gamma=0.1),
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [60, 90], 0.1),
    ),
    "exponential": (
        ScheduleSpec(name="exponential", warmup_fraction=0, decades=2),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 120)),
    ),
    "linear": (
        ScheduleSpec(name="linear", warmup_fraction=0, end=0.1),
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 120),
    ),
    "cosine": (
        ScheduleSpec(name="cosine", warmup_fraction=0, end=0.1),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 120, 0.1),
    ),
    "one_cycle": (
        ScheduleSpec(name="one_cycle"),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, 120, cycle_momentum=False),
    ),
    "cyclic": (
        ScheduleSpec(name="cyclic", warmup_fraction=0, cycles=4, end=0.1),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 30, 1, 0.1),
    ),
    "cosine_restarts": (
        ScheduleSpec(name="cosine_restarts", warmup_fraction=0, cycles=3, growth=3),  # 13 units of an epoch: 1, 3, 9
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 3),
    ),
    "warm-up": (
        ScheduleSpec(name="constant", warmup_fraction=0.1),
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 12, 1.0, 11),
    ),
}


@pytest.mark.technique("T120")
@pytest.mark.parametrize("name", TORCH)
def test_where_torch_has_the_schedule_ours_is_the_same(name):
    spec, make = TORCH[name]
    epochs = 13 if name == "cosine_restarts" else 12
    assert _rates(spec, epochs, 10) == pytest.approx(_torch_rates(make, 10 * epochs), rel=1e-12, abs=1e-12)


@pytest.mark.technique("T120")
def test_cycles_are_the_formula_of_snapshot_ensembles():
    spec, total, cycles = ScheduleSpec(name="cyclic", warmup_fraction=0, cycles=4), 120, 4
    length = math.ceil(total / cycles)
    want = [0.5 * (math.cos(math.pi * ((t - 1) % length) / length) + 1) for t in range(1, total + 1)]
    assert _rates(spec, 12, 10) == pytest.approx(want, abs=1e-12)


@pytest.mark.technique("T120")
@pytest.mark.parametrize("name", CYCLIC)
def test_warm_up_takes_part_of_the_first_cycle_and_moves_no_other(name):
    cold, warm = (ScheduleSpec(name=name, cycles=3, end=0.2, warmup_fraction=share) for share in (0.0, 0.9))
    epochs = whole_epochs(cold, 9)
    first, (cold, warm) = cycle_ends(cold, epochs)[0] * 10, (_rates(spec, epochs, 10) for spec in (cold, warm))
    half = first // 2
    assert warm[:half] == pytest.approx([(step + 1) / half for step in range(half)])
    assert warm[half] == 1.0
    assert warm[half:first] == sorted(warm[half:first], reverse=True)
    assert warm[first:] == cold[first:]


def test_ten_epochs_in_four_cycles_become_twelve_so_that_no_snapshot_is_taken_at_full_rate():
    spec = ScheduleSpec(name="cyclic", cycles=4, warmup_fraction=0)
    length = math.ceil(10 / 4)  # the trap: the last cycle has one epoch, which begins and ends at the peak
    assert [epoch % length for epoch in range(10)][-1] == 0
    assert whole_epochs(spec, 10) == 12
    assert cycle_ends(spec, 12) == (3, 6, 9, 12)
    rates = _rates(spec, 12, 5)
    assert all(rates[end * 5 - 1] < 0.02 for end in cycle_ends(spec, 12))
    assert [step for step in range(60) if rates[step] == 1.0] == [0, 15, 30, 45]
    with pytest.raises(ValueError, match="4 cycles do not fill 10 epochs but 12; see whole_epochs"):
        rate_factor(spec, 0, epochs=10, steps_per_epoch=5)


@pytest.mark.parametrize("name", NAMES)
def test_rounded_epochs_are_the_fewest_that_hold_every_cycle(name):
    for spec, epochs, *_ in _draws(name):
        rounded = whole_epochs(spec, epochs)
        ends = cycle_ends(spec, rounded)
        lengths = [end - begin for begin, end in pairwise((0, *ends))]
        assert ends[-1] == rounded >= epochs
        assert whole_epochs(spec, rounded) == rounded
        assert len(ends) == (spec.cycles if name in CYCLIC else 1)
        growth = spec.growth if name == "cosine_restarts" else 1
        assert all(after == growth * before for before, after in pairwise(lengths))
        fewer = [round((lengths[0] - 1) * growth**cycle) for cycle in range(len(ends))]
        assert sum(fewer) < epochs or name not in CYCLIC


def test_cycles_grow_by_a_broken_number_in_whole_epochs():
    assert cycle_ends(ScheduleSpec(name="cosine_restarts", cycles=4, growth=1.5), 17) == (
        2,
        5,
        10,
        17,
    )  # 2, 3, 4.5, 6.75


@pytest.mark.parametrize("name", NAMES)
def test_no_rate_leaves_zero_to_one_and_the_peak_is_reached(name):
    spec = ScheduleSpec(name=name)
    rates = _rates(spec, whole_epochs(spec, 20), 10)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == pytest.approx(1.0, abs=0.02 if name == "one_cycle" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_with_the_same_rates(name):
    """A rate is a function of its step alone: asked in any order, or from the middle, it is the same."""
    spec = ScheduleSpec(name=name)
    epochs = whole_epochs(spec, 8)
    whole, shuffled = _rates(spec, epochs, 4), list(range(epochs * 4))
    random.Random(0).shuffle(shuffled)
    asked = {step: rate_factor(spec, step, epochs=epochs, steps_per_epoch=4) for step in shuffled}
    assert [asked[step] for step in range(len(whole))] == whole


@pytest.mark.parametrize("warmup", [0.07, 0.14, 0.28, 0.56])
def test_rounding_adds_no_step_to_the_warm_up(warmup):
    assert math.ceil(warmup * 100) == round(warmup * 100) + 1  # the trap
    rates = _rates(ScheduleSpec(name="cosine", warmup_fraction=warmup), 10, 10)
    assert rates.index(1.0) == round(warmup * 100) - 1


def test_the_tail_for_averaging_is_constant_and_leaves_what_comes_before():
    spec = ScheduleSpec(name="cosine")
    plain, tail = _rates(spec, 8, 5), _rates(spec, 8, 5, swa_start=0.75, swa_lr=0.3)
    assert tail == plain[:30] + [0.3] * 10


def test_a_step_outside_the_stage_and_an_open_schedule_are_refused():
    for step in (-1, 20):
        with pytest.raises(ValueError, match=rf"step must lie in 0 to 19, got {step}\."):
            rate_factor(ScheduleSpec(name="cosine"), step, epochs=4, steps_per_epoch=5)
    with pytest.raises(ValueError, match=r"train\.schedule\.name is still open"):
        rate_factor(ScheduleSpec(), 0, epochs=4, steps_per_epoch=5)


def _drops(rule, losses):
    return [epoch for epoch, loss in enumerate(losses) if rule.sees(loss)]


@pytest.mark.technique("T117")
def test_the_rate_is_halved_when_val_stops_improving():
    spec = ScheduleSpec(name="plateau")
    assert (spec.factor, spec.patience) == (0.5, 3)
    rule = Plateau(factor=0.5, patience=3)
    losses = [1.0, 0.8, 0.9, 0.81, 0.79999, 0.5, 0.6, float("nan"), 0.5, 0.55, 0.55, 0.5]
    assert _drops(rule, losses) == [4, 8, 11]  # 0.79999 is no improvement on 0.8 worth the name
    assert rule.factor == 0.125


@pytest.mark.technique("T117")
def test_plateaus_are_those_of_torch_up_to_the_last_drop():
    draw = random.Random(1)
    losses = [1 / (1 + epoch) + draw.uniform(0, 0.2) for epoch in range(60)]
    for patience in (1, 2, 4):
        rule = Plateau(factor=0.3, patience=patience)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=patience - 1, eps=0)
        for loss in losses:
            rule.sees(loss)
            scheduler.step(loss)
            assert rule.factor == pytest.approx(max(optimizer.param_groups[0]["lr"], 0.3**MOST_DROPS), rel=1e-12)
        assert rule.factor < 1


def test_a_plateau_goes_on_from_its_state():
    draw = random.Random(2)
    losses = [draw.uniform(0.5, 1) for _ in range(30)]
    whole = Plateau(factor=0.5, patience=2)
    want = _drops(whole, losses)
    assert len(want) == MOST_DROPS
    for cut in range(30):
        before, after = (Plateau(factor=0.5, patience=2) for _ in range(2))
        first = _drops(before, losses[:cut])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert first + [cut + epoch for epoch in _drops(after, losses[cut:])] == want
        assert after.factor == whole.factor


def _curve(noise, *, steps=1000, parts=((0.3, -2.0), (0.2, 0.0), (0.2, -1.5), (0.3, 0.0))):
    """Losses that fall and rest in turn: shares of the steps, and slopes per run."""
    draw, level, losses = random.Random(0), 4.0, []
    for share, slope in parts:
        for _ in range(round(share * steps)):
            level += slope / steps
            losses.append(level + draw.gauss(0, noise))
    return losses


@pytest.mark.technique("T116")
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_drops_are_suggested_where_the_loss_flattens(noise):
    first, second = suggest_drops(_curve(noise))
    assert abs(first - 300) <= 50  # five per cent of the run
    assert abs(second - 700) <= 50


@pytest.mark.technique("T116")
def test_no_drop_is_suggested_where_the_loss_still_falls_or_never_did():
    assert suggest_drops(_curve(0.05, parts=((1.0, -3.0),))) == []
    assert suggest_drops(_curve(0.05, parts=((1.0, 0.0),))) == []
    assert suggest_drops([1.0] * 200) == []
    assert suggest_drops([1.0, 0.5]) == []


def test_a_curve_is_drawn_in_one_line():
    assert draw_curve(ScheduleSpec(name="linear", warmup_fraction=0), 10, 10, width=8) == "█▇▆▅▄▃▂▁"
    assert draw_curve(ScheduleSpec(name="constant", warmup_fraction=0), 1, 3, width=12) == "█" * 12
    halved = draw_curve(ScheduleSpec(name="cosine"), 4, 10, width=20, swa_start=0.5, swa_lr=0.5)
    assert halved[10:] == "▅" * 10
    cycles = draw_curve(ScheduleSpec(name="cyclic", cycles=4, warmup_fraction=0), 4, 100)
    assert [cycles[begin : begin + 10] for begin in range(0, 40, 10)] == [cycles[:10]] * 4
    assert cycles[0] + cycles[9] == "█▁"
