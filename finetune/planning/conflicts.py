"""Wishes that contradict each other or the facts, as tables: when that is so, and what the user is told.

`CONFLICTS` are known from the recipe and the facts, `AFTER_ADVICE` once the advice has named a strategy where the
recipe names none. All rows that hold are told at once.
"""

from collections.abc import Callable, Sequence

from finetune.config.facts import Facts
from finetune.config.own import has_own_loss
from finetune.config.recipe import Recipe
from finetune.errors import RecipeError
from finetune.planning.case import Case
from finetune.planning.refit import has_more

_CYCLIC = ("cyclic", "cosine_restarts")
_TURNING = (*_CYCLIC, "one_cycle")


Row = tuple[Callable[[Case], object], Callable[[Case], str]]
"""A contradiction, and what to say of it."""


def refuse_conflicts(recipe: Recipe, facts: Facts) -> None:
    """Nothing, where all wishes can be fulfilled together.

    Raises:
        RecipeError: naming every conflict.
    """
    _refuse(CONFLICTS, Case(recipe=recipe, facts=facts, strategy=recipe.train.strategy))


def refuse_after_advice(recipe: Recipe, facts: Facts, strategy: str, why: str) -> None:
    """Nothing, where the strategy that was chosen has use for all wishes.

    Args:
        recipe: as it was wished.
        facts: as they were measured.
        strategy: of the recipe, or of the advice.
        why: the advice.

    Raises:
        RecipeError: naming every conflict.
    """
    _refuse(AFTER_ADVICE, Case(recipe=recipe, facts=facts, strategy=strategy, why=why))


def refuse_teacher(recipe: Recipe, facts: Facts) -> None:
    """Nothing, where the teacher that the recipe names, if any, can teach on these images.

    Raises:
        RecipeError: if not.
    """
    _refuse(OF_TEACHERS, Case(recipe=recipe, facts=facts, strategy=recipe.train.strategy))


def _refuse(rows: Sequence[Row], case: Case) -> None:
    if faults := [told(case) for is_so, told in rows if is_so(case)]:
        raise RecipeError("\n".join(faults))


def _needs(case: Case) -> str:
    return "; ".join(told(case) for is_so, told in LBFGS_NEEDS if is_so(case))


LBFGS_NEEDS: tuple[Row, ...] = (
    (lambda c: c.augment.preset != "none", lambda c: "augment.preset must be none"),
    (
        lambda c: c.augment.cutout or c.augment.pca_color or c.augment.rotate_degrees or c.augment.policy != "none",
        lambda c: "augment must change nothing else",
    ),
    (lambda c: c.recipe.hardware.precision not in ("auto", "32"), lambda c: "hardware.precision must be 32"),
    (lambda c: c.augment.mixup or c.augment.cutmix, lambda c: "augment.mixup and cutmix must be 0"),
    (lambda c: c.drops, lambda c: "head.dropout and drop_connect must be 0"),
    (
        lambda c: c.rules.stochastic_depth or c.rules.channel_dropout or c.rules.fractional_pooling,
        lambda c: "regularization must drop and move nothing",
    ),
    (
        lambda c: c.train.batch_size < c.num_train,
        lambda c: f"train.batch_size must be at least {c.num_train}, all training images",
    ),
    (lambda c: c.train.batch_norm not in (None, "frozen"), lambda c: "train.batch_norm must be frozen"),
    (lambda c: c.train.imbalance.kind == "sampler", lambda c: "train.imbalance.kind must draw every image"),
    (
        lambda c: c.train.optimizer.weight_decay,
        lambda c: "train.optimizer.weight_decay must be 0, for it is no part of the loss",
    ),
)
"""L-BFGS believes differences of gradients, so nothing may be random between two: when it is, and what to do."""

