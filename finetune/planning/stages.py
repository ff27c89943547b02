"""How a training is staged: what moves in each stage, how fast, and for how long. Pure, as all planning is."""

import math
from collections.abc import Callable
from typing import Any

from finetune.compute import Device
from finetune.config.decided import SchedulePlan
from finetune.config.facts import Facts
from finetune.config.imbalance import uneven
from finetune.config.own import has_own_loss
from finetune.config.plan import Stage
from finetune.config.recipe import Recipe, TrainSpec
from finetune.planning.advisor import partial_depth
from finetune.planning.batch_norm import refuse_lone_image, small_batch_warning
from finetune.planning.lr_schedules import whole_epochs
from finetune.planning.wise_ft import mixture_share
from finetune.runs.teacher import decide_distillation, inherit_imbalance

Decide = Callable[[str, Any, Any, str], Any]
"""Key, wish, choice and reason to the value; the reason is written down."""
BUDGETS = {"cpu": 8_000, "cuda": 200_000, "mps": 40_000}
"""Images that a default run trains on in all, epochs times images; the one for the GPU of a Mac is not measured."""
EPOCHS_RANGE = (3, 20)
"""Fewest and most epochs that the planner chooses."""
LEARNING_RATES = {
    "adamw": 1e-3,
    "adam": 1e-3,
    "sgd": 0.1,
    "momentum": 1e-2,
    "nesterov": 1e-2,
    "adagrad": 1e-2,
    "rmsprop": 1e-4,
    "lbfgs": 1.0,
}
"""Peak rate of the head by optimizer, at 64 images per step; timm's begin at that of `adamw`."""
WHOLE_STEP = 64
"""Images per step for which `LEARNING_RATES` are given."""
LARGEST_RATE = 1.0
"""However large the batch."""
RATIOS = {"partial": 0.5, "full": 0.3, "gradual": 0.3, "surgical": 0.3, "norm_only": 1.0, "bitfit": 1.0, "lora": 1.0}
"""Rate of the backbone's top over that of the head: see `benchmarks/LOG.md`. Training bears more where the first layers
are still, and the head's own where it is the top third alone, or the few numbers of norms, biases and adapters."""
LAYER_DECAY = 1.0
WEIGHT_DECAY = 0.01
LEAST_VAL = 100
"""With fewer val images the noise between epochs is larger than what training changes."""
STEADY = ("constant", "plateau")
"""Schedules that need not have fallen when they end."""
AVERAGE = "none"
EMA_SHARE = 0.1
"""Memory of the moving average, as a share of all steps."""


def epochs_for(recipe: Recipe, facts: Facts, device: Device) -> int:
    """Passes over the training images: as the recipe says, else what the budget of the device allows."""
    least, most = EPOCHS_RANGE
    return recipe.train.epochs or min(most, max(least, round(BUDGETS[device] / sum(facts.counts["train"]))))


def decide_train(recipe: Recipe, facts: Facts, strategy: str, device: Device, decide: Decide) -> dict[str, Any]:
    """The section `train` with nothing open."""
    wish, num_train = recipe.train, sum(facts.counts["train"])
    batch = min(wish.batch_size, num_train)
    decided: dict[str, Any] = {**wish.model_dump(), "strategy": strategy, "batch_size": batch}
    quiet: Decide = (lambda key, wish, choice, why: choice if wish is None else wish) if strategy == "probe" else decide
    if batch < wish.batch_size:
        quiet("train.batch_size", None, batch, "there are no more training images than these")
    decided["depth"] = _decide_depth(wish, facts, strategy, quiet)
    is_third = 3 * decided["depth"] <= len(facts.backbone.stages) + 2  # rounded up
    is_top = strategy == "partial" and (is_third or bool(wish.layers))
    decided["optimizer"] = _decide_optimizer(recipe, 1.0 if is_top else RATIOS.get(strategy, 1.0), batch, quiet)
    decided["schedule"], epochs = _decide_schedule(recipe, facts, device, quiet)
    decided["epochs"] = 1 if strategy == "probe" else epochs
    decided["averaging"] = _decide_averaging(wish, epochs * math.ceil(num_train / batch), quiet)
    mixture = mixture_share(recipe, facts, strategy)
    decided["averaging"]["wise_ft"] = quiet("train.averaging.wise_ft", wish.averaging.wise_ft, *mixture)
    decided["distillation"] = decide_distillation(wish.distillation, facts.teacher, decide).model_dump()
    balance = inherit_imbalance(facts.teacher, facts.counts["train"])
    if has_own_loss(facts.own):
        balance = ("none", "the loss that was handed in says what each image counts")
    decided["imbalance"] = {
        **wish.imbalance.model_dump(),
        "kind": quiet("train.imbalance.kind", wish.imbalance.kind, *balance),
    }
    decided |= _decide_keeping(wish, facts, decided["schedule"], epochs, quiet)
    decided["batch_norm"] = _decide_batch_norm(recipe, facts, batch, quiet)
    if strategy != "probe" and facts.backbone.has_batch_norm:
        refuse_lone_image(decided["batch_norm"], batch, num_train)
    return decided


