"""Chirality: can features tell an image from its mirror image? If they can, flips are not for these data.

Text, watches and hands have a side, and a flip makes images of them that never occur. If a data set holds
every image as often as its mirror image, nothing can tell the two apart, whatever the backbone; so a probe
that can has found a side. It cannot see that two classes are each other's mirror image, left and right
hands in equal number: together they are symmetric. Their names can, which is why names are read as well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from finetune.config.measures import Proportion
from finetune.features.probing import fit_probe
from finetune.metrics.shares import wilson

FOLDS = 5
LEAST_IMAGES = 100
"""With fewer, chance alone may look like a side, or hide one."""
PENALTY = 1.0
"""Of the probe; 0.01 to 10 gave the same verdicts on the five sets that the thresholds were chosen on."""
OBJECTS_ABOVE = 0.6
"""A flip is unsafe where more images than this are surely told from their mirror images."""
SAFE_BELOW = 0.65
"""A flip is safe where surely no more than this are. 300 images of no side reach about 0.56, rarely 0.62."""

_COUNTERPARTS = {"left": "right", "links": "rechts", "l": "r"}
_COUNTERPARTS |= {right: left for left, right in _COUNTERPARTS.items()}
_SIDE = re.compile(r"left|right|links|rechts|(?<![^\W\d_])[lr](?![^\W\d_])")  # l and r only where no letter is beside
_LEFTS = ("left", "links", "l")


@dataclass(frozen=True, kw_only=True)
class Chirality:
    """How well originals are told from mirror images, and what follows for flips."""

    share: Proportion | None
    """Of images told from their own mirror image, 0.5 by chance; None where there are too few to ask."""
    num_images: int
    is_safe: bool | None
    """Whether a horizontal flip suits the data; None where that cannot be told."""


def measure_chirality(originals: torch.Tensor, mirrored: torch.Tensor, *, seed: int) -> Chirality:
    """How often a probe, shown an image and its mirror image, says which is the original.

    The question of Lin et al., Visual Chirality, CVPR 2020, https://arxiv.org/abs/2006.09512, put to a
    cross-validated logistic probe; they train a network, and on images one by one. We ask for one decision
    per pair, since whatever an image and its mirror image have in common then cancels, which finds more with
    few images (0.87 instead of 0.74 on 300 hand signs); and N pairs are N trials, while 2 N decisions on
    single images come in twos that depend on each other. The probe sees differences f(x) - f(mirror(x)) and
    their negatives, so an image and its mirror image are in the same fold, and which comes first tells nothing.

    Folds share training images, so by chance alone the share varies up to 1.4 times as much as its interval
    says; the thresholds leave room for it. Copies of an image in several folds count as evidence of a side.

    Args:
        originals: (N, D), features of the images; 300 to 1,000 images are enough.
        mirrored: (N, D), features of the same images flipped, cropped first and then flipped.
        seed: decides the folds.

    Raises:
        ValueError: if the shapes differ or are not (N, D), or a feature is not finite.
    """
    if originals.ndim != 2 or originals.shape != mirrored.shape:
        raise ValueError(
            f"originals and mirrored must both be (N, D), got {tuple(originals.shape)} and {tuple(mirrored.shape)}."
        )
    num_images = len(originals)
    if num_images < LEAST_IMAGES:
        return Chirality(share=None, num_images=num_images, is_safe=None)
    votes = _votes(originals.double() - mirrored.double(), seed)
    ties = int((votes == 0).sum())  # images that are their own mirror image: half of the guesses are right
    share = wilson(int((votes > 0).sum()) + ties // 2, num_images)
    is_safe = False if share.low > OBJECTS_ABOVE else True if share.high < SAFE_BELOW else None
    return Chirality(share=share, num_images=num_images, is_safe=is_safe)


def sided_classes(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of class names that a change of side turns into each other, the left one first.

    Sides are left and right, links and rechts, anywhere in a name, and l and r that touch no other letter.
    Case does not matter. A name with a side but no counterpart is in no pair.
    """
    by_key = {name.casefold(): name for name in names}
    pairs = []
    for key, name in by_key.items():
        first = _SIDE.search(key)
        twin = by_key.get(_SIDE.sub(lambda side: _COUNTERPARTS[side[0]], key))
        if first is not None and twin is not None and first[0] in _LEFTS:
            pairs.append((name, twin))
    return tuple(pairs)


def _votes(differences: torch.Tensor, seed: int) -> torch.Tensor:
    """(N,), positive where the probe of the other folds takes the original for the original."""
    count = len(differences)
    folds = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % FOLDS
    votes = differences.new_empty(count)
    for fold in range(FOLDS):
        known, asked = differences[folds != fold], differences[folds == fold]
        labels = torch.arange(2).repeat_interleave(len(known))  # 0: original minus mirrored, 1: the reverse
        probe = fit_probe(torch.cat([known, -known]), labels, num_classes=2, l2=PENALTY)
        votes[folds == fold] = asked @ (probe.weight[0] - probe.weight[1])  # no bias: neither order is the likelier
    return votes
