"""What must be as it was where a run goes on: images, weights, view, what a program handed in, its teacher.

A run goes on by its plan. Its recipe is read where there is no plan yet, and where it is the wish of another run.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from finetune.compute import Compute
from finetune.config.facts import Facts
from finetune.config.own import OwnThing, refuse_other_things
from finetune.config.plan import Plan
from finetune.config.reading import load_recipe, recipe_text
from finetune.config.recipe import Recipe
from finetune.errors import RunError
from finetune.runs.folder import RunFolder, no_run
from finetune.runs.teacher import refuse_other_teacher


def read_wish(run: RunFolder, root: str | None = None) -> Recipe:
    """The recipe of a run that has no plan yet.

    Args:
        run: stopped before its plan.
        root: where its images are now; None: where they were.

    Raises:
        RunError: if there is no recipe, or nothing where its images are said to be.
    """
    if not run.path.is_dir():
        raise no_run(run.path)
    if not run.file("recipe.yaml").exists():
        raise RunError(
            f"{run.path} holds neither plan.yaml nor recipe.yaml, so it is no run. `finetune train` makes one."
        )
    recipe = _read_recipe(run, root)
    _refuse_lost_images(run, recipe.data.root)
    return recipe


def read_decided(run: RunFolder, root: str | None = None) -> Plan:
    """The plan of `run`, with its images where they are now.

    Raises:
        RunError: if there is nothing where the images are said to be.
    """
    plan = run.plan if root is None else with_root(run.plan, root)
    _refuse_lost_images(run, plan.data.root)
    return plan


def with_root(plan: Plan, root: str | Path) -> Plan:
    """The plan with the whole path of where its images are."""
    whole = str(Path(root).expanduser().absolute())
    return plan.model_copy(update={"data": plan.data.model_copy(update={"root": whole})})


def _refuse_lost_images(run: RunFolder, root: str | None) -> None:
    if root is not None and not Path(root).expanduser().exists():
        raise RunError(
            f"{root} is not there, where the images of {run.path} are said to be. Where they have moved, "
            f"`finetune resume {run.path} data.root=FOLDER` makes sure that they are the same, and remembers the place."
        )


def _read_recipe(run: RunFolder, root: str | None = None) -> Recipe:
    moved = [] if root is None else [f"data.root={json.dumps(str(Path(root).expanduser().absolute()))}"]
    return load_recipe(run.file("recipe.yaml"), moved)


def record_root(run: RunFolder, root: str | None) -> None:
    """Write where the images are now into the recipe and the plan; for whoever knows that they are the same."""
    if root is None:  # a program handed them in
        return
    if run.file("recipe.yaml").exists() and _read_recipe(run).data.root != root:
        run.write_text("recipe.yaml", recipe_text(_read_recipe(run, root)))
    if (plan := run.plan).data.root != root:
        run.write_text("plan.yaml", with_root(plan, root).to_yaml())


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
    said = " ".join(overrides)
    if not run.file("recipe.yaml").exists():
        raise RunError(
            f"{run.path} was trained by a plan and holds no recipe that {said} could be laid over. Change a copy of "
            f"its plan.yaml and train that, or give a recipe: `finetune train IMAGES backbone={run.path} {said}` "
            "begins from its weights."
        )
    recipe = _read_recipe(run)
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


def refuse_other_beginning(run: RunFolder, facts: Facts) -> None:
    """Nothing, where `run` can go on as it began.

    Args:
        run: has a plan.
        facts: as they are now.

    Raises:
        RunError: if what it began with has changed, or is not here.
    """
    refuse_changes(run, facts)
    Compute.of(run.plan.hardware)  # its device
    refuse_other_teacher(run)


def refuse_changes(run: RunFolder, facts: Facts) -> None:
    """Nothing, where the images and the backbone are those of the plan of `run`, and its view is that of its beginning.

    Raises:
        RunError: if not.
    """
    plan = run.plan
    for what, then, now in (
        ("images", plan.split_digest, facts.split_digest),
        ("backbone's weights", plan.weights_digest, facts.backbone.weights_digest),
    ):
        if then != now:
            raise RunError(
                f"the {what} have changed since the plan was made ({then[:12]}, now {now[:12]}). "
                f"Put them back, or start a new run: its split would not be the same."
            )
    if plan.view != Facts.model_validate(run.read_json("facts.json")).view:
        raise RunError(
            f"{run.path}/plan.yaml was changed by hand: its view is not that of facts.json, with which the run began. "
            f"Change it back, or train it as a run of its own: `finetune train {run.path}/plan.yaml`."
        )


def refuse_other_own(run: RunFolder, now: Sequence[OwnThing], verb: str = "resume") -> None:
    """Nothing, where what a program hands in is what it handed in when `run` was begun; or there is no plan yet.

    Raises:
        RunError: if not.
    """
    if not run.file("plan.yaml").exists():
        return
    then, view = run.plan.own, _own_view(run, now)
    is_trained = verb == "evaluate" or not run.plan.stages or run.final_weights().exists()
    refuse_other_things((*then, *view), now, run=run.path, is_trained=is_trained, verb=verb)


def _own_view(run: RunFolder, now: Sequence[OwnThing]) -> list[OwnThing]:
    """The `vary` of a run of an older version, whose plan does not name it."""
    named = run.read_json("environment.json").get("own_view") if run.has_begun else None
    if named is None:
        return []
    name, _, digest = named.rpartition(" ")
    alike = [one for one in now if one.argument == "vary" and one.digest == digest]
    return alike or [OwnThing(argument="vary", name=name, digest=digest)]
