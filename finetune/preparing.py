"""Before a training: images opened, measured, and a plan made of it, each as `train` itself does it."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.config.backbone_names import name_backbone
from finetune.config.facts import Facts, Ranking
from finetune.config.plan import Plan
from finetune.config.reading import Wish, as_recipe
from finetune.config.recipe import Recipe
from finetune.config.section import ROLES, Section
from finetune.data.dataset import Dataset
from finetune.data.torch_datasets import Handed
from finetune.errors import DataError, RecipeError, names_beside, nearest
from finetune.features.survey import Survey, look, survey_part
from finetune.handing_in import hand_in
from finetune.inference.teacher import find_teacher
from finetune.inference.tta_views import refuse_views
from finetune.model_selection.pilot import run_pilot
from finetune.model_selection.ranking import choose_backbone
from finetune.models.classifier import refuse_layers
from finetune.models.own import NOTHING, Given, Model
from finetune.planning.conflicts import refuse_teacher
from finetune.planning.plan_faults import refuse_misfit
from finetune.planning.planner import make_plan
from finetune.process import as_guest
from finetune.saying import every_few_seconds
from finetune.training.optimization import check_optimizer
from finetune.training.own import OwnLoss
from finetune.training.setup import Vary

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Print a line for people; where standard error is closed, nobody reads it."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


@as_guest()
def plan(
    recipe: Wish | None = None,
    overrides: Sequence[str] = (),
    *,
    model: Model | None = None,
    dataset: Handed | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[object] = (),
    logger: object | None = None,
    vary: Vary | None = None,
    pilot_seconds: float | None = None,
    say: Say = say_on_stderr,
) -> tuple[Facts, Plan]:
    """What is measured and what would be done, without doing it.

    Args:
        recipe: what to do: a recipe, its file or shipped name, or a folder of images.
        overrides: `section.key=value`.
        model: as in `train`; so are the next five, which a plan names.
        dataset: see there.
        loss: see there.
        callbacks: see there.
        logger: see there.
        vary: see there.
        say: gets every line for people.
        pilot_seconds: for short trainings of the closest candidates, by which the strategy is then chosen; None: none.
    """
    recipe = as_recipe(recipe, overrides)
    if pilot_seconds is not None and (recipe.train.strategy is not None or not recipe.pretrained):
        raise RecipeError("a pilot chooses train.strategy, which the recipe names already; leave one of the two out.")
    check_optimizer(recipe.train.optimizer)
    teacher = find_teacher(recipe.train.distillation.teacher)
    own = hand_in(
        recipe, model=model, dataset=dataset, loss=loss, callbacks=callbacks, logger=logger, vary=vary, say=say
    )
    recipe, ranking = with_backbone(recipe, say, own.given)
    seen = look(recipe, every_few_seconds(say), roles_seen=_roles_seen(recipe), given=own.given)
    facts = seen.facts.model_copy(update={"own": own.things})
    if pilot_seconds is not None:
        refuse_teacher(recipe, facts.model_copy(update={"teacher": teacher}))  # before seconds are spent
        facts = run_pilot(recipe, replace(seen, facts=facts), pilot_seconds, say, own.training)
    facts = facts.model_copy(update={"ranking": ranking, "teacher": teacher})
    return facts, checked_plan(recipe, replace(seen, facts=facts))


@as_guest()
def open_dataset(
    recipe: Wish | None = None,
    overrides: Sequence[str] = (),
    *,
    dataset: Handed | None = None,
    say: Say = say_on_stderr,
) -> Dataset:
    """The images of a recipe (or of a folder, or of torch data sets): read, faulty ones named, divided as a run does.

    Files that show their fault only when they are decoded are found by `Dataset.find_faults`, or by a survey.

    Raises:
        DataError: if there is nothing to learn from.
        RecipeError: if no data is named.
    """
    recipe = as_recipe(recipe, overrides)
    if recipe.data.root is None and dataset is None:
        raise RecipeError("no images are named. Give a folder, set data.root, or hand in dataset=.")
    own = hand_in(recipe, dataset=dataset, say=say)
    opened = Dataset.open(recipe.data, recipe.seed, own.given.source)
    opened.divide()
    return opened


@as_guest()
def survey(
    recipe: Wish | None = None,
    overrides: Sequence[str] = (),
    *,
    model: Model | None = None,
    dataset: Handed | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[object] = (),
    logger: object | None = None,
    vary: Vary | None = None,
    say: Say = say_on_stderr,
) -> Facts:
    """What there is to know about a recipe's (or a folder's) images and backbone before anything is decided.

    Where the recipe leaves the backbone open it is chosen as `train` chooses it. What was looked at is remembered, so
    a training that follows looks at nothing twice.

    Args:
        recipe: a recipe, its file or shipped name, or a folder of images.
        overrides: `section.key=value`.
        model: as in `train`; so are the next five, which a plan names.
        dataset: see there.
        loss: see there.
        callbacks: see there.
        logger: see there.
        vary: see there.
        say: gets every line for people.
    """
    recipe = as_recipe(recipe, overrides)
    teacher = find_teacher(recipe.train.distillation.teacher)
    own = hand_in(
        recipe, model=model, dataset=dataset, loss=loss, callbacks=callbacks, logger=logger, vary=vary, say=say
    )
    recipe, ranking = with_backbone(recipe, say, own.given)
    seen = look(recipe, every_few_seconds(say), given=own.given)
    return seen.facts.model_copy(update={"ranking": ranking, "teacher": teacher, "own": own.things})


@as_guest()
def show_images(recipe: Recipe, path: Path, say: Say = say_on_stderr) -> Path:
    """Write a picture of what training by `recipe` will see of its images; `path`, a PNG file."""
    from finetune.training.setup import draw_training_views

    teacher = find_teacher(recipe.train.distillation.teacher)
    recipe, _ = with_backbone(recipe, say)
    seen = look(recipe, every_few_seconds(say), roles_seen=_roles_seen(recipe))
    facts = seen.facts.model_copy(update={"teacher": teacher})
    draw_training_views(make_plan(recipe, facts), seen.dataset, path)
    return path


class Extracted(Section):
    """How many images of a part were looked at."""

    hits: int
    """Known before."""
    misses: int
    """Looked at now."""
    bad: int
    """That cannot be read."""


@as_guest()
def extract(recipe: Recipe, part: str, say: Say = say_on_stderr) -> Extracted:
    """Look at one part of the images, such as `2/8`, and keep their features for whoever plans or trains later.

    Raises:
        RecipeError: if `part` is no such pair, or no backbone is named.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not found or int(found[1]) > int(found[2]):
        raise RecipeError(f"part is {part!r}; give which one of how many, such as 2/8.")
    if recipe.backbone is None:
        raise RecipeError("a part of the images is looked at by one backbone; name it, backbone=NAME.")
    seen = survey_part(recipe, int(found[1]), int(found[2]), every_few_seconds(say))
    return Extracted(hits=seen.hits, misses=seen.misses, bad=len(seen.bad))


