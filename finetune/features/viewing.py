"""How a backbone sees images here: the view of its weights, whose constants, which sizes, and on what machine."""

import os

import torch

from finetune.data.value_range import FULL_RANGE
from finetune.errors import BackboneError, RecipeError
from finetune.machine import num_cores
from finetune.models.backbones import Backbone
from finetune.models.image_sizes import nearest_size, size_unit, takes_size
from finetune.recipe.addresses import uri_from_environment
from finetune.recipe.cards import View
from finetune.recipe.facts import BackboneFacts, MachineFacts
from finetune.recipe.schema import Recipe

LARGE_PIXELS = 512
"""Transformers pretrained at this size or above, such as DINOv2's 518, cost more than people can train at."""
TRAINABLE_PIXELS = 224
"""What these take instead, to the nearest multiple of their patches."""
_OVERRIDES = ("image_size", "crop_pct", "interpolation", "mean", "std")


def fit_size(backbone: Backbone, wish: int | None) -> tuple[int, str]:
    """The size at which a backbone looks, for which it is changed in place, and a word on it where there is one to say.

    Transformers take multiples of their patches and windows; position embeddings are resampled by timm. At the size
    of pretraining nothing is changed.

    Args:
        backbone: in evaluation mode.
        wish: pixels; None leaves it to us: the size of pretraining, or of large transformers one people can train at.

    Raises:
        BackboneError: if it does not take images of this size.
    """
    name, own = backbone.card.name, backbone.card.input_size[1]
    unit = size_unit(backbone.model, own)
    if wish is None and (unit == 1 or own < LARGE_PIXELS):
        return own, ""
    size = nearest_size(TRAINABLE_PIXELS if wish is None else wish, unit)
    told = [f"{own} px, the size of pretraining, makes each step of {name} cost too much"] if wish is None else []
    if wish not in (None, size):
        told.append(f"{name} takes multiples of {unit} px, so {wish} px became {size}")
    if size != own and (fault := takes_size(backbone, size)) is not None:
        fault = _resized(backbone, size, fault)
        if fault is not None:
            said = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise BackboneError(
                f"{name} does not take images of {size} px ({said}). "
                f"Set data.image_size to {own}, the size it was pretrained at, or leave it null."
            ) from fault
        told.append(f"what {name} knows of positions was resampled from {own} px")
    return size, "; ".join(told)


def _resized(backbone: Backbone, size: int, fault: Exception) -> Exception | None:
    """What the backbone still raises once timm has set it to `size`; `fault` where timm cannot."""
    if not hasattr(backbone.model, "set_input_size"):
        return fault
    try:
        backbone.set_image_size(size)
    except (AssertionError, RuntimeError, ValueError, TypeError) as other:
        return other
    return takes_size(backbone, size)


def choose_view(recipe: Recipe, backbone: Backbone, size: int) -> tuple[View, tuple[str, ...]]:
    """The view of the weights with the recipe's overrides, and the names of those that differ.

    Args:
        recipe: may override any part.
        backbone: its card says how it was pretrained.
        size: pixels, as `fit_size` settled them.
    """
    wish, card = recipe.data, backbone.card
    view = View(
        size_pixels=size,
        shorter_pixels=max(size, int(size / (wish.crop_pct or card.crop_pct))),
        interpolation=wish.interpolation or card.interpolation,
        mean=wish.mean or card.mean,
        std=wish.std or card.std,
        value_range=wish.value_range or FULL_RANGE,
        frame=wish.frame,
    )
    own = {**{key: getattr(card, key) for key in _OVERRIDES if key != "image_size"}, "image_size": backbone.source_size}
    differ = [key for key in _OVERRIDES if getattr(wish, key) is not None and getattr(wish, key) != own[key]]
    return view, tuple(differ)


def whose_constants(recipe: Recipe) -> str:
    """Where mean and std come from: the weights, the training images, or the recipe itself.

    Raises:
        RecipeError: if the recipe both gives them and asks for measured ones, or names ones it does not give.
    """
    wish = recipe.data
    if wish.mean is not None or wish.std is not None:
        if wish.normalize not in (None, "recipe"):
            raise RecipeError(f"data.mean and data.std are given, and data.normalize is {wish.normalize}; keep one.")
        return "recipe"
    if wish.normalize == "recipe":
        raise RecipeError("data.normalize is recipe, but data.mean and data.std are not given.")
    return wish.normalize or ("weights" if recipe.pretrained else "channel_mean_std")


def measure_machine(wish: str) -> MachineFacts:
    """What torch can use here."""
    has_gpu = torch.cuda.is_available() and wish != "cpu"
    return MachineFacts(
        device="cuda" if has_gpu else "cpu",
        cores=num_cores(),
        has_bf16=has_gpu and torch.cuda.is_bf16_supported(),
        has_fp16=has_gpu,
        tracking_uri=uri_from_environment(),
        tracking_experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or None,
    )


def fast_precision(machine: MachineFacts) -> str:
    """The fastest arithmetic that a frozen backbone looks in well, here."""
    return "bf16" if machine.has_bf16 else "fp16" if machine.has_fp16 else "32"


def backbone_facts(backbone: Backbone) -> BackboneFacts:
    """What `Facts` say of a backbone."""
    card = backbone.card
    arch, options = backbone.network
    return BackboneFacts(
        name=card.name,
        arch=arch,
        arch_kwargs=options,
        params_m=round(sum(p.numel() for p in backbone.parameters()) / 1e6, 3),
        num_features=backbone.num_features,
        stages=backbone.stages,
        pretrained_on=card.pretrained_on,
        input_size=backbone.source_size,
        licence=card.licence,
        weights_digest=backbone.digest,
        has_batch_norm=any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in backbone.modules()),
    )
