"""The step, the rates, the rule that ends a stage, and memory that runs out."""

import pytest
import torch
from made_classifiers import STAGE, ShortOfMemory, _module, tiny_classifier
from torch import nn

from finetune.config.decided import Rule
from finetune.config.recipe import ScheduleSpec
from finetune.errors import RunError
from finetune.planning.lr_schedules import rate_factor
from finetune.training.module import is_out_of_memory
from finetune.training.optimization import gradient_norm, group_parameters, make_optimizer, set_rates
from finetune.training.watching import Curves, EarlyStop, is_clearly_higher, is_clearly_worse


@pytest.mark.technique("T008")
def test_the_ratio_of_rates_holds_through_the_whole_schedule():
    optimizer = make_optimizer(tiny_classifier(), STAGE, Rule(name="adamw", weight_decay=0.1))
    for step in range(100):
        rates = set_rates(optimizer, rate_factor(ScheduleSpec(name="cosine"), step, epochs=10, steps_per_epoch=10))
        assert rates["backbone"] == pytest.approx(0.1 * rates["head"], rel=1e-12)
        assert {group["lr"] for group in optimizer.param_groups} == set(rates.values())


@pytest.mark.technique("T122")
def test_every_trainable_tensor_is_in_one_group_and_no_bias_is_decayed():
    classifier = tiny_classifier(trainable_stages=1)
    groups = group_parameters(classifier, STAGE, 0.1)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in classifier.parameters() if p.requires_grad)
    assert id(classifier.backbone.stem.weight) not in members
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_gradients_are_clipped_by_their_global_norm():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert gradient_norm([weight], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_a_scaled_gradient_is_clipped_as_if_it_were_not():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    assert gradient_norm([weight], 1.0, scale=1024.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad / 1024, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


@pytest.mark.technique("T179")
def test_training_stops_after_patience_and_keeps_the_earliest_best():
    rule, losses = EarlyStop(patience=3), [0.9, 0.5, 0.7, 0.5, float("nan"), 0.1]
    rule.sees(-1, 1.0)
    for epoch, loss in enumerate(losses):
        rule.sees(epoch, loss)
        if rule.is_over(epoch):
            break
    assert (epoch, rule.best_epoch, rule.best_loss) == (4, 1, 0.5)


def test_a_training_that_only_does_harm_keeps_its_start():
    rule = EarlyStop(patience=2)
    rule.sees(-1, 0.3)
    rule.sees(0, 0.4)
    rule.sees(1, float("nan"))
    assert rule.is_over(1)
    assert rule.best_epoch == -1


def test_where_val_is_small_the_last_epoch_is_kept_unless_it_clearly_does_harm():
    rule = EarlyStop(patience=1, keeps_last=True)
    rule.sees(-1, 0.3)
    for epoch, (loss, top1) in enumerate([(0.4, 0.85), (0.9, 0.3), (0.5, 0.7), (float("nan"), 0.8)]):
        rule.sees(epoch, loss, is_harmed=is_clearly_worse(top1, 0.8, 15))
        assert not rule.is_over(epoch)
    assert rule.best_epoch == 2  # not 1: five right of 15 where 12 were; not 3: its loss is no number


def test_losses_are_compared_image_by_image():
    hard = torch.linspace(0, 9, 100)  # images differ far more than epochs do
    wiggle = 0.01 * torch.sin(torch.arange(100.0))
    assert is_clearly_higher(hard + 0.01 + wiggle, hard)
    assert not is_clearly_higher(hard + 0.001 + wiggle, hard)
    assert not is_clearly_higher(hard - 0.01 + wiggle, hard)
    broken = hard.clone()
    broken[3] = float("nan")
    assert is_clearly_higher(broken, hard)
    assert not is_clearly_higher(hard, broken)
    assert not is_clearly_higher(hard, torch.empty(0))  # nothing was kept so far
    assert is_clearly_higher(broken, torch.empty(0))


def test_curves_forget_what_an_interrupted_epoch_wrote(tmp_path):
    curves = Curves(tmp_path / "curves.csv")
    for epoch in (-1, 0, 1):
        curves.append("1-full", epoch, epoch + 1, {"val/loss": 0.1 * epoch + 1 / 3})
    curves.append("1-full", 2, 3, {"train/running_loss": 9.0})
    curves.forget_after("1-full", 1)
    assert [row["epoch"] for row in curves.rows()] == ["-1", "0", "1"]
    assert float(curves.rows()[2]["value"]) == 0.1 + 1 / 3  # to the last bit


def test_steps_run_on_over_the_stages_and_after_a_resume(tmp_path):
    path = tmp_path / "curves.csv"
    for stage, last in (("1-partial", 5), ("2-full", 3), ("3-full", 2)):
        curves = Curves(path)
        curves.append(stage, -1, 0, {"val/loss": 1.0})
        curves.append(stage, 0, last, {"val/loss": 0.5})
    curves.forget_after("3-full", -1)
    Curves(path).append("3-full", 0, 2, {"val/loss": 0.5})
    assert [int(row["step"]) for row in curves.rows()] == [0, 5, 6, 9, 10, 12]
    curves.forget_after("3-full", -2)
    Curves(path).append("3-full", -1, 0, {"val/loss": 1.0})
    assert [int(row["step"]) for row in curves.rows()] == [0, 5, 6, 9, 10]


@pytest.mark.parametrize(("limit", "pieces"), [(5, 4), (1, 1)])
def test_short_memory_halves_the_micro_batch_and_leaves_the_gradient(limit, pieces):
    images, labels = torch.randn(19, 3, 8, 8), torch.arange(19) % 3
    whole, said = tiny_classifier(), []
    module = _module(whole, said)
    loss, hits = module._accumulate(images, labels)
    cut = tiny_classifier()
    short = _module(cut, said)
    short.classifier = ShortOfMemory(cut, limit)
    assert short._accumulate(images, labels) == (pytest.approx(loss, rel=1e-5), hits)
    assert short.micro_batch == pieces
    assert said[0].startswith("out of memory at 19 images: going on with 9 at a time, 19 per step as planned")
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "statistics"])
def test_where_batch_norm_trains_a_cut_batch_has_another_gradient_so_short_memory_ends_the_run(mode):
    images, labels = torch.randn(19, 3, 8, 8), torch.arange(19) % 3
    gradients = []
    for size in (19, 5):
        classifier = tiny_classifier(batch_norm=mode)
        _module(classifier, [])._pieces(images, labels, size)
        gradients.append(classifier.backbone.stem.weight.grad)  # below the norm
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()
    module = _module(tiny_classifier(batch_norm=mode), said := [])
    module.classifier = ShortOfMemory(module.classifier, 5)
    with pytest.raises(RunError, match=r"out of memory at 19 images, .* batch norm trains.* train.batch_size below 19"):
        module._accumulate(images, labels)
    assert module.micro_batch is None and not said


def test_memory_too_short_for_one_image_is_said():
    module = _module(tiny_classifier(), [])
    module.classifier = ShortOfMemory(module.classifier, 0)
    with pytest.raises(RunError, match="one single image does not fit"):
        module._accumulate(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))


def test_other_faults_are_not_taken_for_short_memory():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
