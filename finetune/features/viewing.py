"""How a backbone sees images here: the view of its weights, whose constants, which sizes, and on what machine."""

import os
from dataclasses import asdict

from finetune.compute import Machine
from finetune.config.addresses import uri_from_environment
from finetune.config.card import View
from finetune.config.facts import BackboneFacts, MachineFacts
from finetune.config.recipe import DataSpec
from finetune.data.value_range import FULL_RANGE
from finetune.errors import RecipeError
from finetune.models.backbones import Backbone
from finetune.models.layers import BatchNorm

_OVERRIDES = ("image_size", "crop_pct", "interpolation", "mean", "std")


def choose_view(wish: DataSpec, backbone: Backbone, size: int) -> tuple[View, tuple[str, ...]]:
    """The view of the weights with the recipe's overrides, and the names of those that differ.

    Args:
        wish: may override any part.
        backbone: its card says how it was pretrained.
        size: pixels, as `fit_size` settled them.
    """
    card = backbone.card
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


def whose_constants(wish: DataSpec, *, is_pretrained: bool) -> str:
    """Where mean and std come from: the weights, the training images, or the recipe itself.

    Raises:
        RecipeError: if the recipe both gives them and asks for measured ones, or names ones it does not give.
    """
    if wish.mean is not None or wish.std is not None:
        if wish.normalize not in (None, "recipe"):
            raise RecipeError(f"data.mean and data.std are given, and data.normalize is {wish.normalize}; keep one.")
        return "recipe"
    if wish.normalize == "recipe":
        raise RecipeError("data.normalize is recipe, but data.mean and data.std are not given.")
    return wish.normalize or ("weights" if is_pretrained else "channel_mean_std")


def measure_machine(wish: str) -> MachineFacts:
    """What torch can use here."""
    return MachineFacts(
        **asdict(Machine.here(wish)),
        tracking_uri=uri_from_environment(),
        tracking_experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or None,
    )


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
        has_batch_norm=any(isinstance(module, BatchNorm) for module in backbone.modules()),
    )
