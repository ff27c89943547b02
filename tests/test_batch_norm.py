"""Batch norm inside a real network in training: its formula, its freedom to undo itself, and its gradient."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.config.backbone_names import read_zoo
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head

BATCH = 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def classifier():
    """The bundled backbone, all of it in training, with statistics that follow the images."""
    torch.manual_seed(0)
    backbone = load_backbone("tiny_resnet18.cifar10", zoo=read_zoo())
    model = Classifier(backbone, make_head(backbone.num_features, 3, init="small"))
    model.freeze(len(backbone.stages), batch_norm="train")
    return model.train()


def norms_of(model):
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert len(found) == 21  # a ResNet-18 whose every stage changes its width
    return found


def seen_by(modules, run):
    """Input and output of each of `modules` while `run` runs."""
    seen = {}

    def remember(name):
        def hook(module, inputs, output):
            seen[name] = inputs[0].detach().clone(), output.detach().clone()

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    assert seen.keys() == modules.keys()
    return seen


@pytest.mark.technique("T063")
@pytest.mark.technique("T064")
def test_every_map_of_the_batch_comes_out_with_mean_0_and_variance_1(classifier):
    norms = norms_of(classifier)
    for norm in norms.values():
        assert norm.training
        with torch.no_grad():
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    images = 3 * randn(BATCH, 3, 64, 64) + 1
    for x, y in seen_by(norms, lambda: classifier(images)).values():
        assert y.shape[0] == BATCH
        variance = x.var((0, 2, 3), correction=0)
        assert float(x.mean((0, 2, 3)).abs().max()) > 1e-2  # the input is not so by itself
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.var((0, 2, 3), correction=0), variance / (variance + 1e-5), rtol=1e-4, atol=1e-5)
        assert float((y.mean((2, 3)).abs()).max()) > 0.1  # of the batch and its positions together, not of one image


@pytest.mark.technique("T063")
@pytest.mark.technique("T064")
def test_a_convolutional_norm_is_a_dense_one_over_all_positions_with_scale_and_shift(classifier):
    norms = norms_of(classifier)
    for name, (x, y) in seen_by(norms, lambda: classifier(randn(BATCH, 3, 64, 64))).items():
        norm, channels = norms[name], x.shape[1]
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels).double()  # (B H W, C)
        mean, variance = rows.mean(0), rows.var(0, correction=0)
        expected = norm.weight * (rows - mean) / (variance + norm.eps).sqrt() + norm.bias
        found = y.permute(0, 2, 3, 1).reshape(-1, channels).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.technique("T063")
def test_running_statistics_take_a_tenth_of_the_batch_with_its_unbiased_variance(classifier):
    norms = norms_of(classifier)
    before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    for name, (x, _) in seen_by(norms, lambda: classifier(randn(BATCH, 3, 64, 64))).items():
        rows, (mean, variance) = x.transpose(0, 1).flatten(1).double(), before[name]  # (C, B H W)
        expected = 0.9 * mean + 0.1 * rows.mean(1), 0.9 * variance + 0.1 * rows.var(1)
        found = norms[name].running_mean.double(), norms[name].running_var.double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.technique("T063")
def test_only_in_training_does_an_image_depend_on_its_batch_mates(classifier):
    image, others, strangers = randn(1, 3, 64, 64), randn(7, 3, 64, 64, seed=1), 5 + randn(7, 3, 64, 64, seed=2)
    with torch.no_grad():
        known, other = (classifier.backbone(torch.cat([image, rest]))[0] for rest in (others, strangers))
        assert float((known - other).abs().max()) > 0.05
        classifier.eval()
        known, other = (classifier.backbone(torch.cat([image, rest]))[0] for rest in (others, strangers))
    torch.testing.assert_close(known, other, rtol=1e-4, atol=1e-4)


@pytest.mark.technique("T065")
def test_scale_and_shift_can_undo_the_normalisation(classifier):
    """With scale sqrt(var + eps) and shift mean, every norm gives what it was given."""
    norms = norms_of(classifier)
    images = randn(BATCH, 3, 64, 64)

    def undo(module, inputs):
        x = inputs[0].detach()
        with torch.no_grad():
            module.weight.copy_((x.var((0, 2, 3), correction=0) + module.eps).sqrt())
            module.bias.copy_(x.mean((0, 2, 3)))

    handles = [norm.register_forward_pre_hook(undo) for norm in norms.values()]
    seen = seen_by(norms, lambda: classifier(images))
    for handle in handles:
        handle.remove()
    for x, y in seen.values():
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    again = seen_by(norms, lambda: classifier(images))  # and they stay, as any weights that were learned
    for x, y in again.values():
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.technique("T065")
def test_scale_and_shift_learn_with_the_rest(classifier):
    names = {name for name in classifier.trainable_names() if ".bn" in name or "downsample.1" in name}
    assert len(names) == 42
    nn.functional.cross_entropy(classifier(randn(6, 3, 64, 64)), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    gradients = {name: parameter.grad for name, parameter in classifier.named_parameters() if name in names}
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


@pytest.mark.technique("T073")
def test_the_gradient_goes_through_the_mean_and_the_variance_of_the_batch(classifier):
    """Finite differences of a whole residual block agree only if both are differentiated."""
    block = classifier.backbone.model.layer4[1].double()
    assert block.bn1.training
    assert block.bn2.training
    start = randn(3, 128, 2, 2, seed=3).double()
    directions = randn(4, *start.shape, seed=4).double()
    weights = randn(*start.shape, seed=5).double()

    def along(steps):  # (4,): a few directions stand for 1,536 numbers
        return (block(start + torch.einsum("k,kbchw->bchw", steps, directions)) * weights).sum()[None]

    assert torch.autograd.gradcheck(along, torch.zeros(4, dtype=torch.float64, requires_grad=True), atol=1e-6)


@pytest.mark.technique("T073")
def test_a_gradient_in_training_has_no_part_along_what_normalisation_removes(classifier):
    """A common offset or a common stretch of a map changes nothing, so the gradient is at right angles to both."""
    norm = classifier.backbone.model.layer3[0].bn1.double()
    x = (2 * randn(BATCH, 96, 3, 3) + 1).double().requires_grad_()
    weights = randn(*x.shape, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda part: (norm(torch.cat([part, x[1:].detach()])) * weights).sum()[None] / 100,
        x[:1].detach().requires_grad_(),
        atol=1e-6,
    )
    (gradient,) = torch.autograd.grad((norm(x) * weights).sum(), x)
    size = gradient.abs().sum((0, 2, 3))
    assert float((gradient.sum((0, 2, 3)) / size).abs().max()) < 1e-12
    x = x.detach()
    along = (gradient * (x - x.mean((0, 2, 3), keepdim=True))).sum((0, 2, 3))
    assert float((along / size).abs().max()) < 1e-4  # up to eps
    norm.eval()  # with stored statistics there is nothing to go through
    x.requires_grad_()
    (plain,) = torch.autograd.grad((norm(x) * weights).sum(), x)
    assert float((plain.sum((0, 2, 3)) / plain.abs().sum((0, 2, 3))).abs().max()) > 0.01
