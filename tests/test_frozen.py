"""The frozen backbone: what the whole network says, at every depth, and the network itself left alone."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.config.card import Card
from finetune.models import frozen as frozen_module
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.frozen import FrozenBackbone, pool

FUSED = (
    "test_resnet", "test_efficientnet", "test_byobnet", "resnetv2_50", "regnetx_002", "mobilenetv3_small_050",
    "torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/densenet121", "torchvision/shufflenet_v2_x0_5",
)  # fmt: skip
WHOLE = ("test_vit", "test_convnext", "small_swin", "torchvision/swin_t")
"""Without a batch norm after a convolution."""
SMALL_SWIN = Card(
    name="small_swin", arch="swin_tiny_patch4_window7_224", num_classes=7, input_size=(3, 64, 64),
    arch_kwargs={"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 4)},
)  # fmt: skip


def images(n, size, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def unsettle(backbone):
    """Batch norms as after a long training: no statistic and no scale is what it began as."""
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in backbone.modules() if isinstance(module, _BatchNorm)):
        for tensor, low, spread in ((norm.running_mean, -0.3, 0.6), (norm.running_var, 0.5, 1.0),
                                    (norm.weight.data, 0.5, 1.0), (norm.bias.data, -0.3, 0.6)):  # fmt: skip
            tensor.copy_(low + spread * torch.rand(len(tensor), generator=generator))
    return backbone


def unsettled(name):
    torch.manual_seed(0)
    return unsettle(load_backbone(name, zoo={"small_swin": SMALL_SWIN}, pretrained=False))


def size_of(backbone):
    return 160 if backbone.card.arch == "test_vit" else 64


def plainly(backbone, size):
    """As `FrozenBackbone`, of the very same stages, but not fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_module, "_fused", lambda backbone, example: backbone)
        return FrozenBackbone(copy.deepcopy(backbone), size_pixels=size, device="cpu")


