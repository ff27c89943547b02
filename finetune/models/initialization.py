"""Initialization: how new layers begin, and how pretrained stages begin anew.

New layers preserve the variance of what goes through them, judged by fan-in. Re-initialised stages follow the
architecture's own rule, except that residual branches begin at zero, so that each block begins as its shortcut.

For diagnosis, and called by nothing else yet: `find_symmetric`.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from operator import methodcaller

import torch
from torch import nn

from finetune.models.backbones import Backbone

RULES = ("zero", "small", "uniform", "xavier", "kaiming")
SMALL_STD = 0.01
"""Standard deviation of `small` weights."""
_SKIPS = ("has_skip", "use_res_connect", "apply_residual")
"""How blocks of EfficientNet and MobileNet say that they have a shortcut: timm, torchvision, torchvision's MNASNet."""


def initialize(layer: nn.Linear | nn.Conv2d, rule: str, *, slope: float = 0.0, bias: float = 0.0) -> None:
    """Give `layer` new weights, drawn from torch's generator, and a constant bias.

    Fan-in is what one unit reads: inputs, or channels of its group times the kernel's area. The rules are

    - `zero`: for a single linear head, or the end of a residual branch.
    - `small`: normal, std 0.01; for shallow networks.
    - `uniform`: between -sqrt(3 / fan_in) and +sqrt(3 / fan_in), which has the variance of `xavier`.
    - `xavier`: normal, std sqrt(1 / fan_in); for linear, tanh and SELU layers. Glorot & Bengio, AISTATS 2010,
      https://proceedings.mlr.press/v9/glorot10a.html, in the form that keeps activations alone: unlike the paper, and
      unlike torch's `xavier_normal_`, fan-out plays no part.
    - `kaiming`: normal, std sqrt(2 / ((1 + slope^2) fan_in)); for the ReLU family. He et al., ICCV 2015,
      https://arxiv.org/abs/1502.01852.

    Args:
        layer: a linear layer, or a convolution with any number of groups.
        rule: one of `RULES`.
        slope: of the activation after it, below zero; used by `kaiming`.
        bias: of every unit. A little above 0 keeps ReLU units awake at first; the evidence that it helps is mixed.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}.")
    if rule == "zero":
        nn.init.zeros_(layer.weight)
    elif rule == "small":
        nn.init.normal_(layer.weight, std=SMALL_STD)
    elif rule == "uniform":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    elif rule == "xavier":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")  # a gain of 1 makes it Xavier's by fan-in
    else:
        nn.init.kaiming_normal_(layer.weight, a=slope, nonlinearity="leaky_relu")
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def find_symmetric(module: nn.Module, *, exempt: Collection[str] = ()) -> list[str]:
    """Names of weights whose rows are all the same: units that begin as one, and get one gradient.

    Only a layer above that tells them apart could part them, and none does while it is constant too. In a grouped
    convolution the units of one group are compared, for others read other channels. Where `module` holds a single
    linear layer it is an output layer: labels part its rows, so it may begin at zero.

    Args:
        module: with linear, convolution or attention layers; tables and tokens may well be constant.
        exempt: names of weights that may be so, such as the head's, and `residual_ends(module)`.

    Raises:
        ValueError: if a name of `exempt` is no parameter of `module`.
    """
    if unknown := sorted(set(exempt) - dict(module.named_parameters()).keys()):
        raise ValueError(f"exempt names what the module does not hold: {', '.join(unknown)}.")
    weights = list(_unit_weights(module))
    if len(weights) == 1 and weights[0][1].ndim == 2:
        return []
    return [name for name, weight, groups in weights if name not in exempt and _has_equal_rows(weight, groups)]


def _unit_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, weight (units, ...) and number of groups of every layer of units."""
    for prefix, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield f"{prefix}.weight".lstrip("."), part.weight, getattr(part, "groups", 1)
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            yield f"{prefix}.in_proj_weight".lstrip("."), part.in_proj_weight, 3  # queries, keys and values


