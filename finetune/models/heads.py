"""Heads: what replaces the source's own classifier, and how it may begin.

Zero is the default: the problem in a linear head alone is convex, so no symmetry needs breaking; the
first loss is then exactly log K, and the first gradient into the backbone exactly zero.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from finetune.models.activations import LEAKY_SLOPE, PRELU_SLOPE, Maxout, make_activation
from finetune.models.initialization import RULES, initialize
from finetune.models.regularization import DropConnectLinear

KINDS = ("linear", "mlp", "cosine")
INITS = (*RULES, "model", "probe")
PROBE_SOFTENING = 0.3
"""What a probe's logits are multiplied by before training goes on from it: a probe that is sure of every training image
leaves the backbone no gradient. Decisions stay the same, and a temperature would undo it. See `benchmarks/LOG.md`."""
HELD_OUT = "held_out."
"""Begins the names of the tensors in `probe.safetensors` of the probe before a refit."""
SURE = 0.99
"""Probability that a cosine head gives at first to an image right on its class's direction."""
_BELOW_ZERO = {"leaky_relu": LEAKY_SLOPE, "prelu": PRELU_SLOPE}
_KEEPS_VARIANCE = ("tanh", "selu", "maxout")
"""Activations that halve nothing, so that their layer begins by `xavier`: near zero tanh is linear, SELU is made for
it, and the larger of two independent normal numbers has the mean square of either."""


