"""What weights have seen: a run that begins from another run's weights may be judged on images these were trained on.

A trained run keeps digests of the bytes of its training and val images, eight bytes each, and those of the run that it
began from; so the chain is told however long it is, and wherever the folder is copied to.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.recipe.cards import Card
from finetune.recipe.runs import write_whole

_USES = ("train", "val")
"""Roles whose images move the weights, and choose among them."""


def record_seen(path: Path, own: Mapping[str, Sequence[str]], card: Card) -> None:
    """Write the digests of all images that moved or chose the weights of a run: its own and its ancestors'.

    Args:
        path: an .npz file with the arrays `train` and `val`: (N,) uint64, sorted.
        own: digests of the run's own by role; none where the probe is the model, whose backbone has not seen them.
        card: of the backbone that the run began from.
    """
    before = _seen_by(card)
    seen = {role: np.union1d(_numbers(own.get(role, ())), before[role]) for role in _USES}
    write_whole(path, lambda temporary: _save(temporary, seen))


def overlap_warnings(card: Card, roles: Sequence[str], digests: Sequence[str]) -> list[str]:
    """A sentence where images that are to judge a run were used to train or choose the weights that it begins from.

    Args:
        card: of the backbone.
        roles: of every image.
        digests: of every image's bytes.
    """
    seen, found = _seen_by(card), []
    for role, uses in (("test", _USES), ("val", _USES[:1])):  # what chose before may choose again
        own = _numbers(digest for digest, given in zip(digests, roles, strict=True) if given == role)
        if count := int(np.isin(own, np.concatenate([seen[use] for use in uses])).sum()):
            found.append(f"{count:,} of {len(own):,} {role} images")
    if not found:
        return []
    return [
        f"{' and '.join(found)} were seen, byte for byte, in the training of {card.name}, which this run begins from: "
        "scores on them flatter it. Set the same seed and split as there, or keep other images for judging."
    ]


def _seen_by(card: Card) -> dict[str, np.ndarray]:
    if card.images is None or not card.images.exists():
        return {role: _numbers([]) for role in _USES}
    with np.load(card.images, allow_pickle=False) as stored:
        return {role: stored[role] for role in _USES}


def _numbers(digests: Iterable[str]) -> np.ndarray:
    return np.array([int(digest[:16], 16) for digest in digests], dtype=np.uint64)


def _save(path: Path, seen: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as handle:  # a name without .npz would be given one
        np.savez(handle, train=seen["train"], val=seen["val"])
