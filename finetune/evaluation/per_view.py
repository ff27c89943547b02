"""Scores by view: what each view says alone, taken from the one look whose average is judged.

All of it is as the networks said it, averaged over the members of an ensemble, before any temperature: that is fitted
to the average over views. What mirrored views say is of the image as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from finetune.config.measures import Proportion
from finetune.config.plan import Plan
from finetune.config.scores import ViewRow
from finetune.data.loading import ImageStore
from finetune.inference.predict import predict_in_batches
from finetune.inference.tta import average_views
from finetune.inference.tta_views import open_viewer
from finetune.metrics.classification import decide, log_losses, top_k_accuracy
from finetune.metrics.intervals import bootstrap_mean
from finetune.metrics.shares import wilson
from finetune.models.classifier import Classifier

MOST_BYTES = 256 * 2**20
"""Probabilities of all views of val, or of test, are kept up to this; the table is made in any case."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What V views said of N images."""

    names: tuple[str, ...]
    """Of the views, V."""
    average: torch.Tensor  # (N, K) float32
    is_right: torch.Tensor  # (N, V)
    losses: torch.Tensor  # (N, V), in nats
    probabilities: torch.Tensor | None  # (N, V, K) float16; None where they are more than `MOST_BYTES`

    @property
    def num_bytes(self) -> int:
        """Of the probabilities, kept or not."""
        return 2 * self.is_right.numel() * self.average.shape[1]


def look_by_view(
    classifier: Classifier,
    store: ImageStore,
    indices: Sequence[int],
    labels: torch.Tensor,
    plan: Plan,
    views: str,
) -> Looked:
    """What every view says, and the average that `predict_probabilities` gives, bit for bit.

    Args:
        classifier: moved to the device of the plan.
        store: where the images come from.
        indices: N items of the store.
        labels: (N,).
        plan: of the run.
        views: as in `list_crops`.

    Raises:
        As `predict_probabilities`.
    """
    viewer = open_viewer(classifier, plan, views)
    shape = (len(indices), len(viewer.crops), viewer.num_classes)
    average = torch.empty(shape[0], shape[2])
    is_right, losses = torch.empty(shape[:2], dtype=torch.bool), torch.empty(shape[:2], dtype=torch.float64)
    kept = torch.empty(shape, dtype=torch.float16) if 2 * np.prod(shape, dtype=np.int64) <= MOST_BYTES else None
    start = 0
    for said in predict_in_batches(viewer, store, indices):  # (V, B, K)
        rows = slice(start, start + said.shape[1])
        average[rows] = average_views(said, plan.evaluate.average)
        for view, own in enumerate(said):
            is_right[rows, view] = decide(own) == labels[rows]
            losses[rows, view] = log_losses(own, labels[rows])
        if kept is not None:
            kept[rows] = said.transpose(0, 1).half()
        start = rows.stop
    names = tuple(crop.name for crop in viewer.crops)
    return Looked(names=names, average=average, is_right=is_right, losses=losses, probabilities=kept)


def view_arrays(looked: Mapping[str, Looked]) -> dict[str, np.ndarray]:
    """By role, what `predictions.npz` holds of its views: their names (V,) and, if kept, probabilities (N, V, K)."""
    arrays = {}
    for role, one in looked.items():
        arrays[f"{role}_view_names"] = np.array(one.names, dtype=str)
        if one.probabilities is not None:
            arrays[f"{role}_view_probabilities"] = one.probabilities.numpy()
    return arrays


def view_rows(looked: Mapping[str, Looked], labels: torch.Tensor) -> tuple[ViewRow, ...] | None:
    """Each view on test, in their order, then their average; None where there is one view, or no test image.

    Args:
        looked: by role.
        labels: (N,) of test.
    """
    if (test := looked.get("test")) is None or not len(labels):
        return None
    rows = [
        _row(name, wilson(int(right.sum()), len(labels)), losses)
        for name, right, losses in zip(test.names, test.is_right.T, test.losses.T, strict=True)
    ]
    return (*rows, _row("average", top_k_accuracy(test.average, labels), log_losses(test.average, labels)))


def view_note(looked: Mapping[str, Looked]) -> str | None:
    """That probabilities by view were not kept, and how large they are; None where they were."""
    left = {role: one.num_bytes for role, one in looked.items() if one.probabilities is None}
    if not left:
        return None
    sizes = ", ".join(f"{role} {size / 2**20:,.0f} MB" for role, size in left.items())
    return f"probabilities by view are not in predictions.npz: {sizes}, and {MOST_BYTES // 2**20} are kept"


def _row(name: str, top1: Proportion, losses: torch.Tensor) -> ViewRow:
    return ViewRow(name=name, top1=top1, log_loss=bootstrap_mean(losses, seed=0))
