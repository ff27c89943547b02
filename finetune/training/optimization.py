"""Optimizers and their parameter groups: who moves, how fast, and who is decayed.

Peak rates stand in each group as `peak_lr`; the schedule multiplies them, so that the ratio between
head and backbone holds at every step.
"""

from collections.abc import Iterable

import torch
from torch import nn

from finetune.models.classifier import Classifier
from finetune.recipe.plan import Stage
from finetune.recipe.schema import OptimizerSpec


def group_parameters(classifier: Classifier, stage: Stage, weight_decay: float) -> list[dict[str, object]]:
    """Every trainable tensor in exactly one group, and no frozen one in any.

    Vectors and scalars (biases, norm scales, tokens of one position) are not decayed.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            part = "head" if name.startswith("head.") else "backbone"
            is_decayed = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token"))
            groups.setdefault((part, is_decayed), []).append(parameter)
    rates = {"head": stage.lr_head, "backbone": stage.lr_backbone}
    return [
        {
            "params": members,
            "name": f"{part}{'' if is_decayed else ' (no decay)'}",
            "part": part,
            "lr": rates[part],
            "peak_lr": rates[part],
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for (part, is_decayed), members in groups.items()
    ]


def make_optimizer(classifier: Classifier, stage: Stage, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101) or SGD with Nesterov momentum."""
    groups = group_parameters(classifier, stage, spec.weight_decay or 0.0)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr_head, momentum=spec.momentum, nesterov=spec.momentum > 0)
    return torch.optim.AdamW(groups, lr=stage.lr_head)


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
