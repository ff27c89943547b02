"""Networks that a Python program holds: any module whose head is known, behind the contract of a backbone.

Yours stays as it is: what is looked through and trained is a copy. Its digest is of its weights, its layers and, where
they are your own, the source of its classes, so that features are never taken from the cache for another network.
"""

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn

from finetune.config.card import INTERPOLATIONS, OWN, Card
from finetune.config.own import qualified_name
from finetune.data.sources import Source
from finetune.errors import BackboneError, nearest
from finetune.models.backbones import Backbone, take_classifier

_KNOWN_CODE = ("torch", "timm", "torchvision")
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What networks raise at images that are not for them."""
_HOW = (
    "finetune.Network(module, head='fc', input_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) says "
    "it, here with the constants of ImageNet"
)


@dataclass(frozen=True)
class Network:
    """A network of yours, and what must be told of it: where its head is, and how it wants its images.

    A module of timm tells all of this by itself, so it may be handed in alone.
    """

    module: nn.Module
    """Images (B, 3, S, S) to logits (B, C), or to pooled features (B, D). Weights that are frozen in it stay so, unless
    all are: what moves is decided by the plan."""
    _: KW_ONLY
    head: str | None = None
    """Name of the layer that makes logits of pooled features, such as `fc` or `classifier.1`; it is taken off. Empty:
    there is none. None: the module knows it, as those of timm do."""
    input_size: int | None = None
    """S, height and width in pixels; None, here and below: as the module's own `pretrained_cfg` says."""
    mean: tuple[float, float, float] | None = None
    """Per channel, in units of pixels / 255."""
    std: tuple[float, float, float] | None = None
    interpolation: str = "bilinear"
    """nearest, bilinear or bicubic; a `pretrained_cfg` wins where `input_size` is None."""
    crop_pct: float = 0.875
    """Side of the centre crop over the shorter side; so does it."""
    classes: Sequence[str] = ()
    """What the head's outputs stand for, where it knows something; empty: it is taken off and forgotten."""
    name: str | None = None
    """In plans and reports; None: that of the module's class, or of timm."""


Model = nn.Module | Network
"""A network of yours: a module of timm alone, or any with what must be told of it."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a survey is given by a program instead of looking it up; None where the recipe names it."""

    source: Source | None = None
    backbone: Backbone | None = None


NOTHING = Given()


class OwnBackbone(Backbone):
    """A copy of a module that was handed in, without its head."""

    def __init__(self, model: nn.Module, card: Card, *, head: str | None, has_source: bool) -> None:
        super().__init__(
            model, card, build=_cannot_build, has_source=has_source, take=lambda own, card: _take_head(own, card, head)
        )
        self._layers = hashlib.sha256("\n".join(_told_by(self.model)).encode()).hexdigest()

    @property
    def network(self) -> tuple[str, dict[str, Any]]:
        """Whose class it is; nothing builds it again."""
        return self.card.arch, {}

    @property
    def digest(self) -> str:
        """Sha256 over its class, layers, own code and weights."""
        return hashlib.sha256(json.dumps([self.card.arch, self._layers, self.weights_digest]).encode()).hexdigest()

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """Nothing.

        Raises:
            BackboneError: always, for a module does not say how it draws a head.
        """
        raise BackboneError(f"{self.card.name} was handed in, and does not say how it draws its own classifier.")

    def random_twin(self) -> Backbone:
        """The same network with weights drawn anew: by `reset_parameters`, and others as their own values, shuffled."""
        twin = copy.deepcopy(self)
        drawn = set[int]()
        for module in twin.model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
                drawn |= {id(tensor) for tensor in module.parameters(recurse=False)}
        with torch.no_grad():
            for parameter in twin.model.parameters():
                if id(parameter) not in drawn:
                    parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
        twin._source = (None,)
        return twin.eval()


def open_network(handed: nn.Module | Network) -> Backbone:
    """A copy of a network that was handed in as a backbone, on the CPU, in evaluation mode.

    Raises:
        BackboneError: if it does not tell how it wants images, or where its head is; or if what it makes of images
            without it is not a row of features for each.
    """
    told = handed if isinstance(handed, Network) else Network(handed)
    if not isinstance(told.module, nn.Module):
        raise BackboneError(f"model= is a {type(told.module).__name__}; give a torch.nn.Module or a finetune.Network.")
    kind = type(told.module).__name__
    try:
        model = copy.deepcopy(told.module).cpu().float()
    except RuntimeError as fault:
        raise BackboneError(f"model=, a {kind}, cannot be copied ({fault}).") from fault
    if not any(parameter.requires_grad for parameter in model.parameters()):  # as features are usually taken
        model.requires_grad_(True)
    card = _card(told)
    has_source = _knows_classes(model, told, card)
    try:
        backbone = OwnBackbone(model, card, head=told.head, has_source=has_source).eval()
        backbone.num_features = _num_features(backbone, told)
    except _UNFIT as fault:
        raise BackboneError(f"{card.name} cannot look at images {(2, *card.input_size)}: {fault}") from fault
    return backbone


