"""Reading recipes: strict YAML, `section.key=value` overrides, and every fault at once with its line."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, SequenceNode

from finetune.config.addresses import hide_logins
from finetune.config.backbone_names import find_recipe, is_run
from finetune.config.recipe import VIEWS_HELP, Recipe, recipe_keys
from finetune.config.renamed import KEYS, VALUES
from finetune.errors import RecipeError, nearest

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


Wish = Recipe | str | os.PathLike[str]
"""A recipe, or what `load_recipe` makes one of."""


def load_recipe(source: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `source` names, with `overrides` laid over it.

    Args:
        source: a YAML file, the name of a shipped recipe, a data folder or table, or None for an empty recipe.
        overrides: `section.key=value`, the value written as in YAML.

    Raises:
        RecipeError: naming every unknown key and bad value, with the line of each.
    """
    text, where = "", "the command line"
    wish: dict[str, Any] = {}
    if source is not None:
        _refuse_run(Path(source).expanduser())
        path = find_recipe(str(source))
        if path is None:
            wish = {"data": {"root": str(source)}}
        else:
            text, where = _read(path), str(path)
            wish = _parse(text, where)
            _refuse_plan(wish, path)
    faults, lines = [], _lines(text, where)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, value = _parse_override(override)
        _lay(wish, key.split("."), value)
        lines[key] = f"{override!r}"
    try:
        recipe = Recipe.model_validate(wish)
    except ValidationError as fault:
        faults = [fault_sentence(error, lines, where) for error in fault.errors()]
    if faults:
        raise RecipeError(hide_logins("\n".join(faults)))
    return recipe


def _refuse_run(path: Path) -> None:
    if is_run(path):
        raise RecipeError(
            f"{path} holds a run, no images. `finetune resume {path}` goes on with it; with train.epochs=N "
            f"added, or as `finetune train IMAGES backbone={path}`, another run begins from its weights; and "
            f"`finetune train {path}/recipe.yaml` trains by its recipe again, {path}/plan.yaml by its plan."
        )


def _refuse_plan(wish: Mapping[str, Any], path: Path) -> None:
    if "split_digest" in wish and "stages" in wish:
        raise RecipeError(
            f"{path} is a plan, in which everything is decided, and no recipe. `finetune train {path}` carries it out; "
            "what leads to another plan is a recipe, such as recipe.yaml beside it."
        )


def recipe_text(recipe: Recipe) -> str:
    """What was set, as a recipe file; a key that nobody set is left out, so that reading it again wishes no more."""
    wish = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(wish, sort_keys=False, allow_unicode=True)


def as_recipe(recipe: Wish | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe as it is, or the one that a file, a shipped name or a folder of images stands for; None: an empty one.

    See `load_recipe`.

    Raises:
        TypeError: if overrides stand beside a recipe that is made already.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(None if recipe is None else os.fspath(recipe), overrides)
    if overrides:
        raise TypeError("the recipe is made already; give the overrides to load_recipe, which made it.")
    return recipe


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a YAML file holds, and `FILE, line N` for every dotted key in it.

    Raises:
        RecipeError: if it is no mapping, or holds a key twice.
    """
    text = _read(path)
    return _parse(text, str(path)), _lines(text, str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise RecipeError(f"{path} is not UTF-8 (byte {fault.start}); save it as UTF-8.") from fault


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        wish = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as fault:  # a date that is none raises ValueError
        raise RecipeError(f"{where} is not YAML: {fault}") from fault
    if wish is None:
        return {}
    if not isinstance(wish, dict):
        raise RecipeError(f"{where} holds a {type(wish).__name__}; a recipe is a mapping such as `backbone: resnet18`.")
    return wish


def _parse_override(override: str) -> tuple[str, Any]:
    key, _, value = override.partition("=")
    try:
        return key.strip(), yaml.load(value, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as fault:
        raise RecipeError(f"the value of {override!r} is not YAML: {fault}") from fault


def _lay(wish: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set one nested key; a section that is null or missing becomes a mapping."""
    for part in path[:-1]:
        inner = wish.get(part)
        wish[part] = dict(inner) if isinstance(inner, dict) else {}
        wish = wish[part]
    wish[path[-1]] = value


def _lines(text: str, where: str) -> dict[str, str]:
    """`FILE, line N` for every dotted key; a key that stands twice is refused here."""
    root = yaml.compose(text, Loader=_LOADER) if text else None
    lines: dict[str, str] = {}
    faults: list[str] = []

    def walk(node: Node | None, prefix: str) -> None:
        if isinstance(node, SequenceNode):
            for number, part in enumerate(node.value):
                walk(part, f"{prefix}{number}.")
        if not isinstance(node, MappingNode):
            return
        for key, value in node.value:
            name, place = f"{prefix}{key.value}", f"{where}, line {key.start_mark.line + 1}"
            if name in lines:
                faults.append(f"{place}: {name} stands here and in {lines[name]}; keep one.")
            lines[name] = place
            walk(value, f"{name}.")

    walk(root, "")
    if faults:
        raise RecipeError("\n".join(faults))
    return lines


def fault_sentence(
    error: Any, lines: Mapping[str, str], where: str, *, known: Set[str] | None = None, what: str = "a recipe"
) -> str:
    """What, where, got, do: one line for one fault that pydantic found.

    Args:
        error: pydantic's.
        lines: `FILE, line N` by dotted key.
        where: the file, for keys that it lacks.
        known: all dotted keys; None: those of a recipe.
        what: the file is.
    """
    known = set(recipe_keys()) if known is None else known
    path = ".".join(str(part) for part in error["loc"])
    key = next((path.rsplit(".", cut)[0] for cut in range(4) if path.rsplit(".", cut)[0] in known | set(lines)), path)
    place = lines.get(key, lines.get(path, where))
    if path in KEYS:
        return f"{place}: {path} is called {KEYS[path]} now. Write that instead."
    if (new := VALUES.get(key, {}).get(str(error["input"]))) is not None:
        return f"{place}: {key}: {error['input']} is called {new} now. Write that instead."
    if error["type"] == "extra_forbidden":
        return f"{place}: {path} is no key of {what}. {_hint(path, known)}"
    if error["type"] == "model_type":
        return f"{place}: {_section_hint(path, known, error['input'])}"
    if error["type"] == "string_pattern_mismatch" and key == "evaluate.views":
        return f"{place}: {key}: {error['input']!r} is no view, nor a list of views. {VIEWS_HELP}"
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    told = error["msg"].removeprefix("Value error, ")
    return f"{place}: {key}: {told}{got}." if key else f"{place}: {told}."


def _section_hint(section: str, known: Iterable[str], value: object) -> str:
    """What to write instead of a value where a section of keys belongs."""
    own = sorted(key for key in known if key.startswith(f"{section}."))
    main = [f"{section}.{word}" for word in ("name", "kind", "strategy", "preset") if f"{section}.{word}" in own]
    do = f"You may mean {main[0]}={value}" if main and value is not None else f"Its keys are {', '.join(own)}"
    return f"{section} is a section of keys and no value, got {value!r}. {do}."


def _hint(path: str, known: Iterable[str]) -> str:
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    last = path.rsplit(".", 1)[-1]
    same = [key for key in sorted(known) if key.rsplit(".", 1)[-1] == last]
    if same:
        return f"It is written {same[0]}."
    return nearest(path, [*known, *sections], otherwise="`finetune recipes show quick` shows a recipe in full.")