def _decide_depth(wish: TrainSpec, facts: Facts, strategy: str, decide: Decide) -> int:
    stages = len(facts.backbone.stages)
    if strategy != "partial" or wish.layers:
        return stages
    depth = max(partial_depth(stages, facts.profile), wish.reinit)
    above = " and all above the best depth" if depth > partial_depth(stages) else ""
    why = f"all but the lowest quarter of {stages} stages{above}; the first layers stay as they were pretrained"
    return int(decide("train.depth", wish.depth, depth, why))


def _decide_optimizer(recipe: Recipe, ratio: float, batch: int, decide: Decide) -> dict[str, Any]:
    wish = recipe.train.optimizer
    rule = decide("train.optimizer.name", wish.name, "adamw", "robust to the rate on small data")
    rate = decide("train.optimizer.lr", wish.lr, *_rate(rule, min(recipe.train.batch_size, max(batch, WHOLE_STEP))))
    gentle = "pretrained weights move gently, or what they know is lost"
    few = "what moves is near the head, or little, and bears its rate"
    ratio = ratio if recipe.pretrained else 1.0
    why = "random weights have nothing to keep" if not recipe.pretrained else gentle if ratio < 1 else few
    return {
        **wish.model_dump(),
        "name": rule,
        "lr": rate,
        "backbone_lr_ratio": decide("train.optimizer.backbone_lr_ratio", wish.backbone_lr_ratio, ratio, why),
        "layer_decay": wish.layer_decay or LAYER_DECAY,
        "weight_decay": (0.0 if rule == "lbfgs" else WEIGHT_DECAY) if wish.weight_decay is None else wish.weight_decay,
    }


def _rate(rule: str, batch_size: int) -> tuple[float, str]:
    """The peak rate of the head at `batch_size` images per step; and why.

    Rules that divide by the size of gradients move weights by the rate whatever the batch, and only the noise falls
    with its root (Malladi et al., NeurIPS 2022, https://arxiv.org/abs/2205.10287); the others follow the batch (Goyal
    et al. 2017, https://arxiv.org/abs/1706.02677). Where there are fewer images than a batch holds, the step is whole,
    and its rate as well.
    """
    power = {"lbfgs": 0.0, "sgd": 1.0, "momentum": 1.0, "nesterov": 1.0}.get(rule, 0.5)
    rate = LEARNING_RATES.get(rule, LEARNING_RATES["adamw"]) * (batch_size / WHOLE_STEP) ** power
    return min(LARGEST_RATE, rate), f"for {rule} at {batch_size} images per step"


def _decide_schedule(recipe: Recipe, facts: Facts, device: Device, decide: Decide) -> tuple[dict[str, Any], int]:
    wish, snapshots = recipe.train.schedule, recipe.train.averaging.snapshots
    why = "the rate falls to zero, so the last epochs settle"
    name = decide(
        "train.schedule.name",
        wish.name,
        "cyclic" if snapshots else "cosine",
        f"each of {snapshots} snapshots is taken where the rate has fallen" if snapshots else why,
    )
    spec = wish.model_copy(update={"name": name, "cycles": snapshots or wish.cycles})
    num_train = sum(facts.counts["train"])
    budget = (
        f"about {BUDGETS[device]:,} images in all for {num_train:,} training images, within {EPOCHS_RANGE[0]} to "
        f"{EPOCHS_RANGE[1]}"
    )
    wanted = epochs_for(recipe, facts, device)
    epochs = whole_epochs(spec, wanted)
    if epochs != wanted:
        decide("train.epochs", None, epochs, f"{wanted}, rounded up so that every cycle is made of whole epochs")
    else:
        decide("train.epochs", recipe.train.epochs, epochs, budget)
    return spec.model_dump(), epochs


