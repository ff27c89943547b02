"""Recipe: what the user wishes. Null means "you choose"; the planner leaves nothing null.

The field names here are the recipe's keys, their docstrings are the reference, and a JSON schema for
editors is made from them (`finetune recipes check --schema`).
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from finetune.config.addresses import without_login
from finetune.config.model_keys import AugmentSpec, HeadSpec, RegularizationSpec
from finetune.config.section import ROLES, Names, Positive, Prefer, Section, Share, Text, as_text
from finetune.errors import nearest

_VIEW = (
    r"((center|flip|five|ten)(@\d+)?(/\d+)?|(whole|whole_flip)(@\d+)?|resolutions|"
    r"multiscale(_five)?|fully_convolutional(_unmirrored)?)"
)
VIEWS_PATTERN = rf"^{_VIEW}(,{_VIEW})*$"
"""Names of views with commas; `@` gives the shorter side of the image, and `/` the size of the crop."""
VIEWS_HELP = (
    "Views are center, flip, five, ten (each also as ten@320 or center/288), whole, whole_flip (also as whole@320), "
    "resolutions, multiscale, multiscale_five, fully_convolutional and fully_convolutional_unmirrored; "
    "several with commas."
)
Strategy = Literal["probe", "partial", "full", "gradual", "surgical", "norm_only", "bitfit", "lora"]
Invariance = Literal["hflip", "vflip", "rot90"]


class SplitSpec(Section):
    """How images are divided where the data does not say it. The rest is for training."""

    val: Share = 0.15
    """Share of each class used for choosing: early stopping, the probe's penalty, the strategy; see `refit`."""
    calibration: Share = 0.1
    """Share of each class used for the temperature alone, until a `refit`."""
    test: Share = 0.15
    """Share of each class read once, at the end."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Of the division; null takes the recipe's own. Set it where runs of several seeds shall share their images."""
    refit: bool | None = None
    """Once val has chosen, train again from the start on train, val and calibration together; test is never touched.
    Null: the probe always, a fine-tuned model where val is small."""

    @model_validator(mode="after")
    def _leave_something(self) -> "SplitSpec":
        if (total := self.val + self.calibration + self.test) >= 1:
            raise ValueError(f"val + calibration + test = {total:.2f} leaves nothing to train on")
        return self


class ColumnsSpec(Section):
    """Which column of a table or of parquet shards is what, where its name does not say so."""

    image: Text | None = None
    """Holds paths of images (or, in shards, the images)."""
    label: Text | None = None
    """Holds one class for each image."""
    split: Text | None = None
    """Holds words for train, val, calibration and test, or those that `data.splits` names; `none`: no column does."""

    @property
    def named(self) -> dict[str, str]:
        """The columns that are named, by what they are."""
        return {what: name for what in ("image", "label", "split") if (name := getattr(self, what)) is not None}


