"""Optimizers and their parameter groups: who moves, how fast, and who is decayed.

Peak rates stand in each group as `peak_lr`; the schedule multiplies them, so that the ratios between
groups hold at every step. timm's own ladder writes `lr_scale` instead, which torch never reads.

For diagnosis, and called by nothing else yet: `decay_penalty`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from finetune.compute import exact
from finetune.config.decided import Rule
from finetune.config.plan import Stage
from finetune.config.recipe import OptimizerSpec
from finetune.errors import RecipeError, nearest
from finetune.models.classifier import Classifier
from finetune.models.layers import BatchNorm
from finetune.models.modes import modes_kept

DEFAULT = "adamw"
"""The rule for any new problem."""
OWN = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lbfgs")
"""Rules by torch; all others are `timm/NAME`."""
TIMM = "timm/"
_NO_DECAY = re.compile(r"bias|token|pos_|position|latent")
"""In the last part of a name: biases, tokens and positions, whatever their shape."""
_RANDOM = re.compile(r"drop|stochastic", re.IGNORECASE)
"""In the class names of layers that draw: timm's, torchvision's and our own share no base class."""


def group_parameters(
    classifier: Classifier, stage: Stage, weight_decay: float, *, anchored: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Every trainable tensor in exactly one group, and no frozen one in any.

    Matrices and kernels are decayed. Biases, tokens, positions, and whatever has but one axis longer than 1 (scales of
    norms and layers, slopes of activations) are not: shrinking them limits nothing (Goyal et al. 2017, section 5.3,
    https://arxiv.org/abs/1706.02677, for norms). Under `stage.layer_decay` each stage of the backbone has groups of its
    own, one step of the ladder below the stage above it (Bao et al., ICLR 2022, https://arxiv.org/abs/2106.08254).

    Args:
        classifier: frozen as the stage wants it.
        stage: gives the peak rates. Stages drawn anew have the head's, and the ladder begins below them.
        weight_decay: of those that are decayed.
        anchored: names of weights that an `Anchor` pulls to their start, and so nothing may pull to zero.
    """
    members: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            part, rate = _part_and_rate(classifier, stage, name)
            is_decayed = _is_matrix(name, parameter) and name not in anchored
            members.setdefault((part, rate, is_decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{part}{'' if is_decayed else ' (no decay)'}",
            "part": part,
            "lr": rate,
            "peak_lr": rate,
            "decay": weight_decay if is_decayed else 0.0,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for (part, rate, is_decayed), parameters in members.items()
    ]


def _part_and_rate(classifier: Classifier, stage: Stage, name: str) -> tuple[str, float]:
    backbone, (part, _, own) = classifier.backbone, name.partition(".")
    if part != "backbone":
        return part, stage.lr_head
    number, top = backbone.stage_of[own], len(backbone.stages) - 1 - stage.fresh_stages
    if number > top:
        return "fresh", stage.lr_head
    if stage.layer_decay < 1:
        part = f"backbone/{backbone.stages[number]}"
    return part, stage.lr_backbone * stage.layer_decay ** (top - number)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    is_vector = sum(length > 1 for length in parameter.shape) < 2  # torchvision's layer scale is (C, 1, 1)
    return not is_vector and not _NO_DECAY.search(name.rpartition(".")[2])


def check_optimizer(spec: OptimizerSpec | Rule) -> None:
    """Refuse what `make_optimizer` could not make, before anything is trained.

    Raises:
        RecipeError: if the name is unknown, or what it needs is not installed, or `adamw` is to be coupled.
    """
    name = spec.name or DEFAULT
    if name.startswith(TIMM):
        _from_timm(name, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], 1e-3, spec.momentum)
    elif name not in OWN:
        raise _unknown(name)
    if name == "adamw" and spec.decay == "coupled":
        raise RecipeError(
            "train.optimizer.decay is coupled, but adamw decouples it by definition. Set train.optimizer.name to adam."
        )


