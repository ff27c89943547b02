"""A plan that is handed in to be trained: a value, or a file that may have been edited, read with every fault named."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from finetune.config.backbone_names import whole_name
from finetune.config.plan import Plan, Stage, plan_of
from finetune.config.reading import Wish, fault_sentence, read_mapping
from finetune.config.recipe import recipe_keys
from finetune.errors import RecipeError
from finetune.runs.resume import with_root

_MARKS = (re.compile(r"^split_digest:", re.MULTILINE), re.compile(r"^stages:", re.MULTILINE))
"""Keys that every plan has, and no recipe."""


def as_plan(wish: Wish | Plan | None, overrides: Sequence[str] = ()) -> Plan | None:
    """The plan that is handed in, with the whole paths of what it names; None where that is a recipe, or names one.

    Args:
        wish: a plan, its file, or anything that `as_recipe` takes.
        overrides: refused beside a plan, which leaves nothing open.

    Raises:
        RecipeError: naming every unknown key and bad value of the file; or if there are overrides.
    """
    if isinstance(wish, Plan):
        plan, named = wish, "it"
    elif isinstance(wish, str | os.PathLike) and is_plan_file(Path(wish).expanduser()):
        plan, named = load_plan(Path(wish).expanduser()), os.fspath(wish)
    else:
        return None
    if overrides:
        raise RecipeError(
            f"{named} is a plan, in which everything is decided, so {', '.join(overrides)} cannot be laid over it. "
            "Change the value in a copy of the file, or train a recipe with it."
        )
    return _with_whole_paths(plan)


def is_plan_file(path: Path) -> bool:
    """Whether `path` is a file that says what only plans say."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return all(mark.search(text) for mark in _MARKS)


def load_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        RecipeError: naming every unknown key and bad value, with the line of each.
    """
    found, lines = read_mapping(path)
    stages = found.get("stages") or ()
    try:
        return plan_of(found)
    except ValidationError as fault:
        known = {*recipe_keys(Plan), *(f"stages.{at}.{key}" for at in range(len(stages)) for key in recipe_keys(Stage))}
        told = [fault_sentence(error, lines, str(path), known=known, what="a plan") for error in fault.errors()]
        raise RecipeError("\n".join(told)) from fault


def _with_whole_paths(plan: Plan) -> Plan:
    """So that the run can be resumed from anywhere."""
    spec = plan.train.distillation
    if spec.teacher is not None:
        spec = spec.model_copy(update={"teacher": str(Path(spec.teacher).expanduser().absolute())})
    train = plan.train.model_copy(update={"distillation": spec})
    named = plan.model_copy(update={"backbone": whole_name(plan.backbone), "train": train})
    return named if named.data.root is None else with_root(named, named.data.root)
