"""WiSE-FT: what ships lies between start and end; the training goes on from its own weights; and when it is chosen."""

import pytest
import torch
from made_averages import copy_of, is_same, make_classifier
from made_facts import make_facts
from safetensors.torch import load_file
from small_runs import start

from finetune.config.reading import load_recipe
from finetune.ensembles.soups import load_start
from finetune.planning.planner import make_plan
from finetune.planning.wise_ft import SHARE
from finetune.training.wise_ft import StartMixture

PLAIN = ("train.strategy=partial", "train.epochs=2", "train.optimizer.lr=0.01", "augment.preset=none")


def moved(classifier):
    before = {name: weight.detach().clone() for name, weight in classifier.named_parameters()}
    with torch.no_grad():
        for weight in classifier.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    return before


def test_within_it_weights_that_train_lie_on_the_line_and_afterwards_nothing_has_changed():
    classifier = make_classifier(batch_norm="frozen", stages=1)
    before = moved(classifier)
    ends = copy_of(classifier)
    with StartMixture(before, 0.25).swapped(classifier):
        for name, weight in classifier.named_parameters():
            want = before[name] + 0.25 if weight.requires_grad else ends[name]
            torch.testing.assert_close(weight.detach(), want)
    assert is_same(classifier, ends)
    with pytest.raises(RuntimeError), StartMixture(before, 0.25).swapped(classifier):
        raise RuntimeError
    assert is_same(classifier, ends)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_mixes_nothing_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        StartMixture({}, share)


def test_what_ships_is_the_mixture_of_the_start_and_of_what_ships_without_it(shapes, tmp_path):
    ends, mixed = (
        start(shapes, tmp_path / name, *PLAIN, f"train.averaging.wise_ft={share}")
        for name, share in (("end", 1), ("mixed", 0.25))
    )
    begun = load_start(ends).state_dict()
    end, found = (load_file(run.final_weights()) for run in (ends, mixed))
    assert any(not torch.equal(begun[name], tensor) for name, tensor in end.items())
    for name, tensor in end.items():
        torch.testing.assert_close(found[name], torch.lerp(begun[name].float(), tensor.float(), 0.25).to(tensor.dtype))
    assert torch.equal(load_file(mixed.file("model.safetensors"))["head.linear.weight"], found["head.linear.weight"])


def test_by_default_a_training_from_the_probe_ships_a_mixture_and_the_plan_says_so():
    plan = make_plan(load_recipe(None, ["train.strategy=full"]), make_facts(per_class=99))
    assert plan.train.averaging.wise_ft == SHARE < 1
    large = make_plan(load_recipe(None, ["train.strategy=full"]), make_facts(per_class=100))
    assert large.train.averaging.wise_ft == 1
    (reason,) = [reason for reason in plan.reasons if reason.key == "train.averaging.wise_ft"]
    assert "start" in reason.why


@pytest.mark.parametrize(
    "wishes",
    [
        ["head.init=zero"],
        ["head.kind=mlp"],
        ["train.reinit=1"],
        ["train.batch_norm=train"],
        ["train.averaging.snapshots=2"],
        ["train.averaging.kind=ema"],
    ],
)
def test_where_start_and_end_are_not_one_kind_of_network_the_end_ships(wishes):
    plan = make_plan(load_recipe(None, ["train.strategy=full", *wishes]), make_facts(per_class=20))
    assert plan.train.averaging.wise_ft == 1
