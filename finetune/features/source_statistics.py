"""What a backbone's features of its source's own images look like, so that other images can be compared with them.

Mean and covariance serve the Frechet distance, class means the earth mover's. They are measured once by whoever has
the source's images, and then travel with the card.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from finetune.compute import Compute, Precision
from finetune.config.card import Card
from finetune.config.recipe import DataSpec, HardwareSpec
from finetune.data.dataset import ALL, Dataset
from finetune.data.items import Found, Items
from finetune.data.sources import Source, open_source
from finetune.data.splits import draw_sample
from finetune.data.walking import is_image, listed
from finetune.errors import BackboneError, DataError
from finetune.features.cache import FeatureCache
from finetune.features.extraction import extract
from finetune.metrics.distances import class_prototypes, fit_gaussian
from finetune.models.backbones import load_backbone
from finetune.models.frozen import FrozenBackbone
from finetune.runs.folder import write_whole

LEAST_IMAGES = 50
"""Statistics of fewer images are mostly chance."""
MOST_IMAGES = 50_000
"""A sample of this many, drawn by class and content, says all that is asked of it."""
PRECISION: Precision = "32"


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """Pooled features of a source's images, in short."""

    mean: torch.Tensor
    """(D,)"""
    covariance: torch.Tensor
    """(D, D), divisor n - 1."""
    class_means: torch.Tensor
    """(Z, D); no rows where the images came without classes."""
    class_weights: torch.Tensor
    """(Z,) share of the images of each class."""
    classes: tuple[str, ...]
    num_images: int
    num_bad: int
    """Files that could not be read and were left out."""

    def save(self, path: Path) -> None:
        """Write a whole safetensors file, in float32."""
        tensors = {
            "mean": self.mean.float(),
            "covariance": self.covariance.float(),
            "class_means": self.class_means.float(),
            "class_weights": self.class_weights.float(),
            "images": torch.tensor([self.num_images]),
        }
        note = {"classes": json.dumps(self.classes, ensure_ascii=False)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=note))


def measure_statistics(
    card: Card, root: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> SourceStatistics:
    """Mean, covariance and class means of the card's features of the images under `root`, in the card's own view.

    Args:
        card: whose backbone looks; its weights lie beside it.
        root: a folder of images without classes, or any layout a run takes; of given roles only train is used.
        progress: called with images done and in all.

    Raises:
        DataError: if there are too few readable images.
        BackboneError: if the backbone cannot be loaded, or its features are not finite.
    """
    dataset = Dataset(_list_images(root.expanduser()), DataSpec(root=str(root)), 0)
    classes, labels = dataset.classes, dataset.items.labels
    rows = draw_sample(dataset.indices(ALL), labels.tolist(), dataset.digests, most=MOST_IMAGES, seed=0)
    compute = Compute.decide(HardwareSpec(precision=PRECISION))
    backbone = load_backbone(card.name, zoo={card.name: card}).eval().to(compute.device)
    backbone.to(memory_format=torch.channels_last)
    view = dataset.see(card.view()).view
    cache = FeatureCache(backbone.digest, view.digest, PRECISION)
    found = extract(
        dataset.items,
        dataset.digests,
        rows,
        view,
        backbone=lambda: FrozenBackbone(backbone, size_pixels=view.size_pixels, device=compute.device),
        cache=cache,
        store=None,
        compute=compute,
        progress=progress,
    )
    rows = [index for index in rows if index not in found.bad]
    if len(rows) < LEAST_IMAGES:
        raise DataError(
            f"{root} holds {len(rows)} different images that can be read; statistics of a source need at least "
            f"{LEAST_IMAGES}, and better thousands. Give a folder of the images that {card.name} was trained on."
        )
    features = cache.features([dataset.digests[index] for index in rows])
    if not features.isfinite().all():
        raise BackboneError(f"{card.name} gives features that are not finite; its weights are damaged.")
    whole = fit_gaussian(features)
    means, weights = class_prototypes(features, torch.from_numpy(labels[rows]).long(), num_classes=max(1, len(classes)))
    present = np.unique(labels[rows]).tolist()
    return SourceStatistics(
        mean=whole.mean,
        covariance=whole.covariance,
        class_means=means if classes else means[:0],
        class_weights=weights if classes else weights[:0],
        classes=tuple(classes[label] for label in present) if classes else (),
        num_images=len(rows),
        num_bad=len(dataset.bad) + len(found.bad),
    )


def _list_images(root: Path) -> Source:
    """The images to look at; no classes where a folder holds images directly, and nothing else."""
    if root.is_dir():
        inside = listed(root)
        files = [path for path in inside if is_image(path)]
        if files and not any(path.is_dir() for path in inside):
            items = Items(Found(path.name, "", None, path) for path in files)
            items.number_classes({"": 0})
            return Source(root=root, kind="folders", classes=(), items=items, warnings=())
    return open_source(root).of_role(None, "train")
