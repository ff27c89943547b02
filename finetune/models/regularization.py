"""Noise in the network while it trains: dropped weights, maps and blocks, and pooling regions that move.

Every random piece is a module, so that `eval()` switches it off, a frozen stage holds it still, and
`sample_predictions` finds it. None has tensors: putting one in changes no key of the state dict. Put them in before
the `Classifier` is made, which notes the modules of every stage.
"""

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from finetune.compute import own_draws
from finetune.models.backbones import Backbone
from finetune.models.layers import Dropout
from finetune.models.modes import evaluating, modes_kept

_DROP_PATH = re.compile(r"(\w+_)?drop_path\d*|stochastic_depth")
_NO_SHORTCUT = {
    "has_skip": False, "use_shortcut": False, "use_res_connect": False, "residual": False, "no_skip": True,
    "shortcut": None, "identity": None,
}  # fmt: skip
"""What timm and torchvision write on a block that nothing bypasses; to skip it would lose the image."""


_POOLS = frozenset({"SelectAdaptivePool2d", "AdaptiveAvgPool2d", "FastAdaptiveAvgPool", "FastAdaptiveAvgPool2d"})


class DropConnectLinear(nn.Linear):
    """A linear map whose weights are dropped in training, anew for every example and pass.

    Wan et al., ICML 2013, https://proceedings.mlr.press/v28/wan13.html. Kept weights are divided by the share kept, so
    that at test the layer is a plain linear map: the mean over masks, where the paper samples from a Gaussian with
    that mean and averages after the activation. Biases are never dropped. One mask per example takes B x K x D numbers.
    """

    def __init__(self, in_features: int, out_features: int, *, p: float = 0.5) -> None:
        super().__init__(in_features, out_features)
        self.p = _checked(p)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, D) to (B, K)."""
        if not self.training or self.p == 0:
            return F.linear(features, self.weight, self.bias)
        mask = self.weight.new_empty(len(features), *self.weight.shape).bernoulli_(1 - self.p)  # (B, K, D)
        dropped = mask.div_(1 - self.p) * self.weight
        return torch.einsum("bkd,bd->bk", dropped, features) + self.bias

    def extra_repr(self) -> str:
        """Sizes and rate, for printing."""
        return f"{super().extra_repr()}, p={self.p}"


class FractionalMaxPool(nn.Module):
    """Max pooling over overlapping 2 x 2 regions that shrinks maps by a ratio between 1 and 2.

    Graham 2014, https://arxiv.org/abs/1412.6071. In training the regions are drawn for every example and pass, alike
    for all channels; at test they are fixed, where torch's own layer goes on drawing. It may stand before the last
    pooling of a top that is trained anew (`insert_fractional_pooling`). To average over regions at test, use
    `sample_predictions`.
    """

    def __init__(self, ratio: float = 2**0.5) -> None:
        super().__init__()
        if not 1 < ratio < 2:
            raise ValueError(f"ratio must lie between 1 and 2, got {ratio}; use nn.MaxPool2d for whole ratios.")
        self.ratio = ratio

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, floor(H / ratio), floor(W / ratio)).

        Raises:
            ValueError: if the maps are smaller than a region.
        """
        if min(maps.shape[2:]) < 2:
            raise ValueError(f"maps of {maps.shape[2]} x {maps.shape[3]} are too small for regions of 2 x 2.")
        batch, channels, height, width = maps.shape
        draws = maps.new_full((batch, 1, 2), 0.5)
        if self.training:
            draws.uniform_()
        size = int(height / self.ratio), int(width / self.ratio)
        draws = draws.expand(-1, channels, -1).contiguous()
        return F.fractional_max_pool2d(maps, 2, output_size=size, _random_samples=draws)


def insert_fractional_pooling(backbone: Backbone, size_pixels: int) -> str:
    """Put a `FractionalMaxPool` before the pooling that ends `backbone`; the name of the latter, as it was.

    What the backbone says then changes at test, too, so it belongs to a top that learns anew, and into every copy.

    Args:
        backbone: changed in place.
        size_pixels: of the images that will come.

    Raises:
        ValueError: if it does not end in a pooling over maps of 3 x 3 or more: one region fills smaller ones.
    """
    found: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        found.append((name, tuple(args[0].shape[2:])))

    pools = {name: m for name, m in backbone.named_modules() if type(m).__name__ in _POOLS}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in pools.items()]
    try:
        with evaluating(backbone), torch.inference_mode():
            backbone(next(backbone.parameters()).new_zeros(1, 3, size_pixels, size_pixels))
    finally:
        for hook in hooks:
            hook.remove()
    if not found or len(found[-1][1]) != 2 or min(found[-1][1]) < 3:
        seen = f"pools maps of {found[-1][1]} last" if found else "has no pooling at its end"
        raise ValueError(
            f"fractional_pooling moves regions of 2 x 2 in maps of 3 x 3 or more, but {_name(backbone)} {seen}; "
            "a larger data.image_size gives larger maps."
        )
    name = found[-1][0]  # the outermost is the last to finish
    parent, _, leaf = name.rpartition(".")
    changed = nn.Sequential(FractionalMaxPool(), pools[name]).train(backbone.training)
    setattr(backbone.get_submodule(parent), leaf, changed)
    return name


