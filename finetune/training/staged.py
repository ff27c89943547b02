"""All stages of a plan in turn: those on the training images, which val watches, and their refit on all labelled ones.

Each of the two begins from the same start: the pretrained weights, and the probe of the images that it trains on.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from finetune.config.plan import Images, Plan
from finetune.data.dataset import Dataset
from finetune.data.loading import Batches
from finetune.models.backbones import Backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import one_probe
from finetune.planning.lr_schedules import whole_epochs
from finetune.runs.folder import RunFolder
from finetune.training.fit import fit
from finetune.training.own import OwnTraining
from finetune.training.setup import Vary, make_batches, make_classifier, training_batches
from finetune.training.watching import Curves

Say = Callable[[str], None]


class Kept(NamedTuple):
    """What a finished stage on the training images says of its refit."""

    epochs: int
    """Up to the one that was kept; 0 where that was the start."""
    slowdown: float
    """Share of the planned rates at the end, after a divergence."""


def train_stages(
    run: RunFolder,
    plan: Plan,
    dataset: Dataset,
    backbone: Backbone,
    *,
    own: OwnTraining,
    teach: Callable[[Images], nn.Module | None],
    say: Say,
    notify: Callable[[], None],
) -> Classifier:
    """The classifier that the last stage ends with; what is done already is skipped.

    Args:
        run: holds the plan and the probe.
        plan: of the run, with one stage or more.
        dataset: its images.
        backbone: pretrained; changed in place.
        own: what a program handed in.
        teach: gives the teacher for stages on these images, where the plan names one.
        say: prints a line for people.
        notify: called when what the curves hold is there to stay.

    Raises:
        RunError: if training diverges, and does so again at a lower rate.
    """
    if not plan.is_refit:
        return _train_on("train", run, plan, dataset, backbone, own, teach, say, notify)
    pristine = copy.deepcopy(backbone)
    _train_on("train", run, plan, dataset, backbone, own, teach, say, notify)
    return _train_on("labelled", run, plan, dataset, pristine, own, teach, say, notify)


def _train_on(
    on: Images,
    run: RunFolder,
    plan: Plan,
    dataset: Dataset,
    backbone: Backbone,
    own: OwnTraining,
    teach: Callable[[Images], nn.Module | None],
    say: Say,
    notify: Callable[[], None],
) -> Classifier:
    """Every stage on one kind of images, from the start."""
    origin = None
    if plan.regularization.l2_sp:
        origin = {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}
    train, val = _batches(on, plan, dataset, own.vary)
    counts = train.labels.bincount(minlength=len(plan.classes)).tolist()
    probe = one_probe(load_file(run.file("probe.safetensors")), is_held_out=on == "train")
    classifier = make_classifier(plan, backbone, probe, counts)
    start = None
    if plan.train.averaging.wise_ft != 1:
        start = {name: weight.detach().clone() for name, weight in classifier.named_parameters()}
    last = run.stage_weights(plan.last_stage(on))
    teacher = None if last.exists() else teach(on)
    for index, stage in enumerate(plan.stages):
        if stage.images != on:
            continue
        settled, slowdown = _settle(run, plan, index)
        fit(
            settled,
            index,
            classifier,
            train,
            val,
            run.stage_folder(index),
            Curves(run.file("curves.csv")),
            members=run.file("snapshots"),
            origin=origin,
            start=start,
            teacher=teacher,
            own=own,
            slowdown=slowdown,
            say=say,
            notify=notify,
        )
    return classifier


def _batches(on: Images, plan: Plan, dataset: Dataset, vary: Vary | None) -> tuple[Batches, Batches | None]:
    if on == "train":
        return make_batches(plan, dataset, vary=vary)
    return training_batches(plan, dataset, on, vary=vary), None


def _settle(run: RunFolder, plan: Plan, index: int) -> tuple[Plan, float]:
    """The plan with the epochs of a refit settled, and the share of its rates: as the stage it repeats went."""
    twin = plan.repeated(index)
    if twin == index or run.stage_weights(index).exists():
        return plan, 1.0
    kept = read_kept(run, twin)
    stages = list(plan.stages)
    epochs = whole_epochs(stages[index].schedule, kept.epochs) if kept.epochs else 0
    stages[index] = stages[index].model_copy(update={"epochs": epochs})
    return plan.model_copy(update={"stages": tuple(stages)}), kept.slowdown


def read_kept(run: RunFolder, index: int) -> Kept:
    """How a finished stage of `run` went."""
    found = torch.load(run.stage_folder(index) / "last.ckpt", weights_only=True, mmap=True)
    return Kept(epochs=found["keeper"]["best_epoch"] + 1, slowdown=found["slowdown"])
