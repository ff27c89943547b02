"""Plan: every decision with nothing left open, and the reason for each. A file that can be run again."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from finetune.config.card import View
from finetune.config.decided import (
    AugmentPlan,
    DataPlan,
    HardwarePlan,
    HeadPlan,
    SchedulePlan,
    TrackingPlan,
    TrainPlan,
    shared_by_stages,
)
from finetune.config.model_keys import RegularizationSpec
from finetune.config.own import OwnThing
from finetune.config.recipe import EvaluateSpec
from finetune.config.renamed import with_new_names
from finetune.config.section import Prefer, Section
from finetune.errors import RunError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, and a plan is read often
HELD_OUT_WEIGHTS = "held_out.safetensors"
"""Of a stage that a refit repeats on all labelled images."""
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


BEFORE: dict[str, Any] = {
    "data": {"value_range": [0.0, 65535.0], "split": {"refit": False}},
    "train": {"averaging": {"wise_ft": 1.0}},
    "hardware": {"micro_batch": 0},
}
"""What plans of older versions did and did not say: all 16 bits were mapped to eight, nothing was refit or mixed, and
the images of a step passed at once."""
Images = Literal["train", "labelled"]
"""The training images alone, or all that are labelled and not for test: train, val and calibration."""


class Stage(Section):
    """One `Trainer.fit`: what moves, how fast, how long."""

    name: Literal["partial", "full", "gradual", "surgical", "norm_only", "bitfit", "lora", "refit"]
    images: Images = "train"
    """Which images it trains on. Where on all that are labelled, no val watches, and `epochs` become those that were
    kept of the stage it repeats."""
    trains: Literal["all", "norm_only", "bitfit", "lora"] = "all"
    """Which tensors of the trained stages move; the head always does."""
    trainable_stages: int
    """Top stages of the backbone that move."""
    layers: tuple[str, ...] = ()
    """Names of the only stages or layers that move, instead of the top ones."""
    freezes_first: bool = False
    """The first layer stays still."""
    fresh_stages: int = 0
    """Top stages that were drawn anew, and move at the rate of the head."""
    epochs: int
    lr_head: float
    """Peak rate of the head."""
    lr_backbone: float
    """Peak rate of the backbone's topmost stage."""
    layer_decay: float = 1.0
    """Peak rate of each lower stage over that of the one above it."""
    schedule: SchedulePlan = SchedulePlan(name="cosine")
    """Of the rate over this stage."""
    batch_norm: Literal["frozen", "statistics", "train"]


class Forecast(Section):
    """What one strategy is expected to give and to cost."""

    strategy: str
    gain: float
    """Accuracy above the probe's, as a share; from the measured matrix."""
    gain_low: float
    gain_high: float
    """95 % interval of the gain in a single run."""
    seconds: float
    """Of the whole training, on this machine."""
    memory_mb: float
    """Peak of a training step above the process's own."""
    is_gain_known: bool = True
    """False for what was timed but never run in the benchmark that foretells gains."""


class Advice(Section):
    """Where the data stand on the grid, and what follows."""

    cell: str
    """Such as `small, similar`."""
    images_per_class: float
    similarity: float
    similarity_low: float
    similarity_high: float
    small_below: float
    """Images per class that divide small from large."""
    similar_from: float
    """Similarity that divides different from similar."""
    probe_error: float = 0.0
    """Share of images that the probe gets wrong; 0 where there is none."""
    prefer: Prefer = "balanced"
    strategy: str
    runner_up: str
    why: str
    forecasts: tuple[Forecast, ...] = ()


class Reason(Section):
    """Why a key holds its value."""

    key: str
    value: str
    why: str


