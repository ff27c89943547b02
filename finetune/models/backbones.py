"""Backbones: timm, torchvision and local weights behind one contract.

A backbone is what remains of a network when its source classifier is taken off: images in, pooled
features out. Every tensor of it belongs to one stage, so that freezing, learning rates and saving
speak of the same parts whatever the architecture.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from finetune.config.backbone_names import card_at
from finetune.config.card import OWN, Card
from finetune.errors import BackboneError, nearest
from finetune.models.image_sizes import set_image_size
from finetune.models.modes import evaluating
from finetune.models.stages import divide_into_stages, num_parameters
from finetune.models.weights import fetch_from_hub, fetch_from_url, load_strictly, read_card_weights, read_checkpoint

TORCHVISION = "torchvision/"
_OF_A_RUN = "backbone.model."
"""Begins the names of the backbone's tensors in the whole model of a run."""
_CORPORA = {"in1k": "ImageNet-1k", "in12k": "ImageNet-12k", "in21k": "ImageNet-21k", "in22k": "ImageNet-22k"}
Build = Callable[..., nn.Module]
"""`build(num_classes=K)` gives the whole network with random weights."""
Take = Callable[[nn.Module, Card], nn.Module | None]
"""Removes the source classifier from a network and gives it back; None where there is none."""


class Backbone(nn.Module):
    """A network without its source classifier, in stages from stem to top."""

    def __init__(
        self, model: nn.Module, card: Card, *, build: Build, has_source: bool, take: Take | None = None
    ) -> None:
        super().__init__()
        _refuse_channels(card)
        card = replace(card, params_m=card.params_m or round(num_parameters(model) / 1e6, 3))
        classifier = (take or take_classifier)(model, card)
        self.card = card
        self.source_size = card.input_size[1]
        """Pixels at which it came; `set_image_size` leaves it."""
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

    def set_image_size(self, size_pixels: int) -> None:
        """Take images of another size: a network of timm with its position embeddings or windows resampled.

        Raises:
            AssertionError, RuntimeError, ValueError or TypeError: as timm, where the size does not fit.
        """
        set_image_size(self.model, size_pixels)
        self._build = partial(self._build, resized_to=size_pixels)
        self.card = replace(self.card, input_size=(3, size_pixels, size_pixels))

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
        classifier = take_classifier(model, replace(self.card, num_classes=num_classes))
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
    def network(self) -> tuple[str, dict[str, Any]]:
        """What builds the same network again, a timm name or `torchvision/NAME`, and its options."""
        build = cast("partial[nn.Module]", self._build)
        name = f"{TORCHVISION}{build.args[0]}" if build.func is _build_torchvision else str(build.args[0])
        return name, dict(build.keywords)

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


def _refuse_channels(card: Card) -> None:
    channels = card.arch_kwargs.get("in_chans", card.input_size[0])
    if channels != 3 or card.input_size[0] != 3:
        raise BackboneError(
            f"backbone {card.name} takes images of {channels} channels, and images come as red, green and blue here. "
            "Choose one of 3 channels; it takes grey images too, as three equal channels."
        )


def load_backbone(name: str, *, zoo: Mapping[str, Card], pretrained: bool = True) -> Backbone:
    """The backbone called `name`, with its weights, or with random ones under the same contract.

    Args:
        name: a card of `zoo`, `torchvision/NAME[.WEIGHTS]`, a finished run or another folder with a card, or a timm
            name with or without a tag.
        zoo: cards by name; they win over timm names.
        pretrained: False draws from torch's generator and reads neither disk nor network.

    Raises:
        BackboneError: if the name is unknown, or its weights are missing, damaged or of another network.
    """
    if name in zoo:
        return _load_card(zoo[name], zoo, pretrained)
    if name.startswith(TORCHVISION):
        return _load_torchvision(name, zoo, pretrained)
    if (card := card_at(name)) is not None:
        return _load_card(card, zoo, pretrained)
    return _load_timm(name, zoo, pretrained)


def refuse_unknown(name: str, zoo: Mapping[str, Card]) -> None:
    """Nothing, where `load_backbone` knows `name`; no weights are read.

    Raises:
        BackboneError: if not.
    """
    if name.startswith(TORCHVISION) and name not in zoo:
        _find_torchvision(name, zoo)
    elif name not in zoo and card_at(name) is None:
        _find_timm(name, zoo)


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
        with evaluating(model), torch.inference_mode():
            width = _forward_features(model, torch.zeros(1, *card.input_size)).shape[1]
    return int(width)


def take_classifier(model: nn.Module, card: Card) -> nn.Module | None:
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
    return classifier if isinstance(classifier, nn.Module) and num_parameters(classifier) else None


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
    if card.arch.startswith(OWN):
        raise BackboneError(
            f"backbone {card.name}: its network, {card.arch.removeprefix(OWN)}, was handed in from Python, and only "
            "its weights are kept. Begin from them in Python: load_run(run, model=...).model is the whole network."
        )
    if pretrained and card.weights is None:  # a card that only adds knowledge to a timm or torchvision name
        found = load_backbone(card.arch, zoo={}, pretrained=True)
        found.card = replace(card, params_m=card.params_m or found.card.params_m)
        found.source_size = card.input_size[1]
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
    fits = (f"{card.weights}", f"{card.arch} with {dict(card.arch_kwargs)}")
    if features := {name.removeprefix(_OF_A_RUN): t for name, t in state.items() if name.startswith(_OF_A_RUN)}:
        found = Backbone(model, card, build=build, has_source=False)  # the head of a run is no part of its backbone
        load_strictly(found.model, features, *fits)
        return found
    load_strictly(model, state, *fits)
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
        params_m=round(num_parameters(model) / 1e6, 3),
    )  # fmt: skip


def _as_random(card: Card) -> Card:
    return replace(card, pretrained_on="nothing (random weights)", weights=None, sha256=None, top1=None, images=None)


def _build_timm(name: str, resized_to: int | None = None, **options: Any) -> nn.Module:
    import timm

    model = timm.create_model(name, **options)
    if resized_to is not None:
        set_image_size(model, resized_to)
    return model


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
