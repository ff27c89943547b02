"""Activations as modules: torch's own where torch has them, and maxout, which it has not.

None works in place: whoever watches pre-activations from a hook must see what went in, not what came out.
"""

from collections.abc import Callable

import torch
from torch import nn

from finetune.errors import RecipeError
from finetune.planning.activations import OFFERED, judge_activation

LEAKY_SLOPE = 0.01
"""Slope of leaky ReLU below zero."""
PRELU_SLOPE = 0.25
"""Where the learned slope of PReLU begins (He et al., ICCV 2015, section 2.1)."""

_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "gelu": nn.GELU,  # the exact one; its tanh approximation is off by up to 5e-4
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=1),
}


class Maxout(nn.Module):
    """The larger of two linear maps, for each unit: a layer and its activation in one, with twice the parameters.

    Goodfellow et al., ICML 2013, https://arxiv.org/abs/1302.4389, with two pieces.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_in, 2 * num_out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (..., num_in) to (..., num_out)."""
        first, second = self.linear(features).chunk(2, dim=-1)
        return torch.maximum(first, second)


def make_activation(
    name: str, *, num_units: int, slope: float = LEAKY_SLOPE, alpha: float = 1.0, is_hidden: bool = True
) -> nn.Module:
    """A new activation module; works on units or channels in axis 1, never in place.

    Leaky ReLU: Maas et al., 2013. PReLU: https://arxiv.org/abs/1502.01852. ELU: https://arxiv.org/abs/1511.07289.
    SELU: https://arxiv.org/abs/1706.02515. GELU: https://arxiv.org/abs/1606.08415. Swish (silu):
    https://arxiv.org/abs/1710.05941.

    Args:
        name: a name of `finetune.planning.activations`.
        num_units: units or channels before it; `prelu` learns one slope for each, or a single one with 1.
        slope: of `leaky_relu` below zero.
        alpha: what `elu` levels off at, below zero.
        is_hidden: False lets an output layer have `sigmoid` or `softmax`.

    Raises:
        RecipeError: if the name is unknown, or refused where it stands.
        ValueError: if it is `maxout`, which is no function of one input: use the layer `Maxout`.
    """
    verdict = judge_activation(name)
    if verdict.name == "maxout":
        raise ValueError("maxout stands in place of the linear layer: use Maxout(num_in, num_out).")
    if verdict.verdict == "refused" and (is_hidden or verdict.name not in _PLAIN):
        where = "a hidden layer" if is_hidden else "any layer"
        raise RecipeError(
            f"head.activation: {name!r} is refused in {where}. {verdict.why} Choose one of {', '.join(OFFERED)}."
        )
    if verdict.name == "leaky_relu":
        return nn.LeakyReLU(slope)
    if verdict.name == "prelu":
        return nn.PReLU(num_units, init=PRELU_SLOPE)
    if verdict.name == "elu":
        return nn.ELU(alpha)
    return _PLAIN[verdict.name]()