class DataSpec(Section):
    """Where the images are, and how they become tensors."""

    root: Text | None = None
    """A folder of class folders (or of train/val/test), a table (CSV, TSV, JSON lines), or a folder of
    parquet shards."""
    splits: dict[str, Names] | None = None
    """What is which split: folders below the root, words of a table's split column, or tables, by role, such as
    `{train: Training, test: [Test1, Test2]}`. Null: told by their names; `{}`: nothing is a split."""
    columns: ColumnsSpec = ColumnsSpec()
    """Of a table or of parquet shards."""
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
    value_range: tuple[float, float] | None = None
    """Values that become 0 and 255 in images of more than 8 bits per channel; null measures them on the training
    images. What lies outside is clipped, and said."""
    frame: Literal["first", "middle", "each"] = "first"
    """Which one is used of files that hold several frames or pages; `each` makes every one an image with the label of
    its file, and keeps those of a file in one split."""
    invariances: tuple[Invariance, ...] | None = None
    """Changes that leave every label true; flips in training and testing are used only if named here."""
    flip_label_pairs: tuple[tuple[Text, Text], ...] = ()
    """Pairs of classes that a horizontal flip turns into each other; the flip is then used, and swaps their labels."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """A broken file is named and left out, or stops the run."""

    @field_validator("splits", mode="before")
    @classmethod
    def _know_roles(cls, splits: object) -> object:
        for role in splits if isinstance(splits, dict) else ():
            if role not in ROLES:
                told = nearest(str(role), ROLES)
                if ":" in str(role):
                    told = "YAML wants a blank after the colon: 'data.splits={train: NAME, test: NAME}'."
                raise ValueError(f"{role!r} is no role; they are {', '.join(ROLES)}. {told}".strip(" ."))
        return splits

    @field_validator("value_range")
    @classmethod
    def _rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (value[0] < value[1] and all(math.isfinite(end) for end in value)):
            raise ValueError(f"value_range is {list(value)}; give the lowest and the highest value, such as [0, 4095]")
        return value

    @property
    def allowed_changes(self) -> tuple[Invariance, ...]:
        """What may be done to an image: the invariances, and the horizontal flip where labels follow it."""
        declared = self.invariances or ()
        return (*declared, "hflip") if self.flip_label_pairs and "hflip" not in declared else declared

    def mirror_classes(self, classes: Sequence[str]) -> tuple[int, ...]:
        """By class, the class of its mirror image; its own where it is in no pair."""
        twins = {**dict(self.flip_label_pairs), **{right: left for left, right in self.flip_label_pairs}}
        return tuple(classes.index(twins.get(name, name)) for name in classes)


class OptimizerSpec(Section):
    """How a step is made from a gradient."""

    name: Text | None = None
    """`sgd`, `momentum`, `nesterov`, `adagrad`, `rmsprop`, `adam`, `adamw`, `lbfgs` (only where nothing is random),
    or one of timm's as `timm/NAME`."""
    lr: Annotated[float, Field(gt=0, le=10)] | None = None
    """Learning rate of the head, at its peak."""
    backbone_lr_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of the backbone's topmost stage over that of the head."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Rate of each stage of the backbone over that of the stage above it; 1 gives all the same."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """Decay of matrices and kernels; biases, norms and tokens have none."""
    decay: Literal["decoupled", "coupled"] = "decoupled"
    """Shrink weights by rate times decay, or add decay times weight to the gradient (the classic L2 penalty)."""
    momentum: Share = 0.9
    """For `momentum`, `nesterov` and timm's."""
    rho: Share = 0.99
    """How slowly `rmsprop` forgets squared gradients."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """For `adam` and `adamw`: how slowly gradients and their squares are forgotten."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to denominators."""


class ScheduleSpec(Section):
    """The learning rate over a stage, per step, as a share of its peak. Drops and cycles are placed by shares of it."""

    name: (
        Literal["constant", "step", "multistep", "exponential", "inverse", "linear", "cosine", "plateau", "one_cycle",
                "cyclic", "cosine_restarts"] | None
    ) = None  # fmt: skip
    """`constant`; `step` and `multistep` drop by `gamma`; `exponential` and `inverse` (1/t) fall by `decades`; `linear`
    and `cosine` fall to `end`; `plateau` drops where val loss stops falling; `one_cycle` rises and falls; `cyclic` is
    one cosine per cycle, for snapshots; `cosine_restarts` is cosine with warm restarts in ever longer cycles (SGDR).
    Null: chosen."""
    warmup_fraction: Share = 0.05
    """Share of all steps over which the rate rises linearly; `one_cycle` rises on its own."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of a drop, for `step` and `multistep`."""
    every: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the steps between two drops, for `step`."""
    milestones: tuple[Share, ...] = (0.5, 0.75)
    """Shares of the steps at which `multistep` drops."""
    end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where `linear`, `cosine` and cycles end."""
    decades: Annotated[float, Field(gt=0, le=6)] = 2.0
    """Powers of ten by which `exponential` and `inverse` have fallen after the last step: 2 is to a hundredth."""
    cycles: Annotated[int, Field(ge=1)] = 5
    """Restarts of `cyclic` and `cosine_restarts`; the steps are rounded up to whole cycles."""
    growth: Annotated[float, Field(ge=1, le=4)] = 2.0
    """Length of a cycle over that of the one before, for `cosine_restarts`."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Epochs without a better val loss after which `plateau` drops."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the rate is multiplied by at each drop of `plateau`."""


