"""Idle keys: what a recipe sets and nothing of the decided plan reads, each with what would read it.

One table, for a wish that has no effect is either refused or named here; `tests/test_every_key.py` holds that against
every key there is.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from finetune.config.facts import Facts
from finetune.config.plan import Plan, Reason
from finetune.config.recipe import Recipe
from finetune.planning.refit import is_cross_fitted
from finetune.runs.teacher import idle_distillation

_CYCLES = ("cyclic", "cosine_restarts")
_ADAM = ("adam", "adamw")
_STEPWISE = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", *_ADAM, "timm/*")
_CHANGES = ("light", "medium", "heavy")
READ_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "head.hidden": ("head.kind", ("mlp",)),
    "head.activation": ("head.kind", ("mlp",)),
    "head.bias": ("head.kind", ("mlp",)),
    "augment.crop": ("augment.preset", _CHANGES),
    "train.lora_rank": ("train.strategy", ("lora",)),
    "train.patience": ("train.checkpoint", ("settled", "best")),
    "train.clip_norm": ("train.optimizer.name", _STEPWISE),
    "train.optimizer.backbone_lr_ratio": ("train.optimizer.name", _STEPWISE),
    "train.optimizer.layer_decay": ("train.optimizer.name", _STEPWISE),
    "train.optimizer.decay": ("train.optimizer.name", _STEPWISE),
    "train.optimizer.momentum": ("train.optimizer.name", ("momentum", "nesterov", "timm/*")),
    "train.optimizer.rho": ("train.optimizer.name", ("rmsprop",)),
    "train.optimizer.betas": ("train.optimizer.name", _ADAM),
    "train.optimizer.eps": ("train.optimizer.name", ("adagrad", "rmsprop", *_ADAM)),
    "train.schedule.gamma": ("train.schedule.name", ("step", "multistep")),
    "train.schedule.every": ("train.schedule.name", ("step",)),
    "train.schedule.milestones": ("train.schedule.name", ("multistep",)),
    "train.schedule.end": ("train.schedule.name", ("linear", "cosine", *_CYCLES)),
    "train.schedule.decades": ("train.schedule.name", ("exponential", "inverse")),
    "train.schedule.cycles": ("train.schedule.name", _CYCLES),
    "train.schedule.growth": ("train.schedule.name", ("cosine_restarts",)),
    "train.schedule.patience": ("train.schedule.name", ("plateau",)),
    "train.schedule.factor": ("train.schedule.name", ("plateau",)),
    "train.averaging.ema_decay": ("train.averaging.kind", ("ema",)),
    "train.averaging.swa_start": ("train.averaging.kind", ("swa",)),
    "train.averaging.swa_lr": ("train.averaging.kind", ("swa",)),
    "train.averaging.batch_norm": ("train.averaging.kind", ("ema", "swa")),
    "train.imbalance.gamma": ("train.imbalance.kind", ("focal",)),
    "train.imbalance.beta": ("train.imbalance.kind", ("effective",)),
    "tracking.uri": ("tracking.enabled", ("true",)),
    "tracking.experiment": ("tracking.enabled", ("true",)),
}
"""By key, the key whose value decides whether it is read, and the values with which it is."""
_PROBE = "the probe is the model, and it is solved exactly, without steps"
_ONE_VIEW = re.compile(r"(center|whole)(@\d+)?(/\d+)?")
_MIRRORED = re.compile(r"\b(flip|ten|whole_flip|multiscale|fully_convolutional)\b")


def idle_reasons(recipe: Recipe, plan: Plan, facts: Facts) -> list[Reason]:
    """A line for every key that `recipe` sets and nothing reads, in the order of the recipe's keys."""
    found = _idle_of_a_probe(recipe) if not plan.stages else _idle_in_training(recipe, plan, facts)
    found |= _idle_anywhere(recipe, plan, facts)
    return [
        Reason(key=key, value="(as the recipe says)", why=f"inactive: {found[key]}")
        for key in set_keys(recipe)
        if key in found
    ]


