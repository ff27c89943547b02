"""A pilot tries the candidates for about the seconds it was given, and decides by what val says."""

import time

import pytest
import torch
from made_facts import make_facts

import finetune as ft
from finetune.config.facts import PilotFacts
from finetune.config.measures import Proportion
from finetune.errors import RecipeError
from finetune.features.survey import look
from finetune.model_selection import pilot
from finetune.model_selection.pilot import run_pilot
from finetune.planning.advisor import advise
from finetune.preparing import plan

SMALL = ["data.image_size=32", "train.batch_size=16", "tracking.enabled=false"]


def row(strategy, value, number=1):
    val = Proportion(value=value, low=value - 0.05, high=value + 0.05, n=200)
    return PilotFacts(strategy=strategy, round=number, epochs=2, images=100, seconds=12.3, val=val)


pytestmark = pytest.mark.slow
"""A pilot trains for the seconds that it is given."""


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def piloted(shapes):
    seen = look(ft.load_recipe(str(shapes), SMALL))
    before = {name: value.clone() for name, value in seen.backbone.state_dict().items()}
    began = time.perf_counter()
    facts = run_pilot(ft.load_recipe(str(shapes), SMALL), seen, 20.0, quiet)
    return seen, before, facts, time.perf_counter() - began


def test_the_better_half_goes_on(piloted):
    facts = piloted[2]
    first = {row.strategy: row.val.value for row in facts.pilot if row.round == 1}
    (second,) = [row for row in facts.pilot if row.round == 2]
    assert set(first) == {"partial", "full"}
    assert first[second.strategy] == max(first.values())
    assert all(row.val.n == 12 and row.images <= 48 and row.epochs >= 1 for row in facts.pilot)


@pytest.mark.parametrize("better", ["partial", "full"])
def test_the_worse_half_is_left_behind(piloted, shapes, monkeypatch, better):
    def trial(recipe, seen, strategy, seconds, number, *rest):
        return row(strategy, 0.9 if strategy == better else 0.7, number)

    monkeypatch.setattr(pilot, "_try", trial)
    facts = run_pilot(ft.load_recipe(str(shapes), SMALL), piloted[0], 60.0, quiet)
    assert [(one.strategy, one.round) for one in facts.pilot] == [("partial", 1), ("full", 1), (better, 2)]


@pytest.mark.technique("T118")
def test_val_chooses_neither_the_schedule_nor_the_rate_beside_what_a_pilot_tries(shapes, monkeypatch):
    made = []

    def note(recipe, facts):
        made.append(ft.make_plan(recipe, facts))
        return made[-1]

    recipe = ft.load_recipe(str(shapes), SMALL)
    seen = look(recipe)
    monkeypatch.setattr(pilot, "make_plan", note)
    run_pilot(recipe, seen, 20.0, quiet)
    assert {plan.train.strategy for plan in made} == {"partial", "full"}
    assert len({plan.stages[-1].schedule.model_dump_json() for plan in made}) == 1
    assert len({plan.stages[-1].lr_head for plan in made}) == 1


def test_a_pilot_keeps_to_its_seconds(piloted):
    assert sum(row.seconds for row in piloted[2].pilot) <= piloted[3] < 60  # 20 were given, on whatever machine this is


def test_a_pilot_teaches_the_surveyed_backbone_nothing(piloted):
    seen, before, _, _ = piloted
    assert all(torch.equal(before[name], value) for name, value in seen.backbone.state_dict().items())


def test_the_plan_follows_the_pilot_and_says_so(piloted, shapes):
    facts = piloted[2]
    made = ft.make_plan(ft.load_recipe(str(shapes), SMALL), facts)
    last = {row.strategy: row.val.value for row in facts.pilot}
    assert made.train.strategy in (*last, "probe")
    reason = next(reason for reason in made.reasons if reason.key == "train.strategy")
    assert reason.why.startswith("a pilot on 12 val images: ")
    assert all(f"{strategy} {100 * value:.1f} %" in reason.why for strategy, value in last.items())


def test_the_last_round_decides_and_the_cheaper_of_equals_wins():
    judge = lambda *rows: advise(make_facts(probe=0.8, low=0.75).model_copy(update={"pilot": rows}))  # noqa: E731
    assert judge(row("partial", 0.85), row("full", 0.9), row("full", 0.84, 2)).strategy == "partial"
    assert judge(row("partial", 0.85), row("full", 0.85)).strategy == "partial"
    assert judge(row("partial", 0.85), row("full", 0.9), row("full", 0.92, 2)).strategy == "full"
    assert judge(row("partial", 0.78), row("full", 0.76)).strategy == "partial"  # behind, but not clearly
    lost = judge(row("partial", 0.6), row("full", 0.7))
    assert (lost.strategy, lost.runner_up) == ("probe", "full")


@pytest.mark.parametrize(
    ("wishes", "seconds", "message"),
    [
        ([], 0.1, r"--pilot is 0\.1 seconds, but 30 steps each of partial and full take about \d+ here"),
        (["train.strategy=full"], 60, "a pilot chooses train.strategy, which the recipe names already"),
    ],
)
def test_a_pilot_that_could_show_nothing_is_refused(shapes, wishes, seconds, message):
    with pytest.raises(RecipeError, match=message):
        plan(ft.load_recipe(str(shapes), [*SMALL, *wishes]), pilot_seconds=seconds, say=quiet)
