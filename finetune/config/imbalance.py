"""What to do about classes of uneven size: whether anything, and what.

The answer depends on what counts. Evening the classes out helps where each matters alike, and costs accuracy where the
images to come are as uneven as those at hand; the reason that is given says so.
"""

from collections.abc import Sequence

UNEVEN_RATIO = 3.0
"""The largest class over the smallest from which classes count as uneven. Twofold, shifted logits gained 0.8 points of
balanced accuracy, within two standard deviations over seeds; threefold 2.0, tenfold 4.5, fiftyfold 7.2, all beyond
three (`python benchmarks/imbalance.py`: linear heads on two sets, three seeds)."""
KIND = "inverse"
"""Inverse weights start from the decisions of the probe and leave them gradually. `logit_adjustment` gains as much
balanced accuracy, but has a higher log loss, and starts from the probe with its priors taken away: where a class has
two images that may name it everywhere (`docs/training.md`; `python benchmarks/imbalance.py --tuned`)."""


def ratio_of(counts: Sequence[int]) -> float:
    """Images of the largest class over those of the smallest that has any; 1 where there is nothing to compare."""
    present = [count for count in counts if count > 0]
    return max(present) / min(present) if present else 1.0


def uneven(counts: Sequence[int]) -> bool:
    """Whether classes differ so much that measures should weight them alike, from the training images of each."""
    return ratio_of(counts) >= UNEVEN_RATIO


def hides_classes(counts: Sequence[int]) -> bool:
    """Whether a share over all images says little of the small classes; one without an image counts as one of one."""
    return uneven([max(1, count) for count in counts])


def decide_imbalance(counts: Sequence[int]) -> tuple[str, str]:
    """A kind of `ImbalanceSpec` and why, from the training images of each class."""
    ratio = ratio_of(counts)
    if not uneven(counts):
        return "none", f"the largest class has {ratio:.1f} times the images of the smallest, below {UNEVEN_RATIO:g}"
    return KIND, (
        f"the largest class has {ratio:.1f} times the images of the smallest ({UNEVEN_RATIO:g} or more): an image "
        "counts more the rarer its class, which raises balanced accuracy at some cost in overall accuracy and log "
        "loss; choose none if only these count and images to come are as uneven"
    )
