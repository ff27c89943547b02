"""What is measured of units and gradients, and what is made of it."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.models.activation_statistics import dead_share, judge_units, measure_gradients, measure_units
from finetune.models.activity import GRID
from finetune.models.backbones import load_backbone

FIXTURES = {
    "tanh, too small": (nn.Tanh, 0.01, "collapses"),
    "tanh, too large": (nn.Tanh, 1.0, "saturated"),
    "tanh, xavier": (nn.Tanh, 512**-0.5, None),
    "relu, xavier": (nn.ReLU, 512**-0.5, "collapses"),
    "relu, kaiming": (nn.ReLU, (2 / 512) ** 0.5, None),
}
"""Ten layers of 512 units on unit-Gaussian input: the activation, the std of weights, and what must be said."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def layers_of(name):
    return measure_units(deep_net(name), [randn(200, 512, seed=1000)])


def deep_net(name, *, num_classes=None):
    act, std, _ = FIXTURES[name]
    layers = []
    for depth in range(10):
        linear = nn.Linear(512, 512)
        linear.weight.data = std * randn(512, 512, seed=depth)
        linear.bias.data.zero_()
        layers += [linear, act()]
    if num_classes:
        layers.append(nn.Linear(512, num_classes, bias=False))
        layers[-1].weight.data = 512**-0.5 * randn(num_classes, 512, seed=99)
    return nn.Sequential(*layers)


def dense(act, *, inputs=8, units=20, seed=0):
    net = nn.Sequential(nn.Linear(inputs, units), act)
    net[0].weight.data, net[0].bias.data = randn(units, inputs, seed=seed), torch.zeros(units)
    return net


@pytest.mark.technique("T059")
@pytest.mark.technique("T060")
@pytest.mark.parametrize("name", FIXTURES)
def test_the_five_known_initialisations_get_their_verdicts(name):
    layers = layers_of(name)
    assert len(layers) == 10
    verdicts = judge_units(layers)
    word = FIXTURES[name][2]
    assert [word in verdict for verdict in verdicts] == ([] if word is None else [True])
    if word == "collapses":
        assert f"from {layers[0].std:.3g} in 1 to {layers[-1].std:.3g} in 19" in verdicts[0]


@pytest.mark.technique("T059")
def test_std_by_layer_follows_from_the_variance_of_the_weights():
    stds = {name: [layer.std for layer in layers_of(name)] for name in FIXTURES}
    # small tanh is the identity: every layer multiplies by 0.01 sqrt(512)
    assert stds["tanh, too small"][9] / stds["tanh, too small"][2] == pytest.approx(0.2263**7, rel=0.1)
    # a ReLU halves the second moment, so xavier loses sqrt 2 per layer and kaiming nothing
    first = math.sqrt(0.5 - 0.5 / math.pi)  # of a rectified unit Gaussian
    assert stds["relu, xavier"][0] == pytest.approx(first, rel=0.02)
    assert stds["relu, xavier"][9] / stds["relu, xavier"][0] == pytest.approx(2**-4.5, rel=0.2)
    assert stds["relu, kaiming"][9] == pytest.approx(math.sqrt(2) * first, rel=0.2)


@pytest.mark.technique("T059")
def test_numbers_over_batches_are_those_of_all_values_at_once():
    net, images = dense(nn.ReLU()), randn(90, 8, seed=1)
    with torch.no_grad():
        values = net(images) * 1.0
    (layer,) = measure_units(net, images.split([7, 50, 33]))
    assert (layer.name, layer.kind, layer.num_units, layer.num_samples) == ("1", "relu", 20, 90)
    assert layer.mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert layer.std == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert layer.zero_share == pytest.approx(float((values == 0).double().mean()))
    places = torch.bucketize(values.clamp(-3, 3), torch.tensor(GRID)) - 1
    assert list(layer.counts) == places.flatten().bincount(minlength=61).tolist()
    assert layer.counts[30] >= layer.zero_share * values.numel()  # zeros lie in the middle bin


