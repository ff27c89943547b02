"""Surgical fine-tuning: the stage that new images pull at hardest is found, and looking changes nothing."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.features.surgery import relative_gradients
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head


class Amplify(torch.autograd.Function):
    """The same forward; the gradient times a factor backward."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def classifier(name="test_resnet", **options):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm begins some branches at zero, through which no gradient passes
            nn.init.ones_(module.weight)
    return Classifier(backbone, make_head(backbone.num_features, 3, init="small", **options))


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(count)]


def amplify(module, factor):
    """Gradients of the parameters within `module` become `factor` times as large, and no others."""
    module.register_forward_pre_hook(lambda _, inputs: Amplify.apply(inputs[0], 1 / factor))
    module.register_forward_hook(lambda _, inputs, output: Amplify.apply(output, factor))


@pytest.mark.parametrize("stage", ["layer1", "layer3"])
def test_a_stage_with_planted_gradients_is_chosen(stage):
    model = classifier()
    before = relative_gradients(model, batches())
    factor = 100 * max(before.values()) / before[stage]
    amplify(model.backbone.model.get_submodule(stage), factor)
    after = relative_gradients(model, batches())
    assert max(after, key=after.get) == stage
    assert after == pytest.approx({**before, stage: factor * before[stage]}, rel=1e-3)


def test_proportions_do_not_depend_on_the_scale_of_the_loss():
    model = classifier()
    before = relative_gradients(model, batches())
    model.backbone.register_forward_hook(lambda _, inputs, output: Amplify.apply(output, 7.0))
    after = relative_gradients(model, batches())
    assert after == pytest.approx({stage: 7 * ratio for stage, ratio in before.items()}, rel=1e-4)


def test_the_answer_is_the_mean_over_tensors_of_mean_ratios_over_batches():
    model = classifier()
    found, twin = relative_gradients(model, batches(3), num_batches=2), copy.deepcopy(model).eval()
    twin.freeze(5)
    layers = {key: one for key, one in twin.backbone.model.named_modules() if isinstance(one, nn.Conv2d)}
    ratios = {key: [] for key in layers}  # without biases, convolutions are all that batch norm leaves
    for images, labels in batches(2):
        twin.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        for key, layer in layers.items():
            ratios[key].append(float(layer.weight.grad.norm() / layer.weight.detach().norm()))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        own = [sum(pair) / 2 for key, pair in ratios.items() if key.startswith(f"{stage}.")]
        assert found[stage] == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert tuple(found) == model.backbone.stages


def test_looking_changes_no_weight_buffer_gradient_or_mode():
    model = classifier(dropout=0.5)
    model.freeze(2, batch_norm="train")
    model.train()
    model(batches()[0][0]).sum().backward()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = {key: module.training for key, module in model.named_modules()}
    grads = {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    required = {key: p.requires_grad for key, p in model.named_parameters()}
    dice = torch.get_rng_state()
    with torch.no_grad():  # as whoever only looks may call it
        relative_gradients(model, batches())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert {key: p.requires_grad for key, p in model.named_parameters()} == required
    for key, p in model.named_parameters():
        assert (p.grad is None) == (grads[key] is None)
        assert p.grad is None or torch.equal(p.grad, grads[key])
    assert torch.equal(torch.get_rng_state(), dice)


def test_batch_norm_and_tensors_of_zero_do_not_count():
    model = classifier("test_vit")
    images = [(torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))]
    with torch.no_grad():
        for parameter in model.backbone.model.blocks[2].parameters():
            parameter.zero_()
    found = relative_gradients(model, images)
    assert "blocks.2" not in found
    assert len(found) == len(model.backbone.stages) - 1
    assert all(0 < ratio < float("inf") for ratio in found.values())

    model = classifier()
    before = relative_gradients(model, batches(1))
    with torch.no_grad():  # halved and doubled again, the network is the same and only the shares of batch norm change
        model.backbone.model.layer3[0].bn2.weight.mul_(0.5)
        model.backbone.model.layer3[0].bn2.bias.mul_(0.5)
    model.backbone.model.layer3[0].bn2.register_forward_hook(lambda _, inputs, output: output * 2)
    assert relative_gradients(model, batches(1)) == pytest.approx(before, rel=1e-4)


def test_no_more_batches_are_drawn_than_asked_for():
    drawn = iter(itertools.cycle(batches(1)))
    counted = [0]

    def count():
        for batch in drawn:
            counted[0] += 1
            yield batch

    relative_gradients(classifier(), count(), num_batches=2)
    assert counted == [2]


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        relative_gradients(classifier(), [])


def test_under_a_zero_head_no_stage_has_a_gradient():
    backbone = load_backbone("test_resnet", zoo={}, pretrained=False)
    silent = relative_gradients(Classifier(backbone, make_head(backbone.num_features, 3)), batches(1))
    assert set(silent.values()) == {0.0}