def _card(told: Network) -> Card:
    known: dict[str, Any] = dict(getattr(told.module, "pretrained_cfg", None) or {})
    if not known and None in (told.input_size, told.mean, told.std):
        raise BackboneError(
            f"model=, a {type(told.module).__name__}, does not tell how it wants its images: their size, mean and std. "
            f"{_HOW}."
        )
    if told.interpolation not in INTERPOLATIONS:
        raise BackboneError(f"interpolation is {told.interpolation!r}; a network may say {', '.join(INTERPOLATIONS)}.")
    is_known = bool(known) and told.input_size is None
    tag = f".{known['tag']}" if known.get("tag") else ""
    name = told.name or (f"{known['architecture']}{tag}" if known.get("architecture") else type(told.module).__name__)
    size = tuple(known["input_size"]) if told.input_size is None else (3, told.input_size, told.input_size)
    return Card(
        name=name,
        arch=OWN + qualified_name(told.module),
        num_classes=len(told.classes) or int(known.get("num_classes") or 0),
        classes=tuple(told.classes),
        pretrained_on="whatever it saw before it was handed in",
        input_size=size,
        mean=tuple(told.mean or known["mean"]),
        std=tuple(told.std or known["std"]),
        interpolation=known["interpolation"] if is_known else told.interpolation,
        crop_pct=float(known["crop_pct"]) if is_known else told.crop_pct,
        licence=str(known.get("license") or "unknown"),
    )


def _knows_classes(model: nn.Module, told: Network, card: Card) -> bool:
    """Whether the head that is taken off knows classes: those that are told, or as many as timm's weights have.

    Raises:
        BackboneError: if the classes that are told are not as many as its outputs.
    """
    outputs = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if told.classes and len(told.classes) not in outputs:
        raise BackboneError(f"{card.name}: classes names {len(told.classes)}, and no layer has as many outputs.")
    return bool(told.classes) or (told.head is None and outputs[-1:] == [card.num_classes])


def _take_head(model: nn.Module, card: Card, head: str | None) -> nn.Module | None:
    if head is None and hasattr(model, "reset_classifier"):
        return take_classifier(model, card)
    if head is None and hasattr(model, "forward_head"):
        head = _unused_linear(model, card)
    if head is None:
        raise BackboneError(f"{card.name} does not tell which of its layers is the head. {_suggestion(model)} {_HOW}.")
    if not head:
        return None
    names = [name for name, _ in model.named_modules() if name]
    if head not in names:
        raise BackboneError(
            f"{card.name} has no layer {head!r} to be its head. {nearest(head, names, otherwise=_suggestion(model))}"
        )
    classifier = model.get_submodule(head)
    _refuse_other_layer(model, classifier, head, card)
    parent, _, leaf = head.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return classifier


def _refuse_other_layer(model: nn.Module, classifier: nn.Module, head: str, card: Card) -> None:
    """Nothing, where what `classifier` gives is the answer of the whole network."""
    said: list[Any] = []
    handle = classifier.register_forward_hook(lambda module, inputs, output: said.append(output))
    with torch.inference_mode():
        answer = model.eval()(torch.zeros(2, *card.input_size))
    handle.remove()
    if not said or not torch.equal(torch.flatten(said[-1]), torch.flatten(answer)):
        raise BackboneError(
            f"{head!r} does not give the answer of {card.name}: it is changed after that layer, or comes from another. "
            f"{_suggestion(model)}"
        )


def _unused_linear(model: nn.Module, card: Card) -> str:
    """Name of the last linear layer, where features before the head do not pass through it; empty where they do."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        return ""
    name, layer = found[-1]
    passed: list[bool] = []
    handle = layer.register_forward_hook(lambda *_: passed.append(True))
    with torch.inference_mode():
        images = torch.zeros(1, *card.input_size)
        model.eval().forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    handle.remove()
    return "" if passed else name


def _suggestion(model: nn.Module) -> str:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        return "It has no linear layer."
    name, layer = found[-1]
    return f"Its last linear layer is {name!r}, from {layer.in_features} to {layer.out_features}."


def _num_features(backbone: Backbone, told: Network) -> int:
    """Width of the rows of features that two images become, in training and in evaluation mode.

    Raises:
        BackboneError: if they become something else.
    """
    twin = copy.deepcopy(backbone)
    for mode in (True, False):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            answer: Any = twin.train(mode)(torch.zeros(2, *backbone.card.input_size))
        if not isinstance(answer, torch.Tensor) or answer.ndim != 2 or len(answer) != 2:
            got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
            raise BackboneError(
                f"{backbone.card.name} without its head makes {got} of 2 images{' in training' if mode else ''}, and "
                f"not a row of features for each. {_suggestion(told.module)} Name the layer that pooled features go "
                "into: head=NAME."
            )
    return int(answer.shape[1])


def _told_by(model: nn.Module) -> Iterator[str]:
    """Its layers in words, and the source of every class that is not of a library."""
    yield re.sub(r"0x[0-9a-f]+", "", repr(model))
    for kind in sorted({type(module) for module in model.modules()}, key=lambda kind: kind.__qualname__):
        if kind.__module__.partition(".")[0] not in _KNOWN_CODE:
            try:
                yield inspect.getsource(kind)
            except (OSError, TypeError):  # typed at a prompt
                yield kind.__qualname__


def _cannot_build(**options: Any) -> nn.Module:
    raise AssertionError("a network that was handed in is copied, not built")
