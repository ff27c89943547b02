"""Recipe: what the user wishes. Null means "you choose"; the planner leaves nothing null.

The field names here are the recipe's keys, their docstrings are the reference, and a JSON schema for
editors is made from them (`finetune recipes check --schema`).
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_text(value: object) -> object:
    """YAML reads `32` and `2024` as numbers; where a name is meant, they are names."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Preset = Literal["none", "light", "medium", "heavy"]
Strategy = Literal["probe", "partial", "full"]
Invariance = Literal["hflip", "vflip", "rot90"]


class Section(BaseModel):
    """A frozen group of keys that refuses the ones it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class SplitSpec(Section):
    """How images are divided where the data does not say it. The rest is for training."""

    val: Share = 0.15
    """Share of each class used for choosing: early stopping, the probe's penalty, the strategy."""
    calibration: Share = 0.1
    """Share of each class used for the temperature alone."""
    test: Share = 0.15
    """Share of each class read once, at the end."""

    @model_validator(mode="after")
    def _leave_something(self) -> "SplitSpec":
        if (total := self.val + self.calibration + self.test) >= 1:
            raise ValueError(f"val + calibration + test = {total:.2f} leaves nothing to train on")
        return self


class DataSpec(Section):
    """Where the images are, and how they become tensors."""

    root: Text | None = None
    """A folder of class folders (or of train/val/test), a CSV/TSV table, or a folder of parquet shards."""
    split: SplitSpec = SplitSpec()
    """Applied only to the roles that the data itself does not name."""
    max_train_per_class: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Use at most this many training images of each class; the choice is seeded and nested."""
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    """Pixels; null takes the size of pretraining."""
    crop_pct: Annotated[float, Field(gt=0.2, le=1)] | None = None
    """Side of the centre crop over the shorter side; null takes the weights' own."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    """Null takes the weights' own."""
    normalize: Literal["weights", "recipe", "channel_mean", "channel_mean_std"] | None = None
    """Whose mean and std: the weights' own (null, where there are any), this recipe's, or the training images'."""
    mean: tuple[float, float, float] | None = None
    """Per channel, in units of pixels / 255; null takes the weights' own."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Per channel, in units of pixels / 255; null takes the weights' own."""
    invariances: tuple[Invariance, ...] | None = None
    """Changes that leave every label true; flips in training and testing are used only if named here."""
    label_swap: tuple[tuple[Text, Text], ...] = ()
    """Pairs of classes that a horizontal flip turns into each other; the flip is then used, and swaps their labels."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """A broken file is named and left out, or stops the run."""

    @property
    def allowed_changes(self) -> tuple[Invariance, ...]:
        """What may be done to an image: the invariances, and the horizontal flip where labels follow it."""
        declared = self.invariances or ()
        return (*declared, "hflip") if self.label_swap and "hflip" not in declared else declared

    def mirror_classes(self, classes: Sequence[str]) -> tuple[int, ...]:
        """By class, the class of its mirror image; its own where it is in no pair."""
        twins = {**dict(self.label_swap), **{right: left for left, right in self.label_swap}}
        return tuple(classes.index(twins.get(name, name)) for name in classes)


class AugmentSpec(Section):
    """How training images are varied."""

    preset: Preset | None = None
    """Strength of the random changes; flips follow `data.invariances` and `data.label_swap`."""


class HeadSpec(Section):
    """The new classification layer."""

    kind: Literal["linear"] = "linear"
    """One linear layer."""
    init: Literal["probe", "zero", "small", "model"] | None = None
    """Start from the probe, from zero, from N(0, 0.01^2), or from the architecture's own rule."""
    dropout: Share = 0.0
    """Share of features dropped before the head, in training only."""


class OptimizerSpec(Section):
    """How a step is made from a gradient."""

    name: Literal["adamw", "sgd"] | None = None
    """`sgd` is Nesterov with `momentum`."""
    lr: Annotated[float, Field(gt=0, le=10)] | None = None
    """Learning rate of the head, at its peak."""
    backbone_lr_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of pretrained weights over that of the head."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """Decoupled decay of matrices and kernels; biases and norms have none."""
    momentum: Share = 0.9
    """For `sgd`."""


class TrainSpec(Section):
    """How deep, how long, how fast."""

    strategy: Strategy | None = None
    """Null asks the advisor."""
    depth: Annotated[int, Field(ge=1)] | None = None
    """Stages of the backbone that `partial` trains, counted from the top."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """At most; early stopping may end sooner."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per optimizer step, whatever fits in memory at once."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """Rule, rates and decay."""
    schedule: Literal["cosine", "constant"] | None = None
    """Of the learning rate, per step."""
    warmup_fraction: Share = 0.05
    """Share of all steps over which the rate rises linearly."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Epochs without a lower val loss after which training stops, where the best epoch is kept."""
    keep: Literal["best", "last"] | None = None
    """The epoch with the lowest val loss at the best temperature, or the last; null: last where val is small."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global norm of the gradient."""
    batch_norm: Literal["frozen", "train"] | None = None
    """Statistics of batch-norm layers in trained stages; in frozen stages they never move."""


class EvaluateSpec(Section):
    """How the model is judged."""

    views: Literal["center", "five", "ten"] = "center"
    """Crops whose probabilities are averaged; ten needs `data.label_swap`, or `hflip` among `data.invariances`."""
    calibrate: bool = True
    """Fit one temperature on the calibration images."""


class HardwareSpec(Section):
    """What to run on."""

    devices: Literal["auto", "cpu", "cuda"] = "auto"
    """One device; auto takes a GPU if there is one."""
    precision: Annotated[Literal["auto", "32", "bf16", "fp16"], BeforeValidator(_as_text)] = "auto"
    """Auto takes bf16 (or fp16) on a GPU that has it, 32 elsewhere."""
    workers: Annotated[int, Field(ge=0, le=64)] | None = None
    """Loader processes; on a CPU none is fastest, as decoded images are kept."""
    image_cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """Memory for decoded, resized images, so that later epochs do not decode again."""


class TrackingSpec(Section):
    """Where runs are compared."""

    enabled: bool = True
    """Log to MLflow."""
    uri: str | None = None
    """Null: the SQLite store beside the runs."""
    experiment: str | None = None
    """Null: the recipe's name."""


class Recipe(Section):
    """What the user wishes, perhaps with things left open."""

    name: Annotated[Text, Field(min_length=1, max_length=80)] | None = None
    """Begins the run folder's name; null takes the data folder's."""
    backbone: str | None = None
    """A timm name, `torchvision/NAME`, or a card in a zoo folder; null takes the bundled one."""
    pretrained: bool = True
    """False trains the same architecture from random weights, as a control."""
    data: DataSpec = DataSpec()
    """Images."""
    augment: AugmentSpec = AugmentSpec()
    """Variation in training."""
    head: HeadSpec = HeadSpec()
    """The new layer."""
    train: TrainSpec = TrainSpec()
    """Training."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Judging."""
    hardware: HardwareSpec = HardwareSpec()
    """Machine."""
    tracking: TrackingSpec = TrackingSpec()
    """MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of splits, order, augmentation and dropout."""


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe may hold, in order."""
    keys = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += recipe_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