OF_STAGES: tuple[Row, ...] = (
    (
        lambda c: (c.train.depth or 0) > c.num_stages,
        lambda c: f"train.depth is {c.train.depth}, but {c.facts.backbone.name} has {c.num_stages} stages.",
    ),
    (
        lambda c: c.train.reinit > c.num_stages,
        lambda c: f"train.reinit is {c.train.reinit}, but {c.facts.backbone.name} has {c.num_stages} stages.",
    ),
    (
        lambda c: c.train.depth is not None and c.strategy not in (None, "partial"),
        lambda c: f"train.depth belongs to strategy partial, not to {c.strategy}; remove one of the two.",
    ),
    (
        lambda c: c.train.layers and c.strategy not in (None, "partial"),
        lambda c: f"train.layers belongs to strategy partial, not to {c.strategy}; remove one of the two.",
    ),
    (
        lambda c: c.train.layers and c.train.depth is not None,
        lambda c: "train.layers and train.depth both say what partial trains; remove one of the two.",
    ),
    (
        lambda c: not c.recipe.pretrained and c.strategy not in (None, "full"),
        lambda c: f"pretrained is false, so strategy {c.strategy} would freeze random weights; use full.",
    ),
    (
        lambda c: not c.recipe.pretrained and c.rules.l2_sp,
        lambda c: "pretrained is false, so there is nothing that regularization.l2_sp could pull back to.",
    ),
    (
        lambda c: c.strategy == "surgical" and not c.facts.gradients,
        lambda c: "train.strategy surgical compares gradients of the probe's loss, and there is no probe.",
    ),
    (
        lambda c: c.strategy == "lora" and c.rules.l2_sp,
        lambda c: "train.strategy lora leaves pretrained weights where they are, so regularization.l2_sp must be 0.",
    ),
    (
        lambda c: c.rules.fractional_pooling and not c.train.reinit,
        lambda c: "regularization.fractional_pooling is for tops drawn anew; set train.reinit to 1 or more.",
    ),
    (
        lambda c: c.is_drawn and c.facts.backbone.has_batch_norm and c.train.batch_norm in ("frozen", "statistics"),
        lambda c: (
            f"train.batch_norm is {c.train.batch_norm}, but fresh weights need statistics and scales of their own."
        ),
    ),
    (
        lambda c: c.train.reinit and not c.recipe.pretrained,
        lambda c: "pretrained is false, so train.reinit has nothing to draw anew.",
    ),
    (
        lambda c: c.train.reinit and c.strategy not in (None, "partial", "full", "gradual"),
        lambda c: f"train.reinit needs its stages trained whole, but the strategy is {c.strategy}.",
    ),
    (
        lambda c: c.train.depth is not None and c.train.depth < c.train.reinit,
        lambda c: f"train.reinit is {c.train.reinit}, but train.depth trains only {c.train.depth} stages.",
    ),
    (
        lambda c: c.train.reinit and c.train.layers,
        lambda c: "train.reinit draws top stages anew, but train.layers names what trains; use train.depth.",
    ),
    (
        lambda c: c.train.reinit and c.head.init == "probe",
        lambda c: "head.init is probe, but the features it was fitted to are drawn anew; use zero.",
    ),
)
"""Of what moves, and what it begins from."""

OF_TRAINING: tuple[Row, ...] = (
    (
        lambda c: c.averaging.snapshots and c.cycles != c.averaging.snapshots,
        lambda c: (
            f"train.averaging.snapshots is {c.averaging.snapshots} and train.schedule.cycles {c.cycles}; "
            "keep the first."
        ),
    ),
    (
        lambda c: c.averaging.snapshots and c.train.schedule.name not in (None, *_CYCLIC),
        lambda c: f"train.averaging.snapshots needs a schedule with cycles, but it is {c.train.schedule.name}.",
    ),
    (
        lambda c: c.averaging.kind == "swa" and (c.averaging.snapshots or c.train.schedule.name in _TURNING),
        lambda c: "train.averaging.kind swa and a schedule with cycles both say where the rate ends; keep one.",
    ),
    (
        lambda c: c.strategy == "lora" and (c.averaging.snapshots or c.averaging.keep_last),
        lambda c: (
            "train.strategy lora merges its matrices at the end, so no snapshots of them are kept; set both to 0."
        ),
    ),
    (
        lambda c: c.mixture,
        lambda c: f"train.averaging.wise_ft is {c.averaging.wise_ft:g}, but {c.mixture}; set it to 1, or change that.",
    ),
    (
        lambda c: c.recipe.data.split.refit and not has_more(c.facts),
        lambda c: (
            "data.split.refit is true, but no val or calibration image is there that is not among test too; keep such "
            "images apart, or leave data.split.refit open."
        ),
    ),
    (
        lambda c: c.obstacle,
        lambda c: f"data.split.refit is true, but {c.obstacle}; leave one of the two out.",
    ),
    (
        lambda c: c.train.optimizer.name == "lbfgs" and _needs(c),
        lambda c: f"train.optimizer.name is lbfgs, which needs the same loss at every look: {_needs(c)}.",
    ),
)
"""Of how it is trained."""

OF_TEACHERS: tuple[Row, ...] = (
    (
        lambda c: c.teacher is not None and c.strategy == "probe",
        lambda c: (
            "train.distillation.teacher is set, but strategy probe trains nothing that could be taught; remove it or "
            "use another one."
        ),
    ),
    (
        lambda c: c.teacher is not None and c.known is None,
        lambda c: (
            f"train.distillation.teacher is {c.teacher}, but the facts know no teacher; `finetune.plan` looks at it."
        ),
    ),
    (
        lambda c: c.knows_others,
        lambda c: (
            f"train.distillation.teacher: {c.their_run} knows other classes, or in another order ({c.their_classes}; "
            f"here {c.our_classes}). Train it on the same classes."
        ),
    ),
    (
        lambda c: c.knows_split is False and not c.knows_others,
        lambda c: (
            f"train.distillation.teacher: {c.their_run} was trained on another split of the images "
            f"({c.their_split}, here {c.facts.split_digest:.12}). It may have learned from test images of "
            "this run, and no score would be honest. Train both on the same images, with the same data.split, its "
            "seed and data.max_train_per_class."
        ),
    ),
    (
        lambda c: c.other_view,
        lambda c: (
            f"train.distillation.teacher: {c.their_run} looks at images in another view than this run ({c.our_view}). "
            f"Set {c.their_view}."
        ),
    ),
)
"""Of a teacher, with its student and these images."""

