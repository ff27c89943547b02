"""What must be as it was where a run goes on: images, weights, view, the user's own change of images, its teacher."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import RunError
from finetune.recipe.distillation import refuse_other_teacher
from finetune.recipe.facts import Facts
from finetune.recipe.plan import Plan
from finetune.recipe.reading import load_recipe, recipe_text
from finetune.recipe.runs import RunFolder, no_run
from finetune.recipe.schema import Recipe

Vary = Callable[..., Any]


def read_wish(run: RunFolder, root: str | None = None) -> Recipe:
    """The recipe of `run`. A backbone that it left open is the one that was chosen, once there is a plan.

    Args:
        run: has a recipe.
        root: where its images are now; None: where they were.

    Raises:
        RunError: if there is no recipe, or nothing where its images are said to be.
    """
    recipe = _read_recipe(run, root)
    if recipe.data.root is not None and not Path(recipe.data.root).expanduser().exists():
        raise RunError(
            f"{recipe.data.root} is not there, where the images of {run.path} are said to be. Where they have moved, "
            f"`finetune resume {run.path} data.root=FOLDER` makes sure that they are the same, and remembers the place."
        )
    if recipe.backbone is None and run.file("plan.yaml").exists():
        return recipe.model_copy(update={"backbone": run.plan.backbone})
    return recipe


def _read_recipe(run: RunFolder, root: str | None = None) -> Recipe:
    if not run.path.is_dir():
        raise no_run(run.path)
    if not run.file("recipe.yaml").exists():
        raise RunError(f"{run.path} holds no recipe.yaml, so it is no run. `finetune train` makes one.")
    moved = [] if root is None else [f"data.root={json.dumps(str(Path(root).expanduser().absolute()))}"]
    return load_recipe(run.file("recipe.yaml"), moved)


def record_root(run: RunFolder, root: str) -> None:
    """Write where the images are now into the recipe and the plan; for whoever knows that they are the same."""
    if _read_recipe(run).data.root != root:
        run.write_text("recipe.yaml", recipe_text(_read_recipe(run, root)))
    if run.file("plan.yaml").exists() and (plan := run.plan).data.root != root:
        moved = plan.model_copy(update={"data": plan.data.model_copy(update={"root": root})})
        run.write_text("plan.yaml", moved.to_yaml())


def moved_to(overrides: Sequence[str]) -> str | None:
    """The new place of the images, where that is all that is said."""
    key, _, value = overrides[0].partition("=") if len(overrides) == 1 else ("", "", "")
    return value if key.strip() == "data.root" else None


def another_wish(run: RunFolder, overrides: Sequence[str]) -> Recipe:
    """The recipe of another run: that of the finished `run`, begun from its weights, with `overrides`.

    Raises:
        RunError: if the run is not finished: what its plan says cannot change on the way.
        RecipeError: if an override is wrong.
    """
    recipe, said = _read_recipe(run), " ".join(overrides)
    if not run.file("scores.json").exists():
        raise RunError(
            f"{run.path} is not finished, and its plan cannot change on the way: with {said} the result would follow "
            f"no recipe. `finetune resume {run.path}` finishes it, and this command then makes another run from its "
            f"weights; `finetune train {run.path}/recipe.yaml {said}` starts anew."
        )
    plan = run.plan  # a refit has seen val, so the other run begins from what it repeated
    beginning = run.stage_folder(plan.last_stage("train")) if plan.stages and plan.is_refit else run.path
    begins = [f"backbone={json.dumps(str(beginning.absolute()))}"]
    if not recipe.pretrained:
        begins.append("pretrained=true")  # as the weights of the run now are
    if recipe.train.reinit:
        begins.append("train.reinit=0")  # what was drawn anew has been trained since
    if recipe.head.init is not None:
        begins.append("head.init=null")  # the probe on these weights, and no new beginning
    return load_recipe(run.file("recipe.yaml"), [*begins, *overrides])


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
