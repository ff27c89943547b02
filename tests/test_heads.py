"""Heads: three kinds, their beginnings, and the first loss that each promises."""

import itertools
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import RecipeError
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import KINDS, CosineHead, LinearHead, MlpHead, make_head
from finetune.models.initialization import find_symmetric
from finetune.models.regularization import DropConnectLinear, random_pieces


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
        ({"init": "ones"}, "init must be one of zero, small, uniform, xavier, kaiming, model, probe, got 'ones'"),
        ({"init": "probe"}, "weight and bias go with init 'probe'"),
        ({"init": "zero", "weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, "only with it; init is 'zero'"),
        (
            {"init": "probe", "weight": torch.zeros(5, 3), "bias": torch.zeros(3)},
            r"weight \(5, 3\) .* 5 features and 3",
        ),
        ({"init": "probe", "weight": torch.zeros(3, 5)}, "weight and bias go with init 'probe'"),
        ({"kind": "tree"}, "kind must be one of linear, mlp, cosine, got 'tree'"),
        ({"kind": "mlp", "init": "model"}, "an mlp head cannot begin from 'model', which is one layer"),
        ({"kind": "cosine", "init": "zero"}, "cannot begin at zero, which has no direction"),
        ({"kind": "cosine", "init": "small", "drop_connect": 0.5}, "drop_connect is 0.5, but a cosine head"),
        ({"kind": "cosine", "init": "probe", "weight": torch.zeros(3, 5)}, "a row of weight is zero or not finite"),
    ],
)
def test_beginnings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(5, 3, **options)


@pytest.mark.technique("T003")
@pytest.mark.parametrize("init", ["uniform", "xavier", "kaiming"])
def test_a_linear_head_can_begin_by_a_named_rule(init):
    torch.manual_seed(0)
    linear = make_head(500, 40, init=init).linear.requires_grad_(False)
    assert float(linear.weight.std()) == pytest.approx(((2 if init == "kaiming" else 1) / 500) ** 0.5, rel=0.03)
    assert not linear.bias.any()


@pytest.mark.technique("T003")
def test_todays_calls_draw_what_they_always_drew():
    torch.manual_seed(5)
    head = make_head(7, 3, init="small")
    torch.manual_seed(5)
    own = nn.Linear(7, 3)
    assert torch.equal(head.linear.weight, nn.init.normal_(own.weight, std=0.01))
    assert list(head.state_dict()) == ["linear.weight", "linear.bias"]


def test_an_mlp_head_with_a_zero_last_layer_begins_at_log_k_and_its_hidden_units_differ():
    torch.manual_seed(0)
    head, labels = make_head(20, 4, kind="mlp", hidden=16), torch.arange(32) % 4
    loss = F.cross_entropy(head(torch.randn(32, 20)), labels)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    loss.backward()
    assert len(torch.unique(head.linear.weight.grad, dim=1)[0]) == 16  # no unit is told what another is


@pytest.mark.technique("T054")
def test_the_last_layer_of_an_mlp_head_begins_small_whatever_the_hidden_one_does():
    torch.manual_seed(0)
    head = make_head(500, 40, kind="mlp", hidden=300, init="small").requires_grad_(False)
    assert float(head.linear.weight.std()) == pytest.approx(0.01, rel=0.03)
    assert float(head.hidden.weight.std()) == pytest.approx((2 / 500) ** 0.5, rel=0.03)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "selu", "maxout"])
@torch.inference_mode()
def test_the_hidden_layer_keeps_the_mean_square_whatever_its_activation(activation):
    torch.manual_seed(0)
    head = MlpHead(300, 3, hidden=400, activation=activation).eval()
    units = head.activation(head.hidden(torch.randn(200, 300)))
    assert units.shape == (200, 400)
    assert float(units.square().mean()) == pytest.approx(1, abs=0.05)


def test_hidden_units_begin_with_the_bias_that_was_asked_for():
    for activation, units in (("relu", 8), ("maxout", 16)):
        head = make_head(5, 3, kind="mlp", hidden=8, activation=activation, hidden_bias=0.01)
        biases = [module.bias for module in head.hidden.modules() if isinstance(module, nn.Linear)]
        assert torch.equal(biases[0], torch.full((units,), 0.01))
        assert not head.linear.bias.any()


def test_an_activation_that_has_no_place_in_a_hidden_layer_is_refused():
    with pytest.raises(RecipeError, match="'sigmoid' is refused in a hidden layer"):
        make_head(5, 3, kind="mlp", activation="sigmoid")


@pytest.mark.parametrize(
    ("kind", "init"),
    [(kind, init) for kind in KINDS for init in ("zero", "small") if (kind, init) != ("cosine", "zero")],
)
def test_no_head_is_reported_as_symmetric_when_its_own_exemption_is_heeded(kind, init):
    head = make_head(6, 3, kind=kind, init=init, hidden=8)
    assert find_symmetric(head, exempt=head.may_begin_at_zero) == []


def test_without_the_exemption_a_zero_layer_above_a_hidden_one_is_reported():
    assert find_symmetric(make_head(6, 3, kind="mlp", hidden=8)) == ["linear.weight"]


@pytest.mark.technique("T123")
@pytest.mark.technique("T124")
@pytest.mark.technique("T126")
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@torch.inference_mode()
def test_the_rate_is_the_share_dropped_anew_for_each_example_and_what_is_kept_is_divided_by_the_share_kept(rate):
    torch.manual_seed(0)
    head, seen = make_head(100, 3, dropout=rate).train(), []
    head.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(2):
        head(torch.ones(400, 100))
    first, second = seen
    torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / (1 - rate)))
    assert float((first == 0).float().mean()) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 40_000) ** 0.5)
    assert len(torch.unique(first, dim=0)) > 390  # by example
    assert not torch.equal(first, second)  # by pass


