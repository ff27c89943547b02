"""Facts: what was measured before anything was decided. A frozen value, kept as `facts.json`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from finetune.config.card import View
from finetune.config.measures import LearningCurveFacts, Measure, Proportion
from finetune.config.own import OwnThing


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BadFile(_Value):
    """An image that could not be read, and why."""

    name: str
    reason: str


class RangeFacts(_Value):
    """Values of images of more than 8 bits per channel, and which of them become 0 and 255."""

    low: float
    high: float
    lowest: float | None = None
    """Of all values in the training images that were measured; None where the recipe gives the range."""
    highest: float | None = None
    num_images: int = 0
    """Training images that were measured."""
    why: str
    """Such as `12 bits`."""


class PerClass(_Value):
    """Training images per class."""

    min: int
    median: float
    max: int


class BackboneFacts(_Value):
    """The backbone that looked at the images."""

    name: str
    arch: str = ""
    """What builds the network again: a timm name, or `torchvision/NAME`; and its options."""
    arch_kwargs: dict[str, Any] = {}
    params_m: float
    """Millions of parameters, without the source head."""
    num_features: int
    stages: tuple[str, ...]
    """Names from the stem to the top."""
    pretrained_on: str
    input_size: int
    licence: str
    has_batch_norm: bool
    weights_digest: str


class ProbeFacts(_Value):
    """A logistic regression on frozen features."""

    val: Proportion
    train: Proportion
    log_loss: float
    """On val, in nats."""
    l2: float
    l2_at_edge: bool
    chosen_by: str = "val"
    """What chose the penalty: `val`, or `cross-validation` on the training images where val is small."""
    left_out: Proportion | None = None
    """Of training images, each judged by a probe that never saw it; measured where val is small."""
    balanced_accuracy: Measure | None = None
    """On val: the mean recall of the classes."""
    macro_f1: Measure | None = None
    """On val: the mean F1 of the classes."""


class DepthFacts(_Value):
    """What the pooled features of one stage tell of the classes."""

    stage: str
    width: int
    """Features."""
    probe: Proportion
    """Logistic regression, on val or by cross-validation."""
    ridge: Proportion
    """Ridge regression, one image left out at a time."""
    neighbours: Proportion
    """Nearest neighbours, one image left out at a time."""


class ProfileFacts(_Value):
    """Accuracy by depth, from the stem to the top, on a sample of the training images."""

    depths: tuple[DepthFacts, ...]
    num_images: int
    judged: str
    """How the logistic probes were judged: `val`, or `cross-validation` where val is small."""
    best: int
    """Depth of the most accurate probe; of equals the highest."""
    lead: float
    """Accuracy of the best depth minus that of the top, on the same images."""
    lead_error: float
    """Standard error of `lead`."""

    @property
    def earlier(self) -> int | None:
        """The best depth where it leads the top by more than one standard error; None where the top serves as well."""
        return self.best if self.best < len(self.depths) - 1 and self.lead > self.lead_error else None


class ShiftFacts(_Value):
    """How far the images move one stage's batch-norm inputs from the statistics of pretraining."""

    stage: str
    mean: Measure
    """Mean over channels of (mean - running mean)^2 / running variance."""
    spread: Measure
    """Mean over channels of |log (variance / running variance)|."""


class ResponseFacts(_Value):
    """What the source classifier says of the images."""

    num_classes: int
    effective: Measure
    """exp of the entropy of the mean prediction: source classes that the images are spread over."""
    confidence: Measure
    """Mean of the largest probability."""
    energy: Measure
    """Mean of -log sum exp of the logits: lower is more familiar (Liu et al., NeurIPS 2020)."""
    named: tuple[tuple[str, float], ...] = ()
    """The source classes predicted most, and the share of images each got."""


class SimilarityFacts(_Value):
    """How similar the images are to what the backbone knows, measured in several ways, and one number for the grid."""

    value: float
    """1: as the images of pretraining, 0: unlike them. The rule is `advice.similarity_of_shift`, or `..._of_probes`."""
    low: float
    high: float
    control: Proportion | None = None
    """The same probe on features of the same network with random weights, on a sample."""
    shift: tuple[ShiftFacts, ...] = ()
    """By stage; empty where there is no batch norm."""
    response: ResponseFacts | None = None
    """None where the weights have no source classifier."""
    frechet: float | None = None
    """Distance from the source's features in units of their spread, small-sample bias removed; None without source
    statistics."""
    emd: float | None = None
    """Similarity by earth mover's distance between class means, in (0, 1]; None without source statistics."""


