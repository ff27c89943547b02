"""A comparison of finished runs: which is better, as far as their test images can tell."""

from finetune.config.measures import Measure, Proportion
from finetune.config.scores import Judged, Told


class Seeds(Judged):
    """One score over runs that differ in nothing but the seed."""

    mean: float
    spread: Told[float] = None
    """Standard deviation of single runs, with n - 1; None of a single one."""
    low: Told[float] = None
    """Of the 95 % interval of the mean, by Student's t; None of a single run."""
    high: Told[float] = None
    n: int


class ComparedRun(Judged):
    """One run on all of its test images."""

    run: str
    """Its name in the comparison."""
    backbone: str
    strategy: str
    seed: int
    views: str
    n: int
    top1: Proportion
    log_loss: Measure
    chosen_by_val: tuple[str, ...]
    """What looked at val on the way to the model, one entry `key: how`."""


class RunPair(Judged):
    """First minus second on the test images that both have."""

    first: str
    second: str
    n: int
    """Images that both have."""
    only_in_first: int
    """Test images of the first alone: left out."""
    only_in_second: int
    only_first_right: int
    """Images that the first alone answers rightly."""
    only_second_right: int
    difference: Measure
    """Of the accuracies."""
    log_loss_difference: Measure
    p: float
    """McNemar's, exact."""
    images_needed: int
    """About how many would show a difference of one point."""
    p_adjusted: float
    """Holm's, over all pairs."""
    is_told_apart: bool
    sentence: str
    """What may be said, by `p_adjusted`."""


class Apart(Judged):
    """Two runs that share no test image, so they are no pair."""

    first: str
    second: str


class SeedGroup(Judged):
    """Runs whose plans differ in the seed alone."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    top1: Seeds
    log_loss: Seeds
    same_images: bool
    """Whether all were tested on the same images."""


class GroupPair(Judged):
    """Two such groups by the seeds that both have."""

    first: int
    """Its place among the groups, from 1."""
    second: int
    seeds: tuple[int, ...]
    difference: Seeds
    """Of the accuracies; its interval holds both other seeds and other images."""
    sentence: str


class Comparison(Judged):
    """How finished runs differ on the test images that they share."""

    classes: tuple[str, ...]
    runs: tuple[ComparedRun, ...]
    """The highest test accuracy first."""
    pairs: tuple[RunPair, ...]
    """Each two runs that share test images, first minus second in the order of `runs`."""
    apart: tuple[Apart, ...]
    seed_groups: tuple[SeedGroup, ...]
    group_pairs: tuple[GroupPair, ...]
    notes: tuple[str, ...]
    """What a reader must know."""
