"""Prediction: probabilities of images under a run's final model, view by view or averaged.

An image is decoded once, however many views are taken of it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from finetune.config.card import View
from finetune.config.plan import Plan
from finetune.data.decoding import BadImage
from finetune.data.loading import ImageStore
from finetune.errors import DataError, RunError
from finetune.inference.tta import average_views
from finetune.inference.tta_views import AnyViewer, Viewer, open_viewer
from finetune.metrics.calibration import apply_temperature, log_probabilities
from finetune.models.classifier import Classifier
from finetune.models.regularization import random_pieces, sample_predictions


def predict_probabilities(
    classifier: Classifier,
    store: ImageStore,
    indices: Sequence[int],
    plan: Plan,
    views: str,
    how: str = "probability",
    view: View | None = None,
) -> torch.Tensor:
    """Probabilities (N, K), averaged over views, in float32 on the CPU; before any temperature.

    Args:
        classifier: moved to the device of the plan.
        store: where the images come from.
        indices: items of the store.
        plan: of the run.
        views: as in `list_crops`.
        how: as in `average_views`.
        view: of the classifier, where it is not the plan's.

    Raises:
        DataError: if a file holds no readable image.
        OSError: if a file cannot be read.
        RecipeError: if `views` is unknown, or the classifier cannot look at images of such sizes.
    """
    viewer = open_viewer(classifier, plan, views, view)
    answers = [torch.empty(0, viewer.num_classes)]
    for said in predict_in_batches(viewer, store, indices):  # averaged at once: 50 views would fill memory
        answers.append(average_views(said, how))
    return torch.cat(answers)


def predict_in_batches(viewer: AnyViewer, store: ImageStore, indices: Sequence[int]) -> Iterator[torch.Tensor]:
    """Probabilities (V, B, K) of every view of a few images after the other, as `Viewer.judge` gives them.

    Before any temperature. Views are named and ordered as `view_names(views, plan.view.size_pixels)`, also where
    members of an ensemble look at images of other sizes; mirrored ones speak of the image as it is.
    """
    for pictures in _pictures(viewer, store, indices):
        yield viewer.judge(pictures)


def draw_in_batches(
    classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan, draws: int, seed: int
) -> Iterator[torch.Tensor]:
    """Probabilities (S, B, K) of centre views of a few images after the other, under S draws of the head's dropout.

    Gal and Ghahramani, ICML 2016, https://arxiv.org/abs/1506.02142; see `sample_predictions`; their mean is the answer.
    A finished run is loaded without the noise that its backbone had in training: so that looks at an image once, and
    the head alone is passed S times.

    Raises:
        RunError: if nothing in the head is random in training.
        ValueError: if `draws` is less than 1.
    """
    if not random_pieces(classifier.head):
        raise RunError(
            "the head of this run has no dropout, so draws of it would all be the same. Train with head.dropout "
            "or head.drop_connect above 0, or judge it without draws."
        )
    viewer = Viewer(classifier, plan, "center")
    for number, pictures in enumerate(_pictures(viewer, store, indices)):
        with torch.inference_mode(), viewer.compute.autocast():
            features = classifier.backbone(viewer.images(np.stack([crop for crops in pictures for crop in crops])))
            drawn = sample_predictions(classifier.head, features, draws, seed + number)
        yield drawn.cpu()


def _pictures(viewer: AnyViewer, store: ImageStore, indices: Sequence[int]) -> Iterator[list[list[np.ndarray]]]:
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(indices), viewer.images_at_once):
            yield list(pool.map(partial(_read, viewer, store), indices[start : start + viewer.images_at_once]))


def _read(viewer: AnyViewer, store: ImageStore, index: int) -> list[np.ndarray]:
    try:
        return viewer.read(store, index)
    except BadImage as fault:
        name = store.items[index].name
        raise DataError(f"{name} cannot be read ({fault}). Was it changed since the data were surveyed?") from fault


def temper(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities (N, K) at another temperature; averages are tempered as log p."""
    return apply_temperature(log_probabilities(probabilities), temperature).softmax(1).float()
