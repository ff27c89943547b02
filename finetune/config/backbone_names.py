"""The shelf: where shipped recipes and zoo folders lie, in a wheel and in a checkout alike."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import BackboneError, RecipeError, names_beside, nearest

if TYPE_CHECKING:
    from finetune.config.card import Card
    from finetune.config.recipe import Recipe

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path:
    """The folder `recipes` or `zoo` that came with this version."""
    packed = _PACKAGE / f"_{name}"
    return packed if packed.is_dir() else _PACKAGE.parent / name


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """The first comment line of a recipe."""
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


def find_recipe(source: str) -> Path | None:
    """The recipe file that `source` names, or None where it names a folder or table of images.

    Raises:
        RecipeError: if it names neither.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    if source in (recipes := list_recipes()):
        return recipes[source]
    if path.exists():
        return None
    hint = nearest(path.name, [*recipes, *names_beside(path)], otherwise=f"Shipped recipes: {', '.join(recipes)}.")
    raise RecipeError(f"{source!r} is neither a file, a folder, nor a shipped recipe. {hint}")


def zoo_folders() -> list[Path]:
    """Folders of cards: those of FINETUNE_ZOO, then the user's own, then the shipped one."""
    named = [Path(part).expanduser() for part in os.environ.get("FINETUNE_ZOO", "").split(os.pathsep) if part]
    return [*named, *_own_zoo(), shipped("zoo")]


def user_zoo() -> Path:
    """Where `zoo add` puts cards when FINETUNE_ZOO names no folder.

    Raises:
        OSError: where the user has no home.
    """
    return _in_home("XDG_DATA_HOME", "~/.local/share") / "finetune" / "zoo"


def read_zoo() -> "dict[str, Card]":
    """Every card at hand by name; of two with one name the first folder's wins.

    Raises:
        BackboneError: if FINETUNE_ZOO names a folder that is not there, or a card cannot be read.
    """
    from finetune.config.card import read_card  # here, so that listing recipes reads no YAML library

    cards: dict[str, Card] = {}
    for folder in zoo_folders():
        if not folder.is_dir():
            if folder not in (*_own_zoo(), shipped("zoo")):
                raise BackboneError(f"FINETUNE_ZOO names {folder}, which is no folder. Mend or unset the variable.")
            continue
        for path in sorted(folder.glob("*/card.yaml")):
            card = read_card(path)
            cards.setdefault(card.name, card)
    return cards


def folder_of_backbone(name: str) -> Path | None:
    """The folder of weights that `name` means: a path, or a run here or among the runs; None where it is another name.

    Raises:
        BackboneError: if it is a path, and nothing is there.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or ("/" in name and path.parent.is_dir())
    for folder in (path, Path(os.environ.get("FINETUNE_RUNS", "runs")) / path):
        if is_run(folder) or (folder.is_dir() and is_path):
            return folder.absolute()
    if is_path:
        hint = nearest(path.name, names_beside(path))
        raise BackboneError(f"backbone: {path} is not there. Name a finished run, or a zoo's backbone. {hint}".rstrip())
    return None


def card_at(name: str) -> "Card | None":
    """The card of the folder of weights that `name` means, by that name; None where it means no folder.

    A stage of a finished run is such a folder too: so another run begins from weights before a refit.

    Raises:
        BackboneError: if the folder holds no card.
    """
    from finetune.config.card import read_card

    if (folder := folder_of_backbone(name)) is None:
        return None
    run, files = folder.parent.parent, [folder / name for name in ("weights.safetensors", "held_out.safetensors")]
    weights = next((path for path in files if path.exists()), None)
    if folder.parent.name == "stages" and (run / "card.yaml").exists() and weights is not None:
        card = read_card(run / "card.yaml")
        is_before = not folder.name.endswith("-refit")
        return replace(card, name=name, weights=weights, sha256=None, is_before_refit=is_before)
    if not (folder / "card.yaml").exists():
        raise BackboneError(f"backbone: {folder} {why_no_card(folder)}")
    return replace(read_card(folder / "card.yaml"), name=name)


def name_backbone(recipe: "Recipe") -> "Recipe":
    """The recipe with the whole path of its backbone where that is a folder, so that it means the same anywhere."""
    name = recipe.backbone
    return recipe if name is None else recipe.model_copy(update={"backbone": whole_name(name)})


def whole_name(backbone: str) -> str:
    """The name of a backbone, or the whole path of the folder that it means.

    Raises:
        BackboneError: if it is a path and nothing is there, or a folder without weights.
    """
    if backbone.startswith("torchvision/") or backbone in read_zoo():
        return backbone
    if (folder := folder_of_backbone(backbone)) is None:
        return backbone
    card_at(str(folder))  # a folder without weights is refused here
    return str(folder)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: it holds the recipe that it was begun with, or the plan."""
    return any((folder / name).is_file() for name in ("recipe.yaml", "plan.yaml"))


def short_name(backbone: str) -> str:
    """What a run folder is called after: the name of its backbone, or the network of the run that it begins from."""
    card = card_at(backbone) if Path(backbone).is_absolute() else None
    return (card.arch if card is not None else backbone).replace("/", "_")


def why_no_card(folder: Path) -> str:
    """What a folder without a card is, and what to do, as the rest of a sentence."""
    if (folder / "ensemble.json").exists():
        return f"averages several networks, and no training can begin from them all; name one of {folder}/members/."
    if (folder / "scores.json").exists():
        return f"is a run of an older version, without a card. `finetune evaluate {folder}` gives it one."
    if is_run(folder):
        return f"is a run that is not trained to its end. `finetune resume {folder}` goes on."
    return "holds no card.yaml, so it is neither a finished run nor a backbone of a zoo."


def default_backbone() -> str:
    """The bundled backbone: always at hand, chosen where a recipe names none."""
    return next(path.parent.name for path in sorted(shipped("zoo").glob("*/card.yaml")))


def cache_folder() -> Path:
    """Where features are kept: FINETUNE_CACHE, or `finetune` in the user's cache folder.

    Raises:
        OSError: where the user has no home, and neither variable says so.
    """
    if named := os.environ.get("FINETUNE_CACHE"):
        return Path(named).expanduser()
    return _in_home("XDG_CACHE_HOME", "~/.cache") / "finetune"


def _in_home(variable: str, otherwise: str) -> Path:
    """A folder that a variable names, or one in the user's home; some containers give their user none."""
    try:
        return Path(os.environ.get(variable) or otherwise).expanduser()
    except RuntimeError as fault:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", otherwise) from fault


def _own_zoo() -> list[Path]:
    """The user's zoo, where there is one that can be looked into."""
    try:
        return [folder] if (folder := user_zoo()).is_dir() else []
    except OSError:
        return []