class ChiralityFacts(_Value):
    """Whether a mirrored image can be told from an original."""

    share: Proportion | None
    """Of pairs in which the original was named; 0.5 is guessing. None: too few images to ask."""
    lost: Measure | None = None
    """Accuracy on val images minus that on their mirror images, for the probe."""
    is_safe: bool | None
    """True: mirroring goes unnoticed; False: it shows; None: too few images to say."""
    sided: tuple[tuple[str, str], ...] = ()
    """Classes that are named as each other's mirror image."""


class TimingFacts(_Value):
    """One optimizer step of a training depth, timed on this machine."""

    trains: str
    """A number of top stages, or `norm_only`: norms and biases everywhere; the head always."""
    images_per_second: float
    memory_mb: float
    """What a step of a whole batch keeps for its backward pass, with gradients and optimizer state."""
    image_mb: float = 0.0
    """The part of it that each image adds; 0 in facts of older versions."""
    batch_size: int = 0
    """Images of that batch; 0 in facts of older versions."""


class PilotFacts(_Value):
    """A short training of one strategy, judged on val."""

    strategy: str
    round: int
    """Of successive halving, from 1."""
    epochs: int
    images: int
    """Training images that were used."""
    seconds: float
    val: Proportion


class NeighbourFacts(_Value):
    """Classification by the nearest training images, in frozen features."""

    val: Proportion
    k: int
    left_out: Proportion | None = None
    """Of training images, each judged by the others; measured where val is small."""


class MachineFacts(_Value):
    """What the run may use."""

    device: str
    cores: int
    has_bf16: bool
    has_fp16: bool
    can_fork: bool = True
    """Whether loader processes are forked, and so share decoded images."""
    tracking_uri: str | None = None
    """MLFLOW_TRACKING_URI, without a login."""
    tracking_experiment: str | None = None
    """MLFLOW_EXPERIMENT_NAME."""


class Findings(_Value):
    """What frozen features say of the images."""

    probe: ProbeFacts | None = None
    """None where the backbone has random weights; so are all others."""
    knn: NeighbourFacts | None = None
    learning_curve: LearningCurveFacts | None = None
    profile: ProfileFacts | None = None
    """None where the recipe leaves the depth of fine-tuning no choice; so are chirality and timing."""
    similarity: SimilarityFacts | None = None
    chirality: ChiralityFacts | None = None
    timing: tuple[TimingFacts, ...] = ()
    """From few trained stages to all, then norms alone."""
    forward_images_per_second: float = 0.0


class RankRow(_Value):
    """One backbone that looked at the images: how well its features fit, what it costs, what it takes them for."""

    name: str
    is_tied: bool
    """Its probe cannot be told from the most accurate one on these images; true of that one itself."""
    tie_score: float | None = None
    """Mean z-score that orders tied backbones; None where there is nothing to decide."""
    behind: Measure
    """Accuracy of the most accurate probe minus that of this one, on the same images."""
    probe: Proportion
    """Logistic regression on frozen features, cross-validated."""
    neighbours: Proportion
    """Nearest neighbours, one image left out at a time."""
    logme: float
    h_score: float
    leep: float | None = None
    """None where the weights have no source classifier; so are `nce` and `response`."""
    nce: float | None = None
    milliseconds: float
    """Per image of a small batch on this machine, decoding apart."""
    megabytes: float
    """Of weights in memory, without the source classifier; so are the parameters."""
    params_m: float
    num_features: int
    image_size: int
    """Pixels at which it looked."""
    source_size: int
    """Pixels of pretraining."""
    pretrained_on: str
    licence: str
    top1: float | None = None
    """Per cent, on its own source task."""
    response: ResponseFacts | None = None
    taken_for: tuple[tuple[str, str, float], ...] = ()
    """Each class, the source class that its images are most often taken for, and the share of them that are."""
    frechet: float | None = None
    """As in `SimilarityFacts`; so is `emd`."""
    emd: float | None = None


