"""Why a plan that was handed in cannot be carried out here: it is of other images or weights, or contradicts itself.

A plan that was made here is right. One that was edited, or comes from elsewhere, is held against what is here before
anything is trained by it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune.config.facts import Facts
from finetune.config.plan import Plan, Stage
from finetune.config.recipe import Recipe, TrainSpec
from finetune.errors import RecipeError
from finetune.planning.conflicts import refuse_teacher
from finetune.planning.lr_schedules import whole_epochs


def refuse_misfit(plan: Plan, facts: Facts) -> None:
    """Nothing, where the plan fits the images and the backbone, and its parts fit each other.

    Raises:
        RecipeError: naming every key that does not.
    """
    faults = [row.told(plan, facts) for row in PLAN_FAULTS if row.is_so(plan, facts)]
    if faults:
        raise RecipeError("\n".join(f"plan: {fault}" for fault in faults))
    taught = TrainSpec(strategy=plan.train.strategy, distillation=plan.train.distillation)
    refuse_teacher(Recipe(train=taught), facts)


@dataclass(frozen=True)
class PlanFault:
    """A contradiction, and what to say of it."""

    is_so: Callable[[Plan, Facts], bool]
    told: Callable[[Plan, Facts], str]


def _depth(facts: Facts) -> int:
    return len(facts.backbone.stages)


def _numbered(plan: Plan, is_so: Callable[[Stage], bool]) -> str:
    return ", ".join(f"stages.{number}" for number, stage in enumerate(plan.stages) if is_so(stage))


def _is_too_deep(stage: Stage, facts: Facts) -> bool:
    return max(stage.trainable_stages, stage.fresh_stages) > _depth(facts)


def _has_half_cycles(stage: Stage) -> bool:
    return stage.images == "train" and whole_epochs(stage.schedule, stage.epochs) != stage.epochs


def _repeats(plan: Plan) -> bool:
    """Whether the stages on all labelled images are those on the training images again, in their order, or none."""
    first = [stage for stage in plan.stages if stage.images == "train"]
    again = [stage for stage in plan.stages if stage.images == "labelled"]
    alike = [stage.model_copy(update={"name": "refit", "images": "labelled"}) for stage in first]
    return list(plan.stages) == [*first, *again] and again in ([], alike)


PLAN_FAULTS = (
    PlanFault(
        lambda plan, facts: plan.split_digest != facts.split_digest,
        lambda plan, facts: f"split_digest is {plan.split_digest[:12]}, but the images in {facts.root}, divided as "
        f"data.split says, have {facts.split_digest[:12]}. Point data.root at the images that the plan was made for, "
        "and leave their division as it was; or let a recipe make a plan for these.",
    ),
    PlanFault(
        lambda plan, facts: plan.weights_digest != facts.backbone.weights_digest,
        lambda plan, facts: f"weights_digest is {plan.weights_digest[:12]}, but {plan.backbone} has weights "
        f"{facts.backbone.weights_digest[:12]} here. Put the card that the plan was made with first in FINETUNE_ZOO; "
        "or let a recipe make a plan for these.",
    ),
    PlanFault(
        lambda plan, facts: plan.classes != facts.classes,
        lambda plan, facts: f"classes are {', '.join(plan.classes[:5])}, but the images have "
        f"{', '.join(facts.classes[:5])}. Write them as the images name them.",
    ),
    PlanFault(
        lambda plan, facts: plan.view != facts.view,
        lambda plan, facts: f"data.image_size is {plan.data.image_size}, but {plan.backbone} looks at "
        f"{facts.view.size_pixels} px ({facts.size_note}). Set data.image_size to that.",
    ),
    PlanFault(
        lambda plan, facts: (plan.train.strategy == "probe") != (not plan.stages),
        lambda plan, facts: f"train.strategy is {plan.train.strategy}, and there are {len(plan.stages)} stages; a "
        "probe has none, and everything else at least one. Change one of the two.",
    ),
    PlanFault(
        lambda plan, facts: any(_is_too_deep(stage, facts) for stage in plan.stages),
        lambda plan, facts: f"{_numbered(plan, lambda stage: _is_too_deep(stage, facts))}: trainable_stages or "
        f"fresh_stages is more than the {_depth(facts)} stages that {plan.backbone} has. Lower it.",
    ),
    PlanFault(
        lambda plan, facts: any(_has_half_cycles(stage) for stage in plan.stages),
        lambda plan, facts: f"{_numbered(plan, _has_half_cycles)}: epochs are no whole cycles of schedule.name "
        f"{next(stage.schedule.name for stage in plan.stages if _has_half_cycles(stage))}. Take a number of epochs "
        "that schedule.cycles divides.",
    ),
    PlanFault(
        lambda plan, facts: not _repeats(plan),
        lambda plan, facts: "stages on images labelled must be those on images train again, in the same order and with "
        "the same values, called refit. Change both alike, or remove those on labelled.",
    ),
    PlanFault(
        lambda plan, facts: plan.data.split.refit != plan.is_refit,
        lambda plan, facts: f"data.split.refit is {str(plan.data.split.refit).lower()}, but what trains last does so "
        f"on {'all labelled images' if plan.is_refit else 'the training images alone'}. Change one of the two.",
    ),
)  # fmt: skip
"""What can be wrong, with the keys to change."""
