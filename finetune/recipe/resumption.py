"""What must be as it was where a run goes on: images, weights, view, the user's own change of images, its teacher."""

import hashlib
from collections.abc import Callable
from typing import Any

from finetune.errors import RunError
from finetune.recipe.distillation import refuse_other_teacher
from finetune.recipe.facts import Facts
from finetune.recipe.plan import Plan
from finetune.recipe.reading import load_recipe
from finetune.recipe.runs import RunFolder
from finetune.recipe.schema import Recipe

Vary = Callable[..., Any]


def read_wish(run: RunFolder) -> Recipe:
    """The recipe of `run`. A backbone that it left open is the one that was chosen, once there is a plan.

    Raises:
        RunError: if there is no recipe.
    """
    if not run.file("recipe.yaml").exists():
        raise RunError(f"{run.path} holds no recipe.yaml, so it is no run. `finetune train` makes one.")
    recipe = load_recipe(run.file("recipe.yaml"))
    if recipe.backbone is None and run.file("plan.yaml").exists():
        return recipe.model_copy(update={"backbone": run.plan.backbone})
    return recipe


def refuse_other_beginning(run: RunFolder, facts: Facts, vary: Vary | None) -> None:
    """Nothing, where `run` can go on as it began.

    Args:
        run: has a plan.
        facts: as they are now.
        vary: the user's own change of training images.

    Raises:
        RunError: if what it began with has changed, or is not here.
    """
    refuse_changes(run.plan, facts)
    if run.plan.hardware.devices == "cuda" and facts.machine.device != "cuda":
        raise RunError("the plan is made for a GPU, and torch sees none here. Resume the run where there is one.")
    _refuse_other_view(run, vary)
    refuse_other_teacher(run)


def refuse_changes(plan: Plan, facts: Facts) -> None:
    """Nothing, where the images and the backbone are those of the plan.

    Raises:
        RunError: if not.
    """
    for what, then, now in (
        ("images", plan.split_digest, facts.split_digest),
        ("backbone's weights", plan.weights_digest, facts.backbone.weights_digest),
    ):
        if then != now:
            raise RunError(
                f"the {what} have changed since the plan was made ({then[:12]}, now {now[:12]}). "
                f"Put them back, or start a new run: its split would not be the same."
            )
    if plan.view != facts.view:
        raise RunError("plan.yaml was changed by hand: its view is not that of the recipe. Start a new run instead.")


def name_view(vary: Vary | None) -> str | None:
    """Name and digest of a user's own function; its code is not kept."""
    if vary is None:
        return None
    code = getattr(vary, "__code__", None)
    plain = [part for part in code.co_consts if isinstance(part, bool | int | float | str)] if code else []
    text = repr((code.co_code, code.co_names, plain)) if code else type(vary).__qualname__
    name = getattr(vary, "__qualname__", type(vary).__qualname__)
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _refuse_other_view(run: RunFolder, vary: Vary | None) -> None:
    then, now = run.read_json("environment.json").get("own_view"), name_view(vary)
    if run.plan.stages and not run.final_weights().exists() and then != now:
        raise RunError(
            f"the run was begun with {then or 'no function of its own'} for training views, and is resumed with "
            f"{now or 'none'}. Resume it from Python with the same one: finetune.resume(run, vary=...)."
        )