class Unranked(_Value):
    """A backbone that could not look at the images, and why."""

    name: str
    reason: str


class Ranking(_Value):
    """Backbones in the order of choice, on training images alone."""

    root: str
    classes: tuple[str, ...]
    num_images: int
    image_size: int | None
    """Pixels that the recipe sets for all; None where each looked at its own size."""
    device: str
    rows: tuple[RankRow, ...]
    """Best first."""
    unranked: tuple[Unranked, ...] = ()
    chosen: str
    why: str
    agreement: tuple[tuple[str, str, float], ...] = ()
    """Spearman's correlation of two measures over the candidates; none for fewer than three."""
    features: dict[str, int] = {}
    """Cache hits and misses."""
    warnings: tuple[str, ...] = ()


class TeacherFacts(_Value):
    """The finished run that is to teach this one."""

    run: str
    """Its folder."""
    networks: int
    """That every one of its answers costs."""
    weights_digest: str
    """Of all its networks, of what they are given, and of how they are averaged."""
    split_digest: str
    classes: tuple[str, ...]
    view: View
    crop_pct: float
    imbalances: tuple[str, ...]
    """What was done about uneven classes where its networks were trained, each kind once."""


class Facts(Findings):
    """What we measured: the images, the split, the backbone's view of them, the machine."""

    root: str
    """The folder or table of images; of a dataset that a program handed in, the name of its class."""
    kind: str
    """folders, table, parquet or dataset."""
    classes: tuple[str, ...]
    given_roles: tuple[str, ...] = ()
    """Roles that the data themselves name; the others are cut."""
    counts: dict[str, tuple[int, ...]]
    """Images of each class, by role."""
    labelled: tuple[int, ...] = ()
    """Images of each class that a refit trains on: of train, val and calibration, none that is also in test."""
    num_images: int
    bad_images: tuple[BadFile, ...] = ()
    leaks: int = 0
    """Images whose very bytes also stand in another given role."""
    split_digest: str
    warnings: tuple[str, ...] = ()
    image_kinds: dict[str, int] = {}
    rotated: int = 0
    """Images that EXIF says to turn."""
    value_range: RangeFacts | None = None
    """None where no training image has more than 8 bits per channel, and the recipe gives no range."""
    several_frames: int = 0
    """Files that hold several frames or pages."""
    frame_images: int = 0
    """Images that all of their frames make; 0 where one of each file is used."""
    median_width: float
    median_height: float
    images_per_class: PerClass
    backbone: BackboneFacts
    view: View
    crop_pct: float
    """Side of the centre crop over the shorter side."""
    normalize: str
    """Where mean and std come from: weights, channel_mean, channel_mean_std, or recipe."""
    normalized_images: int = 0
    """Training images that the constants were measured on; 0 where none were."""
    size_note: str = ""
    """What was done to the size of images, or to the backbone for it, that the recipe does not say."""
    overridden: tuple[str, ...] = ()
    """Parts of the weights' own view that the recipe replaced."""
    chance: float
    """Accuracy of guessing evenly."""
    majority: float
    """Accuracy on val of always naming the commonest class of val."""
    gradients: dict[str, float] = {}
    """Gradient over weight by stage of the backbone, where the recipe asks for surgical fine-tuning."""
    pilot: tuple[PilotFacts, ...] = ()
    """Empty unless `plan --pilot` ran one."""
    ranking: Ranking | None = None
    """Where the recipe left the backbone open and there were several."""
    teacher: TeacherFacts | None = None
    """Where the recipe names one."""
    own: tuple[OwnThing, ...] = ()
    """What a Python program handed in."""
    machine: MachineFacts
    features: dict[str, int] = {}
    """Cache hits, misses, and bytes."""
    seconds: dict[str, float] = {}

    @property
    def frames_text(self) -> str:
        """What becomes of files of several frames, in words."""
        told = f"{self.several_frames:,} files hold several frames or pages"
        if self.frame_images:
            return f"{told}: {self.frame_images:,} images; the frames of one file stay together"
        return f"{told}; the {self.view.frame} of each is used"
