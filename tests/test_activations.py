import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from finetune.config.model_keys import HeadSpec
from finetune.errors import RecipeError
from finetune.models.activations import Maxout, make_activation
from finetune.models.initialization import initialize
from finetune.planning.activations import ACTIVATIONS, OFFERED, judge_activation

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
PLACES = torch.linspace(-10, 10, 2000, dtype=torch.float64)
"""Zero, where some have a kink, is not among them."""


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def bell(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


TRUTH = {  # value and derivative, in double precision
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "leaky_relu": (lambda x: x if x > 0 else 0.01 * x, lambda x: 1.0 if x > 0 else 0.01),
    "prelu": (lambda x: x if x > 0 else 0.25 * x, lambda x: 1.0 if x > 0 else 0.25),
    "elu": (lambda x: x if x > 0 else math.expm1(x), lambda x: 1.0 if x > 0 else math.exp(x)),
    "selu": (
        lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * math.expm1(x)),
        lambda x: SELU_SCALE * (1.0 if x > 0 else SELU_ALPHA * math.exp(x)),
    ),
    "gelu": (lambda x: x * phi(x), lambda x: phi(x) + x * bell(x)),
    "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x)))),
    "softplus": (lambda x: math.log1p(math.exp(x)), sigmoid),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
}
EVERY = [
    pytest.param("relu", marks=pytest.mark.technique("T035")),
    pytest.param("leaky_relu", marks=pytest.mark.technique("T036")),
    pytest.param("prelu", marks=pytest.mark.technique("T037")),
    pytest.param("elu", marks=pytest.mark.technique("T038")),
    pytest.param("selu", marks=pytest.mark.technique("T039")),
    pytest.param("gelu", marks=pytest.mark.technique("T040")),
    pytest.param("silu", marks=pytest.mark.technique("T040")),
    pytest.param("softplus", marks=pytest.mark.technique("T041")),
    pytest.param("tanh", marks=pytest.mark.technique("T034")),
    pytest.param("sigmoid", marks=pytest.mark.technique("T033")),
]


def module_of(name, **options):
    return make_activation(name, num_units=1, is_hidden=name != "sigmoid", **options)


def test_every_activation_that_can_be_had_has_a_truth_here():
    assert TRUTH.keys() == {*OFFERED, "sigmoid"} - {"maxout"}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_slope_are_those_of_the_formula(name, dtype):
    value, slope = TRUTH[name]
    x = PLACES.to(dtype)[:, None].requires_grad_()  # (N, 1)
    y = module_of(name).to(dtype)(x)
    y.sum().backward()
    places = x.detach().double().flatten().tolist()
    for found, truth in ((y, value), (x.grad, slope)):
        expected = torch.tensor([truth(place) for place in places], dtype=torch.float64)
        torch.testing.assert_close(found.detach().double().flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TRUTH)
