"""The next experiment after a run: one change, where it is most likely to help. A prior, not a proof.

A run that knows its training images much better than val wants one more regulariser, and only one: all of them at once
would tell nothing. A run that does not even know its training images wants to learn more, not less.
"""

import math
from typing import Any

from finetune.config.plan import Plan
from finetune.config.scores import Experiment

OVERFIT_GAP = 0.1
"""Accuracy on training images above that on val from which regularisation is worth trying."""
LEARNED = 0.95
"""Accuracy on training images below which there is more to learn from them."""
MIXING_UP_TO = 20_000
"""Training images up to which mixed and cut images are worth trying; larger sets rarely need them."""
STRONGER = {"none": "light", "light": "medium", "medium": "heavy"}


def next_experiment(
    plan: Plan, *, train_top1: float, val_top1: float, num_train: int, num_val: int, num_stages: int
) -> Experiment | None:
    """What to change next, in one key; None where neither more nor less regularisation is called for.

    Args:
        plan: of the run.
        train_top1: accuracy on training images in the last epoch, as training sees them.
        val_top1: accuracy on val at the end of the same epoch.
        num_train: training images.
        num_val: val images; a gap that their number cannot show is none.
        num_stages: of the backbone.
    """
    if not plan.stages:
        return None
    gap = train_top1 - val_top1
    noise = 2 * math.sqrt(max(1e-9, val_top1 * (1 - val_top1)) / max(1, num_val))
    if gap > max(OVERFIT_GAP, noise):
        seen = f"{100 * train_top1:.0f} % of training and {100 * val_top1:.0f} % of val images are right"
        free = _rungs(plan, num_train)
        return Experiment(key=free[0][0], value=free[0][1], why=f"{seen}: {free[0][2]}") if free else None
    if train_top1 < LEARNED and gap < noise:
        seen = f"only {100 * train_top1:.0f} % of training images are right, and val does not suffer"
        return _learn_more(plan, num_stages, seen)
    return None


def _rungs(plan: Plan, num_train: int) -> list[tuple[str, str, str]]:
    """Every rung that is still free, the first to be tried first."""
    train, augment, rules = plan.train, plan.augment, plan.regularization
    rungs: list[tuple[str, Any, str, bool]] = [
        (
            "augment.preset",
            STRONGER.get(augment.preset),
            "more variation is the surest regulariser",
            augment.preset in STRONGER,
        ),
        (
            "train.strategy",
            "partial",
            "fewer stages that move can learn less by heart",
            train.strategy == "full" and plan.pretrained and not plan.fresh_stages,
        ),
        (
            "train.optimizer.weight_decay",
            f"{3 * train.optimizer.weight_decay:g}",
            "a stronger pull to zero",
            0 < train.optimizer.weight_decay < 0.1,
        ),
        (
            "head.dropout",
            "0.5",
            "its wide hidden layer can learn by heart",
            plan.head.kind == "mlp" and not plan.head.dropout,
        ),
        (
            "regularization.stochastic_depth",
            "0.1",
            "shorter networks in training, averaged by the whole one",
            not rules.stochastic_depth and train.strategy != "probe",
        ),
        (
            "augment.mixup",
            "0.2",
            "blends of images help small sets",
            not augment.mixup and not augment.cutmix and num_train <= MIXING_UP_TO,
        ),
        (
            "train.averaging.snapshots",
            "5",
            "several models of one run, averaged",
            not train.averaging.snapshots and train.averaging.kind != "swa" and train.strategy != "lora",
        ),
    ]
    return [(key, str(value), why) for key, value, why, is_free in rungs if is_free]


def _learn_more(plan: Plan, num_stages: int, seen: str) -> Experiment:
    depth = plan.stages[0].trainable_stages
    if plan.train.strategy == "partial" and not plan.stages[0].layers and 2 * depth <= num_stages:
        return Experiment(key="train.depth", value=str(2 * depth), why=f"{seen}: let more of the network move")
    return Experiment(key="train.epochs", value=str(2 * plan.epochs), why=f"{seen}: train longer")