@pytest.mark.technique("T059")
def test_a_tiny_spread_around_a_large_mean_is_still_measured():
    class Shifted(nn.Module):
        def forward(self, x):
            return F.relu(1000 + 1e-2 * x)

    values = 1000 + 1e-2 * randn(4000, 3)
    (layer,) = measure_units(Shifted(), randn(4000, 3).split(1000))
    assert layer.std == pytest.approx(float(values.double().std(correction=0)), rel=0.02)


@pytest.mark.technique("T060")
def test_an_explosion_is_named_with_its_layer_and_so_is_a_value_that_is_none():
    net = deep_net("relu, kaiming")
    for depth in range(5, 10):
        net[2 * depth].weight.data *= 3.0
    (verdict,) = judge_units(measure_units(net, [randn(100, 512)]))
    assert "explodes" in verdict
    assert "lost at 15" in verdict  # 3, 9, 27 times the first from layer 11 on, and 20 is passed at module 15
    for depth in range(10):
        net[2 * depth].weight.data *= 1e5
    (verdict,) = judge_units(measure_units(net, [randn(100, 512)]))
    assert "not finite" in verdict


@pytest.mark.technique("T048")
def test_a_sigmoid_fed_wide_values_is_saturated_as_the_normal_law_says():
    edge = math.log(0.97 / 0.03) / 10  # in standard deviations
    expected = 1 - math.erf(edge / math.sqrt(2))
    (layer,) = measure_units(nn.Sigmoid(), [10 * randn(500, 40)])
    assert expected > 0.7
    assert layer.saturated_share == pytest.approx(expected, abs=0.01)
    assert "saturated" in judge_units((layer,))[0]
    (narrow,) = measure_units(nn.Sigmoid(), [0.5 * randn(500, 40)])
    assert narrow.saturated_share == 0.0
    assert judge_units((narrow,)) == ()


@pytest.mark.technique("T048")
def test_saturated_units_pass_next_to_no_gradient():
    x = (10 * randn(400, 1)).requires_grad_()
    y = torch.tanh(x)
    y.sum().backward()
    (layer,) = measure_units(nn.Tanh(), [x.detach()])
    flat = y.abs() > 0.97
    assert layer.saturated_share == pytest.approx(float(flat.double().mean()))
    assert float(x.grad[flat].max()) < 1 - 0.97**2 + 1e-6
    assert measure_units(nn.ReLU(), [x.detach()])[0].saturated_share is None


def test_a_gate_may_be_closed():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
    net[1].bias.data.fill_(-20.0)
    (layer,) = measure_units(net, [randn(8, 4, 5, 5)])
    assert layer.is_gate
    assert layer.saturated_share == 1.0
    assert judge_units((layer,)) == ()


@pytest.mark.technique("T050")
def test_relu_on_symmetric_input_is_zero_half_the_time_and_leaky_relu_never():
    x = randn(500, 200)
    assert measure_units(nn.ReLU(), [x])[0].zero_share == pytest.approx(0.5, abs=0.02)
    assert measure_units(nn.LeakyReLU(), [x])[0].zero_share == 0.0


@pytest.mark.technique("T049")
def test_relu_is_not_centred_and_tanh_is():
    x = randn(500, 200)
    (relu,), (tanh,) = measure_units(nn.ReLU(), [x]), measure_units(nn.Tanh(), [x])
    assert relu.centring == pytest.approx(1 / math.sqrt(math.pi - 1), abs=0.02)  # of a rectified Gaussian
    assert tanh.centring < 0.02


