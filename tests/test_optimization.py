"""Optimizers: each is its published rule, decays what it should and nothing else, and keeps the ladder of rates."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.config.decided import Rule
from finetune.config.plan import Stage
from finetune.config.recipe import OptimizerSpec, ScheduleSpec, TrainSpec
from finetune.errors import RecipeError
from finetune.metrics import calibration
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.planning.lr_schedules import rate_factor
from finetune.training.optimization import (
    DEFAULT,
    OWN,
    Anchor,
    check_optimizer,
    decay_penalty,
    group_parameters,
    make_optimizer,
    random_layers,
    set_rates,
)

MOVING = tuple(name for name in OWN if name != "lbfgs")
TIMM = ("timm/lion", "timm/lamb", "timm/nadamw", "timm/muon", "timm/sgdw", "timm/adafactorbv")

START = [[3.0, -2.0], [1.0, 4.0]]


class Toy(nn.Module):
    """Weights and nothing else, in float64, where a classifier is wanted."""

    def __init__(self, weight, bias=0.0):
        super().__init__()
        self.backbone = None
        weight = torch.atleast_2d(torch.as_tensor(weight, dtype=torch.float64))
        self.head = nn.Linear(weight.shape[1], len(weight)).double()
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.fill_(bias)

    def pull(self, gradient):
        """Give every weight this gradient."""
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.head.weight.grad += torch.as_tensor(gradient, dtype=torch.float64)


def _stage(lr=0.1, **options):
    base = {"name": "full", "trainable_stages": 1, "epochs": 1, "lr_backbone": lr / 10, "batch_norm": "frozen"}
    return Stage(**{**base, "lr_head": lr, **options})


def _optimizer(toy, name, lr=0.1, **options):
    return make_optimizer(toy, _stage(lr), Rule(name=name, **options))


def _walk(name, gradients, lr=0.1, start=1.0, **options):
    """Weights after each step along given gradients, or along those of a function."""
    toy = Toy([[start, start]] * 2)
    optimizer, path = _optimizer(toy, name, lr, **options), []
    for gradient in gradients:
        toy.pull(gradient(toy.head.weight.detach()) if callable(gradient) else gradient)
        optimizer.step()
        path.append(toy.head.weight[0, 0].item())
    return path


def _noise(count, seed=0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()


def _network(name, num_trainable_stages=None):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    classifier = Classifier(backbone, nn.Linear(backbone.num_features, 3))
    classifier.freeze(len(backbone.stages) if num_trainable_stages is None else num_trainable_stages)
    return classifier


# The rules


def _sgd(g, lr, state):
    return -lr * g


def _momentum(g, lr, state):
    state["v"] = 0.8 * state.get("v", 0.0) + g
    return -lr * state["v"]


def _nesterov(g, lr, state):
    state["v"] = 0.8 * state.get("v", 0.0) + g
    return -lr * (g + 0.8 * state["v"])


def _adagrad(g, lr, state):
    state["sum"] = state.get("sum", 0.0) + g**2
    return -lr * g / (math.sqrt(state["sum"]) + 1e-7)


def _rmsprop(g, lr, state):
    state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * g**2
    return -lr * g / (math.sqrt(state["mean"]) + 1e-7)


def _adam(g, lr, state):
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.7 * state.get("m", 0.0) + 0.3 * g
    state["u"] = 0.95 * state.get("u", 0.0) + 0.05 * g**2
    m, u = state["m"] / (1 - 0.7 ** state["t"]), state["u"] / (1 - 0.95 ** state["t"])
    return -lr * m / (math.sqrt(u) + 1e-7)


RULES = dict(zip(MOVING, (_sgd, _momentum, _nesterov, _adagrad, _rmsprop, _adam, _adam), strict=True))


@pytest.mark.technique("T098")
@pytest.mark.technique("T099")
@pytest.mark.technique("T101")
@pytest.mark.technique("T102")
@pytest.mark.technique("T103")
@pytest.mark.parametrize("name", MOVING)
def test_fifty_steps_are_the_published_rule(name):
    numbers = {"momentum": 0.8, "rho": 0.9, "betas": (0.7, 0.95), "eps": 1e-7}
    weight, state, want = 1.0, {}, []
    for gradient in _noise(50):
        weight += RULES[name](gradient, 0.03, state)
        want.append(weight)
    assert _walk(name, _noise(50), lr=0.03, **numbers) == pytest.approx(want, rel=1e-9)


@pytest.mark.technique("T097")
def test_sgd_steps_along_the_mean_over_the_batch_however_it_is_cut():
    assert TrainSpec().batch_size == 64
    features, labels = torch.tensor(_noise(64 * 5)).view(64, 5).double(), torch.arange(64) % 3
    whole, cut = Toy(torch.zeros(3, 5)), Toy(torch.zeros(3, 5))
    F.cross_entropy(whole.head(features), labels).backward()
    for x, y in zip(features.split(16), labels.split(16), strict=True):
        (F.cross_entropy(cut.head(x), y, reduction="sum") / 64).backward()
    _optimizer(whole, "sgd").step()
    _optimizer(cut, "sgd").step()
    torch.testing.assert_close(cut.head.weight, whole.head.weight)
    softmax_less_label = torch.full((64, 3), 1 / 3).double() - F.one_hot(labels, 3)
    torch.testing.assert_close(whole.head.weight, -0.1 * softmax_less_label.T @ features / 64)


@pytest.mark.technique("T098")
def test_momentum_crosses_a_narrow_valley_in_fewer_steps_than_sgd_at_its_best_rate():
    slopes = torch.tensor([[1.0, 50.0]], dtype=torch.float64)

    def steps_to_rest(name, lr):
        toy = Toy([[1.0, 1.0]])
        optimizer = _optimizer(toy, name, lr)
        for step in range(1000):
            if float(toy.head.weight.detach().norm()) < 1e-6:
                return step
            toy.pull(slopes * toy.head.weight.detach())
            optimizer.step()
        return math.inf

    best_of_sgd = steps_to_rest("sgd", 2 / (1 + 50))  # which makes both directions shrink alike
    assert steps_to_rest("momentum", 0.05) < 0.85 * best_of_sgd < math.inf
    assert OptimizerSpec().momentum == 0.9


@pytest.mark.technique("T099")
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_velocity_starts_at_zero_so_the_first_step_is_that_of_sgd(momentum):
    assert _walk("momentum", [3.0], momentum=momentum) == _walk("sgd", [3.0])


def test_equal_gradients_multiply_the_rate_by_one_over_one_minus_momentum():
    path = _walk("momentum", [1.0] * 200)
    assert path[-2] - path[-1] == pytest.approx(0.1 / (1 - 0.9), rel=1e-6)


@pytest.mark.technique("T100")
def test_the_three_forms_of_nesterov_agree():
    def slope(x):
        return 3.0 * x + math.sin(x)

    x, v, lr, rho, textbook = 1.0, 0.0, 0.05, 0.9, []
    for _ in range(50):
        v = rho * v - lr * slope(x + rho * v)
        x += v
        textbook.append(x + rho * v)  # where the next gradient is taken
    shifted, v, change = 1.0, 0.0, []
    for _ in range(50):
        before, v = v, rho * v - lr * slope(shifted)
        shifted += v + rho * (v - before)
        change.append(shifted)
    ours = _walk("nesterov", [lambda weight: 3.0 * weight + weight.sin()] * 50, lr=lr)
    assert ours == pytest.approx(textbook, abs=1e-12)
    assert change == pytest.approx(textbook, abs=1e-12)


@pytest.mark.technique("T101")
def test_steps_of_adagrad_shrink_with_the_root_of_time():
    path = [1.0, *_walk("adagrad", [7.0] * 100)]
    steps = [before - after for before, after in pairwise(path)]
    assert [steps[0], steps[3], steps[99]] == pytest.approx([0.1, 0.05, 0.01], rel=1e-6)


@pytest.mark.technique("T102")
@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_the_first_step_of_rmsprop_is_too_long_by_one_over_the_root(rho):
    assert 1 - _walk("rmsprop", [5.0], lr=1e-3, rho=rho)[0] == pytest.approx(1e-3 / math.sqrt(1 - rho), rel=1e-6)
    assert OptimizerSpec().rho == 0.99


@pytest.mark.technique("T103")
@pytest.mark.parametrize("gradient", [1e-3, 1.0, -100.0])
def test_the_first_step_of_adam_is_the_rate_whatever_the_gradient(gradient):
    step = 1 - _walk("adam", [gradient], lr=1e-3)[0]
    assert step == pytest.approx(math.copysign(1e-3, gradient), rel=1e-4)  # 3.16 rates without the correction


@pytest.mark.technique("T104")
@pytest.mark.technique("T105")
def test_a_recipe_that_names_no_optimizer_gets_adam_with_its_usual_numbers_and_decoupled_decay():
    optimizer = make_optimizer(Toy([[1.0, 1.0]]), _stage(1e-3), Rule(name=DEFAULT))
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert optimizer.defaults["fused"]


@pytest.mark.technique("T107")
def test_newton_finds_a_temperature_without_a_rate_in_steps_that_halving_could_not(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 4, generator=generator), torch.arange(200) % 4
    logits = 5 * (logits + F.one_hot(labels, 4))
    want = calibration.fit_temperature(logits, labels).value
    monkeypatch.setattr(calibration, "_MOST_STEPS", 9)
    assert calibration.fit_temperature(logits, labels).value == pytest.approx(want, rel=1e-9)


@pytest.mark.technique("T107")
@pytest.mark.technique("T108")
def test_lbfgs_needs_no_tuned_rate_where_conditioning_defeats_sgd():
    slopes = torch.logspace(0, 4, 6).double()
    toy = Toy(torch.ones(1, 6))
    optimizer = _optimizer(toy, "lbfgs", lr=1.0, weight_decay=0.1)  # of which it has none

    def closure():
        optimizer.zero_grad()
        loss = (slopes * (toy.head.weight - 2) ** 2).sum() / 2 + toy.head.bias.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(toy.head.weight.detach(), torch.full((1, 6), 2.0).double(), atol=1e-5, rtol=0)
    assert (1 - 2 / 1e4) ** 60 > 0.98  # what sixty steps of SGD at the largest stable rate leave of the distance
    assert set_rates(optimizer, 0.5) == {"all": 0.5}


@pytest.mark.technique("T108")
@pytest.mark.parametrize(
    ("layer", "kind"),
    [(nn.Dropout(0.1), "Dropout"), (nn.Dropout2d(0.1), "Dropout2d"), (nn.BatchNorm1d(2), "BatchNorm1d")],
)
def test_lbfgs_is_refused_where_a_layer_is_random(layer, kind):
    toy = Toy([[1.0, 1.0]])
    toy.head.add_module("noise", layer)
    toy.eval()  # as it may be when the optimizer is made
    with pytest.raises(RecipeError, match=rf"the loss is random in training: head\.noise \({kind}\)\. Turn these off"):
        _optimizer(toy, "lbfgs")
    assert not toy.training
    assert random_layers(Toy([[1.0]])) == []


def test_lbfgs_takes_frozen_batch_norm_and_dropout_of_zero():
    classifier = _network("test_resnet")
    assert any(isinstance(module, _BatchNorm) for module in classifier.modules())
    optimizer = make_optimizer(classifier, _stage(1.0), Rule(name="lbfgs"))
    assert optimizer.defaults["line_search_fn"] == "strong_wolfe"
    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in trained]


# timm's


@pytest.mark.parametrize("name", TIMM)
def test_optimizers_of_timm_keep_our_rates_and_step(name):
    classifier = _network("test_resnet", 1)
    optimizer = make_optimizer(classifier, _stage(0.01, layer_decay=0.5), Rule(name=name))
    groups = group_parameters(classifier, _stage(0.01, layer_decay=0.5), 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
    assert set_rates(optimizer, 0.5) == {"head": 0.005, "backbone/layer4": 0.0005}
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    for parameter in classifier.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(classifier.trainable_names())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamv", "'adamv' is not an optimizer. Nearest: adam, adamw"),
        ("lion", "Nearest: timm/lion"),
        ("timm/lyon", "Nearest: timm/lion"),
        ("quantum", "Known: sgd, momentum"),
        ("timm/adahessian", "needs second derivatives"),
        ("timm/fusedadam", "cannot be made on this machine: "),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused_before_training(name, words):
    with pytest.raises(RecipeError) as fault:
        check_optimizer(OptimizerSpec(name=name))
    assert str(fault.value).startswith("train.optimizer.name: ")
    assert words in str(fault.value)


def test_coupled_adamw_is_a_contradiction():
    with pytest.raises(RecipeError, match=r"train\.optimizer\.decay is coupled.*Set train\.optimizer\.name to adam"):
        check_optimizer(OptimizerSpec(name="adamw", decay="coupled"))
    for name in (*OWN, *TIMM):
        check_optimizer(OptimizerSpec(name=name))


# Decay


@pytest.mark.technique("T121")
@pytest.mark.technique("T122")
@pytest.mark.parametrize("name", (*MOVING, "timm/lion", "timm/sgdw", "timm/adamw"))
def test_decoupled_decay_shrinks_weights_by_rate_times_decay_and_no_bias(name):
    toy = Toy(START, bias=5.0)
    optimizer = _optimizer(toy, name, lr=0.5, weight_decay=0.2)
    set_rates(optimizer, 0.5)  # decay follows the schedule
    for step in range(1, 4):
        toy.pull(0.0)
        optimizer.step()
        want = torch.tensor(START).double() * (1 - 0.25 * 0.2) ** step
        torch.testing.assert_close(toy.head.weight.detach(), want, rtol=1e-12, atol=0)
    assert toy.head.bias.tolist() == [5.0, 5.0]


@pytest.mark.technique("T121")
@pytest.mark.technique("T122")
@pytest.mark.parametrize("name", [name for name in (*MOVING, "timm/nadam") if name != "adamw"])
def test_coupled_decay_descends_the_loss_plus_half_the_decay_times_the_squared_weights(name):
    features, labels = torch.tensor(_noise(40, seed=1)).double().view(8, 5), torch.arange(8) % 3
    decayed, penalised = (Toy(torch.tensor(_noise(15)).view(3, 5), bias=1.0) for _ in range(2))
    first = _optimizer(decayed, name, weight_decay=0.3, decay="coupled")
    second = _optimizer(penalised, name, weight_decay=0.0)
    for _ in range(20):
        for toy, optimizer, decay in ((decayed, first, 0.0), (penalised, second, 0.3)):
            optimizer.zero_grad()
            loss = F.cross_entropy(toy.head(features), labels) + decay / 2 * toy.head.weight.square().sum()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(decayed.head.weight, penalised.head.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(decayed.head.bias, penalised.head.bias, rtol=1e-8, atol=1e-10)


@pytest.mark.technique("T121")
def test_an_l2_penalty_raises_the_loss_and_biases_have_none():
    toy = Toy(START, bias=5.0)
    penalties = [
        decay_penalty(_optimizer(toy, name, weight_decay=decay, decay="coupled"))
        for name, decay in (("sgd", 0.0), ("sgd", 0.1), ("adam", 1.0), ("timm/sgd", 1.0))
    ]
    assert penalties == pytest.approx([0.0, 0.1 / 2 * 30, 30 / 2, 30 / 2])


def test_for_plain_sgd_the_two_decays_are_one_and_for_momentum_they_are_not():
    gradients = _noise(20)
    for name, is_same in (("sgd", True), ("momentum", False)):
        paths = [_walk(name, gradients, weight_decay=0.3, decay=decay) for decay in ("decoupled", "coupled")]
        assert (paths[0] == pytest.approx(paths[1], rel=1e-9)) == is_same


def test_coupled_decay_in_adam_spares_weights_with_large_gradients_and_decoupled_does_not():
    """Loshchilov & Hutter, section 2: dividing by the gradient's size takes its share of the decay with it."""
    left = {}
    for decay in ("coupled", "decoupled"):
        for size in (10.0, 0.01):
            gradients = [size * (-1.0) ** step for step in range(200)]
            plain, decayed = (_walk("adam", gradients, 1e-3, weight_decay=rate, decay=decay)[-1] for rate in (0.0, 0.1))
            left[decay, size] = plain - decayed
    assert left["decoupled", 10.0] == pytest.approx(left["decoupled", 0.01], rel=0.1)
    assert left["coupled", 0.01] > 20 * left["coupled", 10.0] > 0


