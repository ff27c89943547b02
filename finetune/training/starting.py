"""What a training starts from: the classifier with its first head, and the batches it will see."""

from collections.abc import Mapping

import torch

from finetune.data.augmentation import Augmentation
from finetune.data.loading import Batches
from finetune.features.survey import Look
from finetune.models.backbones import Backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import PROBE_SOFTENING, make_head
from finetune.recipe.plan import Plan


def make_classifier(plan: Plan, backbone: Backbone, probe: Mapping[str, torch.Tensor]) -> Classifier:
    """`backbone` with the head that the plan begins from; `probe` holds `weight` and `bias`, or nothing."""
    torch.manual_seed(plan.seed)
    init = str(plan.head.init)
    start = probe if init == "probe" else {}
    head = make_head(
        backbone.num_features,
        len(plan.classes),
        init=init,
        dropout=plan.head.dropout,
        weight=start["weight"] * PROBE_SOFTENING if start else None,
        bias=start["bias"] * PROBE_SOFTENING if start else None,
        arch_rule=backbone.new_classifier,
    )
    return Classifier(backbone, head).to(memory_format=torch.channels_last)


def make_batches(plan: Plan, seen: Look, *, most_images: int | None = None) -> tuple[Batches, Batches]:
    """Training batches, shuffled and varied, of all images or the first few; val batches, as they are."""
    view, data = plan.view, plan.data
    vary = None
    if plan.augment.preset != "none":
        vary = Augmentation(
            str(plan.augment.preset),
            size_pixels=view.size_pixels,
            interpolation=view.interpolation,
            invariances=data.allowed_changes,
        )
    workers = plan.hardware.workers or 0
    rows, labels = seen.indices("train"), seen.labels("train").tolist()
    if most_images is not None and most_images < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(plan.seed))[:most_images].tolist()
        rows, labels = [rows[at] for at in chosen], [labels[at] for at in chosen]
    size = plan.train.batch_size
    train = Batches(
        seen.store,
        rows,
        labels,
        batch_size=min(size, len(rows)),
        augmentation=vary,
        shuffle=True,
        seed=plan.seed,
        workers=workers,
        drop_last=len(rows) > size,
        mirror_labels=data.mirror_classes(plan.classes),
    )
    val = Batches(
        seen.store,
        seen.indices("val"),
        seen.labels("val").tolist(),
        batch_size=64,
        augmentation=None,
        shuffle=False,
        seed=plan.seed,
        workers=workers,
    )
    return train, val
