"""Heads: four beginnings, and the first loss that each promises."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import LinearHead, make_head


@pytest.mark.technique("T003")
@pytest.mark.technique("T074")
@pytest.mark.parametrize("num_classes", [2, 10, 37])
def test_a_zero_head_begins_at_the_log_of_the_number_of_classes(num_classes):
    features, labels = torch.randn(64, 20) * 30, torch.arange(64) % num_classes
    head = make_head(20, num_classes, init="zero")
    loss = F.cross_entropy(head(features), labels).detach()
    assert float(loss) == pytest.approx(math.log(num_classes), abs=1e-5)


@pytest.mark.technique("T003")
def test_a_new_head_leaves_every_other_tensor_of_the_checkpoint_as_it_was():
    torch.manual_seed(0)
    checkpoint = timm.create_model("test_resnet", num_classes=7).state_dict()
    backbone = load_backbone("test_resnet", zoo={}, pretrained=False)
    backbone.model.load_state_dict({k: v for k, v in checkpoint.items() if not k.startswith("fc.")})
    model = Classifier(backbone, make_head(backbone.num_features, 5))
    state = model.state_dict()
    assert state.pop("head.linear.weight").shape == (5, backbone.num_features)
    assert state.pop("head.linear.bias").shape == (5,)
    assert state.keys() == {f"backbone.model.{name}" for name in checkpoint if not name.startswith("fc.")}
    assert all(torch.equal(tensor, checkpoint[name.removeprefix("backbone.model.")]) for name, tensor in state.items())


@pytest.mark.technique("T003")
def test_the_first_gradient_through_a_zero_head_into_the_features_is_zero():
    features = torch.randn(8, 6, requires_grad=True)
    F.cross_entropy(make_head(6, 3)(features), torch.arange(8) % 3).backward()
    assert float(features.grad.abs().max()) == 0


@pytest.mark.technique("T054")
def test_a_small_head_has_the_promised_spread_and_no_bias():
    torch.manual_seed(0)
    linear = make_head(500, 40, init="small").linear.requires_grad_(False)
    assert float(linear.weight.std()) == pytest.approx(0.01, rel=0.03)
    assert float(linear.bias.abs().max()) == 0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "resnetv2_50x1_bit"])
def test_a_model_head_begins_as_the_architecture_begins_its_own(name):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    torch.manual_seed(3)
    head = make_head(backbone.num_features, 9, init="model", arch_rule=backbone.new_classifier)
    torch.manual_seed(3)
    own = timm.create_model(name, num_classes=9).get_classifier()
    assert torch.equal(head.linear.weight, own.weight.flatten(1))
    assert torch.equal(head.linear.bias, own.bias)


def test_a_model_head_without_a_rule_begins_as_torch_does():
    torch.manual_seed(3)
    head = make_head(12, 4, init="model")
    torch.manual_seed(3)
    assert torch.equal(head.linear.weight, torch.nn.Linear(12, 4).weight)


def test_a_probe_head_is_the_probe():
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    head, features = make_head(5, 3, init="probe", weight=weight, bias=bias, dropout=0.5).eval(), torch.randn(7, 5)
    torch.testing.assert_close(head(features), features @ weight.T.float() + bias.float())


@pytest.mark.technique("T140")
def test_dropout_acts_before_the_linear_map_and_in_training_only():
    head = LinearHead(1000, 1, dropout=0.5)
    torch.nn.init.ones_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    torch.manual_seed(1)
    features = torch.ones(1, 1000)
    with torch.inference_mode():
        assert float(head.eval()(features)) == 1000
        assert 0 < abs(float(head.train()(features)) - 1000) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "xavier"}, "init must be one of zero, small, model, probe, got 'xavier'"),
        ({"init": "probe"}, "weight and bias go with init 'probe'"),
        ({"init": "zero", "weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, "only with it; init is 'zero'"),
        (
            {"init": "probe", "weight": torch.zeros(5, 3), "bias": torch.zeros(3)},
            r"weight \(5, 3\) .* 5 features and 3",
        ),
    ],
)
def test_beginnings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(5, 3, **options)