def test_weights_without_a_gradient_are_not_decayed():
    for name, decay in (("sgd", "decoupled"), ("momentum", "coupled"), ("adamw", "decoupled"), ("timm/sgd", "coupled")):
        toy = Toy(START)
        _optimizer(toy, name, weight_decay=0.5, decay=decay).step()
        assert toy.head.weight.tolist() == START


@pytest.mark.parametrize("name", ["momentum", "adamw", "timm/lion"])
def test_an_optimizer_goes_on_from_its_state(name):
    gradients = _noise(12)

    def walk(toy, optimizer, part):
        for gradient in part:
            toy.pull(gradient)
            optimizer.step()

    whole = Toy([[1.0, 2.0]])
    optimizer = _optimizer(whole, name, weight_decay=0.3)
    walk(whole, optimizer, gradients[:5])
    resumed, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    walk(whole, optimizer, gradients[5:])
    other = _optimizer(resumed, name, weight_decay=0.3)
    other.load_state_dict(state)
    walk(resumed, other, gradients[5:])
    assert torch.equal(resumed.head.weight, whole.head.weight)


# Groups and the ladder

GROUPS = {
    "test_resnet": {"head": 1, "head (no decay)": 1, "backbone": 15, "backbone (no decay)": 30},
    "test_vit": {"head": 1, "head (no decay)": 1, "backbone": 25, "backbone (no decay)": 53},
    "test_convnext": {"head": 1, "head (no decay)": 1, "backbone": 31, "backbone (no decay)": 68},
}
"""Tensors by group: 15 convolutions, each with a scale and a shift of batch norm; 6 blocks of 4 matrices and the patch
embedding; and so on."""