def set_stochastic_depth(backbone: nn.Module, rate: float) -> int:
    """How many residual blocks are now skipped at random in training: block l of L with probability rate * l / L.

    Huang et al., ECCV 2016, https://arxiv.org/abs/1603.09382. As timm and torchvision do it, each example skips blocks
    of its own, and a branch that is kept is divided by its share of passes, so that at test the network is untouched.
    Both branches of a transformer block have the block's rate. A rate of 0 switches an architecture's own off.

    Args:
        backbone: changed in place. Blocks that already have a place for it get the rate; other residual blocks of
            torchvision get a hook on the output of each branch.
        rate: of the last block, in [0, 1).

    Raises:
        ValueError: if `rate` lies outside its range, or is positive where no residual block is found.
    """
    _checked(rate)
    blocks = [block for block in backbone.modules() if _drop_path_names(block) or _branch_ends(block)]
    if rate and not blocks:
        raise ValueError(
            f"stochastic depth {rate}: no residual block is known in {_name(backbone)}. Set it to 0, or take a "
            "residual network of timm (ResNet, ConvNeXt, EfficientNet, ViT) or of torchvision."
        )
    for number, block in enumerate(blocks, 1):
        _set_drop_path(block, rate * number / len(blocks))
    return len(blocks)


def _drop_path_names(block: nn.Module) -> list[str]:
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    if any(getattr(block, name, not value) is value for name, value in _NO_SHORTCUT.items()):
        return []
    names = [
        name
        for name, piece in block.named_children()
        if _DROP_PATH.fullmatch(name) and isinstance(piece, DropPath | StochasticDepth | nn.Identity)
    ]
    if names or _branch_ends(block):
        return names
    return [name for name in ("drop_path",) if vars(block).get(name, block) is None]  # ResNets of timm


def _branch_ends(block: nn.Module) -> tuple[str, ...]:
    """Names of the children whose output is added to the shortcut, in blocks without stochastic depth.

    timm's ResNeSt has it, but drops the shortcut and not the branch.
    """
    from timm.models import resnest
    from torchvision.models import mobilenetv2, mobilenetv3, regnet, resnet, vision_transformer

    ends: dict[type[nn.Module], tuple[str, ...]] = {
        resnest.ResNestBottleneck: ("bn3",),
        resnet.BasicBlock: ("bn2",),
        resnet.Bottleneck: ("bn3",),
        regnet.ResBottleneckBlock: ("f",),
        mobilenetv2.InvertedResidual: ("conv",),
        mobilenetv3.InvertedResidual: ("block",),
        vision_transformer.EncoderBlock: ("dropout", "mlp"),
    }
    return ends.get(type(block), ()) if getattr(block, "use_res_connect", True) else ()


def _set_drop_path(block: nn.Module, rate: float) -> None:
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    names = _drop_path_names(block)
    for name in names:
        piece = getattr(block, name)
        if isinstance(piece, DropPath):
            piece.drop_prob = rate
        elif isinstance(piece, StochasticDepth):
            piece.p = rate
        else:
            setattr(block, name, DropPath(rate).train(block.training))
    if not names:
        for number, end in enumerate(_branch_ends(block), 1):
            piece = DropPath(rate).train(block.training)
            block.add_module(f"drop_path{number}", piece)
            _hook(block.get_submodule(end), piece)


def insert_channel_dropout(backbone: Backbone, rate: float, stages: Sequence[str]) -> None:
    """Nothing; from now on whole feature maps are dropped after each of `stages` in training.

    Tompson et al., CVPR 2015, https://arxiv.org/abs/1411.4280: neighbouring positions of a map say the same, so single
    ones are not worth dropping. After the last stage it acts as ordinary dropout of the pooled features. Where batch
    norm trains above it, its statistics are of dropped maps (Li et al., CVPR 2019, https://arxiv.org/abs/1801.05134):
    keep the rate low.

    Args:
        backbone: changed in place; names of modules and parameters stay.
        rate: share of maps dropped, in [0, 1). Given again for a stage, it replaces the one before.
        stages: some of `backbone.stages`.

    Raises:
        ValueError: if `rate` lies outside its range, a stage is unknown, or it does not end in maps (B, C, H, W).
    """
    _checked(rate)
    if unknown := [stage for stage in stages if stage not in backbone.stages]:
        raise ValueError(f"{_name(backbone)} has no stage {', '.join(unknown)}; it has {', '.join(backbone.stages)}.")
    ends = _stage_ends(backbone)
    chosen = [ends.get(backbone.stages.index(stage)) for stage in stages]
    for stage, end in zip(stages, chosen, strict=True):
        if end is None or not _are_maps(end[1], backbone.card.input_size):
            shape = "nothing with positions" if end is None else f"a tensor of shape {tuple(end[1])}"
            raise ValueError(
                f"channel dropout after {stage}: {_name(backbone)} gives {shape} there, not maps (B, C, H, W). "
                "Set it to 0, or use stochastic depth instead."
            )
    for end in chosen:
        assert end is not None
        _drop_maps_of(end[0], rate)


