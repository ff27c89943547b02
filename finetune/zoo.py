"""The zoo from outside: list, show, add and verify cards. No torch is loaded for any of it."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import BackboneError, nearest
from finetune.recipe.cards import Card, read_card
from finetune.recipe.shelf import read_zoo, user_zoo


def list_cards() -> dict[str, Card]:
    """Every card at hand by name."""
    return read_zoo()


def show_card(name: str) -> Card:
    """One card.

    Raises:
        BackboneError: if no zoo folder holds it.
    """
    cards = read_zoo()
    if name not in cards:
        raise BackboneError(
            f"{name!r} is no card in the zoo. {nearest(name, cards, otherwise='`finetune zoo list` shows all.')}"
        )
    return cards[name]


def add_card(path: Path) -> Card:
    """Copy a card's folder into the first folder of FINETUNE_ZOO, or into the user's zoo, hash verified.

    Raises:
        BackboneError: if `path` holds no card, its weights are not those it names, or the name is taken.
    """
    folder = path.parent if path.name == "card.yaml" else path
    if not (folder / "card.yaml").exists():
        raise BackboneError(
            f"{folder} holds no card.yaml. Write one beside the safetensors file; "
            "`finetune zoo show NAME` prints an example."
        )
    card = read_card(folder / "card.yaml")
    if Path(card.name).name != card.name or card.name.startswith("."):
        raise BackboneError(
            f"{folder}: the card's name {card.name!r} is no name of a folder; use letters, digits, . and _."
        )
    if fault := card_fault(card):
        raise BackboneError(fault)
    named = os.environ.get("FINETUNE_ZOO", "").split(os.pathsep)[0]
    target = (Path(named).expanduser() if named else user_zoo()) / card.name
    if target.exists():
        raise BackboneError(f"{target} is there already; remove it first, or give the card another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{card.name}.{os.getpid()}.tmp")
    shutil.copytree(folder, partial)
    partial.rename(target)
    return read_card(target / "card.yaml")


def verify_cards() -> dict[str, str]:
    """What is wrong with each card at hand; an empty text where nothing is."""
    return {name: card_fault(card) or "" for name, card in read_zoo().items()}


def card_fault(card: Card) -> str | None:
    """Why a card's weights cannot be trusted, or None."""
    if card.weights is None or not card.weights.exists():
        return f"{card.name}: its weights {card.weights} are not there."
    if card.sha256 is None:
        return f"{card.name}: its card names no sha256."
    digest = hashlib.sha256(card.weights.read_bytes()).hexdigest()
    if digest != card.sha256:
        return (
            f"{card.name}: {card.weights} has sha256 {digest[:12]}, its card says {card.sha256[:12]}; "
            "copy the file again."
        )
    return None


def card_text(card: Card) -> str:
    """A card in full, as YAML."""
    return yaml.safe_dump(card_object(card), sort_keys=False, allow_unicode=True)


def card_object(card: Card) -> dict[str, Any]:
    """A card as plain values; of its classes, the number and the first few."""
    return {
        "name": card.name,
        "arch": card.arch,
        "arch_kwargs": dict(card.arch_kwargs),
        "num_classes": card.num_classes,
        "classes": [*card.classes[:5], "..."] if len(card.classes) > 5 else list(card.classes),
        "pretrained_on": card.pretrained_on,
        "input_size": list(card.input_size),
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "crop_pct": card.crop_pct,
        "licence": card.licence,
        "params_m": card.params_m,
        "top1": card.top1,
        "weights": str(card.weights),
        "sha256": card.sha256,
    }
