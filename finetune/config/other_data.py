"""Scores on other images than a run's own, or of a backbone with the classifier it came with."""

from finetune.config.facts import BadFile
from finetune.config.measures import Proportion
from finetune.config.scores import Judged, SplitScores, Told


class FittedTemperature(Judged):
    """The temperature that was applied, and the images it comes from."""

    role: str
    value: float
    n: int


class FittedOn(Judged):
    """What weights, choices and temperature come from: scores are only worth something on other images than these."""

    weights: str
    chosen_by_val: tuple[str, ...]
    temperature: Told[FittedTemperature] = None


class RunFittedOn(FittedOn):
    """The same of a run."""

    root: Told[str] = None
    split_digest: str
    constants: str
    """Where mean and std come from."""


class Seen(Judged):
    """How many of the images are, byte for byte, among those that the run was made from."""

    n: Told[int] = None
    """None where those are not at hand."""
    note: Told[str] = None


class Elsewhere(Judged):
    """One model on the images of another folder. Nothing was fitted there."""

    data: str
    role: str
    """`test` where the images name such a part, else `all`."""
    n: int
    classes: dict[str, str]
    """By class of the images, the model's name of it."""
    missing_classes: tuple[str, ...]
    """Of the model, without images here."""
    bad_images: tuple[BadFile, ...]
    warnings: tuple[str, ...]
    views: str
    views_note: Told[str] = None
    """Why they are not those that were asked for."""
    scores: SplitScores


class RunElsewhere(Elsewhere):
    """A finished run on other images."""

    run: str
    own_test: Told[Proportion] = None
    """Its accuracy on its own test images."""
    fitted_on: RunFittedOn
    seen: Seen


class BackboneElsewhere(Elsewhere):
    """A backbone with the classifier that its weights came with. Of its classes those with images are told."""

    backbone: str
    num_source_classes: int
    fitted_on: FittedOn