def _drop_maps_of(module: nn.Module, rate: float) -> None:
    # The dropout lives in a layer of the stage, which freezes with it; a child of a container might be run by it.
    host = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))][-1]
    if isinstance(before := getattr(host, "channel_dropout", None), nn.Dropout2d):
        before.p = rate
        return
    dropout = nn.Dropout2d(rate).train(host.training)
    host.add_module("channel_dropout", dropout)
    _hook(module, dropout)


def _stage_ends(backbone: Backbone) -> dict[int, tuple[nn.Module, torch.Size]]:
    """By stage, the module that ends it and the shape of its output for one image; pooled outputs do not count."""
    held: dict[str, set[int]] = {}
    for name, stage in backbone.stage_of.items():
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            held.setdefault(".".join(parts[:depth]), set()).add(stage)
    ends: dict[int, tuple[nn.Module, torch.Size]] = {}

    def note(stage: int, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim > 2 and output.shape[2:].numel() > 1:
            ends[stage] = (module, output.shape)  # the outermost module of a stage is the last to finish

    modules = {name: module for name, module in backbone.named_modules() if len(held.get(name, ())) == 1}
    hooks = [module.register_forward_hook(partial(note, min(held[name]))) for name, module in modules.items()]
    try:
        with evaluating(backbone), torch.inference_mode():
            backbone(next(backbone.parameters()).new_zeros(1, *backbone.card.input_size))
    finally:
        for hook in hooks:
            hook.remove()
    return ends


def _are_maps(shape: torch.Size, input_size: Sequence[int]) -> bool:
    """Whether the last two axes have the proportions of the image: some transformers put channels last."""
    return len(shape) == 4 and shape[2] * input_size[2] == shape[3] * input_size[1]


def random_pieces(module: nn.Module) -> list[nn.Module]:
    """The modules in `module` that draw random numbers in training; those with a rate of 0 do not."""
    from timm.layers import DropPath, PatchDropout
    from torchvision.ops import StochasticDepth

    rates = {DropPath: "drop_prob", PatchDropout: "prob", StochasticDepth: "p", Dropout: "p", DropConnectLinear: "p"}
    return [
        piece
        for piece in module.modules()
        if isinstance(piece, FractionalMaxPool)
        or any(isinstance(piece, kind) and getattr(piece, rate) > 0 for kind, rate in rates.items())
    ]


def sample_predictions(classifier: nn.Module, images: torch.Tensor, draws: int = 20, seed: int = 0) -> torch.Tensor:
    """Probabilities (S, B, K) under S draws of everything that was random in training; their mean is the answer.

    Gal and Ghahramani, ICML 2016, https://arxiv.org/abs/1506.02142. Only the random pieces are switched on, and only
    where `classifier.train()` would: batch norm keeps its statistics, and frozen stages, which never met the noise,
    stay as they are. Modes and torch's generators are left as they were found.

    Args:
        classifier: gives logits (B, K); frozen as it was in training. A head will do.
        images: (B, 3, H, W), or what else it takes.
        draws: S.
        seed: of the draws; the same seed gives the same answer.

    Raises:
        ValueError: if `draws` is less than 1, or nothing in the classifier is random.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    with modes_kept(classifier):
        classifier.train()
        awake = [piece for piece in random_pieces(classifier) if piece.training]
        classifier.eval()
        if not awake:
            raise ValueError("nothing in this classifier is random in training, so draws would all be the same.")
        for piece in awake:
            piece.training = True
        with torch.inference_mode(), own_draws(seed, images.device):
            return torch.stack([classifier(images).float().softmax(1) for _ in range(draws)])


def _hook(module: nn.Module, piece: nn.Module) -> None:
    # Not a closure: a copy of the network (an average of weights) must hook its own piece.
    module.register_forward_hook(partial(_apply_to_output, piece))


def _apply_to_output(piece: nn.Module, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return piece(output)


def _checked(rate: float) -> float:
    if not 0 <= rate < 1:
        raise ValueError(f"a share that is dropped must lie in [0, 1), got {rate}.")
    return rate


def _name(backbone: nn.Module) -> str:
    return backbone.card.name if isinstance(backbone, Backbone) else type(backbone).__name__
