"""The zoo from outside: list, show, add, verify and rank cards.

Torch is loaded only where a backbone looks at images: to rank, and to measure the statistics of a source.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from finetune.config.backbone_names import is_run, read_zoo, user_zoo, why_no_card, zoo_folders
from finetune.config.card import Card, read_card
from finetune.config.section import Section
from finetune.errors import BackboneError, names_beside, nearest
from finetune.runs.folder import write_whole

if TYPE_CHECKING:
    from finetune.config.facts import Ranking
    from finetune.config.recipe import Recipe
    from finetune.features.source_statistics import SourceStatistics

STATISTICS = "statistics.safetensors"
Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Print a line for people; where standard error is closed, nobody reads it."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


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


def add_card(path: Path, *, statistics: Path | None = None, say: Say = say_on_stderr) -> Card:
    """Copy a card's folder into the first folder of FINETUNE_ZOO, or into the user's zoo, hash verified.

    With `statistics` also measure what the backbone's features of its source's images look like. A card that is in a
    zoo already stays where it is and only gets the statistics.

    Args:
        path: the card's folder, its card.yaml, or, with `statistics`, the name of a card at hand.
        statistics: images of the source: a folder of them, or of class folders.
        say: gets a line of progress now and then.

    Raises:
        BackboneError: if `path` holds no card, its weights are not those it names, the name is taken, or the card lies
            in a zoo that may not be written to.
        DataError: if `statistics` holds too few images.
    """
    folder = path.parent if path.name == "card.yaml" else path
    if statistics is not None and not folder.exists():
        weights = show_card(str(path)).weights
        assert weights is not None
        folder = weights.parent
    if not folder.exists():
        raise BackboneError(f"{folder} is not there. {nearest(folder.name, names_beside(folder))}".rstrip())
    if is_run(folder) and not (folder / "card.yaml").exists():
        raise BackboneError(f"{folder} {why_no_card(folder)}")
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
    if fault := weights_fault(card):
        raise BackboneError(fault)
    if statistics is not None and folder.resolve().parent in {zoo.resolve() for zoo in zoo_folders()}:
        _refuse_read_only(folder)
        _write_statistics(folder, _measure(card, statistics, say))
        return read_card(folder / "card.yaml")
    target = _own_zoo() / card.name
    if target.exists():
        raise BackboneError(f"{target} is there already; remove it first, or give the card another name.")
    found = _measure(card, statistics, say) if statistics is not None else None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{card.name}.{os.getpid()}.tmp")
    _copy_card(folder, card, partial)
    if found is not None:
        _write_statistics(partial, found)
    partial.rename(target)
    return read_card(target / "card.yaml")


def _own_zoo() -> Path:
    """Where a new card goes."""
    if named := os.environ.get("FINETUNE_ZOO", "").split(os.pathsep)[0]:
        return Path(named).expanduser()
    try:
        return user_zoo()
    except OSError as fault:
        raise BackboneError("you have no home folder that a card could be kept in; name one, FINETUNE_ZOO.") from fault


def _copy_card(folder: Path, card: Card, target: Path) -> None:
    """The whole folder of a card; of a run what its card names, for the rest is of no use to others."""
    if not is_run(folder):
        shutil.copytree(folder, target)
        return
    target.mkdir()
    for path in (folder / "card.yaml", folder / "classes.txt", card.weights, card.images):
        if path is not None and path.exists():
            shutil.copyfile(path, target / path.name)


def rank_cards(
    recipe: "Recipe",
    *,
    among: Sequence[str] = (),
    max_params: float | None = None,
    licences: Sequence[str] = (),
    say: Say = say_on_stderr,
) -> "Ranking":
    """Backbones in the order in which they suit the recipe's training images.

    Args:
        recipe: names the images; its backbone is ignored.
        among: cards, timm or torchvision names; none: every card at hand.
        max_params: millions of parameters, source classifier included, that a candidate may have.
        licences: names, or parts of names, of which a candidate's licence must match one; none: any licence.
        say: gets a line of progress for each candidate.

    Raises:
        BackboneError: if a name is unknown, or nothing is left to rank.
        DataError: if there is nothing to learn from.
        RecipeError: if no data is named.
    """
    from finetune.model_selection.ranking import rank_backbones
    from finetune.process import as_guest
    from finetune.saying import every_few_seconds

    cards = pick_cards(among=among, max_params=max_params, licences=licences)
    with as_guest():
        return rank_backbones(recipe, cards, progress=every_few_seconds(say))


def pick_cards(
    *, among: Sequence[str] = (), max_params: float | None = None, licences: Sequence[str] = ()
) -> dict[str, Card]:
    """Candidates by name, filtered as `rank_cards` says."""
    zoo = read_zoo()
    cards = {name: zoo[name] if name in zoo else _described(name, zoo) for name in among or zoo}
    if licences:
        kept = {licence for word in licences for licence in _matching(word, cards)}
        cards = {name: card for name, card in cards.items() if card.licence in kept}
    if max_params is not None:
        sizes = {name: card.params_m or _described(name, zoo).params_m or 0.0 for name, card in cards.items()}
        cards = {name: card for name, card in cards.items() if sizes[name] <= max_params}
        if not cards:
            least = min(sizes, key=sizes.__getitem__)
            raise BackboneError(
                f"--max-params {max_params:g} leaves no backbone; the smallest is {least} with {sizes[least]:g} "
                "million parameters."
            )
    return cards


def _matching(word: str, cards: dict[str, Card]) -> set[str]:
    """Licences called `word`, or that hold it."""
    known = sorted({card.licence for card in cards.values()})
    equal = {licence for licence in known if licence.casefold() == word.casefold()}
    if found := equal or {licence for licence in known if word.casefold() in licence.casefold()}:
        return found
    hint = nearest(word, known)
    raise BackboneError(f"--licence: no backbone has {word!r}; there are {', '.join(known)}. {hint}".rstrip())


def _described(name: str, zoo: dict[str, Card]) -> Card:
    """What is known of a name, perhaps without a card, once its network is built; its weights are not read."""
    from finetune.models.backbones import load_backbone

    return load_backbone(name, zoo=zoo, pretrained=False).card


def _measure(card: Card, images: Path, say: Say) -> "SourceStatistics":
    from finetune.features.source_statistics import measure_statistics
    from finetune.process import as_guest
    from finetune.saying import every_few_seconds

    tell = every_few_seconds(say)
    with as_guest():
        return measure_statistics(card, images, progress=lambda done, total: tell(card.name, done, total))


def _write_statistics(folder: Path, found: "SourceStatistics") -> None:
    """The file beside the weights first, then the card that names it."""
    path, card = folder / STATISTICS, folder / "card.yaml"
    text = re.sub(r"(?m)^statistics:.*\n?(?:[ \t].*\n?)*", "", card.read_text(encoding="utf-8"))
    try:
        found.save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entry = {"statistics": {"file": path.name, "sha256": digest, "images": found.num_images}}
        whole = text.rstrip() + "\n" + yaml.safe_dump(entry, sort_keys=False)
        write_whole(card, lambda temporary: temporary.write_text(whole, encoding="utf-8"))
    except PermissionError as fault:
        raise _read_only(folder) from fault


def _refuse_read_only(folder: Path) -> None:
    """By its mode, too: an administrator could write, and should not."""
    is_closed = any(not path.stat().st_mode & 0o222 for path in (folder, folder / "card.yaml"))
    if is_closed or not os.access(folder, os.W_OK):
        raise _read_only(folder)


def _read_only(folder: Path) -> BackboneError:
    return BackboneError(
        f"{folder} is read-only, so no statistics can be added to it. Copy the folder elsewhere, make the copy "
        "writable, and add that to a zoo of your own, named first in FINETUNE_ZOO."
    )


def verify_cards() -> dict[str, str]:
    """What is wrong with each card at hand; an empty text where nothing is."""
    return {name: card_fault(card) or "" for name, card in read_zoo().items()}


def card_fault(card: Card) -> str | None:
    """Why a card's weights or statistics cannot be trusted, or None."""
    return weights_fault(card) or statistics_fault(card)