def set_keys(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted names of all that the recipe sets to a value, in order."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from set_keys(value, f"{prefix}{name}.")
        elif name in section.model_fields_set and value is not None:
            yield f"{prefix}{name}"


def _idle_of_a_probe(recipe: Recipe) -> dict[str, str]:
    sections = (
        "augment.",
        "head.",
        "regularization.",
        "train.",
        "hardware.workers",
        "hardware.image_cache_gb",
        "hardware.micro_batch",
    )
    used = ("head.kind", "train.strategy", "train.prefer")
    return {key: _PROBE for key in set_keys(recipe) if key.startswith(sections) and key not in used}


def _idle_in_training(recipe: Recipe, plan: Plan, facts: Facts) -> dict[str, str]:
    train, augment, last = plan.train, plan.augment, plan.stages[-1]
    others = {
        "augment.domain": (
            augment.preset == "none" and augment.policy == "none",
            "augment.preset other than none, or augment.policy",
        ),
        "train.schedule.warmup_fraction": (
            last.schedule.name == "one_cycle",
            "train.schedule.name other than one_cycle, which rises on its own",
        ),
        "train.optimizer.decay": (not train.optimizer.weight_decay, "train.optimizer.weight_decay above 0"),
        "train.averaging.batch_norm": (
            last.batch_norm == "frozen" or not facts.backbone.has_batch_norm,
            "batch norm whose statistics move, train.batch_norm train or statistics",
        ),
        "train.batch_norm": (not facts.backbone.has_batch_norm, "a backbone that has batch norm"),
        "train.freezes_first": (
            train.strategy == "partial" and last.trainable_stages < len(facts.backbone.stages),
            "a train.depth of all stages: the first layer is still as it is",
        ),
    }
    idle = {key: f"it is read only with {needs}" for key, (is_idle, needs) in others.items() if is_idle}
    return idle | {key: f"it is read only with {needs}" for key, needs in idle_distillation(recipe.train.distillation)}


def _idle_anywhere(recipe: Recipe, plan: Plan, facts: Facts) -> dict[str, str]:
    idle = {}
    for key, (decider, values) in READ_WITH.items():
        if plan.stages or not decider.startswith(("head.", "augment.", "train.")):
            now = str(_value(plan, decider)).lower()
            if not any(fnmatchcase(now, value) for value in values):
                idle[key] = f"it is read only with {decider} {' or '.join(values)}"
    if recipe.train.strategy is not None:
        idle["train.prefer"] = f"the recipe names train.strategy, {recipe.train.strategy}"
    given = set(facts.given_roles)
    idle |= {f"data.split.{role}": f"the data say themselves which images are for {role}" for role in given}
    if given >= {"val", "calibration", "test"}:
        idle["data.split.seed"] = "the data say themselves which images are for what"
    if not facts.image_kinds.get("16-bit"):
        idle["data.value_range"] = "every image has 8 bits, which are taken as they are"
    if not facts.several_frames:
        idle["data.frame"] = "no file holds several frames or pages"
    if _ONE_VIEW.fullmatch(plan.evaluate.views):
        idle["evaluate.average"] = "it is read only with evaluate.views that are several"
    is_cross = not plan.stages and plan.probe_on == "labelled" and is_cross_fitted(facts)
    if not sum(facts.counts["calibration"]) and not is_cross:
        idle["evaluate.coverage"] = "there are no calibration images to choose sets by"
    if plan.data.allowed_changes and plan.augment.preset == "none" and not _MIRRORED.search(plan.evaluate.views):
        needs = "it is read only with augment.preset other than none, or mirrored evaluate.views"
        idle |= {"data.invariances": needs, "data.flip_label_pairs": needs}
    return idle


def _value(plan: Plan, key: str) -> Any:
    value: Any = plan
    if key == "train.schedule.name":
        return plan.stages[-1].schedule.name
    for part in key.split("."):
        value = getattr(value, part)
    return value