@pytest.mark.technique("T125")
@pytest.mark.technique("T126")
@torch.inference_mode()
def test_one_pass_at_test_is_the_normalised_geometric_mean_over_all_masks():
    rate, keep = 0.3, 0.7
    head, features = LinearHead(6, 3, dropout=rate).double().eval(), torch.randn(1, 6).double()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 6)  # (64, 6)
    chance = (masks * keep + (1 - masks) * rate).prod(1, keepdim=True)
    assert float(chance.sum()) == pytest.approx(1)
    inverted = (chance * head.linear(masks * features / keep).log_softmax(1)).sum(0).softmax(0)
    torch.testing.assert_close(inverted, head(features)[0].softmax(0))
    plain = (chance * head.linear(masks * features).log_softmax(1)).sum(0).softmax(0)
    torch.testing.assert_close(plain, head(keep * features)[0].softmax(0))  # the rescaling that inversion saves


@pytest.mark.technique("T127")
@pytest.mark.parametrize(("kind", "num_layers"), [("linear", 1), ("mlp", 2)])
def test_dropout_stands_before_the_linear_layers_of_the_head_and_nowhere_else(kind, num_layers):
    backbone, order = load_backbone("test_resnet", zoo={}, pretrained=False), []
    head = make_head(backbone.num_features, 3, kind=kind, dropout=0.5)
    model = Classifier(backbone, head)
    assert set(random_pieces(model)) == set(random_pieces(head))
    for module in head.children():
        module.register_forward_hook(lambda module, args, output: order.append(type(module)))
    model(torch.randn(2, 3, 32, 32))
    dropped = [after for before, after in itertools.pairwise(order) if before is nn.Dropout]
    assert dropped == [nn.Linear] * num_layers == [kind for kind in order if kind is nn.Linear]


@pytest.mark.technique("T131")
@pytest.mark.parametrize("options", [{}, {"kind": "mlp"}, {"kind": "mlp", "activation": "maxout"}])
def test_weights_are_dropped_in_every_linear_layer_of_the_head(options):
    head = make_head(5, 3, drop_connect=0.25, **options)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    assert layers
    assert all(isinstance(layer, DropConnectLinear) and layer.p == 0.25 for layer in layers)


def _steps_to_fit(rate, seed):
    torch.manual_seed(seed)
    labels = torch.arange(60) % 3
    features = 0.5 * torch.randn(60, 20) + torch.randn(3, 20)[labels] / 2
    head = make_head(20, 3, kind="mlp", hidden=32, dropout=rate)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for step in itertools.count(1):
        F.cross_entropy(head.train()(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if F.cross_entropy(head.eval()(features), labels).item() < 0.1 or step == 500:
            return step


@pytest.mark.technique("T129")
def test_with_dropout_the_same_fit_takes_more_steps_on_average():
    """1.7 times as many when this was written; single starts range from as many to 2.6 times."""
    without, with_dropout = (sum(_steps_to_fit(rate, seed) for seed in range(6)) for rate in (0.0, 0.5))
    assert with_dropout > 1.2 * without


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@torch.inference_mode()
def test_a_cosine_head_begins_sure_of_an_image_on_its_direction_and_square_to_the_rest(num_classes):
    head = CosineHead(num_classes, num_classes)
    head.directions.copy_(torch.eye(num_classes))
    assert float(head(torch.eye(num_classes)[:1] * 7).softmax(1)[0, 0]) == pytest.approx(0.99, abs=1e-4)


@torch.inference_mode()
def test_a_cosine_head_ignores_the_length_of_features_and_of_directions():
    torch.manual_seed(0)
    head, features = make_head(8, 4, kind="cosine", init="small"), torch.randn(6, 8)
    before = head(features)
    assert float(before.abs().max()) <= float(head.log_scale.exp())
    head.directions.mul_(torch.rand(4, 1) + 0.5)
    torch.testing.assert_close(head(features * 30), before)


def test_the_scale_of_a_cosine_head_is_learned():
    torch.manual_seed(0)
    head = make_head(8, 4, kind="cosine", init="small")
    F.cross_entropy(head(torch.randn(6, 8)), torch.arange(6) % 4).backward()
    assert head.log_scale.grad.item() != 0


@pytest.mark.parametrize("init", ["small", "uniform", "xavier", "kaiming", "model"])
def test_a_cosine_head_begins_with_directions_of_length_one(init):
    torch.manual_seed(0)
    arch_rule = partial(nn.Linear, 8)
    head = make_head(8, 4, kind="cosine", init=init, arch_rule=arch_rule)
    torch.testing.assert_close(head.directions.norm(dim=1), torch.ones(4))
    assert len(torch.unique(head.directions, dim=0)) == 4


@torch.inference_mode()
def test_a_cosine_head_that_begins_at_class_means_answers_with_the_nearest_of_them():
    torch.manual_seed(0)
    means, features = torch.randn(4, 8) * torch.tensor([[1.0], [2.0], [5.0], [9.0]]), torch.randn(50, 8)
    head = make_head(8, 4, kind="cosine", init="probe", weight=means).eval()
    nearest = F.cosine_similarity(features[:, None], means[None], dim=2).argmax(1)
    assert torch.equal(head(features).argmax(1), nearest)
    with_bias = make_head(8, 4, kind="cosine", init="probe", weight=means, bias=torch.arange(4.0)).eval()
    assert torch.equal(with_bias(features), head(features))


@pytest.mark.technique("T137")
def test_nothing_is_random_in_a_batch_normed_network_unless_it_is_asked_for():
    backbone = load_backbone("test_resnet", zoo={}, pretrained=False)
    assert not random_pieces(Classifier(backbone, make_head(backbone.num_features, 3)))