def make_optimizer(
    classifier: Classifier, stage: Stage, spec: Rule, *, anchored: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The rule that `spec` names, over the groups of `group_parameters`.

    Decoupled decay (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101) shrinks weights by rate times
    decay before each step, whatever the rule makes of the gradient; timm's own kinds of decay are never used. `adam` so
    decayed is `adamw`. `lbfgs` knows one rate, the head's, and no decay.

    Args:
        classifier: frozen as the stage wants it.
        stage: gives the peak rates.
        spec: name and numbers of the rule.
        anchored: names of weights that an `Anchor` pulls to their start.

    Raises:
        RecipeError: as `check_optimizer`, and if layers of the classifier make the loss random for `lbfgs`.
    """
    check_optimizer(spec)
    name, groups = spec.name, group_parameters(classifier, stage, spec.weight_decay, anchored=anchored)
    if name == "lbfgs":
        return _lbfgs(classifier, stage)
    decays_itself = name in ("adam", "adamw") or (spec.decay == "coupled" and name in OWN)
    if not decays_itself:
        for group in groups:
            group["weight_decay"] = 0.0
    optimizer = _make_rule(name, groups, stage.lr_head, spec)
    if not decays_itself:
        optimizer.register_step_pre_hook(_shrink if spec.decay == "decoupled" else _add_decay)
    return optimizer


def _make_rule(name: str, groups: list[dict[str, Any]], lr: float, spec: Rule) -> torch.optim.Optimizer:
    rule: torch.optim.Optimizer
    match name:
        case "sgd":
            rule = torch.optim.SGD(groups, lr=lr)
        case "momentum" | "nesterov":
            is_nesterov = name == "nesterov" and spec.momentum > 0
            rule = torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, nesterov=is_nesterov)
        case "adagrad":
            rule = torch.optim.Adagrad(groups, lr=lr, eps=spec.eps)
        case "rmsprop":
            rule = torch.optim.RMSprop(groups, lr=lr, alpha=spec.rho, eps=spec.eps)
        case "adam" | "adamw":
            kind = torch.optim.AdamW if spec.decay == "decoupled" else torch.optim.Adam
            rule = kind(groups, lr=lr, betas=spec.betas, eps=spec.eps, fused=True)
        case _:
            rule = _from_timm(name, groups, lr, spec.momentum)
    return rule


def _from_timm(name: str, groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    """Numbers other than rate, decay and momentum stay timm's: they differ between its rules."""
    own = name.removeprefix(TIMM)
    if own not in list_optimizers():
        raise _unknown(name)
    if get_optimizer_info(own).second_order:
        raise RecipeError(f"train.optimizer.name: {name} needs second derivatives, which are not taken here.")
    try:
        return create_optimizer_v2(groups, opt=own, lr=lr, weight_decay=0.0, momentum=momentum)
    except (ImportError, AssertionError, NameError, RuntimeError, TypeError, ValueError) as fault:
        raise RecipeError(f"train.optimizer.name: {name} cannot be made on this machine: {fault}") from fault


def _unknown(name: str) -> RecipeError:
    known = (*OWN, *(f"{TIMM}{own}" for own in list_optimizers()))
    hint = nearest(name.lower(), known, otherwise=f"Known: {', '.join(OWN)}, and timm's as timm/NAME.")
    return RecipeError(f"train.optimizer.name: {name!r} is not an optimizer. {hint}")


def _lbfgs(classifier: Classifier, stage: Stage) -> torch.optim.Optimizer:
    """Liu & Nocedal 1989 with a strong Wolfe search, for torch's default step of fixed length can diverge."""
    if layers := random_layers(classifier):
        raise RecipeError(
            f"train.optimizer.name is lbfgs, but the loss is random in training: {', '.join(layers[:3])}"
            f"{f' and {len(layers) - 3} more' if len(layers) > 3 else ''}. Turn these off, or take adamw."
        )
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    group = {"params": trained, "name": "all (no decay)", "part": "all", "peak_lr": stage.lr_head, "decay": 0.0}
    return torch.optim.LBFGS([group], lr=stage.lr_head, line_search_fn="strong_wolfe")


def random_layers(classifier: nn.Module) -> list[str]:
    """Layers that in training answer the same image differently: dropout of any kind, and batch norm on batches."""
    with modes_kept(classifier):
        classifier.train()
        modules = [(name, m, type(m).__name__) for name, m in classifier.named_modules() if m.training]
    return [
        f"{name} ({kind})"
        for name, module, kind in modules
        if isinstance(module, BatchNorm)
        or (_RANDOM.search(kind) and any(getattr(module, share, 0) for share in ("p", "drop_prob")))
    ]


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        if moving and group["decay"]:
            torch._foreach_mul_(moving, 1 - group["lr"] * group["decay"])


@torch.no_grad()
def _add_decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        if moving and group["decay"]:
            torch._foreach_add_([parameter.grad for parameter in moving], moving, alpha=group["decay"])


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group `factor` of its peak rate; the rates by part of the model."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates


def gradient_norm(parameters: Iterable[nn.Parameter], clip_norm: float, scale: float = 1.0) -> float:
    """Clip the global gradient norm to `clip_norm`; the norm before. Gradients may be `scale` times too large."""
    return float(nn.utils.clip_grad_norm_(list(parameters), clip_norm * scale)) / scale


def decay_penalty(optimizer: torch.optim.Optimizer) -> float:
    """What coupled decay adds to the loss it lowers: decay / 2 times the squared weights, over all decayed ones.

    The classic penalty lambda * sum of w^2 is a decay of 2 * lambda.
    """
    return sum(
        group["decay"] / 2 * float(exact(parameter.detach()).square().sum())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["decay"]
    )


class Anchor:
    """A spring from each pretrained weight to where it began: strength / 2 times the squared distance.

    L2-SP of Li et al., ICML 2018, https://arxiv.org/abs/1802.01483, where fine-tuning from a like source must not
    forget. It takes the place of decay for these weights; the head, and all that is new, keeps its decay.
    """

    def __init__(
        self,
        classifier: nn.Module,
        names: Iterable[str],
        strength: float,
        *,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Remember where the weights are now, or take it from `start`.

        Args:
            classifier: holds the weights.
            names: of the pretrained ones, as in `classifier.named_parameters()`.
            strength: alpha of the paper, 0.01 to 0.1 there.
            start: pretrained weights by name, where the classifier has left them, in a second stage. May hold others.
        """
        self.strength, self.names = strength, tuple(names)
        parameters = dict(classifier.named_parameters())
        self._parameters = [parameters[name] for name in self.names]
        begin = parameters if start is None else start
        self._start = [begin[name].detach().clone() for name in self.names]

    @torch.no_grad()
    def loss(self) -> float:
        """The penalty now, which is 0 at the start."""
        return self.strength / 2 * self._squared(self._distances())

    @torch.no_grad()
    def drift(self) -> float:
        """How far the weights are from their start, over the length of the start."""
        return (self._squared(self._distances()) / max(self._squared(self._start), 1e-30)) ** 0.5

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient to those of the weights that have one; call it between backward and clipping.

        Args:
            scale: how many times too large the gradients are, under a gradient scaler.
        """
        for parameter, distance in zip(self._parameters, self._distances(), strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(distance, alpha=self.strength * scale)

    def _distances(self) -> list[torch.Tensor]:
        if self._start and self._start[0].device != self._parameters[0].device:  # the classifier has moved since
            self._start = [
                start.to(parameter.device) for start, parameter in zip(self._start, self._parameters, strict=True)
            ]
        return [parameter - start for parameter, start in zip(self._parameters, self._start, strict=True)]

    def _squared(self, tensors: list[torch.Tensor]) -> float:
        return float(sum((exact(tensor).square().sum() for tensor in tensors), torch.zeros(())))