def assert_near(found, expected, tolerance=1e-4):
    """As shares of the spread of what is expected."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.std())


def num_norms(model):
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", [*FUSED, *WHOLE])
def test_every_depth_says_what_the_unfused_network_says(name):
    backbone = unsettled(name)
    size = size_of(backbone)
    frozen, batch = FrozenBackbone(backbone, size_pixels=size, device="cpu"), images(3, size)
    assert (num_norms(frozen._model) < num_norms(backbone)) == (name in FUSED)
    with torch.inference_mode():
        top = backbone.eval()(batch)
    found, expected = frozen(batch), plainly(backbone, size)(batch)
    assert frozen.depths == len(found) == len(expected) == len(backbone.stages)
    assert_near(found[-1], top)
    assert found[-1].shape == (3, backbone.num_features)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)
        assert one.dtype == torch.float32
        assert float(one.std(0).max()) > 0  # images differ: it is no constant


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "small_swin"])
def test_an_image_has_the_same_features_whatever_stands_beside_it(name):
    backbone = unsettled(name)
    frozen = FrozenBackbone(backbone, size_pixels=size_of(backbone), device="cpu")
    batch = images(4, size_of(backbone))
    alone = [torch.cat(rows) for rows in zip(*(frozen(image[None]) for image in batch), strict=True)]
    for one, other in zip(frozen(batch), alone, strict=True):
        assert_near(one, other, 1e-5)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("test_resnet", [32, 32, 48, 192, 96]),
        ("test_convnext", [24, 24, 32, 48, 64]),
        ("test_vit", [64] * 7),
        ("small_swin", [24, 24, 48, 96, 192]),
    ],
)
def test_a_stage_answers_with_as_many_features_as_it_has_channels(name, widths):
    backbone = unsettled(name)
    frozen = FrozenBackbone(backbone, size_pixels=size_of(backbone), device="cpu")
    assert [rows.shape[1] for rows in frozen(images(2, size_of(backbone)))] == widths


def test_a_stage_ends_where_the_next_begins():
    """By hand, through the layers of a residual network."""
    backbone = unsettled("torchvision/resnet18")
    frozen, batch, model = FrozenBackbone(backbone, size_pixels=64, device="cpu"), images(2, 64), backbone.model
    with torch.inference_mode():
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
        expected = [x.mean((2, 3))]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
            expected.append(x.mean((2, 3)))
    for one, other in zip(frozen(batch), expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_backbone_itself_is_left_as_it_was(name):
    backbone = unsettled(name)
    state = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    modules = {key: id(module) for key, module in backbone.named_modules()}
    trains = {key: parameter.requires_grad for key, parameter in backbone.named_parameters()}
    frozen = FrozenBackbone(backbone, size_pixels=160, device="cpu")
    frozen(images(2, 160))
    assert {key: id(module) for key, module in backbone.named_modules()} == modules
    assert {key: parameter.requires_grad for key, parameter in backbone.named_parameters()} == trains
    assert state.keys() == backbone.state_dict().keys()
    assert all(torch.equal(tensor, backbone.state_dict()[key]) for key, tensor in state.items())
    for module in (*backbone.modules(), *frozen._model.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_hook_is_taken_off_even_where_the_forward_pass_fails():
    frozen = FrozenBackbone(unsettled("test_vit"), size_pixels=160, device="cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        frozen(torch.zeros(1, 4, 160, 160))  # a channel too many
    assert not any(module._forward_hooks for module in frozen._model.modules())


class Forked(nn.Module):
    """A convolution that a batch norm reads, and, where asked, something else too."""

    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.kind = kind

    def forward(self, x):
        y = self.conv(self.stem(x).relu())
        if self.kind == "altered":  # the same tensor object, other numbers
            y.relu_()
        z = self.norm(y)
        if self.kind == "skip":
            z = z.relu() + y
        elif self.kind == "twice":
            z = z.relu() + self.norm(self.conv(z)).relu()
        return self.fc(z.relu().mean((2, 3)))


def forked(kind):
    torch.manual_seed(0)
    card = Card(name="forked", arch="forked", num_classes=5, input_size=(3, 32, 32))
    return unsettle(Backbone(Forked(kind), card, build=lambda num_classes: Forked(kind), has_source=False))


@pytest.mark.parametrize("kind", ["skip", "altered", "twice"])
def test_a_convolution_that_is_read_elsewhere_too_is_not_silently_fused(kind):
    backbone, batch = forked(kind), images(4, 32)
    with torch.inference_mode():
        expected = backbone.eval()(batch)
    frozen = FrozenBackbone(backbone, size_pixels=32, device="cpu")
    assert num_norms(frozen._model) == 1
    torch.testing.assert_close(frozen(batch)[-1], expected, rtol=1e-5, atol=1e-6)


def test_the_same_network_without_the_fork_is_fused():
    """Or else the test above would prove nothing."""
    backbone, batch = forked("straight"), images(4, 32)
    with torch.inference_mode():
        expected = backbone.eval()(batch)
    frozen = FrozenBackbone(backbone, size_pixels=32, device="cpu")
    assert num_norms(frozen._model) == 0
    assert_near(frozen(batch)[-1], expected)


class Chain(nn.Module):
    """Single layers one after another, as VGG: each batch norm opens the stage above its convolution."""

    def __init__(self):
        super().__init__()
        widths = (3, 6, 8, 10, 12)
        pairs = itertools.pairwise(widths)
        parts = [part for a, b in pairs for part in (nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(inplace=True))]
        self.features = nn.Sequential(*parts)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def test_a_stage_that_ends_between_convolution_and_batch_norm_shows_the_convolution():
    torch.manual_seed(0)
    card = Card(name="chain", arch="chain", num_classes=5, input_size=(3, 32, 32))
    backbone = unsettle(Backbone(Chain(), card, build=lambda num_classes: Chain(), has_source=False))
    stages = {backbone.stage_of[f"model.features.{k}.weight"] for k in (0, 3, 6, 9)}
    assert len(stages) == 4
    assert backbone.stage_of["model.features.1.running_mean"] > backbone.stage_of["model.features.0.weight"]
    batch = images(3, 32)
    found, expected = FrozenBackbone(backbone, size_pixels=32, device="cpu")(batch), plainly(backbone, 32)(batch)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_pooling_is_the_mean_over_positions_however_they_are_laid_out():
    maps = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))  # (B, C, H, W)
    expected = maps.flatten(2).mean(2)
    for laid_out in (maps, maps.permute(0, 2, 3, 1), maps.flatten(2).transpose(1, 2)):
        torch.testing.assert_close(pool(laid_out), expected)
    torch.testing.assert_close(pool(maps.contiguous(memory_format=torch.channels_last)), expected)
    one = torch.randn(2, 7, 1, 1)
    assert torch.equal(pool(one), one.flatten(1))
    assert torch.equal(pool(one.flatten(1)), one.flatten(1))
    assert torch.equal(pool(one.permute(0, 2, 3, 1)), one.flatten(1))