OF_HEADS: tuple[Row, ...] = (
    (
        lambda c: not c.recipe.pretrained and c.head.init == "probe",
        lambda c: "pretrained is false, so there is no probe to begin from; set head.init to zero.",
    ),
    (
        lambda c: c.strategy == "probe" and c.head.kind != "linear",
        lambda c: f"head.kind is {c.head.kind}, but the probe is a linear head; choose another strategy or linear.",
    ),
    (
        lambda c: c.head.kind == "cosine" and (c.head.init == "zero" or c.head.drop_connect),
        lambda c: "head.kind cosine compares directions: it has no zero to begin from, and drops no weights.",
    ),
    (
        lambda c: c.head.kind == "mlp" and c.head.init in ("probe", "model"),
        lambda c: f"head.init is {c.head.init}, which has no hidden layer; for mlp use zero, small, xavier or kaiming.",
    ),
    (
        lambda c: c.head.kind == "mlp" and c.activation,
        lambda c: f"head.activation is {c.head.activation}: {c.activation}",
    ),
    (
        lambda c: c.recipe.evaluate.mc_samples and not c.drops,
        lambda c: (
            f"evaluate.mc_samples is {c.recipe.evaluate.mc_samples}, but the head drops nothing, so all draws would be "
            "the same; set head.dropout (0.5 is usual) or head.drop_connect, or evaluate.mc_samples to 0."
        ),
    ),
)
"""Of the new layer, and of judging by it."""

OF_FLIPS: tuple[Row, ...] = (
    (
        lambda c: c.strangers,
        lambda c: f"data.flip_label_pairs names {c.strangers}, which is no class; they are {c.classes}.",
    ),
    (
        lambda c: c.twice,
        lambda c: (
            f"data.flip_label_pairs names {c.twice} twice, but a mirror image has one class; leave out a class that "
            "keeps its own."
        ),
    ),
    (
        lambda c: c.swapped and {"vflip", "rot90"} <= set(c.recipe.data.invariances or ()),
        lambda c: (
            "data.invariances names vflip and rot90, which together mirror an image and keep its label, but "
            "data.flip_label_pairs says that its label changes; remove one of the three."
        ),
    ),
)
"""Of what may be done to an image."""

OF_LOSSES: tuple[Row, ...] = (
    (
        lambda c: has_own_loss(c.facts.own) and c.strategy == "probe",
        lambda c: "train.strategy is probe, which is solved exactly, by cross-entropy; leave loss= out.",
    ),
    (
        lambda c: has_own_loss(c.facts.own) and c.train.imbalance.kind not in (None, "none", "sampler"),
        lambda c: (
            f"train.imbalance.kind is {c.train.imbalance.kind}, which is a loss, and loss= hands in another; keep one."
        ),
    ),
    (
        lambda c: has_own_loss(c.facts.own) and c.rules.label_smoothing,
        lambda c: (
            f"regularization.label_smoothing is {c.rules.label_smoothing:g}, but loss= takes labels as they are; "
            "keep one."
        ),
    ),
)
"""With a loss that a program hands in."""

CONFLICTS = (*OF_STAGES, *OF_TRAINING, *OF_TEACHERS, *OF_HEADS, *OF_FLIPS, *OF_LOSSES)

AFTER_ADVICE: tuple[Row, ...] = (
    (
        lambda c: c.train.depth is not None and c.strategy != "partial",
        lambda c: (
            f"train.depth belongs to strategy partial, but the advice is {c.strategy}: {c.why}. Set train.strategy to "
            "partial, or remove train.depth."
        ),
    ),
    (
        lambda c: c.train.layers and c.strategy != "partial",
        lambda c: (
            f"train.layers belongs to strategy partial, but the advice is {c.strategy}: {c.why}. Set train.strategy to "
            "partial, or remove train.layers."
        ),
    ),
    (
        lambda c: c.train.reinit and c.strategy == "probe",
        lambda c: f"train.reinit needs its stages trained, but the advice is probe: {c.why}. Set train.strategy.",
    ),
    (
        lambda c: c.teacher is not None and c.strategy == "probe",
        lambda c: (
            f"train.distillation.teacher needs something that trains, but the advice is probe: {c.why}. Set "
            "train.strategy, such as full."
        ),
    ),
    (
        lambda c: c.recipe.evaluate.mc_samples and c.strategy == "probe",
        lambda c: (
            f"evaluate.mc_samples is {c.recipe.evaluate.mc_samples}, but the model is the probe ({c.judged}), which is "
            "solved without dropout. Set another train.strategy, or evaluate.mc_samples to 0."
        ),
    ),
)
"""Of a strategy that the recipe leaves to the advice."""
