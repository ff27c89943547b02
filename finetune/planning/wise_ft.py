"""When what ships is a mixture of the start and the end of a training (WiSE-FT), and of which shares."""

from finetune.config.facts import Facts
from finetune.config.recipe import Recipe
from finetune.planning.advisor import SMALL_PER_CLASS, is_small

SHARE = 0.75
"""Of the trained weights in what ships: see docs/training.md."""


def mixture_share(recipe: Recipe, facts: Facts, strategy: str) -> tuple[float, str]:
    """`train.averaging.wise_ft` where the recipe leaves it open; and why."""
    if strategy == "probe":
        return 1.0, "nothing trains"
    if needs := hindrances(recipe, facts, strategy):
        return 1.0, f"what is trained ships as it is, for {needs[0]}"
    if recipe.train.distillation.teacher is not None:
        return 1.0, "a student ships as its teacher left it"
    averaging = recipe.train.averaging
    if averaging.snapshots or averaging.keep_last or averaging.kind in ("ema", "swa"):
        return 1.0, "the recipe averages in another way"
    if not is_small(facts):
        return (
            1.0,
            f"a mixture was measured below {SMALL_PER_CLASS} images per class; here what is trained ships as it is",
        )
    return SHARE, "the rest is the start under its probe: a little less accurate, and much less often sure and wrong"


def hindrances(recipe: Recipe, facts: Facts, strategy: str) -> list[str]:
    """Why start and end would not make one network."""
    train, head = recipe.train, recipe.head
    found = []
    if not recipe.pretrained or facts.probe is None:
        found.append("random weights are no network to go back to")
    elif head.kind != "linear" or head.init not in (None, "probe"):
        what = f"kind {head.kind}" if head.kind != "linear" else f"init {head.init}"
        found.append(f"training does not begin from the probe (head.{what})")
    if train.reinit:
        found.append("train.reinit throws part of the start away")
    if strategy == "lora":
        found.append("train.strategy lora trains matrices that the start does not have")
    if train.batch_norm in ("train", "statistics") and facts.backbone.has_batch_norm:
        found.append(f"train.batch_norm {train.batch_norm} moves statistics, which cannot be mixed")
    return found
