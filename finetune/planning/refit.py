"""Refit: whether a model, once val has chosen, is trained again on all labelled images. Pure, as all planning is.

The word is scikit-learn's (`GridSearchCV`) and AutoGluon's (`refit_full`). A refit repeats what was decided and changes
nothing of it; so nothing that needs val on the way can be repeated.
"""

from collections.abc import Sequence
from typing import NamedTuple

from finetune.config.facts import Facts, Findings
from finetune.config.plan import Images, Stage
from finetune.config.recipe import Recipe, TrainSpec

LEAST_VAL = 100
"""Val images from which a fine-tuned model is not refit: they tell epochs and strategies apart, and hold a temperature.
With fewer they decide little; see `benchmarks/refit.py`."""


class Refit(NamedTuple):
    """What ends on all labelled images, and why."""

    is_refit: bool
    """The model that is shipped."""
    probe_on: Images
    why: str


def is_worth_refitting(num_val: int) -> bool:
    """Whether a fine-tuned model gains more from training on val than val gives by choosing: where it is small."""
    return num_val < LEAST_VAL


def decide_refit(recipe: Recipe, facts: Facts, strategy: str) -> Refit:
    """What is refit with `strategy`, as the recipe says or, where it does not, as the facts do."""
    wish, num_val = recipe.data.split.refit, sum(facts.counts["val"])
    if not has_more(facts):
        why = "no val or calibration image is there that is not among test too, so there is nothing to add"
        return Refit(False, "train", why)
    probe_on: Images = "labelled" if recipe.pretrained and wish is not False else "train"
    images = _images(facts)
    also = f"; the probe alone ends on {images}" if probe_on == "labelled" else ""
    if strategy == "probe":
        return Refit(wish is not False, probe_on, f"its penalty is chosen, and the probe is solved again on {images}")
    if obstacle := refit_obstacle(recipe.train):
        return Refit(False, probe_on, f"{obstacle}{also}")
    if wish is None and not is_worth_refitting(num_val):
        return Refit(False, probe_on, f"{num_val} val images tell epochs apart, and judge the model that is kept{also}")
    few = f"{num_val} val images (< {LEAST_VAL}) decide little, and can teach: what they watched is trained again on"
    return Refit(wish is not False, probe_on, f"{few} {images}")


def refit_obstacle(train: TrainSpec) -> str:
    """What a training asks for that cannot be repeated without val, in words; nothing where all can."""
    if train.schedule.name == "plateau":
        return "train.schedule.name plateau falls where val says so, and a refit has no val"
    if train.averaging.snapshots:
        return "train.averaging.snapshots keeps members that val is to choose among, and a refit has no val"
    if train.averaging.keep_last:
        return "train.averaging.keep_last keeps members that val is to choose among, and a refit has no val"
    if train.optimizer.name == "lbfgs":
        return "train.optimizer.name lbfgs takes all training images in one batch, which holds no more than them"
    return ""


def with_refit(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, and each of them again on all labelled images."""
    return [*stages, *(stage.model_copy(update={"name": "refit", "images": "labelled"}) for stage in stages)]


def is_cross_fitted(found: Findings) -> bool:
    """Whether a refit probe is judged by folds: where its penalty was chosen by folds, for val is small."""
    return found.probe is not None and found.probe.chosen_by == "cross-validation"


def has_more(facts: Facts) -> bool:
    """Whether more images are labelled than those for training."""
    return sum(facts.labelled) > sum(facts.counts["train"])


def _images(facts: Facts) -> str:
    """How many images there are to end on, and what they were for, in words."""
    counts = {role: sum(facts.counts[role]) for role in ("train", "val", "calibration")}
    parts = ", ".join(f"{count:,} {role}" for role, count in counts.items() if count)
    given = [role for role in ("val", "calibration") if role in facts.given_roles and counts[role]]
    named = f", {' and '.join(given)} as the data name them" if given else ""
    left = sum(counts.values()) - sum(facts.labelled)
    told = f"; {left:,} whose bytes are also in test are left out" if left else ""
    return f"all {sum(facts.labelled):,} labelled images ({parts}{named}{told})"
