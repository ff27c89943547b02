"""What a training starts from: the classifier with its first head, and the batches it will see."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.config.plan import Images, Plan
from finetune.data.augmentation import Augmentation
from finetune.data.contact_sheet import write_contact_sheet
from finetune.data.dataset import Dataset
from finetune.data.loading import Batches
from finetune.data.normalization import fit_color_basis
from finetune.errors import RecipeError
from finetune.models.backbones import Backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import PROBE_SOFTENING, make_head
from finetune.models.initialization import reinitialize_stages
from finetune.models.lora import add_lora
from finetune.models.regularization import insert_channel_dropout, insert_fractional_pooling, set_stochastic_depth
from finetune.training.losses import Kind, log_priors

Vary = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A user's own view: an image (H, W, 3) uint8 and a generator to an image of the same shape."""


def make_classifier(
    plan: Plan, backbone: Backbone, probe: Mapping[str, torch.Tensor], num_images: Sequence[int]
) -> Classifier:
    """`backbone`, changed as the plan says, with the head that the plan begins from.

    Args:
        plan: what is re-initialised, dropped and adapted, and which head.
        backbone: pretrained; changed in place.
        probe: `weight` (K, D) and `bias` (K,) of the solved probe, or nothing.
        num_images: training images of each class.

    Raises:
        BackboneError: if this backbone cannot be changed so.
    """
    torch.manual_seed(plan.seed)
    rules, train = plan.regularization, plan.train
    if plan.fresh_stages:
        reinitialize_stages(backbone, plan.fresh_stages)
    top = plan.stages[-1].trainable_stages
    try:
        if rules.stochastic_depth:
            set_stochastic_depth(backbone, rules.stochastic_depth)
        if rules.channel_dropout:
            insert_channel_dropout(backbone, rules.channel_dropout, backbone.stages[len(backbone.stages) - top :])
        if rules.fractional_pooling:
            insert_fractional_pooling(backbone, plan.view.size_pixels)
    except ValueError as fault:
        raise RecipeError(f"regularization: {fault}") from fault
    if any(stage.trains == "lora" for stage in plan.stages):
        add_lora(backbone, rank=train.lora_rank)
    head = plan.head
    start = soften_probe(probe, train.imbalance.kind, num_images) if head.init == "probe" else {}
    made = make_head(
        backbone.num_features,
        len(plan.classes),
        kind=head.kind,
        hidden=head.hidden,
        activation=head.activation,
        init=head.init,
        hidden_bias=head.bias,
        dropout=head.dropout,
        drop_connect=head.drop_connect,
        weight=start.get("weight"),
        bias=start.get("bias"),
        arch_rule=backbone.new_classifier,
    )
    return Classifier(backbone, made).to(memory_format=torch.channels_last)


def soften_probe(probe: Mapping[str, torch.Tensor], kind: Kind, num_images: Sequence[int]) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of a first head that decides as the probe does, but is less sure.

    With `logit_adjustment` the loss adds the priors, and what is judged has none. So they are taken from the probe
    first, and what is judged decides as the probe with its priors taken away does (Menon et al., ICLR 2021, section 4,
    https://arxiv.org/abs/2007.07314). Softened is then only what images say; the loss adds the priors whole. Taken
    away whole from a probe that was softened before, they would leave their own reverse in what is judged.

    Args:
        probe: `weight` (K, D) and `bias` (K,), solved plainly.
        kind: one of `ImbalanceSpec.kind`.
        num_images: training images of each of the K classes.
    """
    bias = probe["bias"]
    if kind == "logit_adjustment":
        bias = bias - log_priors(num_images).to(bias)
    return {"weight": PROBE_SOFTENING * probe["weight"], "bias": PROBE_SOFTENING * bias}


def make_augmentation(plan: Plan, dataset: Dataset, vary: Vary | None = None) -> Augmentation | None:
    """The random views of training as the plan says; None where it says none."""
    spec, view = plan.augment, plan.view
    extras = (spec.cutout, spec.pca_color, spec.rotate_degrees, spec.policy != "none", vary is not None)
    if spec.preset == "none" and not any(extras):
        return None
    basis = None
    if spec.pca_color:
        basis = fit_color_basis(dataset.store, dataset.indices("train"), size_pixels=view.size_pixels, seed=plan.seed)
    return Augmentation(
        spec.preset,
        size_pixels=view.size_pixels,
        interpolation=view.interpolation,
        invariances=plan.data.allowed_changes,
        domain=spec.domain,
        crop=spec.crop,
        rotate_degrees=spec.rotate_degrees,
        pca_color=None if basis is None else basis.shifts(spec.pca_color),
        policy=spec.policy,
        cutout=spec.cutout,
        custom=vary,
    )


def draw_training_views(plan: Plan, dataset: Dataset, path: Path, vary: Vary | None = None, *, rows: int = 8) -> None:
    """Write a sheet of what the model will see in training: some training images of different classes.

    Raises:
        RecipeError: if the plan varies nothing.
    """
    augmentation = make_augmentation(plan, dataset, vary)
    if augmentation is None:
        raise RecipeError("training sees the images as they are (augment.preset none), so there is nothing to show.")
    waiting: dict[int, list[int]] = {}
    for index in dataset.indices("train"):
        waiting.setdefault(dataset.items[index].label, []).append(index)
    chosen = [own[turn] for turn in range(rows) for own in waiting.values() if turn < len(own)][:rows]
    names = [f"{plan.classes[dataset.items[index].label]}\n{dataset.items[index].name}" for index in chosen]
    images = [dataset.store.get(index) for index in chosen]
    write_contact_sheet(path, images, names, augmentation, view=plan.view, seed=plan.seed)


def make_batches(
    plan: Plan, dataset: Dataset, *, most_images: int | None = None, vary: Vary | None = None
) -> tuple[Batches, Batches]:
    """Training batches, shuffled and varied, of all images or the first few; val batches, as they are."""
    val = Batches(
        dataset.store,
        dataset.indices("val"),
        dataset.labels("val").tolist(),
        batch_size=64,
        augmentation=None,
        shuffle=False,
        seed=plan.seed,
        workers=plan.hardware.workers,
    )
    return training_batches(plan, dataset, "train", most_images=most_images, vary=vary), val


def training_batches(
    plan: Plan, dataset: Dataset, on: Images, *, most_images: int | None = None, vary: Vary | None = None
) -> Batches:
    """Batches, shuffled and varied, of the training images or of all labelled ones; of all or of the first few."""
    rows = dataset.indices("train") if on == "train" else dataset.labelled()
    labels = dataset.items.labels[rows].tolist()
    if most_images is not None and most_images < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(plan.seed))[:most_images].tolist()
        rows, labels = [rows[at] for at in chosen], [labels[at] for at in chosen]
    size = plan.train.batch_size
    return Batches(
        dataset.store,
        rows,
        labels,
        batch_size=min(size, len(rows)),
        augmentation=make_augmentation(plan, dataset, vary),
        shuffle=plan.train.optimizer.name != "lbfgs",
        seed=plan.seed,
        workers=plan.hardware.workers,
        even=True,
        mirror_labels=plan.data.mirror_classes(plan.classes),
        balanced=plan.train.imbalance.kind == "sampler",
    )
