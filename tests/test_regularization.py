"""Noise in training: drawn anew for every example, right on average, gone at test, and no trace in the state dict."""

import copy
from functools import partial

import pytest
import torch
from timm.models.resnest import ResNestBottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import mobilenetv2, mobilenetv3, regnet, resnet, vision_transformer

from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import LinearHead, make_head
from finetune.models.regularization import (
    DropConnectLinear,
    FractionalMaxPool,
    insert_channel_dropout,
    insert_fractional_pooling,
    random_pieces,
    sample_predictions,
    set_stochastic_depth,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backbone_of(name):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    for parameter in backbone.parameters():
        if parameter.ndim == 1 and not parameter.any():
            nn.init.normal_(parameter)  # a residual branch that begins at zero would hide what is done to it
    return backbone.eval()


def awake(module):
    """`module` in evaluation, its random pieces in training: batch norm must not blur what they do."""
    module.eval()
    for piece in random_pieces(module):
        piece.training = True
    return module


def _head(**options):
    torch.manual_seed(0)
    return make_head(40, 5, init="small", **options)


def _skipping(build):
    module = build()
    set_stochastic_depth(module, 0.5)
    return module


def _with_channel_dropout():
    backbone = backbone_of("test_resnet")
    insert_channel_dropout(backbone, 0.5, backbone.stages[1:-1])
    return backbone


def _with_fractional_pooling():
    """A ResNet whose global pooling follows one with regions that move."""
    backbone = backbone_of("test_resnet")
    backbone.model.global_pool = nn.Sequential(FractionalMaxPool(), backbone.model.global_pool)
    return backbone


def _torchvision_resnet():
    torch.manual_seed(0)
    blocks = [resnet.BasicBlock(8, 8) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def _torchvision_vit():
    torch.manual_seed(0)
    network = vision_transformer.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    nn.init.normal_(network.heads.head.weight)  # it begins at zero, and would hide everything
    return network.eval()


_resnet, _mlp = partial(backbone_of, "test_resnet"), partial(_head, kind="mlp")
_maxout = partial(_mlp, activation="maxout")
ROWS, IMAGES = (8, 40), (8, 3, 48, 48)
COMPONENTS = {
    "dropout": (partial(_head, dropout=0.5), _head, ROWS),
    "dropout around a hidden layer": (partial(_mlp, dropout=0.5), _mlp, ROWS),
    "dropout before cosines": (partial(_head, kind="cosine", dropout=0.5), partial(_head, kind="cosine"), ROWS),
    "dropped weights": (partial(_head, drop_connect=0.5), _head, ROWS),
    "dropped weights of maxout": (partial(_maxout, drop_connect=0.5), _maxout, ROWS),
    "skipped blocks": (partial(_skipping, _resnet), _resnet, IMAGES),
    "skipped blocks of torchvision": (partial(_skipping, _torchvision_resnet), _torchvision_resnet, (8, 3, 32, 32)),
    "skipped blocks of a transformer": (partial(_skipping, _torchvision_vit), _torchvision_vit, (8, 3, 16, 16)),
    "dropped maps": (_with_channel_dropout, _resnet, IMAGES),
    "moving regions": (_with_fractional_pooling, None, (8, 3, 160, 160)),
}
"""A network with noise, the same without (None where pooling regions themselves are the layer), and its input."""
every_component = pytest.mark.parametrize(("noisy", "plain", "shape"), COMPONENTS.values(), ids=COMPONENTS.keys())


@pytest.mark.technique("T140")
@pytest.mark.technique("T141")
@every_component
@torch.inference_mode()
def test_at_test_the_answer_is_the_same_every_time_and_that_of_the_network_without_noise(noisy, plain, shape):
    module, inputs = noisy(), randn(*shape)
    module.train()  # as after an epoch
    first = module.eval()(inputs)
    assert torch.equal(module(inputs), first)
    if plain is not None:
        assert torch.equal(plain().eval()(inputs), first)


@pytest.mark.technique("T140")
@every_component
@torch.inference_mode()
def test_in_training_every_pass_draws_anew(noisy, plain, shape):
    module, inputs = awake(noisy()), randn(*shape)
    torch.manual_seed(1)
    assert not torch.equal(module(inputs), module(inputs))


@pytest.mark.technique("T123")
@pytest.mark.technique("T131")
@pytest.mark.technique("T132")
@every_component
@torch.inference_mode()
def test_in_training_every_example_draws_for_itself(noisy, plain, shape):
    module, one = awake(noisy()), randn(1, *shape[1:])
    torch.manual_seed(1)
    rows = module(one.expand(shape).contiguous())
    assert len(torch.unique(rows, dim=0)) >= 3  # of 8; skipped blocks have few outcomes


@every_component
def test_noise_adds_no_tensor(noisy, plain, shape):
    module, without = noisy(), plain() if plain else backbone_of("test_resnet")
    assert random_pieces(module)
    assert list(module.state_dict()) == list(without.state_dict())
    without.load_state_dict(module.state_dict())


@every_component
@torch.inference_mode()
def test_a_copy_has_noise_of_its_own(noisy, plain, shape):
    original, inputs = noisy(), randn(*shape)
    twin = copy.deepcopy(original).eval()
    awake(original)
    assert torch.equal(twin(inputs), twin(inputs))


@pytest.mark.technique("T131")
def test_dropped_weights_have_the_mean_and_variance_of_theory():
    torch.manual_seed(0)
    layer, features = DropConnectLinear(6, 3, p=0.3).requires_grad_(False), randn(1, 6)
    answers = layer(features.expand(20_000, -1))
    variance = 0.3 / 0.7 * features.square() @ layer.weight.square().T  # Wan et al., divided by the share kept
    error = (variance / 20_000).sqrt()
    assert bool(((answers.mean(0) - layer.eval()(features)).abs() < 4 * error).all())
    torch.testing.assert_close(answers.var(0)[None], variance, rtol=0.06, atol=0)


@pytest.mark.technique("T131")
def test_biases_are_never_dropped():
    layer = DropConnectLinear(6, 3, p=0.9)
    assert torch.equal(layer(torch.zeros(50, 6)), layer.bias.expand(50, 3))


@pytest.mark.technique("T128")
@pytest.mark.parametrize(("name", "above"), [("test_resnet", "layer3"), ("test_convnext", "stages.2")])
@torch.inference_mode()
def test_each_map_is_dropped_whole_or_kept_whole(name, above):
    backbone, images, seen = backbone_of(name), randn(4, 3, 64, 64), []
    insert_channel_dropout(backbone, 0.25, [backbone.stages[backbone.stages.index(above) - 1]])
    backbone.model.get_submodule(above).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    backbone(images)
    torch.manual_seed(0)
    awake(backbone)(images)
    plain, dropped = seen  # (B, C, H, W)
    kept = dropped.flatten(2).any(2)
    torch.testing.assert_close(dropped, plain * kept[..., None, None] / 0.75)
    assert float(kept[plain.flatten(2).any(2)].float().mean()) == pytest.approx(0.75, abs=0.12)


@pytest.mark.technique("T128")
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_maps_can_be_dropped_after_any_stage(name):
    backbone, images = backbone_of(name), randn(2, 3, 64, 64)
    before = backbone(images)
    insert_channel_dropout(backbone, 0.5, backbone.stages)
    pieces = random_pieces(backbone)
    assert len(pieces) == len(backbone.stages)
    for piece in pieces:
        backbone.eval()
        piece.training = True
        assert not torch.equal(backbone(images), before)
    insert_channel_dropout(backbone, 0.0, backbone.stages)  # given again, it replaces the one before
    assert not random_pieces(backbone)


@pytest.mark.parametrize(
    ("name", "rate", "stage", "message"),
    [
        ("test_resnet", 0.1, "layer5", "has no stage layer5; it has stem, layer1"),
        ("test_resnet", 1.0, "layer2", r"must lie in \[0, 1\), got 1"),
        ("test_vit", 0.1, "blocks.1", r"after blocks.1: test_vit.* gives a tensor of shape \(1, .* not maps"),
        ("test_mambaout", 0.1, "stages.1", r"gives a tensor of shape \(1, 20, 20, 32\) there, not maps"),
    ],
)
def test_channel_dropout_is_refused_where_there_are_no_maps(name, rate, stage, message):
    backbone = backbone_of(name)
    allowed = ["layer1"] if name == "test_resnet" else []
    with pytest.raises(ValueError, match=message):
        insert_channel_dropout(backbone, rate, [*allowed, stage])
    assert not random_pieces(backbone)


@pytest.mark.technique("T133")
@pytest.mark.parametrize(
    ("build", "num_blocks"),
    [
        (_resnet, 4),
        (partial(backbone_of, "test_convnext"), 9),
        (partial(backbone_of, "test_vit"), 6),
        (_torchvision_resnet, 4),
        (_torchvision_vit, 2),
    ],
    ids=["timm resnet", "timm convnext", "timm vit", "torchvision resnet", "torchvision vit"],
)
def test_the_rate_grows_linearly_to_that_of_the_last_block(build, num_blocks):
    module = build()
    assert set_stochastic_depth(module, 0.4) == num_blocks
    rates = [piece.drop_prob for piece in random_pieces(module)]
    each = len(rates) // num_blocks  # a transformer's block has two branches
    assert rates == pytest.approx(
        [0.4 * number / num_blocks for number in range(1, num_blocks + 1) for _ in range(each)]
    )
    assert set_stochastic_depth(module, 0.2) == num_blocks  # the second rate replaces the first
    assert max(piece.drop_prob for piece in random_pieces(module)) == pytest.approx(0.2)
    assert len(random_pieces(module)) == len(rates)
    set_stochastic_depth(module, 0.0)
    assert not random_pieces(module)


def _timm_convnext():
    block = backbone_of("test_convnext").model.stages[1].blocks[0]
    nn.init.ones_(block.gamma)  # a layer scale that begins near zero
    return block


NARROW = mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, False, "RE", 1, 1, 1.0)
BLOCKS = {
    "basic": (lambda: resnet.BasicBlock(16, 16), 16, torch.relu),
    "bottleneck": (lambda: resnet.Bottleneck(64, 16), 64, torch.relu),
    "regnet": (lambda: regnet.ResBottleneckBlock(16, 16, 1, nn.BatchNorm2d, nn.ReLU, group_width=8), 16, torch.relu),
    "mobilenetv2": (lambda: mobilenetv2.InvertedResidual(16, 16, 1, 2), 16, torch.clone),
    "mobilenetv3": (lambda: mobilenetv3.InvertedResidual(NARROW, nn.BatchNorm2d), 16, torch.clone),
    "timm resnest": (lambda: ResNestBottleneck(64, 16), 64, torch.relu),
    "timm convnext": (_timm_convnext, 32, torch.clone),
}
"""A block, its channels, and what it does after its shortcut."""


@pytest.mark.technique("T133")
@pytest.mark.parametrize(("build", "width", "after"), BLOCKS.values(), ids=BLOCKS.keys())
@torch.inference_mode()
def test_a_skipped_block_hands_on_its_input_and_the_mean_over_passes_is_the_whole_block(build, width, after):
    torch.manual_seed(0)
    network, one = nn.Sequential(build()).eval(), randn(1, width, 6, 6)
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.bias)  # else zeros would pass through whatever follows
    whole = network(one)
    assert set_stochastic_depth(network, 0.3) == 1
    rows = awake(network)(one.expand(24, -1, -1, -1).contiguous())
    is_skipped = torch.isclose(rows, after(one)).flatten(1).all(1)
    assert 0 < int(is_skipped.sum()) < 24
    kept = rows[~is_skipped]
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))
    shows = (whole > 0) & (kept[:1] > 0) | (after is torch.clone)  # elsewhere a ReLU hides the sum
    torch.testing.assert_close((0.7 * kept[:1] + 0.3 * one)[shows], whole[shows])