class Plan(Section):
    """Everything that will be done. Holds no `auto`, and no null but where that says that there is none."""

    name: str
    backbone: str
    arch: str = ""
    """What builds the network of the backbone again: a timm name, or `torchvision/NAME`."""
    arch_kwargs: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool
    data: DataPlan
    augment: AugmentPlan
    head: HeadPlan
    regularization: RegularizationSpec
    train: TrainPlan
    evaluate: EvaluateSpec
    hardware: HardwarePlan
    tracking: TrackingPlan
    seed: int
    own: tuple[OwnThing, ...] = ()
    """What a Python program handed in, and hands in again where the run goes on; none of it is kept."""
    classes: tuple[str, ...]
    split_digest: str
    weights_digest: str
    probe_on: Images = "train"
    """Which images the probe ends on; its penalty is chosen before, and what val and calibration judge is that one."""
    stages: tuple[Stage, ...]
    advice: Advice
    reasons: tuple[Reason, ...]

    @property
    def is_refit(self) -> bool:
        """Whether the model ends on all labelled images, so that val and calibration judge the one before it."""
        return self.stages[-1].images == "labelled" if self.stages else self.probe_on == "labelled"

    @property
    def fresh_stages(self) -> int:
        """Top stages of the backbone that are drawn anew before the first stage."""
        return max((stage.fresh_stages for stage in self.stages), default=0)

    @property
    def epochs(self) -> int:
        """Passes over the training images, at most; 0 where the probe is the model."""
        return sum(stage.epochs for stage in self.stages if stage.images == "train")

    def weights_file(self, index: int) -> str:
        """The file in the folder of a stage with the weights that it ends with.

        Those before a refit have another name: whoever looks for the weights of a run finds those that are shipped.
        """
        is_before = self.is_refit and self.stages[index].images == "train"
        return HELD_OUT_WEIGHTS if is_before else "weights.safetensors"

    def last_stage(self, on: Images) -> int:
        """The index of the last stage on these images; -1 where there is none."""
        return max((index for index, stage in enumerate(self.stages) if stage.images == on), default=-1)

    def repeated(self, index: int) -> int:
        """The index of the stage on the training images that stage `index` repeats on all labelled ones; or itself."""
        return index % (self.last_stage("train") + 1)

    @property
    def view(self) -> View:
        """The evaluation view of every image."""
        data = self.data
        return View(
            size_pixels=data.image_size,
            shorter_pixels=max(data.image_size, int(data.image_size / data.crop_pct)),
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            value_range=data.value_range,
            frame=data.frame,
        )

    def to_yaml(self) -> str:
        """The plan as a file, keys in the recipe's order."""
        plain = self.model_dump(mode="json")
        return str(yaml.dump(plain, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=110))


def read_plan(path: Path) -> Plan:
    """The plan in the file `path`.

    Raises:
        RunError: if it is missing or is no plan.
    """
    if not path.exists():
        raise RunError(f"{path} is not there, so this is no run folder. `finetune train` makes one.")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
        return plan_of(found)
    except (ValidationError, yaml.YAMLError, ValueError) as fault:
        raise RunError(f"{path} is not a plan of this version: {fault}") from fault


def plan_of(found: object) -> Plan:
    """The plan in what a file held, perhaps of an older version.

    Raises:
        ValidationError: if it is none.
    """
    named = with_new_names(found) if isinstance(found, dict) else found
    return Plan.model_validate(_without_copies(_filled(BEFORE, named)))


def _without_copies(found: Any) -> Any:
    """A plan of a version that held rates, epochs and more twice: in the stages, which were read, and in `train`."""
    train = found.get("train") if isinstance(found, dict) else None
    if not isinstance(train, dict) or not {"epochs", "schedule", "optimizer"} <= train.keys():
        return found
    return {**found, "train": shared_by_stages(train)} if "lr" in train["optimizer"] else found


def _filled(defaults: Any, found: Any) -> Any:
    """`found`, with what it does not say as in `defaults`, section by section; anything but sections stays as it is."""
    if not isinstance(found, dict) or not isinstance(defaults, dict):
        return found
    return {**defaults, **found} | {name: _filled(defaults[name], found[name]) for name in defaults if name in found}
