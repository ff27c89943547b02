"""A pilot: short trainings of the closest candidates, so that the choice of a strategy is tried and not only predicted.

Successive halving (Jamieson & Talwalkar, AISTATS 2016): all train for a share of the seconds, and the better half
goes on with more each, and so on. All are judged on val, which is therefore no longer a fair judge of the one
that is chosen: the scores of a run say so by looking at test.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from finetune.config.facts import Facts, PilotFacts
from finetune.config.recipe import DistillationSpec, Recipe
from finetune.errors import RecipeError
from finetune.features.survey import Survey
from finetune.metrics.shares import wilson
from finetune.planning.cost import EPOCH_SECONDS
from finetune.planning.matrix import ORDER
from finetune.planning.planner import make_plan
from finetune.training.own import NOTHING, OwnTraining

LEAST_STEPS = 30
"""Optimizer steps that a candidate gets at least; fewer show the disturbance of a start, not what it leads to."""


MOST_EPOCHS = 20
"""However many seconds there are."""


def run_pilot(
    recipe: Recipe, seen: Survey, seconds: float, say: Callable[[str], None], own: OwnTraining = NOTHING
) -> Facts:
    """The facts with what short trainings showed; about `seconds` are spent, whatever the images.

    Args:
        recipe: with the strategy open.
        seen: what the survey made.
        seconds: for all trainings together.
        say: prints a line for people.
        own: whose loss and change of images are used, and whose listeners hear of nothing.

    Raises:
        RecipeError: if the seconds are too few to show anything on this machine.
    """
    facts = seen.facts
    candidates = [name for name in ORDER if name != "probe"]
    needed = sum(_least_seconds(recipe, facts, name) for name in candidates)
    if seconds < needed:
        raise RecipeError(
            f"--pilot is {seconds:g} seconds, but {LEAST_STEPS} steps each of {' and '.join(candidates)} take about "
            f"{needed:.0f} here, and fewer would show nothing. Give it more."
        )
    rows: list[PilotFacts] = []
    rounds, left = len(candidates), seconds
    number = 0
    while candidates and left > 0:
        number += 1
        share = left / (len(candidates) * max(1, rounds - number + 1))
        for name in candidates:
            row = _try(recipe, seen, name, share, number, own)
            rows.append(row)
            left -= row.seconds
            say(f"pilot, round {number}: {name} {100 * row.val.value:.1f} % of val after {row.seconds:.0f} s")
        latest = {row.strategy: row.val.value for row in rows if row.round == number}
        if len(candidates) == 1:
            break
        candidates = sorted(candidates, key=lambda name: -latest[name])[: len(candidates) // 2]
    return facts.model_copy(update={"pilot": tuple(rows)})


def _try(recipe: Recipe, seen: Survey, strategy: str, seconds: float, number: int, own: OwnTraining) -> PilotFacts:
    """Train for about `seconds` and look at val; the backbone that was surveyed stays as it is."""
    from finetune.training.fit import fit  # here, for Lightning is slow to load
    from finetune.training.setup import make_batches, make_classifier
    from finetune.training.watching import Curves

    epochs, images = _size(seen.facts, strategy, seconds, recipe)
    alone = {"distillation": DistillationSpec()}  # a teacher would take most of the seconds, from all alike
    wish = recipe.train.model_copy(update={"strategy": strategy, "epochs": epochs, "checkpoint": "last", **alone})
    plan = make_plan(recipe.model_copy(update={"train": wish}), seen.facts)
    probe = {} if seen.probe is None else {"weight": seen.probe.weight.float(), "bias": seen.probe.bias.float()}
    began = time.perf_counter()
    classifier = make_classifier(plan, copy.deepcopy(seen.backbone), probe, seen.facts.counts["train"])
    train, val = make_batches(plan, seen.dataset, most_images=images, vary=own.vary)
    with tempfile.TemporaryDirectory() as folder:
        curves = Curves(Path(folder) / "curves.csv")
        here = Path(folder)
        fit(
            plan, 0, classifier, train, val, here, curves,
            members=here, own=OwnTraining(loss=own.loss), say=lambda text: None, notify=lambda: None,
        )  # fmt: skip
        found = [row for row in curves.rows() if row["name"] == "val/top1" and int(row["epoch"]) >= 0]
    num_val = len(val.indices)
    share = wilson(round(float(found[-1]["value"]) * num_val), num_val)
    return PilotFacts(
        strategy=strategy,
        round=number,
        epochs=epochs,
        images=len(train.indices),
        seconds=time.perf_counter() - began,
        val=share,
    )


def _size(facts: Facts, strategy: str, seconds: float, recipe: Recipe) -> tuple[int, int]:
    """Epochs and images that fit into `seconds`, by the timing of this machine; at least a batch, once."""
    speed = _speed(recipe, facts, strategy)
    num_train, num_val = sum(facts.counts["train"]), sum(facts.counts["val"])
    judging = num_val / facts.forward_images_per_second + EPOCH_SECONDS
    budget = max(0.0, seconds - judging)  # val is looked at before the first epoch, too
    epochs = int(budget / (num_train / speed + judging))
    if epochs >= 1:
        return min(epochs, MOST_EPOCHS), num_train
    return 1, max(min(recipe.train.batch_size * LEAST_STEPS, num_train), int((budget - judging) * speed))


def _least_seconds(recipe: Recipe, facts: Facts, strategy: str) -> float:
    batch = min(recipe.train.batch_size, sum(facts.counts["train"]))
    judging = 2 * sum(facts.counts["val"]) / facts.forward_images_per_second
    return LEAST_STEPS * batch / _speed(recipe, facts, strategy) + judging


def _speed(recipe: Recipe, facts: Facts, strategy: str) -> float:
    """Images per second of a training, by the timing of this machine."""
    wish = recipe.train.model_copy(update={"strategy": strategy, "distillation": DistillationSpec()})
    depth = make_plan(recipe.model_copy(update={"train": wish}), facts).stages[0].trainable_stages
    speeds = {row.trains: row.images_per_second for row in facts.timing}
    return speeds.get(str(depth)) or speeds[str(len(facts.backbone.stages))]