def weights_fault(card: Card) -> str | None:
    """Why a card's weights cannot be trusted, or None."""
    if card.weights is None or not card.weights.exists():
        return f"{card.name}: its weights {card.weights} are not there."
    if card.sha256 is None:
        return f"{card.name}: its card names no sha256."
    return _hash_fault(card.name, card.weights, card.sha256, "copy the file again")


def statistics_fault(card: Card) -> str | None:
    """Why a card's source statistics cannot be trusted, or None, also where it has none."""
    if card.statistics is None:
        return None
    again = "measure them again with `finetune zoo add --statistics`"
    if not card.statistics.exists():
        return f"{card.name}: its statistics {card.statistics} are not there; {again}."
    return _hash_fault(card.name, card.statistics, card.statistics_sha256 or "", again)


def _hash_fault(name: str, path: Path, expected: str, mend: str) -> str | None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == expected:
        return None
    return f"{name}: {path} has sha256 {digest[:12]}, its card says {expected[:12]}; {mend}."


class ShownCard(Section):
    """A card as it is shown."""

    name: str
    arch: str
    arch_kwargs: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...]
    """The first few, and dots where there are more."""
    pretrained_on: str
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    licence: str
    params_m: float | None
    top1: float | None
    weights: str
    sha256: str | None
    statistics: str | None

    @classmethod
    def of(cls, card: Card) -> Self:
        """What is shown of a card."""
        alike = {name: getattr(card, name) for name in cls.model_fields.keys() - {"classes", "weights", "statistics"}}
        return cls(
            **alike,
            classes=(*card.classes[:5], "...") if len(card.classes) > 5 else card.classes,
            weights=str(card.weights),
            statistics=str(card.statistics) if card.statistics else None,
        )


def card_text(card: Card) -> str:
    """A card in full, as YAML."""
    return yaml.safe_dump(ShownCard.of(card).model_dump(mode="json"), sort_keys=False, allow_unicode=True)
