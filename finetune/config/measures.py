"""Numbers that were measured, each with its interval: what Facts are made of."""

from pydantic import BaseModel, ConfigDict


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Measure(_Value):
    """A number measured on `n` images, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Proportion(Measure):
    """A share of `n` trials with its Wilson interval."""


class CurvePoint(_Value):
    """Probes that learned from some of the training images."""

    images: int
    """That each of them learned from."""
    probes: int
    accuracy: Measure
    """The mean over them."""


class LearningCurveFacts(_Value):
    """The probe's accuracy over the number of training images, and what twice as many would give."""

    points: tuple[CurvePoint, ...]
    """From few images to all."""
    judged: str
    """On `val`, or by `cross-validation` where val is small."""
    is_balanced: bool
    """Accuracies are means over classes, for these are uneven."""
    num_images: int
    """Training images at hand."""
    exponent: Measure | None = None
    """c of the law error = b images^-c; None where there are too few images for a law, and so are `now` and `twice`."""
    now: Measure | None = None
    """Accuracy with the training images at hand, by the law: all points speak for it, not the last alone."""
    twice: Measure | None = None
    """Accuracy foretold for twice the training images, with a 95 % interval."""
    is_told: bool = False
    """Whether the interval is narrow enough to say anything."""
