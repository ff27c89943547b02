"""Backbones: timm, torchvision and local weights behind one contract.

A backbone is what remains of a network when its source classifier is taken off: images in, pooled
features out. Every tensor of it belongs to one stage, so that freezing, learning rates and saving
speak of the same parts whatever the architecture.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.errors import BackboneError, nearest
from finetune.models.weights import fetch_from_hub, fetch_from_url, load_strictly, read_card_weights, read_checkpoint
from finetune.recipe.cards import Card

TORCHVISION = "torchvision/"
_CORPORA = {"in1k": "ImageNet-1k", "in12k": "ImageNet-12k", "in21k": "ImageNet-21k", "in22k": "ImageNet-22k"}
Build = Callable[..., nn.Module]
"""`build(num_classes=K)` gives the whole network with random weights."""


class Backbone(nn.Module):
    """A network without its source classifier, in stages from stem to top."""

    def __init__(self, model: nn.Module, card: Card, *, build: Build, has_source: bool) -> None:
        super().__init__()
        card = replace(card, params_m=card.params_m or round(_num_parameters(model) / 1e6, 3))
        classifier = _take_classifier(model, card)
        self.card = card
        self.model = model
        self._build = build
        # In a tuple, so that nn.Module does not count, move, freeze or save it with the features.
        self._source = (classifier.requires_grad_(False).eval() if has_source and classifier is not None else None,)
        self.stages, stage_of = divide_into_stages(model)
        self.stage_of = {f"model.{name}": stage for name, stage in stage_of.items()}
        self.fixed_names = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)
        """Parameters that the architecture itself never trains, such as sine position tables."""
        self.num_features = _num_features(model, classifier, card)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to pooled pre-classifier features (B, D)."""
        return _forward_features(self.model, images)

    @property
    def source_head(self) -> nn.Module | None:
        """The classifier the weights came with, (B, D) to (B, C); None where they have none or are random."""
        return self._source[0]

    def source_logits(self, images: torch.Tensor) -> torch.Tensor:
        """What the whole source network says of images (B, 3, H, W): logits (B, C).

        Raises:
            BackboneError: if the weights came without a classifier.
        """
        if (head := self._source[0]) is None:
            raise BackboneError(f"backbone {self.card.name} has no source classifier; it only gives features.")
        features = self(images)
        return head.to(features.device)(features)

    def new_classifier(self, num_classes: int) -> nn.Linear:
        """A linear classifier (D to K) as the architecture initialises its own; draws from torch's generator."""
        model = self._build(num_classes=num_classes)
        classifier = _take_classifier(model, replace(self.card, num_classes=num_classes))
        if not isinstance(classifier, nn.Linear):
            raise BackboneError(
                f"the classifier of {self.card.name} is not linear; choose another head.init than model."
            )
        return classifier

    def random_twin(self) -> "Backbone":
        """The same network with random weights, drawn from torch's generator, in evaluation mode."""
        model = self._build(num_classes=self.card.num_classes)
        return Backbone(model, self.card, build=self._build, has_source=False).eval()

    @property
    def digest(self) -> str:
        """Sha256 over the architecture, its options and the feature weights: what features depend on."""
        options = json.dumps([self.card.arch, sorted(self.card.arch_kwargs.items())], default=str)
        return hashlib.sha256(f"{options} {self.weights_digest}".encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """Sha256 over names, dtypes, shapes and bytes of the feature weights, in the order of names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_backbone(name: str, *, zoo: Mapping[str, Card], pretrained: bool = True) -> Backbone:
    """The backbone called `name`, with its weights, or with random ones under the same contract.

    Args:
        name: a card of `zoo`, `torchvision/NAME[.WEIGHTS]`, or a timm name with or without a tag.
        zoo: cards by name; they win over timm names.
        pretrained: False draws from torch's generator and reads neither disk nor network.

    Raises:
        BackboneError: if the name is unknown, or its weights are missing, damaged or of another network.
    """
    if name in zoo:
        return _load_card(zoo[name], zoo, pretrained)
    if name.startswith(TORCHVISION):
        return _load_torchvision(name, zoo, pretrained)
    return _load_timm(name, zoo, pretrained)


def refuse_unknown(name: str, zoo: Mapping[str, Card]) -> None:
    """Nothing, where `load_backbone` knows `name`; no weights are read.

    Raises:
        BackboneError: if not.
    """
    if name.startswith(TORCHVISION) and name not in zoo:
        _find_torchvision(name, zoo)
    elif name not in zoo:
        _find_timm(name, zoo)


def divide_into_stages(model: nn.Module) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the stages from stem to top, and the stage of every parameter and buffer of `model`.

    A tensor that no stage claims (class token, final norm, buffers of a root) joins the one registered before it.
    """
    names = list(_tensor_names(model))
    claimed = _claim_by_matcher(model, names) or _claim_by_children(model, names)
    order = {key: index for index, key in enumerate(sorted(set(claimed.values())))}
    stage_of, current = {}, 0
    for name in names:
        current = order[claimed[name]] if name in claimed else current
        stage_of[name] = current
    labels: list[str] = []
    for stage in range(len(order)):
        first = next(name for name in names if name in claimed and order[claimed[name]] == stage)
        label = _stage_label(first) if stage else "stem"
        labels.append(label if label not in labels else f"{label}-{stage}")
    return tuple(labels), stage_of


def _stage_label(name: str) -> str:
    parts = name.split(".")[:-1] or [name]
    numbered = next((i for i, part in enumerate(parts) if re.search(r"\d", part)), 0)
    return ".".join(parts[: numbered + 1])


def _tensor_names(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name


def _claim_by_matcher(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """By timm's own grouping; empty where the architecture brings none."""
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (
        AttributeError,
        AssertionError,
    ):  # over all of timm: three families have none, one refuses to group coarsely
        return {}
    from timm.models import group_parameters

    nothing = "~"  # a name that no pattern matches, to learn where timm puts such names
    listed: Any = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, nothing)])  # buffers too
    claimed = group_parameters(listed, matcher, reverse=True)
    unclaimed = claimed.pop(nothing)
    return {name: stage for name, stage in claimed.items() if stage != unclaimed}


