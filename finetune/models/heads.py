"""Heads: the linear classifier that replaces the source's own, and the four ways it may begin.

Zero is the default: the problem in the head alone is convex, so no symmetry needs breaking; the
first loss is then exactly log K, and the first gradient into the backbone exactly zero.
"""

from collections.abc import Callable

import torch
from torch import nn

INITS = ("zero", "small", "model", "probe")
PROBE_SOFTENING = 0.3
"""What a probe's logits are multiplied by before training goes on from it: a probe that is sure of every training image
leaves the backbone no gradient. Decisions stay the same, and a temperature would undo it. See `benchmarks/LOG.md`."""
SMALL_STD = 0.01
"""Standard deviation of `small` weights."""


class LinearHead(nn.Module):
    """Dropout and one linear map, features (B, D) to logits (B, K)."""

    def __init__(self, num_features: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, D) to logits (B, K)."""
        return self.linear(self.dropout(features))


def make_head(
    num_features: int,
    num_classes: int,
    *,
    init: str = "zero",
    dropout: float = 0.0,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    arch_rule: Callable[[int], nn.Linear] | None = None,
) -> LinearHead:
    """A linear head of D features and K classes; `small` and `model` draw from torch's generator.

    Args:
        num_features: D.
        num_classes: K.
        init: `zero`; `small` (normal, std 0.01, bias 0); `model` (as `arch_rule` does it, else as torch does);
            `probe` (the `weight` and `bias` of a solved probe on raw features: Kumar et al., ICLR 2022,
            https://arxiv.org/abs/2202.10054).
        dropout: share of features dropped in training.
        weight: (K, D), with `probe` only.
        bias: (K,), with `probe` only.
        arch_rule: gives the architecture's own classifier for K classes, such as `Backbone.new_classifier`.

    Raises:
        ValueError: if `init` is unknown, weights are missing or given without use, or shapes do not match.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}.")
    if (init == "probe") != (weight is not None) or (weight is None) != (bias is None):
        raise ValueError(f"weight and bias go with init 'probe', and only with it; init is {init!r}.")
    if init == "model" and arch_rule is not None:
        own = arch_rule(num_classes)
        weight, bias = own.weight, torch.zeros(num_classes) if own.bias is None else own.bias
    head = LinearHead(num_features, num_classes, dropout=dropout)
    if init == "zero":
        nn.init.zeros_(head.linear.weight)
    elif init == "small":
        nn.init.normal_(head.linear.weight, std=SMALL_STD)
    if init in ("zero", "small"):
        nn.init.zeros_(head.linear.bias)
    if weight is not None and bias is not None:
        _copy(head.linear, weight, bias)
    return head


def _copy(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if weight.shape != linear.weight.shape or bias.shape != linear.bias.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit a head of "
            f"{linear.in_features} features and {linear.out_features} classes."
        )
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
