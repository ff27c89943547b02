import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.models.backbones import load_backbone
from finetune.models.heads import make_head
from finetune.models.initialization import (
    RULES,
    find_symmetric,
    initialize,
    reinitialize_stages,
    residual_ends,
    zero_residual_ends,
)

LAYERS = {  # a layer of about 10^5 weights and what one of its units reads
    "linear": (lambda: nn.Linear(250, 400), 250),
    "conv": (lambda: nn.Conv2d(32, 350, 3), 32 * 9),
    "grouped": (lambda: nn.Conv2d(64, 1600, (3, 2), groups=8), 8 * 6),
    "depthwise": (lambda: nn.Conv2d(12_000, 12_000, 3, groups=12_000), 9),
}


def drawn(kind, rule, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    initialize(layer, rule, **options)
    return layer.weight.detach()


@pytest.mark.technique("T056")
@pytest.mark.parametrize("kind", LAYERS)
def test_xavier_has_the_variance_of_one_over_fan_in(kind):
    weight, fan_in = drawn(kind, "xavier"), LAYERS[kind][1]
    assert float(weight.std()) == pytest.approx(math.sqrt(1 / fan_in), rel=0.02)
    assert abs(float(weight.mean())) < 0.02 * float(weight.std())


@pytest.mark.technique("T057")
@pytest.mark.parametrize("slope", [0.0, 0.25])
@pytest.mark.parametrize("kind", LAYERS)
def test_kaiming_makes_up_for_what_relu_takes(kind, slope):
    weight, fan_in = drawn(kind, "kaiming", slope=slope), LAYERS[kind][1]
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / ((1 + slope**2) * fan_in)), rel=0.02)


@pytest.mark.technique("T055")
@pytest.mark.parametrize("kind", LAYERS)
def test_uniform_fills_its_bounds_and_has_the_variance_of_xavier(kind):
    weight, bound = drawn(kind, "uniform"), math.sqrt(3 / LAYERS[kind][1])
    assert float(weight.abs().max()) <= bound
    for edge in (weight.min() / -bound, weight.max() / bound):
        assert float(edge) > 0.999
    assert float(weight.var()) == pytest.approx(1 / LAYERS[kind][1], rel=0.02)
    shares = torch.histc(weight / bound, bins=10, min=-1, max=1) / weight.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.005)


@pytest.mark.parametrize(("rule", "std"), [("small", 0.01), ("zero", 0.0)])
@pytest.mark.parametrize("kind", LAYERS)
def test_small_and_zero_are_what_they_say(kind, rule, std):
    assert float(drawn(kind, rule).std()) == pytest.approx(std, rel=0.02)


def outputs(rule, activation):
    """What each of 10 layers of 512 units makes of unit-normal input."""
    torch.manual_seed(0)
    x, found = torch.randn(200, 512), []
    for _ in range(10):
        layer = nn.Linear(512, 512, bias=False)
        initialize(layer, rule)
        x = activation(layer(x)).detach()
        found.append(x)
    return found


@pytest.mark.technique("T057")
@pytest.mark.technique("T056")
def test_kaiming_holds_relu_up_where_xavier_lets_it_fade():
    kaiming, xavier = outputs("kaiming", torch.relu), outputs("xavier", torch.relu)
    assert float(kaiming[-1].std()) == pytest.approx(float(kaiming[0].std()), rel=0.1)
    torch.testing.assert_close(xavier[-1] * math.sqrt(2) ** 10, kaiming[-1])  # half of the power lost at each layer


@pytest.mark.technique("T056")
@pytest.mark.technique("T055")
@pytest.mark.parametrize("rule", ["xavier", "uniform"])
def test_variance_goes_through_linear_layers_as_it_came(rule):
    assert float(outputs(rule, nn.Identity())[-1].std()) == pytest.approx(1, rel=0.1)


@pytest.mark.technique("T061")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(6, 4, 3, groups=2)], ids=["lin", "conv"])
def test_biases_begin_at_zero_under_every_rule(layer, rule):
    layer = layer()
    nn.init.constant_(layer.bias, 3.0)
    initialize(layer, rule)
    assert not layer.bias.any()