@pytest.mark.technique("T133")
def test_a_block_without_a_shortcut_is_never_skipped():
    straight = [mobilenetv2.InvertedResidual(16, 24, 1, 2), mobilenetv2.InvertedResidual(16, 16, 2, 2)]
    backbone = backbone_of("test_efficientnet")
    assert any(hasattr(block, "drop_path") for block in backbone.modules())  # timm has a place for it all the same
    for module in (nn.Sequential(*straight), backbone):
        assert set_stochastic_depth(module, 0.0) == 0


@pytest.mark.parametrize(("rate", "message"), [(0.1, "no residual block is known in Sequential"), (-0.1, "got -0.1")])
def test_stochastic_depth_is_refused_where_nothing_can_be_skipped(rate, message):
    with pytest.raises(ValueError, match=message):
        set_stochastic_depth(nn.Sequential(nn.Linear(2, 2)), rate)


@pytest.mark.technique("T133")
@pytest.mark.technique("T128")
def test_a_frozen_stage_is_neither_skipped_nor_thinned():
    backbone = backbone_of("test_resnet")
    set_stochastic_depth(backbone, 0.5)
    insert_channel_dropout(backbone, 0.5, backbone.stages[1:])
    model = Classifier(backbone, make_head(backbone.num_features, 3))
    model.freeze(2)
    model.train()
    awake_names = {name for name, module in model.named_modules() if module in random_pieces(model) and module.training}
    assert len(awake_names) == 4
    assert all(name.startswith(("backbone.model.layer3.", "backbone.model.layer4.")) for name in awake_names)


