"""What weights have seen: a run that begins from another run's weights may be judged on images these were trained on.

A trained run keeps digests of the bytes of its training and val images, eight bytes each, and those of the run that it
began from; so the chain is told however long it is, and wherever the folder is copied to.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.config.card import Card
from finetune.runs.folder import write_whole

_USES = ("train", "val")
"""Roles whose images move the weights, and choose among them."""


def record_seen(path: Path, own: Mapping[str, Sequence[str]], card: Card) -> None:
    """Write the digests of all images that moved or chose the weights of a run: its own and its ancestors'.

    Args:
        path: an .npz file with the arrays `train` and `val`, and `refit` where weights were trained once more on images
            other than `train`: (N,) uint64, sorted.
        own: digests of the run's own by role; none where the probe is the model, whose backbone has not seen them.
        card: of the backbone that the run began from.
    """
    before = _seen_by(card)
    seen = {role: np.union1d(_numbers(own.get(role, ())), before[role]) for role in _USES}
    if "refit" in own:
        seen["refit"] = np.unique(_numbers(own["refit"]))
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
        f"scores on them flatter it. {_advice(card)}"
    ]


def _advice(card: Card) -> str:
    if card.images is not None and _was_refit(card):
        return (
            "Set the same seed and split as there, and begin from its weights before the refit, a folder in its "
            "`stages/`; or keep other images for judging."
        )
    return "Set the same seed and split as there, or keep other images for judging."


def _was_refit(card: Card) -> bool:
    """Whether the weights are those of a refit, and not the ones before it."""
    if card.images is None or card.is_before_refit:
        return False
    with np.load(card.images, allow_pickle=False) as stored:
        return "refit" in stored


def _seen_by(card: Card) -> dict[str, np.ndarray]:
    if card.images is None or not card.images.exists():
        return {role: _numbers([]) for role in _USES}
    with np.load(card.images, allow_pickle=False) as stored:
        seen = {role: stored[role] for role in _USES}
        if "refit" in stored and not card.is_before_refit:
            seen["train"] = np.union1d(seen["train"], stored["refit"])
    return seen


def _numbers(digests: Iterable[str]) -> np.ndarray:
    return np.array([int(digest[:16], 16) for digest in digests], dtype=np.uint64)


def _save(path: Path, seen: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as handle:  # a name without .npz would be given one
        np.savez(handle, **seen)  # type: ignore[arg-type]
