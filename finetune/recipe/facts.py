"""Facts: what was measured before anything was decided. A frozen value, kept as `facts.json`."""

from pydantic import BaseModel, ConfigDict

from finetune.recipe.cards import View


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Proportion(_Value):
    """A share of `n` trials with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


class BadFile(_Value):
    """An image that could not be read, and why."""

    name: str
    reason: str


class PerClass(_Value):
    """Training images per class."""

    min: int
    median: float
    max: int


class BackboneFacts(_Value):
    """The backbone that looked at the images."""

    name: str
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


class NeighbourFacts(_Value):
    """Classification by the nearest training images, in frozen features."""

    val: Proportion
    k: int


class MachineFacts(_Value):
    """What the run may use."""

    device: str
    cores: int
    has_bf16: bool
    has_fp16: bool


class Facts(_Value):
    """What we measured: the images, the split, the backbone's view of them, the machine."""

    root: str
    kind: str
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    """Images of each class, by role."""
    num_images: int
    bad_images: tuple[BadFile, ...] = ()
    leaks: int = 0
    """Images whose very bytes also stand in another given role."""
    split_digest: str
    warnings: tuple[str, ...] = ()
    image_kinds: dict[str, int] = {}
    rotated: int = 0
    """Images that EXIF says to turn."""
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
    overridden: tuple[str, ...] = ()
    """Parts of the weights' own view that the recipe replaced."""
    chance: float
    """Accuracy of guessing evenly."""
    majority: float
    """Accuracy on val of always naming the commonest class of val."""
    probe: ProbeFacts | None = None
    """None where the backbone has random weights."""
    knn: NeighbourFacts | None = None
    similarity: float | None = None
    """0: features tell nothing about the classes; 1: they tell all."""
    machine: MachineFacts
    features: dict[str, int] = {}
    """Cache hits and misses."""
    seconds: dict[str, float] = {}