@pytest.mark.technique("T122")
@pytest.mark.parametrize("depth", [0, 2, None])
@pytest.mark.parametrize("name", GROUPS)
def test_every_trainable_tensor_is_in_one_group_and_no_frozen_one_in_any(name, depth):
    classifier = _network(name, depth)
    for layer_decay in (1.0, 0.7):
        groups = group_parameters(classifier, _stage(layer_decay=layer_decay), 0.1)
        members = sorted(id(p) for group in groups for p in group["params"])
        assert members == sorted(id(p) for p in classifier.parameters() if p.requires_grad)
    if depth is None:
        groups = group_parameters(classifier, _stage(), 0.1)
        assert {group["name"]: len(group["params"]) for group in groups} == GROUPS[name]


@pytest.mark.technique("T122")
@pytest.mark.parametrize("name", [*GROUPS, "test_efficientnet", "test_vit2", "torchvision/convnext"])
def test_only_matrices_and_kernels_are_decayed(name):
    if name == "torchvision/convnext":
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        backbone = ConvNeXt([CNBlockConfig(8, None, 2)])  # its layer scale is (C, 1, 1)
        backbone.stages, backbone.stage_of = ("all",), dict.fromkeys(dict(backbone.named_parameters()), 0)
        classifier = Toy(START)
        classifier.backbone = backbone
    else:
        classifier = _network(name)
    decayed = {
        id(p) for group in group_parameters(classifier, _stage(), 0.1) for p in group["params"] if group["weight_decay"]
    }
    kernels = {id(m.weight) for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decayed == kernels


def test_what_timm_exempts_from_decay_we_exempt_too():
    for name in ("test_vit", "test_vit2"):
        classifier = _network(name)
        model = classifier.backbone.model
        exempt = {own for own in model.no_weight_decay() if getattr(model, own, None) is not None}
        assert "pos_embed" in exempt
        groups = group_parameters(classifier, _stage(), 0.1)
        undecayed = {id(p) for group in groups for p in group["params"] if not group["weight_decay"]}
        assert {id(getattr(model, own)) for own in exempt} <= undecayed


@pytest.mark.technique("T008")
@pytest.mark.parametrize("name", ["adamw", "momentum", "timm/lamb"])
def test_the_ladder_holds_through_the_whole_schedule(name):
    classifier, stage = _network("test_vit"), _stage(0.01, layer_decay=0.65)
    optimizer, schedule = make_optimizer(classifier, stage, Rule(name=name)), ScheduleSpec(name="cosine")
    stages = classifier.backbone.stages
    for step in range(0, 40, 3):
        factor = rate_factor(schedule, step, epochs=4, steps_per_epoch=10)
        rates = set_rates(optimizer, factor)
        assert rates.pop("head") == pytest.approx(0.01 * factor, rel=1e-12)
        want = {f"backbone/{s}": 0.001 * factor * 0.65 ** (len(stages) - 1 - i) for i, s in enumerate(stages)}
        assert rates == pytest.approx(want, rel=1e-12)
        assert all(group["lr"] in (0.01 * factor, *rates.values()) for group in optimizer.param_groups)


def test_the_ladder_of_timm_is_lost_under_a_scheduler_of_torch_and_ours_is_not():
    classifier = _network("test_vit")
    theirs = torch.optim.AdamW(param_groups_layer_decay(classifier.backbone.model, layer_decay=0.65), lr=1e-3)
    ours = make_optimizer(classifier, _stage(1e-3, layer_decay=0.65), Rule(name="adamw"))
    assert len({group["lr_scale"] for group in theirs.param_groups}) > 5  # it is there, and nobody reads it
    for optimizer, distinct in ((theirs, 1), (ours, 8)):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        assert len({round(group["lr"], 12) for group in optimizer.param_groups}) == distinct


def test_stages_drawn_anew_move_at_the_rate_of_the_head_and_the_ladder_begins_below():
    classifier = _network("test_resnet")
    groups = group_parameters(classifier, _stage(0.01, fresh_stages=2, layer_decay=0.5), 0.0)
    rates = {group["part"]: group["lr"] for group in groups}
    want = {"head": 0.01, "fresh": 0.01, "backbone/layer2": 1e-3, "backbone/layer1": 5e-4, "backbone/stem": 2.5e-4}
    assert rates == pytest.approx(want)


# The anchor


def _pretrained_names(classifier):
    return [name for name, p in classifier.named_parameters() if name.startswith("backbone.") and p.requires_grad]


def _push(classifier):
    """Move every weight by 0.5."""
    torch._foreach_add_([parameter.detach() for parameter in classifier.parameters()], 0.5)


def test_an_anchor_pulls_nothing_at_the_start_and_by_its_formula_after_a_push():
    classifier = _network("test_resnet", 1)
    anchor = Anchor(classifier, _pretrained_names(classifier), 0.1)
    assert (anchor.loss(), anchor.drift()) == (0.0, 0.0)
    start = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    _push(classifier)
    squared = sum(0.25 * start[name].numel() for name in anchor.names)
    length = sum(float(start[name].square().sum()) for name in anchor.names)
    assert anchor.loss() == pytest.approx(0.1 / 2 * squared, rel=1e-5)
    assert anchor.drift() == pytest.approx(math.sqrt(squared / length), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_pull_of_an_anchor_is_the_gradient_of_its_penalty(scale):
    classifier = _network("test_resnet", 1)
    names = _pretrained_names(classifier)
    start = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    anchor, parameters = Anchor(classifier, names, 0.1), dict(classifier.named_parameters())
    _push(classifier)
    penalty = 0.1 / 2 * sum((parameters[name] - start[name]).square().sum() for name in names)
    (scale * penalty).backward()
    want = {name: parameters[name].grad.clone() for name in names}
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(parameter) if name != names[0] else None
    anchor.add_gradient(scale)
    assert parameters[names[0]].grad is None  # what has no gradient is not moved
    for name in names[1:]:
        torch.testing.assert_close(parameters[name].grad, 1 + want[name])
    assert all(bool((p.grad == 1).all()) for name, p in parameters.items() if name not in names)


def test_an_anchor_holds_on_to_the_pretrained_weights_through_later_stages():
    classifier = _network("test_resnet", 1)
    pretrained = copy.deepcopy(classifier.state_dict())
    _push(classifier)
    anchor = Anchor(classifier, _pretrained_names(classifier), 0.1, start=pretrained)
    assert anchor.loss() > 1


def test_anchored_weights_come_to_rest_between_the_loss_and_their_start_and_are_not_decayed():
    toy = Toy([[3.0, 3.0]] * 2)
    anchor = Anchor(toy, ["head.weight"], 0.5)
    spec = Rule(name="sgd", weight_decay=0.9)
    optimizer = make_optimizer(toy, _stage(0.5), spec, anchored=anchor.names)
    for _ in range(100):
        toy.pull(toy.head.weight.detach())  # the loss would have them at zero
        anchor.add_gradient()
        optimizer.step()
    torch.testing.assert_close(toy.head.weight.detach(), torch.full((2, 2), 3 * 0.5 / 1.5).double())
    assert decay_penalty(optimizer) == 0