@pytest.mark.technique("T049")
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh(), nn.Sigmoid()], ids=["relu", "tanh", "sigmoid"])
def test_same_sign_share_is_that_of_images_whose_next_gradients_share_a_sign(act):
    net, images = dense(act, units=4), randn(60, 8, seed=2)
    (layer,) = measure_units(net, [images])
    unit = nn.Linear(4, 1)
    alike = 0
    for image in images:
        unit.zero_grad()
        unit(net(image[None]).detach()).sum().backward()
        alike += bool((unit.weight.grad >= 0).all() or (unit.weight.grad <= 0).all())
    assert layer.same_sign_share == pytest.approx(alike / 60)
    assert (layer.same_sign_share == 1) == (not isinstance(act, nn.Tanh))


@pytest.mark.technique("T045")
@pytest.mark.parametrize("planted", [0, 1, 7])
def test_planted_dead_units_are_found_and_are_those_without_gradient(planted):
    net, images = dense(nn.ReLU()), randn(200, 8)
    units = list(range(3, 3 + planted))
    net[0].bias.data[units] = -100.0
    (layer,) = measure_units(net, images.split(64))
    assert list(layer.dead) == units
    assert layer.dead_share == planted / 20
    net(images).square().sum().backward()
    assert (net[0].weight.grad.abs().sum(1) == 0).nonzero().flatten().tolist() == units


@pytest.mark.technique("T045")
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardswish(), nn.GELU()], ids=["relu", "hardswish", "gelu"])
def test_the_share_of_the_dead_is_that_of_the_layers_that_can_die(act):
    net, images = nn.Sequential(dense(act), nn.Linear(20, 30), nn.ReLU()), randn(200, 8)
    net[0][0].bias.data[:5] = -100.0
    net[1].bias.data[:6] = -1e4
    net.train()
    layers = [layer for layer in measure_units(net, images.split(64)) if layer.can_die and not layer.is_silent]
    wanted = sum(len(layer.dead) for layer in layers) / sum(layer.num_units for layer in layers)
    assert dead_share(net, images.split(64)) == wanted == (6 / 30 if isinstance(act, nn.GELU) else 11 / 50)
    assert all(module.training for module in net.modules())
    with pytest.raises(ValueError, match="batches is empty"):
        dead_share(net, [])


@pytest.mark.technique("T045")
def test_one_image_that_wakes_a_unit_takes_it_from_the_list():
    net, images = dense(nn.ReLU()), randn(2000, 8)
    net[0].bias.data[[4, 9]] = torch.tensor([-100.0, -1e6])
    waking = 100 * net[0].weight.data[4:5]  # along the unit's own weights
    (layer,) = measure_units(net, [images, waking])
    assert 4 not in layer.dead
    assert 9 in layer.dead
    assert layer.nearly_dead == (4,)  # one of 2,001
    assert measure_units(net, [images[:500], waking])[0].nearly_dead == ()  # one of 501


@pytest.mark.technique("T045")
@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Tanh()])
def test_units_with_a_gradient_on_both_sides_cannot_die(act):
    net = dense(act)
    net[0].bias.data.fill_(-5.0)
    (layer,) = measure_units(net, [0.1 * randn(50, 8)])
    assert not layer.can_die
    assert layer.dead == ()
    net(0.1 * randn(50, 8)).sum().backward()
    assert bool((net[0].weight.grad.abs().sum(1) > 0).all())


@pytest.mark.technique("T045")
@pytest.mark.parametrize(("act", "edge"), [(nn.ReLU(), 0.0), (nn.ReLU6(), 0.0), (nn.Hardswish(), -3.0)])
def test_a_unit_dies_where_its_function_is_flat_and_not_before(act, edge):
    net = nn.Sequential(nn.Linear(1, 2), act)
    net[0].weight.data.fill_(1e-3)
    net[0].bias.data = torch.tensor([edge - 0.01, edge + 0.01])
    (layer,) = measure_units(net, [randn(50, 1)])
    assert layer.can_die
    assert layer.dead == (0,)
    net(randn(50, 1)).sum().backward()
    assert (net[0].weight.grad.flatten() != 0).tolist() == [False, True]