def test_gradients_agree_with_differences(name):
    module = module_of(name).double()
    x = torch.tensor([[-3.0], [-0.7], [0.4], [2.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


@pytest.mark.parametrize("name", TRUTH)
def test_what_goes_in_is_not_overwritten(name):
    module = module_of(name)
    assert not getattr(module, "inplace", False)
    x = torch.linspace(-2, 2, 7)[:, None]
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


@pytest.mark.technique("T035")
def test_relu_is_the_default_and_at_zero_passes_nothing_back():
    assert HeadSpec().activation == "relu"
    assert judge_activation("relu").verdict == "good"
    x = torch.zeros(3, requires_grad=True)
    make_activation("relu", num_units=3)(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


@pytest.mark.technique("T036")
def test_the_slope_of_leaky_relu_can_be_chosen_and_keeps_units_alive():
    x = torch.full((1, 4), -5.0, requires_grad=True)
    y = make_activation("leaky_relu", num_units=4, slope=0.3)(x)
    y.sum().backward()
    assert torch.equal(y, 0.3 * x)
    assert torch.equal(x.grad, torch.full((1, 4), 0.3))


@pytest.mark.technique("T037")
@pytest.mark.parametrize(("num_units", "shape"), [(5, (2, 5)), (5, (2, 5, 3, 3)), (1, (2, 5))])
def test_prelu_learns_a_slope_per_unit_or_one_for_all(num_units, shape):
    module = make_activation("prelu", num_units=num_units)
    assert torch.equal(module.weight.detach(), torch.full((num_units,), 0.25))
    module(-torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)).sum().backward()
    assert (module.weight.grad < 0).all()
    assert len(set(module.weight.grad.tolist())) == num_units


@pytest.mark.technique("T038")
def test_elu_levels_off_at_minus_alpha():
    for alpha in (1.0, 0.5):
        assert float(make_activation("elu", num_units=1, alpha=alpha)(torch.tensor(-40.0))) == pytest.approx(-alpha)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert abs(make_activation("elu", num_units=1)(x).mean()) < 0.5 * make_activation("relu", num_units=1)(x).mean()


@pytest.mark.technique("T039")
def test_the_constants_of_selu_leave_a_unit_gaussian_as_it_is():
    module = make_activation("selu", num_units=1).double()
    scale = float(module(torch.ones((), dtype=torch.float64)))
    alpha = -float(module(torch.tensor(-60.0, dtype=torch.float64))) / scale
    assert abs(scale - SELU_SCALE) < 1e-12
    assert abs(alpha - SELU_ALPHA) < 1e-12
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    assert abs((weight * module(x)).sum()) < 1e-6
    assert abs((weight * module(x) ** 2).sum() - 1) < 1e-6


@pytest.mark.technique("T039")
def test_selu_keeps_a_deep_plain_network_alive_where_relu_fades():
    def spread(name):
        torch.manual_seed(0)
        x = torch.randn(256, 256)
        for _ in range(20):
            layer = nn.Linear(256, 256)
            initialize(layer, "xavier")
            x = make_activation(name, num_units=256)(layer(x))
        return float(x.detach().std())

    assert 0.8 < spread("selu") < 1.2
    assert spread("relu") < 0.01
    assert judge_activation("selu").verdict == "caution"
    assert "alpha dropout" in judge_activation("selu").why


@pytest.mark.technique("T040")
def test_swish_is_silu_and_both_smooth_ones_dip_below_zero():
    assert judge_activation("swish") == judge_activation("silu")
    for name in ("swish", "gelu"):
        assert judge_activation(name).verdict == "good"
        y = make_activation(name, num_units=1)(PLACES)
        assert -0.3 < y.min() < -0.1
        assert PLACES[y.argmin()] < 0


@pytest.mark.technique("T041")
def test_softplus_lies_above_relu_by_at_most_log_two():
    gap = make_activation("softplus", num_units=1)(PLACES) - PLACES.clamp(min=0)
    assert (gap > 0).all()
    assert gap.max() <= math.log(2)
    assert gap.max() > 0.99 * math.log(2)


@pytest.mark.technique("T042")
def test_maxout_is_the_larger_of_two_linear_maps_for_twice_the_parameters():
    layer, plain = Maxout(7, 3).double(), nn.Linear(7, 3)
    assert sum(p.numel() for p in layer.parameters()) == 2 * sum(p.numel() for p in plain.parameters())
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = layer.linear.weight, layer.linear.bias
    first, second = (x @ weight[rows].T + bias[rows] for rows in (slice(3), slice(3, 6)))
    torch.testing.assert_close(layer(x), torch.where(first > second, first, second))
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *layer.parameters()))


@pytest.mark.technique("T042")
def test_no_unit_of_maxout_can_die():
    layer = Maxout(4, 3)
    nn.init.constant_(layer.linear.bias, -100.0)
    layer(torch.randn(6, 4)).sum().backward()
    assert (layer.linear.bias.grad.reshape(2, 3).sum(0) == 6).all()
    with pytest.raises(ValueError, match=r"use Maxout\(num_in, num_out\)"):
        make_activation("maxout", num_units=3)


@pytest.mark.technique("T034")
def test_tanh_may_be_had_with_a_warning_that_it_saturates():
    verdict = judge_activation("tanh")
    assert verdict.verdict == "caution"
    assert "saturates" in verdict.why
    x = torch.tensor([-2.1, 2.1], requires_grad=True)
    make_activation("tanh", num_units=2)(x).sum().backward()
    assert (x.grad < 0.06).all()


@pytest.mark.technique("T033")
def test_sigmoid_is_for_outputs_and_refused_in_hidden_layers():
    assert judge_activation("sigmoid").verdict == "refused"
    with pytest.raises(RecipeError, match=r"'sigmoid' is refused in a hidden layer\. It saturates.*relu, leaky_relu"):
        make_activation("sigmoid", num_units=4)
    assert isinstance(make_activation("sigmoid", num_units=4, is_hidden=False), nn.Sigmoid)
    x = torch.zeros(1, requires_grad=True)
    module_of("sigmoid")(x).backward()
    assert float(x.grad) == 0.25


@pytest.mark.technique("T043")
@pytest.mark.parametrize(
    ("name", "function", "twins"),
    [
        ("sine", math.sin, (0.3, math.pi - 0.3)),
        ("cosine", math.cos, (0.3, 2 * math.pi + 0.3)),
        ("abs", abs, (0.3, -0.3)),
        ("square", lambda x: x * x, (0.3, -0.3)),
    ],
)
def test_what_maps_far_inputs_to_one_output_is_refused(name, function, twins):
    assert function(twins[0]) == pytest.approx(function(twins[1]))
    assert judge_activation(name).verdict == "refused"
    assert "many-to-one" in judge_activation(name).why
    for is_hidden in (True, False):
        with pytest.raises(RecipeError, match="many-to-one"):
            make_activation(name, num_units=2, is_hidden=is_hidden)


def test_softmax_shares_one_among_the_classes_of_an_image():
    y = make_activation("softmax", num_units=4, is_hidden=False)(torch.randn(3, 4))
    torch.testing.assert_close(y.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("name", "near"),
    [("rellu", "Nearest: relu"), ("sigmoit", "Nearest: sigmoid"), ("swsh", "Nearest: swish"), ("x7", "one of relu, ")],
)
def test_an_unknown_name_points_to_the_nearest(name, near):
    with pytest.raises(RecipeError, match=rf"head\.activation: '{name}' is not.*{near}"):
        judge_activation(name)


def test_every_verdict_is_one_sentence():
    assert len(ACTIVATIONS) == 16
    for name, verdict in ACTIVATIONS.items():
        assert verdict.name == name
        assert verdict.why[0].isupper()
        assert verdict.why.endswith(".")
        assert ". " not in verdict.why


def test_verdicts_need_no_torch():
    code = "import sys, finetune.planning.activations; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
