"""Activations: which of them belong in a hidden layer, and why the others do not.

The choice moves accuracy by a percent or two, so `relu` is the default and we only keep people from bad ones. Refused
are those that saturate on both sides with a vanishing gradient, and those that give many inputs one output.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from finetune.errors import RecipeError, nearest

_SYNONYMS = {"swish": "silu"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What we think of one activation in a hidden layer."""

    name: str
    verdict: Literal["good", "caution", "refused"]
    why: str
    """One sentence."""


_GOOD = {
    "relu": "It is cheap, does not saturate above zero, and serves nearly everywhere.",
    "leaky_relu": "It is ReLU with a small slope below zero, so units cannot die.",
    "prelu": "It is leaky ReLU with a learned slope; keep the slope out of weight decay.",
    "elu": "Its outputs average closer to zero than those of ReLU, and it levels off gently below.",
    "gelu": "It is a smooth ReLU, usual in transformers and on some networks a little better.",
    "silu": "It is a smooth ReLU, also called Swish, and on some networks a little better.",
    "softplus": "It is a smooth ReLU that never dies, though slower and seldom better.",
    "maxout": "It neither saturates nor dies, for twice the parameters.",
}
_CAUTION = {
    "selu": "It normalises itself only with xavier weights, alpha dropout, and no other norm.",
    "tanh": "It is centred on zero, but saturates on both sides, where the gradient vanishes.",
}
_REFUSED = {
    "sigmoid": "It saturates on both sides, is never negative, and passes on at most a quarter of the gradient.",
    "softmax": "It makes units share a sum of one; its place is after the last layer.",
    "sine": "It is many-to-one: inputs a period apart look the same, and what told them apart is lost.",
    "cosine": "It is many-to-one: inputs a period apart look the same, and what told them apart is lost.",
    "abs": "It is many-to-one: x and -x look the same, and what told them apart is lost.",
    "square": "It is many-to-one: x and -x look the same, and what told them apart is lost.",
}
ACTIVATIONS = MappingProxyType(
    {name: Verdict(name=name, verdict="good", why=why) for name, why in _GOOD.items()}
    | {name: Verdict(name=name, verdict="caution", why=why) for name, why in _CAUTION.items()}
    | {name: Verdict(name=name, verdict="refused", why=why) for name, why in _REFUSED.items()}
)
"""All verdicts by name, the good ones first."""
OFFERED = (*_GOOD, *_CAUTION)
"""The names that a hidden layer may have."""


def judge_activation(name: str) -> Verdict:
    """Whether the activation called `name` belongs in a hidden layer; `swish` is `silu`.

    Raises:
        RecipeError: if the name is unknown. A refused activation raises nothing here.
    """
    if (verdict := ACTIVATIONS.get(_SYNONYMS.get(name, name))) is None:
        hint = nearest(name, [*ACTIVATIONS, *_SYNONYMS], otherwise=f"Choose one of {', '.join(OFFERED)}.")
        raise RecipeError(f"head.activation: {name!r} is not an activation we know. {hint}")
    return verdict