def _decide_averaging(wish: TrainSpec, steps: int, decide: Decide) -> dict[str, Any]:
    spec = wish.averaging
    kind = decide(
        "train.averaging.kind", spec.kind, AVERAGE, "the last weights of a falling rate are an average already"
    )
    decay = spec.ema_decay or math.exp(-1 / max(1.0, EMA_SHARE * steps))
    if kind == "ema":
        decide("train.averaging.ema_decay", spec.ema_decay, decay, f"a memory of a tenth of {steps} steps")
    return {**spec.model_dump(), "kind": kind, "ema_decay": decay}


def _decide_keeping(
    wish: TrainSpec, facts: Facts, schedule: dict[str, Any], epochs: int, decide: Decide
) -> dict[str, Any]:
    cycles = schedule["cycles"] if schedule["name"] in ("cyclic", "cosine_restarts") else 0
    falls = schedule["name"] not in STEADY
    num_val = sum(facts.counts["val"])
    is_enough = num_val >= LEAST_VAL
    patience, why = max(3, epochs // 2), "half of the epochs without a lower val loss: the rate must have time to fall"
    if wish.averaging.kind == "swa":
        patience, why = epochs, "the mean is taken at the end, so training goes there"
    if cycles:
        patience, why = cycles, "ends of cycles without a lower val loss: all cycles are wanted"
    few = f"{num_val} val images (< {LEAST_VAL}) are too few to tell epochs apart"
    fallen = "where the rate has fallen, weights are at rest; an earlier epoch must be clearly better on val"
    is_uneven = uneven(facts.counts["train"])
    enough = ("settled", fallen) if falls else ("best", "the rate stays up, so no epoch is at rest: val chooses")
    return {
        "patience": decide("train.patience", wish.patience, patience, why),
        "checkpoint": decide("train.checkpoint", wish.checkpoint, *(enough if is_enough else ("last", few))),
        "monitor": decide(
            "train.monitor",
            wish.monitor,
            "balanced" if is_uneven else "loss",
            "classes are uneven, and each counts alike"
            if is_uneven
            else "classes are even, so every image counts alike",
        ),
    }


def _decide_batch_norm(recipe: Recipe, facts: Facts, batch: int, decide: Decide) -> str:
    has_batch_norm = facts.backbone.has_batch_norm
    warning = small_batch_warning(batch, sum(facts.counts["train"]))
    choice, why = "frozen", "the statistics of pretraining fit, and do not depend on the batch"
    if not has_batch_norm:
        why = "the backbone has no batch norm"
    elif not recipe.pretrained or recipe.train.reinit > 0:
        choice, why = "train", "random weights need their own statistics"
    mode = decide("train.batch_norm", recipe.train.batch_norm, choice, why)
    if mode != "frozen" and has_batch_norm and warning:
        decide("train.batch_size", None, batch, warning)
    return str(mode)


def make_stages(strategy: str, train: dict[str, Any], facts: Facts) -> list[Stage]:
    """The stages of a decided training: none for the probe, one for most, one per opened depth for `gradual`."""
    if strategy == "probe":
        return []
    optimizer, total = train["optimizer"], len(facts.backbone.stages)
    only: dict[str, Any] = {"norm_only": "norm_only", "bitfit": "bitfit", "lora": "lora"}
    layers = tuple(train["layers"])
    if strategy == "surgical":
        layers = (max(facts.gradients, key=facts.gradients.__getitem__),)
    whole = Stage.model_validate(
        {
            "name": strategy,
            "trains": only.get(strategy, "all"),
            "trainable_stages": min(train["depth"], total),
            "layers": layers,
            "freezes_first": train["freezes_first"],
            "fresh_stages": train["reinit"],
            "epochs": train["epochs"],
            "lr_head": optimizer["lr"],
            "lr_backbone": optimizer["lr"] * optimizer["backbone_lr_ratio"],
            "layer_decay": optimizer["layer_decay"],
            "schedule": train["schedule"],
            "batch_norm": train["batch_norm"],
        }
    )
    if strategy != "gradual":
        return [whole]
    steady = SchedulePlan(name="constant", warmup_fraction=0.3)
    opened = sorted({math.ceil(total * part / train["epochs"]) for part in range(1, train["epochs"])} - {total})
    opened = opened if train["epochs"] < total else list(range(1, total))
    early = [whole.model_copy(update={"trainable_stages": depth, "epochs": 1, "schedule": steady}) for depth in opened]
    rest = whole_epochs(whole.schedule, train["epochs"] - len(early))  # cycles belong to the last stage alone
    return [*early, whole.model_copy(update={"epochs": rest})]
