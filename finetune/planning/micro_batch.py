"""How many images pass through the network at once. Pure, as all planning is.

What a forward pass keeps for its backward pass is most of the memory of a training. A step whose images pass in
pieces keeps the activations of one piece; its gradient, a sum over images, stays what it was, to rounding.
"""

from typing import Any

from finetune.compute import Device
from finetune.config.facts import Facts
from finetune.config.recipe import Recipe
from finetune.errors import RecipeError
from finetune.planning.stages import Decide

PASS_PIXELS = 16 * 224 * 224
"""Of all images of a pass on a CPU that keeps nothing for a backward pass."""
STEP_PIXELS = 12 * 224 * 224
"""Of one that does. What it keeps of more outweighs the process, and fewer take longer: `benchmarks/memory.py`."""


def decide_micro_batch(recipe: Recipe, facts: Facts, train: dict[str, Any], device: Device, decide: Decide) -> int:
    """`hardware.micro_batch` with nothing open.

    Args:
        recipe: may say it.
        facts: of the images' size and of the backbone.
        train: the decided section.
        device: of the plan.
        decide: writes the reason down.

    Raises:
        RecipeError: if the recipe cuts a step whose batch norm takes its statistics from all of it.
    """
    wish, batch = recipe.hardware.micro_batch, int(train["batch_size"])
    if train["strategy"] == "probe":
        return wish or 0
    if wish and wish < batch and _needs_whole(facts, train):
        raise RecipeError(
            f"hardware.micro_batch is {wish}, but with train.batch_norm={train['batch_norm']} batch norm takes its "
            f"statistics from all {batch} images of a step, and a piece would be normalised by its own. Set "
            "hardware.micro_batch to 0, or train.batch_norm to frozen."
        )
    choice, why = _choice(facts, train, device)
    if wish is None and choice == batch:
        return batch  # nothing is cut, and nothing to be said
    return int(decide("hardware.micro_batch", wish, choice, why))


def images_at_once(recipe: Recipe, facts: Facts, train: dict[str, Any], device: Device) -> int:
    """Images of a step that pass at once in whichever strategy, for what is foretold of those not taken too."""
    batch = int(train["batch_size"])
    wish = 0 if _needs_whole(facts, train) else recipe.hardware.micro_batch
    return min(batch, wish or batch) if wish is not None else _choice(facts, train, device)[0]


def _needs_whole(facts: Facts, train: dict[str, Any]) -> bool:
    return bool(train["batch_norm"] != "frozen" and facts.backbone.has_batch_norm)


def _choice(facts: Facts, train: dict[str, Any], device: Device) -> tuple[int, str]:
    batch, size = int(train["batch_size"]), facts.view.size_pixels
    if _needs_whole(facts, train) or device != "cpu":  # a GPU is fastest with all at once
        return batch, "all images of a step pass at once"
    images = min(batch, max(1, STEP_PIXELS // size**2))
    return images, (
        f"on a CPU {images} images of {size} px at a time take less memory than {batch} at little more time; no image "
        "sees another where batch norm is held still, so the gradient of a step is the same"
    )