@pytest.mark.technique("T045")
def test_a_channel_is_alive_if_one_position_of_one_image_wakes_it():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    net[0].weight.data.fill_(1.0)
    net[0].bias.data.fill_(-1.0)
    images = torch.zeros(3, 1, 2, 9)
    (layer,) = measure_units(net, [images])
    assert layer.dead == (0, 1)
    images[2, 0, 1, 8] = 2.0
    (layer,) = measure_units(net, [images])
    assert layer.dead == ()
    assert layer.num_units == 2


def test_units_lie_last_after_a_linear_map_and_second_after_a_convolution():
    channels_last = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
    gated = nn.Sequential(nn.Linear(6, 14), Half(), nn.ReLU())
    convolved = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(5, 11, 1), nn.ReLU())
    tokens = randn(2, 5, 7, 6)
    assert [measure_units(net, [tokens])[0].num_units for net in (channels_last, gated, convolved)] == [10, 7, 11]
    assert measure_units(channels_last, [randn(2, 9, 6)])[0].num_units == 10


class Half(nn.Module):
    def forward(self, x):
        return x.chunk(2, -1)[0]


class Hidden(nn.Module):
    """One block that calls its activations as functions, one module twice, and a lone gate."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 6), nn.Linear(6, 3), nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = self.act(self.second(x))
        return self.act(x - 1).tanh() * self.gain.tanh()


@pytest.mark.technique("T059")
def test_functions_and_second_calls_are_seen_and_gates_of_one_number_are_not():
    net = nn.Sequential(Hidden())
    layers = measure_units(net, [randn(9, 4), randn(9, 4)])
    assert [(layer.name, layer.num_units) for layer in layers] == [
        ("0.relu", 6),
        ("0.act", 3),
        ("0.act#2", 3),
        ("0.tanh", 3),
    ]
    assert {layer.num_samples for layer in layers} == {18}


@pytest.mark.technique("T045")
def test_an_activation_that_works_in_place_is_read_before_it_does():
    whole, in_place = dense(nn.LeakyReLU(0.5)), dense(nn.ReLU(inplace=True))
    (layer,) = measure_units(nn.Sequential(whole, in_place[1]), [randn(100, 8)])[1:]
    assert layer.zero_share > 0.3
    assert layer.dead == ()


@pytest.mark.parametrize(
    ("name", "kind", "names"),
    [
        ("test_resnet", "relu", ["conv1.2", "conv1.5", "layer4.0.act2"]),
        ("test_efficientnet", "silu", ["bn1.act", "blocks.0.0.bn1.act", "bn2.act"]),
        ("test_vit", "gelu", ["blocks.0.mlp.act", "blocks.1.mlp.act", "blocks.5.mlp.act"]),
    ],
)
def test_every_activation_of_a_real_network_is_seen_and_nothing_of_it_changes(name, kind, names):
    backbone = load_backbone(name, zoo={}, pretrained=False).train()
    backbone.model.get_submodule(names[0]).eval()  # a mode of its own
    modes = [module.training for module in backbone.modules()]
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = randn(3, 3, 64, 64) if name != "test_vit" else randn(2, 3, 160, 160)
    for batch_statistics in (False, True):
        layers = measure_units(backbone, [(images, torch.zeros(3))], batch_statistics=batch_statistics)
        seen = [layer.name.removeprefix("model.") for layer in layers]
        assert [*seen[:2], seen[-1]] == names
        assert {layer.kind for layer in layers if not layer.is_gate and ".se." not in layer.name} == {kind}
    assert [module.training for module in backbone.modules()] == modes
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert torch.is_grad_enabled()


def test_hooks_and_modes_are_put_back_after_an_error_too():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    mean = net[1].running_mean
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_units(net, [randn(2, 5)], batch_statistics=True)
    assert net[1].training
    assert net[1].running_mean is mean
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ValueError, match="batches is empty"):
        measure_units(net, [])


@pytest.mark.technique("T060")
def test_batch_statistics_tell_a_fresh_network_from_a_collapsed_one():
    backbone = load_backbone("test_efficientnet", zoo={}, pretrained=False)
    images = [randn(4, 3, 64, 64)]
    assert any("collapses" in verdict for verdict in judge_units(measure_units(backbone, images)))
    fresh = measure_units(backbone, images, batch_statistics=True)
    assert not any("collapses" in verdict for verdict in judge_units(fresh))


def layer_with(dead, **changes):
    (layer,) = measure_units(dense(nn.ReLU(), units=100), [randn(300, 8)])
    assert layer.dead == ()
    return replace(layer, dead=tuple(range(dead)), **changes)


@pytest.mark.technique("T046")
@pytest.mark.parametrize(
    ("before", "now", "said", "cause"),
    [
        (None, 20, None, None),
        (None, 21, "many units are dead", "learning rate too high, bad initialisation"),
        (0, 10, None, None),
        (0, 11, "units died since the last look", "learning rate too high, bad initialisation"),
        (15, 40, "15% of its 100 were dead, now 40% are", "learning rate too high, bad initialisation"),
        (40, 45, "45 of 100 never wake on 300 samples", "They were before: bad initialisation, not the rate"),
    ],
)
def test_dead_units_are_laid_to_the_rate_or_to_the_start(before, now, said, cause):
    earlier = () if before is None else (layer_with(before),)
    verdicts = judge_units((layer_with(now),), before=earlier)
    assert len(verdicts) == (said is not None)
    for verdict in verdicts:
        assert said in verdict
        assert cause in verdict


@pytest.mark.technique("T046")
def test_training_with_too_high_a_rate_kills_units_and_is_blamed():
    images, labels = randn(64, 8, seed=5), torch.arange(64) % 3
    verdicts = {}
    for lr in (0.01, 30.0):
        net = nn.Sequential(*dense(nn.ReLU(), units=40), nn.Linear(40, 3))
        net[2].weight.data, net[2].bias.data = 0.1 * randn(3, 40, seed=6), torch.zeros(3)
        before = measure_units(net, [images])
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        verdicts[lr] = [v for v in judge_units(measure_units(net, [images]), before=before) if "died" in v]
    assert verdicts[0.01] == []
    assert "learning rate too high" in verdicts[30.0][0]


def test_units_behind_a_branch_that_begins_at_zero_only_wait():
    net = dense(nn.ReLU())
    net[0].weight.data.zero_()
    (layer,) = measure_units(nn.Sequential(nn.Identity(), *net), [randn(30, 8)])
    assert layer.is_silent
    assert layer.dead_share == 1.0
    assert not any("dead" in verdict for verdict in judge_units((layer_with(0), layer)))


def test_a_network_in_which_nothing_was_seen_is_said():
    (verdict,) = judge_units(measure_units(nn.Linear(3, 3), [randn(2, 3)]))
    assert "no activation was seen" in verdict


def loss_of(net, *, num_classes=10, n=100):
    return F.cross_entropy(net(randn(n, 512, seed=3)), torch.arange(n) % num_classes)


@pytest.mark.technique("T062")
def test_ratios_are_norms_of_gradient_over_weight_at_a_loss_of_one_and_no_grad_is_touched():
    net = deep_net("tanh, xavier", num_classes=10)
    rows = measure_gradients(net, loss_of(net))
    assert all(parameter.grad is None for parameter in net.parameters())
    (loss := loss_of(net)).backward()
    assert [row.name for row in rows] == [str(2 * depth) for depth in range(11)]
    for row in rows:
        layer = net[int(row.name)]
        own = list(layer.parameters())
        gradient = torch.cat([p.grad.flatten() for p in own]).norm() / loss.detach()
        weight = torch.cat([p.detach().flatten() for p in own]).norm()
        assert row.gradient_norm == pytest.approx(float(gradient), rel=1e-4)
        assert row.ratio == pytest.approx(float(gradient / weight), rel=1e-4)
        assert not row.is_vanishing
    half = measure_gradients(net, 0.5 * loss_of(net))
    assert half[0].ratio == pytest.approx(rows[0].ratio, rel=1e-4)


@pytest.mark.technique("T062")
def test_the_collapsed_network_gets_no_gradient_at_its_first_layer_and_is_told_so():
    nets = {name: deep_net(name, num_classes=10) for name in ("tanh, too small", "tanh, xavier")}
    collapsed, sound = (measure_gradients(net, loss_of(net)) for net in nets.values())
    assert collapsed[0].gradient_norm < 1e-3 * sound[0].gradient_norm
    assert judge_units(layers_of("tanh, xavier"), gradients=sound) == ()
    (verdict,) = judge_units(layers_of("tanh, xavier"), gradients=collapsed)
    assert verdict.startswith("gradients fade before 0, the lowest layer that trains")


@pytest.mark.technique("T062")
def test_layers_a_thousand_times_below_the_median_vanish():
    net = deep_net("tanh, xavier", num_classes=10)
    net[4].weight.data *= 1e-5  # what lies below it learns nothing
    net[5] = Amplify()
    rows = measure_gradients(net, loss_of(net))
    ratios = sorted(row.ratio for row in rows)
    for row in rows:
        assert row.is_vanishing == (row.ratio < 1e-3 * ratios[5])
    fading = [row.name for row in rows if row.is_vanishing]
    assert fading == ["0", "2"]
    (verdict,) = judge_units(layers_of("tanh, xavier"), gradients=rows)
    assert verdict.startswith("gradients vanish in 2 of 11 layers, 0 the first")


class Amplify(nn.Module):
    """Brings small values back to size, and lets no gradient grow."""

    def forward(self, x):
        return x + (1e5 * x - x).detach()


@pytest.mark.technique("T062")
def test_frozen_layers_are_shown_as_frozen_and_a_layer_without_gradient_as_vanishing():
    net = deep_net("tanh, xavier", num_classes=10)
    net[0].requires_grad_(False)
    net[2].register_module("unused", nn.Linear(4, 4))
    rows = {row.name: row for row in measure_gradients(net, loss_of(net))}
    assert [name for name, row in rows.items() if row.is_frozen] == ["0"]
    assert [name for name, row in rows.items() if row.is_vanishing] == ["2.unused"]
    assert rows["2.unused"].zero_share == 1.0
    with pytest.raises(ValueError, match="no graph"):
        measure_gradients(net, loss_of(net).detach())


@pytest.mark.technique("T062")
def test_a_head_of_zeros_gives_no_gradient_below_and_no_warning():
    net = deep_net("tanh, xavier", num_classes=10)
    net[-1].weight.data.zero_()
    rows = measure_gradients(net, loss_of(net))
    assert [row.zero_share for row in rows] == [1.0] * 10 + [0.0]
    assert not any(row.is_vanishing for row in rows)
    assert judge_units(layers_of("tanh, xavier"), gradients=rows) == ()


@pytest.mark.technique("T062")
def test_the_share_of_exact_zeros_counts_the_weights_of_dead_units():
    net, images = dense(nn.ReLU()), randn(50, 8)
    net[0].bias.data[:5] = -100.0
    (row,) = measure_gradients(net, net(images).square().sum())
    assert row.zero_share == pytest.approx(5 / 20)


def test_a_gradient_that_is_not_finite_is_named():
    net = dense(nn.ReLU())
    (row,) = measure_gradients(net, net(randn(5, 8)).sum() * math.inf)
    (verdict,) = judge_units((layer_with(0),), gradients=[row])
    assert "gradient of 0 is not finite" in verdict