@pytest.mark.technique("T132")
def test_maps_shrink_by_the_ratio_rounded_down():
    for size in (7, 14, 33):
        for ratio in (1.2, 2**0.5, 1.9):
            shape = FractionalMaxPool(ratio)(torch.randn(1, 2, size, size + 3)).shape
            assert shape == (1, 2, int(size / ratio), int((size + 3) / ratio))


@pytest.mark.technique("T132")
def test_regions_are_fixed_at_test_where_those_of_torch_still_move():
    maps, ours = randn(2, 3, 20, 20), FractionalMaxPool().eval()
    theirs = nn.FractionalMaxPool2d(2, output_ratio=0.5**0.5).eval()
    torch.manual_seed(0)
    assert not torch.equal(theirs(maps), theirs(maps))
    assert torch.equal(ours(maps), ours(maps))
    assert torch.equal(ours(maps)[:1], ours(maps[:1]))  # whatever else is in the batch


@pytest.mark.technique("T132")
def test_all_channels_of_an_image_share_their_regions():
    torch.manual_seed(0)
    pooled = FractionalMaxPool()(randn(4, 1, 20, 20).expand(-1, 3, -1, -1))
    assert torch.equal(pooled[:, :1].expand(-1, 3, -1, -1), pooled)


def test_whole_ratios_and_maps_smaller_than_a_region_are_refused():
    with pytest.raises(ValueError, match="between 1 and 2, got 2"):
        FractionalMaxPool(2.0)
    with pytest.raises(ValueError, match="maps of 1 x 9 are too small"):
        FractionalMaxPool()(torch.randn(1, 2, 1, 9))


