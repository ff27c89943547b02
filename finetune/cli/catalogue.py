"""Verbs of what is at hand: shipped recipes, and backbones."""

import json
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.words import Json, Wish, finish, read_wish, split_words
from finetune.errors import RunError

recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Shipped recipes: list, show, copy, check.")
zoo_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Backbones: list, show, add, verify, rank.")


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """Shipped recipes, a line each."""
    from finetune.config.backbone_names import list_recipes, recipe_summary

    found = {name: recipe_summary(path) for name, path in list_recipes().items()}
    finish({"recipes": found}, as_json, "\n".join(f"{name:<18}  {line}" for name, line in found.items()))


@recipes_app.command("show")
def recipes_show(
    name: str,
    images: Annotated[
        Path | None, typer.Option(help="A folder: draw what training by this recipe will see of its images instead.")
    ] = None,
    sheet: Annotated[Path, typer.Option(help="The picture to write.")] = Path("training-views.png"),
    as_json: Json = False,
) -> None:
    """A shipped recipe as it is written, or a picture of what training by it sees."""
    path = _shipped(name)
    if images is not None:
        from finetune.config.reading import load_recipe
        from finetune.preparing import show_images

        drawn = show_images(load_recipe(path, [f"data.root={images}"]), sheet)
        finish({"sheet": str(drawn)}, as_json, str(drawn))
        return
    text = path.read_text(encoding="utf-8")
    finish({"name": name, "text": text}, as_json, text.rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: str, to: Annotated[Path | None, typer.Argument(help="A file; NAME.yaml here.")] = None, as_json: Json = False
) -> None:
    """Copy a shipped recipe, to be changed."""
    from finetune.runs.folder import write_whole

    path, target = _shipped(name), to or Path(f"{name}.yaml")
    if target.exists():
        raise RunError(f"{target} is there already; name another file.")
    text = path.read_text(encoding="utf-8")
    write_whole(target, lambda draft: draft.write_text(text, encoding="utf-8"))
    finish({"recipe": str(target)}, as_json, str(target))


@recipes_app.command("check")
def recipes_check(
    files: Annotated[list[Path] | None, typer.Argument(help="Recipes; the shipped ones if none is named.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema for editors instead.")] = False,
    as_json: Json = False,
) -> None:
    """Every fault of every recipe, with its line."""
    from finetune.config.backbone_names import list_recipes
    from finetune.config.reading import load_recipe
    from finetune.config.recipe import Recipe
    from finetune.errors import RecipeError

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    faults: dict[str, str] = {}
    paths = files or list(list_recipes().values())
    for path in paths:
        try:
            load_recipe(path)
        except RecipeError as fault:
            faults[str(path)] = str(fault)
    finish(
        {"checked": len(paths), "faults": faults},
        as_json,
        "\n".join(faults.values()) or f"{len(paths)} recipes are right",
    )
    if faults:
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """Cards at hand, a line each; any timm or torchvision name works without one."""
    from finetune.model_selection.zoo import ShownCard, list_cards

    cards = list_cards()
    lines = [
        f"{card.name:<32} {card.params_m or 0:>7.2f} M  {card.input_size[1]:>4} px  {card.licence:<12} "
        f"{card.pretrained_on}"
        for card in cards.values()
    ]
    finish(
        {"cards": [ShownCard.of(card).model_dump(mode="json") for card in cards.values()]}, as_json, "\n".join(lines)
    )


@zoo_app.command("show")
def zoo_show(name: str, as_json: Json = False) -> None:
    """All that is known of a backbone."""
    from finetune.model_selection.zoo import ShownCard, card_text, show_card

    card = show_card(name)
    finish(ShownCard.of(card), as_json, card_text(card).rstrip())


@zoo_app.command("add")
def zoo_add(
    path: Annotated[Path, typer.Argument(help="A folder with card.yaml and its weights.")],
    statistics: Annotated[
        Path | None,
        typer.Option(help="Images of its source, to measure its features on; PATH may then be a card in the zoo."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a backbone into the zoo, its hash verified."""
    from finetune.model_selection.zoo import ShownCard, add_card

    card = add_card(path, statistics=statistics)
    finish(ShownCard.of(card), as_json, f"{card.name} is now in {card.weights and card.weights.parent.parent}")


@zoo_app.command("verify")
def zoo_verify(as_json: Json = False) -> None:
    """Compare every card's hash with its weights."""
    from finetune.model_selection.zoo import verify_cards

    faults = verify_cards()
    finish(
        {"cards": faults}, as_json, "\n".join(fault or f"{name}: as its card says" for name, fault in faults.items())
    )
    if any(faults.values()):
        raise typer.Exit(1)


@zoo_app.command("rank")
def zoo_rank(
    wish: Wish = None,
    among: Annotated[str, typer.Option(help="Only these: cards, timm or torchvision names, with commas.")] = "",
    max_params: Annotated[float | None, typer.Option(help="Most parameters, in millions.")] = None,
    licence: Annotated[str, typer.Option(help="Only these licences, or parts of their names, with commas.")] = "",
    as_json: Json = False,
) -> None:
    """Which backbone suits the images: probe, transferability and cost, on training images alone."""
    recipe = read_wish(wish)
    from finetune.model_selection.zoo import rank_cards
    from finetune.reporting.ranking_text import ranking_text

    found = rank_cards(recipe, among=split_words(among), max_params=max_params, licences=split_words(licence))
    finish(found, as_json, ranking_text(found))


def _shipped(name: str) -> Path:
    from finetune.config.backbone_names import list_recipes
    from finetune.errors import RecipeError, nearest

    recipes = list_recipes()
    if name not in recipes:
        hint = nearest(name, recipes, otherwise=f"There are {', '.join(recipes)}.")
        raise RecipeError(f"{name!r} is no shipped recipe. {hint}")
    return recipes[name]