class LinearHead(nn.Module):
    """Dropout and one linear map, features (B, D) to logits (B, K)."""

    may_begin_at_zero = ("linear.weight",)
    """Names of weights whose equal rows are no fault: labels part them. For `find_symmetric(head, exempt=...)`."""

    def __init__(self, num_features: int, num_classes: int, *, dropout: float = 0.0, drop_connect: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = _make_linear(num_features, num_classes, drop_connect)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, D) to logits (B, K)."""
        return self.linear(self.dropout(features))


class MlpHead(nn.Module):
    """A hidden layer and a linear map, dropout before each, features (B, D) to logits (B, K).

    The hidden layer begins by the rule that fits its activation: `xavier` for tanh, SELU and maxout, `kaiming` for the
    ReLU family. SELU has the dropout that keeps its mean and variance (Klambauer et al., NeurIPS 2017,
    https://arxiv.org/abs/1706.02515).
    """

    may_begin_at_zero = ("linear.weight",)
    """As the hidden units are drawn, each gives its class weights another gradient."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        hidden: int = 512,
        activation: str = "relu",
        hidden_bias: float = 0.0,
        dropout: float = 0.0,
        drop_connect: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.hidden: nn.Module
        self.activation: nn.Module
        if activation == "maxout":
            self.hidden, self.activation = Maxout(num_features, hidden), nn.Identity()
            self.hidden.linear = read = _make_linear(num_features, 2 * hidden, drop_connect)
        else:
            self.hidden = read = _make_linear(num_features, hidden, drop_connect)
            self.activation = make_activation(activation, num_units=hidden)
        rule = "xavier" if activation in _KEEPS_VARIANCE else "kaiming"
        initialize(read, rule, slope=_BELOW_ZERO.get(activation, 0.0), bias=hidden_bias)
        self.hidden_dropout = nn.AlphaDropout(dropout) if activation == "selu" else nn.Dropout(dropout)
        self.linear = _make_linear(hidden, num_classes, drop_connect)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, D) to logits (B, K)."""
        units = self.activation(self.hidden(self.dropout(features)))  # (B, hidden)
        return self.linear(self.hidden_dropout(units))


class CosineHead(nn.Module):
    """The cosine between features and one direction per class, times a learned scale: (B, D) to logits (B, K).

    Gidaris and Komodakis, CVPR 2018, https://arxiv.org/abs/1804.09458: what only stretches the features does not change
    the answer. Without a scale logits would end at 1, and the loss far above zero (Wang et al., 2017,
    https://arxiv.org/abs/1704.06369). In many dimensions directions are nearly at right angles, so we begin where an
    image right on its own and square to all others has probability p: at log((K - 1) p / (1 - p)) with p = 0.99, which
    is 6.8 for 10 classes and 11.5 for 1000. The scale is learned as its logarithm, so it stays positive.
    """

    may_begin_at_zero: tuple[str, ...] = ()

    def __init__(self, num_features: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.directions = nn.Parameter(F.normalize(torch.randn(num_classes, num_features)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(math.log(max(num_classes - 1, 1) * SURE / (1 - SURE)))))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, D) to logits (B, K)."""
        cosines = F.linear(F.normalize(self.dropout(features)), F.normalize(self.directions))
        return cosines * self.log_scale.exp()


Head = LinearHead | MlpHead | CosineHead


def make_head(
    num_features: int,
    num_classes: int,
    *,
    kind: str = "linear",
    hidden: int = 512,
    activation: str = "relu",
    init: str = "zero",
    hidden_bias: float = 0.0,
    dropout: float = 0.0,
    drop_connect: float = 0.0,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    arch_rule: Callable[[int], nn.Linear] | None = None,
) -> Head:
    """A head of D features and K classes; all but `zero` and `probe` draw its last layer from torch's generator.

    Args:
        num_features: D.
        num_classes: K.
        kind: `linear`; `mlp`, with one hidden layer; `cosine`.
        hidden: units of the hidden layer of `mlp`.
        activation: of that layer; a name of `finetune.planning.activations`.
        init: of the last layer, all biases 0: `zero`; `small` (normal, std 0.01), `uniform`, `xavier` or `kaiming`, as
            `initialize` does them; `model` (as `arch_rule` does it, else as torch does); `probe` (the `weight` and
            `bias` of a solved probe on raw features: Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054).
            A cosine head takes the directions of the rows alone, and not zero, which has none.
        hidden_bias: of the hidden units at the start.
        dropout: share of features dropped before each linear layer, in training.
        drop_connect: share of weights dropped for each example, in training; not for `cosine`.
        weight: (K, D), with `probe` only: a probe's, or for `cosine` also the mean features of the classes
            (Qi et al., CVPR 2018, https://arxiv.org/abs/1712.07136).
        bias: (K,), with `probe` only; a cosine head has none, so it does not need it.
        arch_rule: gives the architecture's own classifier for K classes, such as `Backbone.new_classifier`.

    Raises:
        RecipeError: if `activation` is unknown or does not belong in a hidden layer.
        ValueError: if `kind` or `init` is unknown or they do not go together, weights are missing or given without use,
            or shapes do not match.
    """
    _check(kind, init, weight, bias, drop_connect)
    if kind == "mlp":
        mlp = MlpHead(
            num_features, num_classes, hidden=hidden, activation=activation, hidden_bias=hidden_bias,
            dropout=dropout, drop_connect=drop_connect,
        )  # fmt: skip
        initialize(mlp.linear, init)
        return mlp
    if init == "model" and arch_rule is not None:
        own = arch_rule(num_classes)
        weight, bias = own.weight, torch.zeros(num_classes) if own.bias is None else own.bias
    head = LinearHead(num_features, num_classes, dropout=dropout, drop_connect=drop_connect)
    if init in RULES:
        initialize(head.linear, init)
    if weight is not None:
        _copy(head.linear, weight, torch.zeros(len(weight)) if bias is None else bias)
    return head if kind == "linear" else _as_cosine(head)


def _check(kind: str, init: str, weight: torch.Tensor | None, bias: torch.Tensor | None, drop_connect: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}.")
    if kind == "mlp" and init not in RULES:
        raise ValueError(f"an mlp head cannot begin from {init!r}, which is one layer; choose {', '.join(RULES)}.")
    if kind == "cosine" and init == "zero":
        raise ValueError("a cosine head cannot begin at zero, which has no direction; choose 'probe' or 'small'.")
    if kind == "cosine" and drop_connect:
        raise ValueError(f"drop_connect is {drop_connect}, but a cosine head has directions, not weights; use dropout.")
    is_unneeded = init != "probe" and not (weight is None and bias is None)
    is_missing = init == "probe" and (weight is None or (bias is None and kind == "linear"))
    if is_unneeded or is_missing:
        raise ValueError(f"weight and bias go with init 'probe', and only with it; init is {init!r}.")


def _make_linear(num_in: int, num_out: int, drop_connect: float) -> nn.Linear:
    return DropConnectLinear(num_in, num_out, p=drop_connect) if drop_connect else nn.Linear(num_in, num_out)


def _as_cosine(head: LinearHead) -> CosineHead:
    rows = head.linear.weight.detach()
    if not bool((lengths := rows.norm(dim=1)).all()) or not bool(lengths.isfinite().all()):
        raise ValueError("a row of weight is zero or not finite, so it has no direction; give every class one.")
    cosine = CosineHead(head.linear.in_features, head.linear.out_features, dropout=head.dropout.p)
    with torch.no_grad():
        cosine.directions.copy_(F.normalize(rows))
    return cosine


def _copy(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if weight.shape != linear.weight.shape or bias.shape != linear.bias.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit a head of "
            f"{linear.in_features} features and {linear.out_features} classes."
        )
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


def one_probe(tensors: Mapping[str, torch.Tensor], *, is_held_out: bool) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of the probe that a run ends on, or of the one before the refit, where there was a refit.

    Args:
        tensors: as in `probe.safetensors`.
        is_held_out: which of the two.
    """
    prefix = HELD_OUT if is_held_out and f"{HELD_OUT}weight" in tensors else ""
    return {name: tensors[f"{prefix}{name}"] for name in ("weight", "bias") if f"{prefix}{name}" in tensors}