@pytest.mark.technique("T130")
def test_the_mean_of_many_draws_is_the_mean_over_all_masks():
    head, features = LinearHead(6, 3, dropout=0.5).requires_grad_(False), randn(2, 6)
    nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6)  # (64, 6), all alike in probability
    exact = head.linear(masks[:, None] * features).softmax(2).mean(0)
    draws = sample_predictions(head, features, 4000, 0)  # (S, B, K)
    assert draws.shape == (4000, 2, 3)
    assert bool(((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 4000**0.5).all())
    assert float((head.eval()(features).softmax(1) - exact).abs().max()) > 0.02  # which one pass is not


@pytest.fixture
def noisy_classifier():
    backbone = backbone_of("test_resnet")
    set_stochastic_depth(backbone, 0.5)
    model = Classifier(backbone, make_head(backbone.num_features, 3, init="small", dropout=0.5))
    model.freeze(len(backbone.stages), batch_norm="train")
    return model


@pytest.mark.technique("T130")
def test_draws_follow_their_seed_and_leave_the_caller_as_it_was(noisy_classifier):
    images, model = randn(2, 3, 64, 64), noisy_classifier.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = sample_predictions(model, images, 3, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(sample_predictions(model, images, 3, 7), first)
    assert not torch.equal(sample_predictions(model, images, 3, 8), first)


@pytest.mark.technique("T130")
def test_batch_norm_stands_still_while_masks_are_drawn(noisy_classifier):
    seen = []
    for module in noisy_classifier.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    sample_predictions(noisy_classifier.train(), randn(2, 3, 64, 64), 1)
    assert seen
    assert not any(seen)


@pytest.mark.technique("T130")
def test_noise_that_a_frozen_stage_never_met_is_not_drawn(noisy_classifier):
    noisy_classifier.head = make_head(noisy_classifier.backbone.num_features, 3)
    noisy_classifier.freeze(0)
    with pytest.raises(ValueError, match="nothing in this classifier is random"):
        sample_predictions(noisy_classifier.eval(), randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        sample_predictions(noisy_classifier, randn(2, 3, 64, 64), 0)
    assert not any(module.training for module in noisy_classifier.modules())


@pytest.mark.technique("T132")
@pytest.mark.parametrize("arch", ["test_resnet", "torchvision/resnet18", "mobilenetv2_035"])
def test_moving_regions_stand_before_the_last_pooling_and_are_still_at_test(arch):
    backbone = load_backbone(arch, zoo={}, pretrained=False)
    keys, images = set(backbone.state_dict()), randn(4, 3, 160, 160)
    plain = backbone.eval()(images)
    insert_fractional_pooling(backbone, 160)
    assert set(backbone.state_dict()) == keys
    assert len([piece for piece in backbone.modules() if isinstance(piece, FractionalMaxPool)]) == 1
    assert backbone(images).shape == plain.shape
    assert torch.equal(backbone(images), backbone(images))
    assert not torch.equal(backbone(images), plain)
    pools = [piece for piece in backbone.modules() if isinstance(piece, FractionalMaxPool)]
    pools[0].training = True
    assert not torch.equal(backbone(images), backbone(images))


@pytest.mark.technique("T132")
def test_moving_regions_need_maps_to_move_on():
    with pytest.raises(
        ValueError, match=r"moves regions of 2 x 2 in maps of 3 x 3 or more, but .* pools maps of \(1, 1\) last"
    ):
        insert_fractional_pooling(load_backbone("mobilenetv2_035", zoo={}, pretrained=False), 32)
    with pytest.raises(ValueError, match="has no pooling at its end"):
        insert_fractional_pooling(load_backbone("test_vit", zoo={}, pretrained=False), 160)
