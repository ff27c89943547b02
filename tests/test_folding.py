"""Frozen batch norm folded into convolutions while training: the same step, at less cost."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from finetune.models.folding import Folding

MODELS = ("test_resnet", "test_efficientnet", "test_byobnet", "tf_mobilenetv3_small_minimal_100", "regnetx_002")


def prepare(name: str) -> nn.Module:
    """In float64, with every statistic, scale and shift away from where it begins, batch norm held still."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5),
                                (module.bias, -0.5)):  # fmt: skip
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def gradients(model: nn.Module, context) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.zero_grad()
    torch.manual_seed(3)  # of what a network drops
    with context():
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fold(model: nn.Module) -> Folding:
    return Folding(model, size_pixels=64, device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_step_is_the_same_step(name):
    model = prepare(name)
    folding = fold(model)
    assert len(folding.pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 5
    plain_loss, plain = gradients(model, lambda: torch.enable_grad())
    folded_loss, folded = gradients(model, folding)
    assert torch.allclose(plain_loss, folded_loss, rtol=1e-9)
    assert folded.keys() == plain.keys() and len(plain) == len(list(model.parameters()))
    for key, value in plain.items():
        assert torch.allclose(folded[key], value, rtol=1e-6, atol=1e-9 * float(value.abs().max())), key


def test_no_batch_norm_runs_inside_and_every_one_outside(monkeypatch):
    model = prepare("test_resnet")
    folding, calls, own = fold(model), [], F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a, **k: calls.append(1) or own(*a, **k))
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with folding():
        model(images)
    assert not calls
    model(images)
    assert len(calls) == len(folding.pairs)


def test_a_batch_norm_that_trains_is_left_alone():
    model = prepare("test_resnet")
    folding = fold(model)
    moving = folding.pairs[3][1].train()
    before = moving.running_mean.clone()
    with folding():
        model(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    assert not torch.equal(moving.running_mean, before)
    twin = copy.deepcopy(model)
    twin_loss, _ = gradients(twin, lambda: torch.enable_grad())
    loss, _ = gradients(model, folding)
    assert torch.allclose(loss, twin_loss, rtol=1e-9)


def test_looking_changes_no_mode_no_tensor_and_no_layer():
    model = prepare("test_efficientnet")
    modes, names = [module.training for module in model.modules()], [name for name, _ in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    folding = fold(model)
    with pytest.raises(KeyError), folding():
        assert not any(module is folding.pairs[0][0] for module in model.children())
        raise KeyError
    assert [name for name, _ in model.named_modules()] == names
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def runs_folded(model: nn.Module, folding: Folding) -> list[bool]:
    """Of each pair, whether its batch norm is left out."""
    ran, images = [], torch.rand(2, 3, 64, 64, dtype=torch.float64)

    def note(func, *args, **kwargs):
        ran.append(args[1].data_ptr())
        return func(*args, **kwargs)

    own = F.batch_norm
    with pytest.MonkeyPatch.context() as patch, folding():
        patch.setattr(F, "batch_norm", lambda *args, **kwargs: note(own, *args, **kwargs))
        model(images)
    return [norm.running_mean.data_ptr() not in ran for _, norm in folding.pairs]


def test_where_scales_alone_train_nothing_is_folded():
    """The gradient of a scale would come through that of all weights, which is the dearest part of a step."""
    model = prepare("test_resnet")
    folding = fold(model)
    for conv, _ in folding.pairs[2:]:
        conv.weight.requires_grad_(False)
    assert runs_folded(model, folding) == [True, True, *[False] * (len(folding.pairs) - 2)]
    for _, norm in folding.pairs[3:]:
        norm.weight.requires_grad_(False)
    assert runs_folded(model, folding).count(False) == 1  # the rest is still


@pytest.mark.parametrize(("precision", "is_folded"), [("32", True), ("bf16", False)])
def test_a_fit_folds_what_it_holds_still(shapes, tmp_path, monkeypatch, precision, is_folded):
    import finetune as ft
    from finetune.models import folding

    calls, own = [], folding._Convolution.forward
    monkeypatch.setattr(folding._Convolution, "forward", lambda self, x: calls.append(x.requires_grad) or own(self, x))
    monkeypatch.setattr(Folding, "__init__", told(Folding.__init__, calls))
    wishes = [f"data.root={shapes}", "data.image_size=32", "train.strategy=full", "train.epochs=1",
              "tracking.enabled=false", "data.split.refit=false", f"hardware.precision={precision}"]  # fmt: skip
    ft.train(ft.load_recipe(None, wishes), runs=tmp_path / "runs", say=lambda text: None)
    assert any(calls) == is_folded  # with a gradient: in steps, not in the looks before them


def told(make, calls):
    """Forget what was called while the pairs are sought, and while steps are timed before."""

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        calls.clear()

    return init


class Branching(nn.Module):
    """A convolution that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inside = self.conv(images)
        return (self.norm(inside) + inside).mean((2, 3))


class Twice(Branching):
    """A pair that runs twice would be folded with the right numbers, but is not looked at that closely."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.norm(self.conv(images)) + self.norm(self.conv(images.flip(3)))).mean((2, 3))


class Standardized(nn.Conv2d):
    """A convolution that does something of its own to its weights."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("kind", [Branching, Twice])
def test_what_cannot_be_folded_is_not(kind):
    torch.manual_seed(0)
    model = freeze(kind().double())
    model.norm.running_mean.fill_(1.0)
    assert fold(model).pairs == ()


def test_convolutions_of_another_kind_and_listeners_are_left_alone():
    model = freeze(nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                                 nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double())  # fmt: skip
    model[2].register_forward_hook(lambda module, inputs, output: None)
    assert [pair[0] for pair in fold(model).pairs] == [model[4]]


def test_biases_of_convolutions_and_norms_without_scales_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, affine=False), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten()).double()  # fmt: skip
    model[1].running_mean.fill_(0.7)
    folding = fold(freeze(model))
    assert len(folding.pairs) == 1
    plain, folded = gradients(model, lambda: torch.enable_grad()), gradients(model, folding)
    assert torch.allclose(plain[0], folded[0], rtol=1e-9)
    assert all(torch.allclose(plain[1][name], folded[1][name], rtol=1e-8) for name in plain[1])


def test_who_listens_to_a_batch_norm_or_to_a_block_is_heard_and_may_change_what_passes():
    """Dropout of channels hangs on such hooks."""
    model = prepare("test_resnet")
    folding, heard = fold(model), []
    model.bn1.register_forward_hook(lambda module, inputs, output: heard.append(module) or output * 2)
    model.layer1.register_forward_hook(lambda module, inputs, output: heard.append(module))
    plain, folded = gradients(model, lambda: torch.enable_grad()), gradients(model, folding)
    assert heard == [model.bn1, model.layer1] * 2
    assert torch.allclose(plain[0], folded[0], rtol=1e-9)


class Inquisitive(nn.Module):
    """A network that asks its layers for more than their answer; and one that has a layer by two names."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.asks = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), asks
        self.again = self.conv

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scale = self.conv.out_channels if self.asks else 4
        return self.norm(self.again(images)).mean((2, 3)) * scale


@pytest.mark.parametrize(("asks", "num_pairs"), [(False, 1), (True, 0)])
def test_a_layer_of_two_names_is_folded_and_one_that_is_asked_for_more_is_not(asks, num_pairs):
    torch.manual_seed(0)
    model = freeze(Inquisitive(asks=asks).double())
    model.norm.running_mean.fill_(1.0)
    assert len(fold(model).pairs) == num_pairs
