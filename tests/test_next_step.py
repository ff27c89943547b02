"""The next experiment: one change, in the direction that the run calls for."""

import pytest
from made_facts import make_facts

from finetune.config.reading import load_recipe
from finetune.planning.next_step import next_experiment
from finetune.planning.planner import make_plan


def plan_of(*wishes):
    return make_plan(load_recipe(None, ["data.root=here", *wishes]), make_facts())


OVERFIT = {"train_top1": 0.99, "val_top1": 0.7, "num_train": 2000, "num_val": 400, "num_stages": 5}
UNDERFIT = {"train_top1": 0.7, "val_top1": 0.72, "num_train": 2000, "num_val": 400, "num_stages": 5}


@pytest.mark.technique("T139")
@pytest.mark.technique("T138")
def test_an_overfitting_run_gets_one_regulariser_more_and_the_next_only_after_it():
    wishes, keys = ["train.strategy=full", "augment.preset=light"], []
    while (found := next_experiment(plan_of(*wishes), **OVERFIT)) is not None and len(keys) < 12:
        before, after = plan_of(*wishes), plan_of(*wishes, f"{found.key}={found.value}")
        assert before != after
        keys.append(found.key)
        wishes = [wish for wish in wishes if not wish.startswith(found.key)] + [f"{found.key}={found.value}"]
    assert keys[:2] == ["augment.preset", "augment.preset"]  # to medium, to heavy: one at a time
    assert "head.dropout" not in keys  # there is no wide layer that it could thin
    assert len(set(keys)) > 4


@pytest.mark.technique("T118")
@pytest.mark.parametrize("seen", [OVERFIT, UNDERFIT])
def test_no_experiment_moves_the_schedule_together_with_the_rate(seen):
    wishes, rungs = ["train.strategy=full", "augment.preset=light"], 0
    for _ in range(6):
        if (found := next_experiment(plan_of(*wishes), **seen)) is None:
            break
        rungs += 1
        before, after = (plan_of(*some).stages[-1] for some in (wishes, [*wishes, f"{found.key}={found.value}"]))
        assert before.lr_head == after.lr_head or before.schedule == after.schedule
        assert not found.key.startswith("train.schedule.")
        wishes = [wish for wish in wishes if not wish.startswith(found.key)] + [f"{found.key}={found.value}"]
    assert rungs >= 3


@pytest.mark.technique("T139")
def test_a_wide_hidden_layer_is_where_dropout_belongs():
    wishes = ["train.strategy=partial", "augment.preset=heavy", "head.kind=mlp", "train.optimizer.weight_decay=0"]
    assert next_experiment(plan_of(*wishes), **OVERFIT).key == "head.dropout"


@pytest.mark.technique("T139")
def test_a_run_that_underfits_is_never_regularised_and_one_that_overfits_never_grows():
    shallow = next_experiment(plan_of("train.strategy=partial", "train.depth=1"), **UNDERFIT)
    assert (shallow.key, shallow.value) == ("train.depth", "2")
    assert plan_of("train.strategy=partial", "train.depth=2").stages[0].trainable_stages == 2
    assert next_experiment(plan_of("train.strategy=partial", "train.depth=3"), **UNDERFIT).key == "train.epochs"
    assert next_experiment(plan_of("train.strategy=partial"), **UNDERFIT).key == "train.epochs"
    assert next_experiment(plan_of("train.strategy=partial", "train.layers=[layer4]"), **UNDERFIT).key == "train.epochs"
    assert next_experiment(plan_of("train.strategy=full"), **UNDERFIT).key == "train.epochs"
    assert next_experiment(plan_of("train.strategy=full"), **OVERFIT).key != "train.epochs"


def test_a_gap_that_few_val_images_cannot_show_is_none():
    few = {**OVERFIT, "val_top1": 0.85, "num_val": 20}
    assert next_experiment(plan_of("train.strategy=full"), **few) is None
    assert next_experiment(plan_of("train.strategy=full"), **{**few, "num_val": 2000}) is not None
    assert next_experiment(plan_of("train.strategy=probe"), **OVERFIT) is None


@pytest.mark.technique("T136")
def test_mixed_images_are_for_small_sets():
    wishes = ["train.strategy=partial", "augment.preset=heavy", "train.optimizer.weight_decay=0"]
    wishes += ["regularization.stochastic_depth=0.1"]
    assert next_experiment(plan_of(*wishes), **OVERFIT).key == "augment.mixup"
    many = {**OVERFIT, "num_train": 1_200_000}
    assert next_experiment(plan_of(*wishes), **many).key == "train.averaging.snapshots"