def _has_equal_rows(weight: torch.Tensor, groups: int) -> bool:
    rows = weight.detach().reshape(groups, len(weight) // groups, -1)  # (groups, units, inputs)
    return rows.shape[1] > 1 and bool((rows == rows[:, :1]).all(dim=2).all(dim=1).any())


def residual_ends(module: nn.Module) -> tuple[str, ...]:
    """Names of the last norm scale, or convolution weight, of each residual branch.

    Zero there makes the block a shortcut. Knows the ResNet, RegNet, EfficientNet and MobileNet families of timm and
    torchvision. Left alone are transformers, blocks that begin small by their own rule (layer scale, gains of NFNets),
    and convolutions that standardise their weights, which would blow a small first step up to full size.
    """
    names: dict[str, None] = {}
    for prefix, block in module.named_modules():
        for name in _ends_of(block):
            names[f"{prefix}.{name}".lstrip(".")] = None
    return tuple(names)


def zero_residual_ends(module: nn.Module) -> int:
    """How many residual branches now end in zeros; for blocks with fresh weights only.

    Goyal et al., 2017, section 5.1, https://arxiv.org/abs/1706.02677: the block begins as its shortcut, so variance
    does not grow with depth.
    """
    ends = residual_ends(module)
    for name in ends:
        nn.init.zeros_(module.get_parameter(name))
    return len(ends)


def reinitialize_stages(backbone: Backbone, count: int) -> tuple[str, ...]:
    """Names of the top `count` stages, whose pretrained weights and statistics are now thrown away, in place.

    They begin as the architecture itself begins, with residual branches at zero; what is below does not change by a
    bit. Draws from torch's generator. The source classifier then reads features that it does not know.

    Raises:
        ValueError: if the backbone has fewer stages.
    """
    total = len(backbone.stages)
    if not 0 <= count <= total:
        raise ValueError(f"count must lie in 0 to {total}, the stages of {backbone.card.name}, got {count}.")
    if count == 0:
        return ()
    twin = backbone.random_twin()
    zero_residual_ends(twin)
    fresh = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
            if backbone.stage_of[name] >= total - count:
                tensor.copy_(fresh[name])
    return backbone.stages[total - count :]


def _ends_of(block: nn.Module) -> list[str]:
    """Names, within `block` and not within blocks inside it, of where its residual branch ends."""
    if hasattr(block, "zero_init_last"):
        ends = _zeroed_by(block, methodcaller("zero_init_last"))
    elif hasattr(block, "shortcut") and _takes_zero_init_last(block):  # timm's ByobNet
        ends = _zeroed_by(block, methodcaller("init_weights", zero_init_last=True))
    elif any(getattr(block, flag, False) is True for flag in _SKIPS):
        ends = _last_weight(block)
    elif hasattr(block, "downsample") and hasattr(block, "bn2"):  # torchvision's ResNet, timm's older SENet
        ends = ["bn3.weight" if hasattr(block, "bn3") else "bn2.weight"]
    elif hasattr(block, "proj") and hasattr(block, "f") and isinstance(block.f, nn.Sequential):  # torchvision's RegNet
        ends = [f"f.{name}" for name in _last_weight(block.f)]
    else:
        ends = []
    return [name for name in ends if not _standardises(block.get_submodule(name.rpartition(".")[0]))]


def _takes_zero_init_last(block: nn.Module) -> bool:
    own = getattr(block, "init_weights", None)
    return own is not None and "zero_init_last" in inspect.signature(own).parameters


def _zeroed_by(block: nn.Module, draw: Callable[[nn.Module], None]) -> list[str]:
    """Which parameters of a copy full of ones are zero after `draw`."""
    fresh = copy.deepcopy(block).cpu()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in fresh.parameters():
            parameter.fill_(1)
        draw(fresh)
    return [name for name, parameter in fresh.named_parameters() if not parameter.any()]


def _last_weight(branch: nn.Module) -> list[str]:
    return [name for name, _ in branch.named_parameters() if name.rpartition(".")[2] == "weight"][-1:]


def _standardises(layer: nn.Module) -> bool:
    from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

    return isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame | StdConv2d | StdConv2dSame)
