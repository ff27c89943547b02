"""Low-rank adapters: a few trained numbers beside frozen matrices of a vision transformer.

Written here and not taken from peft for two reasons. peft renames the weights it wraps, and a tensor's
name is what its stage, its learning rate and its digest hang on; ours only adds names. And where a network reads
a layer's weight without calling the layer (BEiT and EVA do so with `qkv`), peft trains matrices that
nothing passes through; ours refuses. The formula and the initial values are the same.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import BackboneError, nearest
from finetune.models.backbones import Backbone
from finetune.models.modes import evaluating


class LowRankLinear(nn.Linear):
    """A linear layer W and a low-rank one beside it: Wx + b + (alpha / rank) BAx, with B zero at the start.

    Shares the tensors of the layer it stands for, under their names.
    """

    ADDED = ("lora_a", "lora_b")
    """Names of its tensors that a plain layer has not."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (..., in) to outputs (..., out)."""
        added = F.linear(F.linear(inputs, self.lora_a), self.lora_b)
        return F.linear(inputs, self.weight, self.bias) + self.scale * added

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that does the same, in the tensors of the one it began from."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        self.weight += self.scale * (self.lora_b @ self.lora_a)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def add_lora(
    backbone: Backbone, *, rank: int, alpha: float | None = None, targets: tuple[str, ...] = ("qkv",)
) -> tuple[str, ...]:
    """Names of the low-rank matrices (in `backbone`) that now stand beside the linear layers called `targets`.

    Hu et al., LoRA, ICLR 2022, https://arxiv.org/abs/2106.09685. A (rank, in) is drawn from torch's generator, B
    (out, rank) is zero, so features begin as they were. Where query, key and value are one layer, they share A. A new
    matrix belongs to the stage of its layer; `Classifier.freeze(..., only="lora")` lets these alone train.

    Args:
        backbone: is changed in place.
        rank: of the added map.
        alpha: its strength, over `rank`; None takes twice the rank.
        targets: last parts of the layers' names.

    Raises:
        ValueError: if `rank` is below 1, or there are adapters already.
        BackboneError: if the network has no attention, no such layers in it, or does not call them.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    modules = dict(backbone.named_modules())
    if any(isinstance(module, LowRankLinear) for module in modules.values()):
        raise ValueError(f"{backbone.card.name} has low-rank matrices already; merge_lora takes them away.")
    layers = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    chosen = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}
    _check_targets(backbone, set(layers), set(chosen), targets)
    for name, layer in chosen.items():
        _put(backbone, name, LowRankLinear(layer, rank=rank, alpha=2 * rank if alpha is None else alpha))
    added = [f"{name}.{own}" for name in chosen for own in LowRankLinear.ADDED]
    backbone.stage_of |= {name: backbone.stage_of[f"{name.rpartition('.')[0]}.weight"] for name in added}
    return tuple(added)


def merge_lora(backbone: Backbone) -> None:
    """Add each low-rank map to the weights it stands beside, and make `backbone` a plain network again, in place.

    Sums are rounded, so features may differ in the last digits.
    """
    for name, module in list(backbone.named_modules()):
        if isinstance(module, LowRankLinear):
            _put(backbone, name, module.merged())
            for own in LowRankLinear.ADDED:
                del backbone.stage_of[f"{name}.{own}"]


def _check_targets(backbone: Backbone, layers: set[str], chosen: set[str], targets: tuple[str, ...]) -> None:
    network = backbone.card.name
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not any("attn" in name or "attention" in name for name in linear):
        raise BackboneError(
            f"{network} has no attention, where low-rank matrices go. Choose a vision transformer of timm, or another "
            "train.strategy: partial and norms suit any network."
        )
    named = {name.rpartition(".")[2] for name in layers}
    if missing := [target for target in targets if target not in named]:
        hint = " ".join(nearest(target, named) for target in missing)
        known = ", ".join(sorted(named)) or "none"
        raise BackboneError(f"{network} has no linear layer called {' or '.join(missing)}; it has {known}. {hint}")
    if unused := chosen - _called(backbone, chosen):
        raise BackboneError(
            f"{network} reads the weight of {min(unused).removeprefix('model.')} without calling the layer, so "
            "matrices beside it would do nothing. Choose other targets, such as proj."
        )


@torch.no_grad()
def _called(backbone: Backbone, names: set[str]) -> set[str]:
    """Those of `names` whose forward runs when an image passes."""
    called: set[str] = set()
    handles = [
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    weight = next(backbone.parameters())
    try:
        with evaluating(backbone):
            backbone(weight.new_zeros(1, *backbone.card.input_size))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _put(backbone: Backbone, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, module)