def _claim_by_children(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """By the order of children, containers opened until there are four.

    A child with at most one weight matrix (a norm, a downsampling) opens the stage after it.
    """
    sections = [(name, child) for name, child in model.named_children() if _num_parameters(child)]
    while len(sections) < 4 and (open_ := [s for s in sections if any(_num_parameters(c) for c in s[1].children())]):
        at = sections.index(max(open_, key=lambda section: _num_parameters(section[1])))
        prefix, container = sections[at]
        sections[at : at + 1] = [(f"{prefix}.{n}", c) for n, c in container.named_children() if _num_parameters(c)]
    matrices = [sum(p.ndim > 1 for p in child.parameters()) for _, child in sections]
    plain = 1 if sum(m > 1 for m in matrices) > 1 else 0  # a chain of single layers, as VGG, is one stage each
    stage_of_section: dict[str, int] = {}
    stage, waiting = 0, []
    for (prefix, _), matrix in zip(sections, matrices, strict=True):
        waiting.append(prefix)
        if matrix > plain:
            stage += bool(stage_of_section) or len(waiting) > 1
            leading = waiting[:-1] if not stage_of_section else []
            stage_of_section |= {p: 0 for p in leading} | {p: stage for p in waiting if p not in leading}
            waiting = []
    stage_of_section |= dict.fromkeys(waiting, stage)
    claim = {name: [stage_of_section[p] for p in stage_of_section if name.startswith(f"{p}.")] for name in names}
    return {name: stages[0] for name, stages in claim.items() if stages} or dict.fromkeys(names, 0)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _forward_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return model(images)


def _num_features(model: nn.Module, classifier: nn.Module | None, card: Card) -> int:
    """`head_hidden_size`, for timm's `num_features` is another width in 13 of 98 families."""
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    if width is None:
        width = getattr(classifier, "in_features", None)
    if width is None:
        was_training = model.training
        with torch.inference_mode():
            width = _forward_features(model.eval(), torch.zeros(1, *card.input_size)).shape[1]
        model.train(was_training)
    return int(width)


def _take_classifier(model: nn.Module, card: Card) -> nn.Module | None:
    """Remove the source classifier from `model` and give it back; None where there is none."""
    if hasattr(model, "reset_classifier"):
        classifier = model.get_classifier()  # type: ignore[operator]
        model.reset_classifier(0)  # type: ignore[operator]
    else:
        classifier = _cut_last_linear(model, card)
    if isinstance(classifier, nn.Conv2d):  # a 1x1 convolution after pooling is a linear map in disguise
        linear = nn.Linear(classifier.in_channels, classifier.out_channels, bias=classifier.bias is not None)
        linear.load_state_dict({name: tensor.flatten(1) if tensor.ndim > 1 else tensor
                                for name, tensor in classifier.state_dict().items()})  # fmt: skip
        return linear
    return classifier if isinstance(classifier, nn.Module) and _num_parameters(classifier) else None


def _cut_last_linear(model: nn.Module, card: Card) -> nn.Linear:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found or found[-1][1].out_features != card.num_classes or hasattr(model, "transform_input"):
        raise BackboneError(
            f"backbone {card.arch}: it does not end in one linear classifier of {card.num_classes} outputs (or changes "
            "its input by itself), so its features cannot be told from its answer. Choose another; timm has most."
        )
    path, classifier = found[-1]
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return classifier


def _load_card(card: Card, zoo: Mapping[str, Card], pretrained: bool) -> Backbone:
    if pretrained and card.weights is None:  # a card that only adds knowledge to a timm or torchvision name
        found = load_backbone(card.arch, zoo={}, pretrained=True)
        found.card = replace(card, params_m=card.params_m or found.card.params_m)
        return found
    if card.arch.startswith(TORCHVISION):
        build: Build = partial(_build_torchvision, card.arch.removeprefix(TORCHVISION), **card.arch_kwargs)
    else:
        build = partial(_build_timm, card.arch, **card.arch_kwargs)
    state = read_card_weights(card, zoo) if pretrained and card.weights else None  # read first: a fault shows at once
    try:
        model = build(num_classes=card.num_classes)
    except (RuntimeError, TypeError, ValueError, KeyError) as fault:
        raise BackboneError(
            f"card {card.name}: {card.arch} with {dict(card.arch_kwargs)} cannot be built ({fault})."
        ) from fault
    if state is None:
        return Backbone(model, _as_random(card), build=build, has_source=False)
    load_strictly(model, state, f"{card.weights}", f"{card.arch} with {dict(card.arch_kwargs)}")
    return Backbone(model, card, build=build, has_source=True)


def _find_torchvision(name: str, zoo: Mapping[str, Card]) -> tuple[str, Any]:
    """Architecture and weights."""
    from torchvision.models import get_model_weights

    arch, _, member = name.removeprefix(TORCHVISION).partition(".")
    if arch not in _torchvision_names():
        raise _unknown(name, zoo)
    enum = get_model_weights(arch)
    choices = {one.name: one for one in enum}
    if member and member not in (*choices, "DEFAULT"):
        raise BackboneError(f"backbone {name!r}: {arch} has no weights {member!r}. It has {', '.join(choices)}.")
    return arch, choices.get(member, enum.DEFAULT)  # type: ignore[attr-defined]


def _load_torchvision(name: str, zoo: Mapping[str, Card], pretrained: bool) -> Backbone:
    arch, weights = _find_torchvision(name, zoo)
    card = _torchvision_card(f"{TORCHVISION}{arch}.{weights.name}", arch, weights)
    size = {"image_size": card.input_size[1]} if arch.startswith("vit_") else {}
    build = partial(_build_torchvision, arch, **size)
    if not pretrained:
        model = build(num_classes=card.num_classes)
        return Backbone(model, _as_random(card), build=build, has_source=False)
    path = fetch_from_url(name, weights.url, zoo)
    state = read_checkpoint(path)
    model = build(num_classes=card.num_classes)
    # The files of DenseNet were written before its layers were renamed.
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
    load_strictly(model, {old.sub(r"\1\2.", key): value for key, value in state.items()}, str(path), arch)
    return Backbone(model, card, build=build, has_source=True)


def _torchvision_card(name: str, arch: str, weights: Any) -> Card:
    view = weights.transforms()
    size, shorter = view.crop_size[0], view.resize_size[0]
    num_classes = len(weights.meta["categories"])
    return Card(
        name=name, arch=f"{TORCHVISION}{arch}", num_classes=num_classes, classes=tuple(weights.meta["categories"]),
        pretrained_on="ImageNet-1k" if num_classes == 1000 else "unknown", input_size=(3, size, size),
        mean=tuple(view.mean), std=tuple(view.std), interpolation=view.interpolation.value, crop_pct=size / shorter,
        licence=str(weights.meta.get("license", "unknown")), params_m=round(weights.meta["num_params"] / 1e6, 3),
    )  # fmt: skip


def _find_timm(name: str, zoo: Mapping[str, Card]) -> Any:
    """What timm says of the weights called so; None where there are none."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name.partition(".")[0]):
        raise _unknown(name, zoo)
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as fault:  # the architecture exists, the tag does not
        raise _unknown(name, zoo) from fault


def _load_timm(name: str, zoo: Mapping[str, Card], pretrained: bool) -> Backbone:
    import timm

    contract = _find_timm(name, zoo)
    if contract is None or (pretrained and not contract.has_weights):
        raise BackboneError(f"backbone {name}: nobody published weights for it under this name. Choose a tag of "
                            f"`timm.list_pretrained('{name.partition('.')[0]}*')`, or another backbone.")  # fmt: skip
    build = partial(_build_timm, name)
    if not pretrained:
        model = build()
        return Backbone(model, _as_random(_timm_card(name, contract, model)), build=build, has_source=False)
    path = fetch_from_hub(name, contract, zoo) if contract.hf_hub_id else fetch_from_url(name, str(contract.url), zoo)
    try:
        overlay = {"file": str(path), "custom_load": False}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, OSError, SafetensorError) as fault:
        raise BackboneError(
            f"{path} does not hold the weights of {name} ({fault}). Delete it and fetch it again."
        ) from fault
    return Backbone(model, _timm_card(name, contract, model), build=build, has_source=True)


def _timm_card(name: str, contract: Any, model: nn.Module) -> Card:
    corpora = [_CORPORA[part] for part in (contract.tag or "").split("_") if part in _CORPORA]
    tag = f".{contract.tag}" if contract.tag and "." not in name else ""
    return Card(
        name=name + tag, arch=name.partition(".")[0], num_classes=int(contract.num_classes),
        pretrained_on=", then ".join(corpora) or "unknown", input_size=tuple(contract.input_size),
        mean=tuple(contract.mean), std=tuple(contract.std), interpolation=contract.interpolation,
        crop_pct=float(contract.crop_pct), licence=contract.license or "unknown",
        params_m=round(_num_parameters(model) / 1e6, 3),
    )  # fmt: skip


def _as_random(card: Card) -> Card:
    return replace(card, pretrained_on="nothing (random weights)", weights=None, sha256=None, top1=None)


def _build_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _build_torchvision(arch: str, **options: Any) -> nn.Module:
    from torchvision.models import get_model

    return get_model(arch, weights=None, **options)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _unknown(name: str, zoo: Mapping[str, Card]) -> BackboneError:
    import timm

    known = [*zoo, *timm.list_models(), *timm.list_pretrained(), *(TORCHVISION + n for n in _torchvision_names())]
    hint = nearest(name, known, otherwise="`finetune zoo list` shows cards; `timm.list_models()` shows the rest.")
    return BackboneError(f"backbone {name!r} is neither a card, nor a timm or torchvision model. {hint}")