class AveragingSpec(Section):
    """More than one set of weights from one run."""

    kind: Literal["none", "ema", "swa"] | None = None
    """Which weights are judged and shipped. `none`: those of the kept epoch. `ema`: their exponential moving average.
    `swa`: their mean over the end of training (stochastic weight averaging). Null: chosen."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Null: exp(-1 / (0.1 steps)), a memory of a tenth of the training."""
    wise_ft: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the trained weights in what ships; the rest is that of the network whose head is the probe (WiSE-FT). 1
    ships them as they are; null: a mixture where training began from the probe."""
    swa_start: Share = 0.75
    """Share of the steps after which weights enter the mean; the rate stays at `swa_lr` from there."""
    swa_lr: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Learning rate while `swa` averages, as a share of the peak."""
    snapshots: Annotated[int, Field(ge=0, le=20)] = 0
    """Cycles after each of which the weights are kept, with their own statistics; the schedule is then cyclic."""
    keep_last: Annotated[int, Field(ge=0, le=20)] = 0
    """Epochs at the end whose weights are kept."""
    batch_norm: Literal["pooled", "exact"] = "pooled"
    """How batch-norm statistics of averaged weights are measured. `pooled`: in one pass over the training images.
    `exact`: layer by layer, each after the statistics below it are right."""


class ImbalanceSpec(Section):
    """What is done where some classes have far more images than others."""

    kind: Literal["none", "inverse", "effective", "sampler", "logit_adjustment", "focal"] | None = None
    """`none`: nothing. `inverse`: losses weighted by one over the images of the class. `effective`: by one over the
    effective number of images. `sampler`: every class is drawn equally often. `logit_adjustment`: the log of
    class frequencies added to logits in training. `focal`: focal loss. Null: chosen by how uneven the classes are."""
    gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Focusing parameter of `focal`; 0 is cross-entropy."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the effective number, (1 - beta^n) / (1 - beta)."""


class DistillationSpec(Section):
    """Knowledge distillation: a finished run, such as an ensemble, is the teacher of the network that is trained."""

    teacher: Text | None = None
    """A run folder: an ensemble, a soup or a plain run, on the same images, classes and view; null: labels alone."""
    temperature: Annotated[float, Field(gt=0, le=20)] = 2.0
    """Softens the logits of teacher and student where they are compared; higher weighs unlikely classes more."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the distillation loss in the whole loss; the rest is the loss on the labels."""


class TrainSpec(Section):
    """How deep, how long, how fast."""

    prefer: Prefer = "balanced"
    """What the advisor looks for where `strategy` is null: `accuracy` takes any expected gain, `balanced` asks half a
    point for a training, `speed` three points."""
    strategy: Strategy | None = None
    """Null asks the advisor. `gradual` opens one stage of the backbone after the other; `surgical` trains the one whose
    gradients are largest for its weights; `norm_only` trains normalisation layers alone, `bitfit` biases alone; `lora`
    adds low-rank matrices to a ViT."""
    depth: Annotated[int, Field(ge=1)] | None = None
    """Stages of the backbone that `partial` trains, counted from the top."""
    layers: tuple[Text, ...] = ()
    """Names of the backbone's stages or layers that `partial` trains, instead of a depth."""
    reinit: Annotated[int, Field(ge=0)] = 0
    """Top stages whose pretrained weights are thrown away and drawn anew."""
    freezes_first: bool = False
    """Hold the first layer still even where everything trains: it saves memory, and SGD needs it on some ViTs."""
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 8
    """Rank of the matrices that `lora` adds; their alpha is twice the rank."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """At most; early stopping may end sooner."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per optimizer step, whatever fits in memory at once."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """Rule, rates and decay."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Of the learning rate."""
    averaging: AveragingSpec = AveragingSpec()
    """Of weights, and what is kept beside them."""
    imbalance: ImbalanceSpec = ImbalanceSpec()
    """Of classes."""
    distillation: DistillationSpec = DistillationSpec()
    """Of other runs into this one."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Epochs without a lower val loss after which training stops, unless `checkpoint` is last."""
    checkpoint: Literal["settled", "best", "last"] | None = None
    """Which epoch's weights are kept. `settled`: the last, unless an earlier one was clearly better on val. `best`: the
    one with the lowest val loss at the best temperature. `last`: the last. Null: `settled`, and `last` where val is
    small."""
    monitor: Literal["loss", "balanced"] | None = None
    """What val judges epochs by. `loss`: val loss, the mean over images. `balanced`: the mean over classes of each
    class's val loss. Null: `balanced` where classes are uneven."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global norm of the gradient."""
    divergence_threshold: Annotated[float, Field(gt=1)] = 3.0
    """A loss above this many times the first (or log K, if that is more) counts as diverged."""
    batch_norm: Literal["frozen", "statistics", "train"] | None = None
    """Batch norm in stages that train. `frozen`: running statistics stay, scale and shift are trained. `statistics`:
    running statistics follow the new images, scale and shift stay. `train`: both change. Null: chosen. In frozen stages
    neither ever changes."""


