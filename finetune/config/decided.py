"""The sections of a plan: those of a recipe with nothing open, and training without what each stage says for itself.

Rates, epochs, depth, schedule and batch norm stand in the stages and nowhere else.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from finetune.config.addresses import without_login
from finetune.config.model_keys import AugmentSpec, Domain, HeadSpec, Preset
from finetune.config.recipe import (
    AveragingSpec,
    DataSpec,
    DistillationSpec,
    HardwareSpec,
    ImbalanceSpec,
    Invariance,
    ScheduleSpec,
    SplitSpec,
    Strategy,
    TrackingSpec,
)
from finetune.config.section import Positive, Section, Share, Text, as_text

OF_STAGES = ("prefer", "depth", "layers", "reinit", "freezes_first", "epochs", "schedule", "batch_norm")
RATES = ("lr", "backbone_lr_ratio", "layer_decay")
"""Keys of a recipe's `train` and `train.optimizer` that a plan has in its stages, or as its advice."""


class SplitPlan(SplitSpec):
    """How the images were divided, and whether the model ends on all that are labelled."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    refit: bool


class DataPlan(DataSpec):
    """The images; without a root a program handed them in."""

    split: SplitPlan
    image_size: Annotated[int, Field(ge=16, le=2048)]
    crop_pct: Annotated[float, Field(gt=0.2, le=1)]
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    normalize: Literal["weights", "recipe", "channel_mean", "channel_mean_std"]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    value_range: tuple[float, float]
    invariances: tuple[Invariance, ...]


class AugmentPlan(AugmentSpec):
    """Variation in training."""

    preset: Preset
    domain: Domain


class HeadPlan(HeadSpec):
    """The new layer."""

    init: Literal["probe", "zero", "small", "uniform", "xavier", "kaiming", "model"]


class Rule(Section):
    """How a step is made from a gradient; how large it is, stands in the stages."""

    name: Text
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay: Literal["decoupled", "coupled"] = "decoupled"
    momentum: Share = 0.9
    rho: Share = 0.99
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8


class SchedulePlan(ScheduleSpec):
    """The learning rate over a stage."""

    name: (
        Literal["constant", "step", "multistep", "exponential", "inverse", "linear", "cosine", "plateau", "one_cycle",
                "cyclic", "cosine_restarts"]
    )  # fmt: skip


class AveragingPlan(AveragingSpec):
    """More than one set of weights from one run."""

    kind: Literal["none", "ema", "swa"]
    ema_decay: Annotated[float, Field(gt=0, lt=1)]
    wise_ft: Annotated[float, Field(gt=0, le=1)]


class ImbalancePlan(ImbalanceSpec):
    """What is done where some classes have far more images than others."""

    kind: Literal["none", "inverse", "effective", "sampler", "logit_adjustment", "focal"]


class TrainPlan(Section):
    """What all stages share."""

    strategy: Strategy
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 8
    batch_size: Annotated[int, Field(ge=1)]
    optimizer: Rule
    averaging: AveragingPlan
    imbalance: ImbalancePlan
    distillation: DistillationSpec = DistillationSpec()
    """Its teacher is null where there is none."""
    patience: Annotated[int, Field(ge=1)]
    checkpoint: Literal["settled", "best", "last"]
    monitor: Literal["loss", "balanced"]
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    divergence_threshold: Annotated[float, Field(gt=1)] = 3.0


def shared_by_stages(train: Mapping[str, Any]) -> dict[str, Any]:
    """The section `train` without what each stage says for itself."""
    rule = {key: value for key, value in train["optimizer"].items() if key not in RATES}
    return {key: value for key, value in train.items() if key not in OF_STAGES} | {"optimizer": rule}


class HardwarePlan(HardwareSpec):
    """What to run on."""

    devices: Literal["cpu", "cuda", "mps"]
    precision: Annotated[Literal["32", "bf16", "fp16"], BeforeValidator(as_text)]
    workers: Annotated[int, Field(ge=0, le=64)]
    micro_batch: Annotated[int, Field(ge=0)]


class TrackingPlan(TrackingSpec):
    """Where the run is logged."""

    uri: Annotated[str, PlainSerializer(without_login)]
    """An address, or `beside the runs`."""
    experiment: str