def with_whole_root(recipe: Recipe) -> Recipe:
    """The recipe with the whole path of its images, so that a run can be resumed from anywhere."""
    if recipe.data.root is None:
        raise RecipeError("no images are named. Give a folder: `finetune train FOLDER`, or set data.root.")
    root = Path(recipe.data.root).expanduser().absolute()
    refuse_nowhere(root)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(root)})})


def refuse_nowhere(root: Path) -> None:
    """Nothing, where there is something at `root`; else a DataError with what is nearly called so."""
    if not root.exists():
        hint = nearest(root.name, names_beside(root), otherwise="Check the path.")
        raise DataError(f"data.root: {root} does not exist. {hint}")


def with_backbone(recipe: Recipe, say: Say, given: Given = NOTHING) -> tuple[Recipe, Ranking | None]:
    """The recipe with its backbone named, and the ranking that named it where there was a choice.

    Of a network that was handed in, a recipe knows no name.
    """
    if given.backbone is not None:
        return recipe, None
    recipe = name_backbone(recipe)
    name, ranking = choose_backbone(recipe, progress=every_few_seconds(say), given=given)
    if ranking is not None:
        say(f"backbone: {ranking.why}")
    return recipe.model_copy(update={"backbone": name}), ranking


def checked_plan(recipe: Recipe, seen: Survey) -> Plan:
    """The plan, once the backbone has been asked whether it can be trained and judged so."""
    decided = make_plan(recipe, seen.facts)
    refuse_layers(seen.backbone, recipe.train.layers)
    refuse_views(decided, seen.backbone)
    return decided


def fitting_plan(plan: Plan, seen: Survey) -> Plan:
    """The plan that was handed in, once it is held against the images and the backbone.

    Raises:
        RecipeError: naming every key that does not fit.
    """
    refuse_misfit(plan, seen.facts)
    for stage in plan.stages:
        refuse_layers(seen.backbone, stage.layers)
    refuse_views(plan, seen.backbone)
    return plan


def _roles_seen(recipe: Recipe) -> tuple[str, ...]:
    """A choice has no business with test images; but a broken one changes the split, which a teacher must share."""
    return ("train", "val") if recipe.train.distillation.teacher is None else ROLES