class EvaluateSpec(Section):
    """How the model is judged."""

    views: Annotated[Text, Field(pattern=VIEWS_PATTERN)] = "center"
    """Crops whose probabilities are averaged: center, flip, five, ten, multiscale, fully_convolutional, resolutions, or
    a list such as `center@256,ten@320`. Mirrored ones need `data.flip_label_pairs`, or `hflip` among
    `data.invariances`."""
    average: Literal["probability", "logit"] = "probability"
    """How the answers to several views are combined. `probability`: the mean of probabilities. `logit`: of logits."""
    coverage: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of images whose prediction set is to hold the true class."""
    calibrate: bool = True
    """Fit one temperature on the calibration images."""
    mc_samples: Annotated[int, Field(ge=0, le=200)] = 0
    """Monte-Carlo dropout: after the ordinary evaluation, so many passes with the head's dropout left on, and what
    their mean gains; 0 is none. Needs `head.dropout` or `head.drop_connect`."""


class HardwareSpec(Section):
    """What to run on."""

    devices: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """One device: cuda is a GPU of Nvidia or AMD, mps that of a Mac; auto takes a GPU if there is one."""
    precision: Annotated[Literal["auto", "32", "bf16", "fp16"], BeforeValidator(as_text)] = "auto"
    """Auto takes bf16 (or fp16) on cuda where the GPU has it, 32 elsewhere."""
    workers: Annotated[int, Field(ge=0, le=64)] | None = None
    """Loader processes; on a CPU none is fastest, as decoded images are kept."""
    image_cache_gb: Annotated[float, Field(ge=0)] = 4.0
    """Memory for decoded, resized images, so that later epochs do not decode again."""
    micro_batch: Annotated[int, Field(ge=0)] | None = None
    """Images per forward and backward pass; gradients add up to that of the whole step. 0: all of a step at once. Null:
    few on a CPU where batch norm is held still, which takes less memory."""


class TrackingSpec(Section):
    """Where runs are compared."""

    enabled: bool = True
    """Log to MLflow."""
    uri: Annotated[str | None, PlainSerializer(lambda uri: uri and without_login(uri))] = None
    """Null: MLFLOW_TRACKING_URI, or the SQLite store beside the runs. A user and password in it are never written."""
    experiment: str | None = None
    """Null: MLFLOW_EXPERIMENT_NAME, or the recipe's name."""


class Recipe(Section):
    """What the user wishes, perhaps with things left open."""

    name: Annotated[Text, Field(min_length=1, max_length=80)] | None = None
    """Begins the run folder's name; null takes the data folder's."""
    backbone: str | None = None
    """A timm name, `torchvision/NAME`, a card in a zoo folder, or a finished run; null ranks the cards at hand on the
    training images and takes the best."""
    pretrained: bool = True
    """False trains the same architecture from random weights, as a control."""
    data: DataSpec = DataSpec()
    """Images."""
    augment: AugmentSpec = AugmentSpec()
    """Variation in training."""
    head: HeadSpec = HeadSpec()
    """The new layer."""
    regularization: RegularizationSpec = RegularizationSpec()
    """What holds training back."""
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