def test_a_layer_without_bias_and_an_unknown_rule():
    initialize(nn.Linear(3, 2, bias=False), "xavier", bias=0.1)
    with pytest.raises(ValueError, match="zero, small, uniform, xavier, kaiming, got 'he'"):
        initialize(nn.Linear(3, 2), "he")


@pytest.mark.technique("T047")
def test_a_small_positive_bias_wakes_relu_units():
    features = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))

    def dead(bias):
        torch.manual_seed(0)
        layer = nn.Linear(64, 2000)
        initialize(layer, "small", bias=bias)
        assert torch.equal(layer.bias.detach(), torch.full((2000,), bias))
        return {*(layer(features) <= 0).all(dim=0).nonzero().flatten().tolist()}

    assert len(dead(0.0)) > 0
    assert dead(0.01) < dead(0.0)


def two_layers(value):
    """Two layers of one constant and ReLU between them."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def train(model, steps):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(30, 5, generator=generator), torch.arange(30) % 3
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)


@pytest.mark.technique("T053")
def test_a_constant_network_is_found_and_its_units_never_part():
    model = two_layers(0.5)
    assert find_symmetric(model) == ["0.weight", "2.weight"]
    before = model[0].weight.detach().clone()
    train(model, 10)
    assert not torch.equal(model[0].weight, before)
    assert find_symmetric(model, exempt=["2.weight"]) == ["0.weight"]
    for layer in (model[0], model[2]):
        initialize(layer, "small")
    assert find_symmetric(model) == []


@pytest.mark.technique("T053")
def test_a_zero_network_is_found_and_its_hidden_layer_gets_no_gradient():
    model = two_layers(0.0)
    assert find_symmetric(model, exempt=["2.weight"]) == ["0.weight"]
    train(model, 1)
    assert not model[0].weight.grad.any()


@pytest.mark.technique("T053")
def test_a_single_linear_head_may_begin_at_zero_for_labels_part_its_rows():
    head = make_head(5, 3, init="zero")
    assert find_symmetric(head) == []
    train(head, 1)
    assert len({tuple(row) for row in head.linear.weight.tolist()}) == 3


@pytest.mark.technique("T053")
def test_units_are_compared_where_they_read_the_same():
    depthwise, grouped = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, groups=2)
    layers = nn.Sequential(depthwise, grouped, nn.Conv2d(6, 1, 1), nn.Embedding(4, 3), nn.LayerNorm([2, 2]))
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    assert find_symmetric(layers) == ["1.weight"]
    with torch.no_grad():
        grouped.weight[0] += 1  # one unit of the first group; the second group is still as one
    assert find_symmetric(layers) == ["1.weight"]
    with torch.no_grad():
        grouped.weight[5] += 1
    assert find_symmetric(layers) == []
    attention = nn.MultiheadAttention(4, 1)
    nn.init.ones_(attention.in_proj_weight)
    assert find_symmetric(attention) == ["in_proj_weight"]


@pytest.mark.technique("T053")
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "torchvision/mobilenet_v3_small"])
def test_no_layer_of_a_real_network_is_symmetric_until_it_is_made_so(name):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    assert find_symmetric(backbone) == []
    victim = [name for name, p in backbone.named_parameters() if p.ndim > 1 and p.shape[1] > 1 and "weight" in name][3]
    nn.init.constant_(backbone.get_parameter(victim), 0.1)
    assert find_symmetric(backbone) == [victim]
    assert find_symmetric(backbone, exempt=[victim]) == []


def test_an_exemption_for_nothing_is_refused():
    with pytest.raises(ValueError, match=r"does not hold: head\.weight"):
        find_symmetric(two_layers(0.0), exempt=["0.weight", "head.weight"])


def timm_blocks():
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models import _efficientnet_blocks as efficient
    from timm.models.byobnet import BottleneckBlock, DarkBlock
    from timm.models.regnet import Bottleneck
    from timm.models.resnet import BasicBlock
    from timm.models.resnetv2 import PreActBottleneck
    from timm.models.senet import SEResNetBlock

    return [
        BasicBlock(8, 8),
        BottleneckBlock(8, 8),
        DarkBlock(8, 8),
        Bottleneck(8, 8),
        PreActBottleneck(8, 8, conv_layer=create_conv2d, norm_layer=BatchNormAct2d),
        SEResNetBlock(8, 8, groups=1, reduction=2),
        efficient.InvertedResidual(8, 8),
        efficient.EdgeResidual(8, 8),
        efficient.DepthwiseSeparableConv(8, 8),
        efficient.UniversalInvertedResidual(8, 8, dw_kernel_size_end=3),
        efficient.MobileAttention(8, 8, num_heads=1, key_dim=8, value_dim=8),
    ]


def torchvision_blocks():
    from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, regnet, resnet

    v3 = mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1)
    mb = efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1)
    return [
        resnet.BasicBlock(8, 8),
        resnet.Bottleneck(8, 2),
        mobilenetv2.InvertedResidual(8, 8, stride=1, expand_ratio=2),
        mobilenetv3.InvertedResidual(v3, nn.BatchNorm2d),
        efficientnet.MBConv(mb, 0.0, nn.BatchNorm2d),
        efficientnet.FusedMBConv(efficientnet.FusedMBConvConfig(4, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d),
        mnasnet._InvertedResidual(8, 8, 3, 1, 2),
        regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, group_width=8),
    ]


@pytest.mark.technique("T058")
@pytest.mark.parametrize("blocks", [timm_blocks, torchvision_blocks])
def test_a_block_with_zeros_at_its_end_is_its_shortcut(blocks):
    torch.manual_seed(0)
    images = torch.rand(2, 8, 6, 6)  # not negative, so that a ReLU after the sum changes nothing
    found = blocks()
    assert len(found) > 7
    for block in found:
        name = type(block).__name__
        for parameter in block.parameters():
            if parameter.ndim == 1 and parameter.any():
                nn.init.ones_(parameter)  # whatever timm has zeroed already
        assert not torch.equal(block(images), images), name
        assert zero_residual_ends(block) == 1, name
        assert torch.equal(block(images), images), name


@pytest.mark.technique("T058")
def test_asking_where_a_block_ends_draws_and_changes_nothing():
    from timm.layers.lambda_layer import LambdaLayer
    from timm.models.byobnet import LayerFn, SelfAttnBlock

    block = SelfAttnBlock(
        8, 8, layers=LayerFn(self_attn=lambda *sizes, **options: LambdaLayer(*sizes, num_heads=1, r=3))
    )
    state, before = torch.get_rng_state(), [parameter.clone() for parameter in block.parameters()]
    assert residual_ends(block) == ("conv3_1x1.bn.weight",)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(block.parameters(), before, strict=True))


@pytest.mark.technique("T058")
def test_a_block_without_shortcut_keeps_its_end():
    from timm.models._efficientnet_blocks import InvertedResidual
    from torchvision.models.mobilenetv2 import InvertedResidual as InvertedResidualV2

    assert residual_ends(InvertedResidual(8, 12)) == ()
    assert residual_ends(InvertedResidualV2(8, 12, stride=1, expand_ratio=2)) == ()


@pytest.mark.technique("T058")
def test_variance_stays_in_a_deep_residual_network_only_with_zero_ends():
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    blocks = nn.Sequential(*(BasicBlock(8, 8) for _ in range(16))).eval()
    for part in blocks.modules():
        if isinstance(part, nn.Conv2d):
            initialize(part, "kaiming")
    images = torch.rand(4, 8, 8, 8)
    with torch.no_grad():
        assert float(blocks(images).var() / images.var()) > 1000
        assert zero_residual_ends(blocks) == 16
        assert float(blocks(images).var()) == pytest.approx(float(images.var()), rel=0.05)


@pytest.mark.technique("T058")
@pytest.mark.parametrize(("name", "ends"), [("test_resnet", 4), ("test_byobnet", 4), ("torchvision/resnet18", 8)])
def test_every_branch_of_a_residual_network_is_found_and_nothing_else_is_touched(name, ends):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    zeroed = residual_ends(backbone)
    assert zero_residual_ends(backbone) == len(zeroed) == ends
    for name, tensor in backbone.state_dict().items():
        assert not tensor.any() if name in zeroed else torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_nfnet"])
def test_networks_that_begin_by_another_rule_have_no_ends(name):
    assert residual_ends(load_backbone(name, zoo={}, pretrained=False)) == ()


def test_standardised_convolutions_do_not_stay_small_and_so_are_left_alone():
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import PreActBottleneck

    torch.manual_seed(0)
    images, step = torch.randn(2, 8, 6, 6), 0.01 * torch.randn(8, 8, 1, 1)
    plain, standardised = nn.Conv2d(8, 8, 1, bias=False), StdConv2d(8, 8, 1)
    with torch.no_grad():
        for layer in (plain, standardised):
            layer.weight.copy_(step)
        assert float(standardised(images).std()) > 30 * float(plain(images).std())
    assert residual_ends(PreActBottleneck(8, 8, conv_layer=StdConv2d, norm_layer=nn.BatchNorm2d)) == ()


def settled(name):
    """A backbone no tensor of which is as it began."""
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    with torch.no_grad():
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            tensor.add_(1)
    return backbone


def tensors(backbone):
    return {name: t.detach().clone() for name, t in (*backbone.named_parameters(), *backbone.named_buffers())}


@pytest.mark.technique("T012")
@pytest.mark.parametrize("count", [1, 3, "all"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_the_top_stages_begin_as_the_architecture_does_and_the_rest_stays(name, count):
    backbone = settled(name)
    total, before = len(backbone.stages), tensors(backbone)
    count = total if count == "all" else count
    torch.manual_seed(7)
    assert reinitialize_stages(backbone, count) == backbone.stages[total - count :]
    torch.manual_seed(7)
    twin = backbone.random_twin()
    zero_residual_ends(twin)
    fresh, after = tensors(twin), tensors(backbone)
    assert {*after} == {*before} == {*backbone.stage_of}
    for key, stage in backbone.stage_of.items():
        expected = fresh if stage >= total - count else before
        assert torch.equal(after[key], expected[key]), key
        assert torch.equal(after[key], before[key]) == (stage < total - count), key


@pytest.mark.technique("T012")
def test_statistics_of_thrown_away_stages_are_fresh_too_and_those_below_are_kept():
    backbone = settled("test_resnet")
    reinitialize_stages(backbone, 2)
    norms = [(name, part) for name, part in backbone.named_modules() if isinstance(part, _BatchNorm)]
    fresh = [name for name, norm in norms if not norm.running_mean.any() and (norm.running_var == 1).all()]
    assert fresh == [name for name, _ in norms if name.startswith(("model.layer3", "model.layer4"))]
    assert len(fresh) > 3
    assert all(int(norm.num_batches_tracked) == (0 if name in fresh else 1) for name, norm in norms)


@pytest.mark.technique("T012")
@pytest.mark.technique("T058")
def test_fresh_blocks_of_torchvision_begin_as_shortcuts_though_torchvision_does_not_see_to_it():
    backbone = settled("torchvision/resnet18")
    twin = backbone.random_twin()
    assert all(twin.get_parameter(name).all() for name in residual_ends(twin))
    reinitialize_stages(backbone, 1)
    zeroed = [name for name in residual_ends(backbone) if not backbone.get_parameter(name).any()]
    assert zeroed == ["model.layer4.0.bn2.weight", "model.layer4.1.bn2.weight"]


@pytest.mark.technique("T012")
def test_fresh_weights_follow_the_generator_and_can_learn():
    drawn = []
    for seed in (1, 1, 2):
        backbone = settled("test_vit")
        torch.manual_seed(seed)
        reinitialize_stages(backbone, 2)
        drawn.append(backbone.weights_digest)
    assert drawn[0] == drawn[1] != drawn[2]
    assert find_symmetric(backbone) == []
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.technique("T012")
def test_no_stage_is_thrown_away_unasked_and_none_can_be_that_is_not_there():
    backbone = settled("test_resnet")
    digest, state = backbone.weights_digest, torch.get_rng_state()
    assert reinitialize_stages(backbone, 0) == ()
    assert backbone.weights_digest == digest
    assert torch.equal(torch.get_rng_state(), state)
    for count in (-1, 6):
        with pytest.raises(ValueError, match=rf"0 to 5, the stages of test_resnet.*got {count}"):
            reinitialize_stages(backbone, count)
