"""Opening: which images and which backbone are opened, how they are seen, and what is measured on them.

A recipe leaves some of that open, and what is needed to decide it is measured; a plan has decided it all, and only what
training and judging need is measured.
"""

from dataclasses import dataclass

from finetune.config.backbone_names import default_backbone
from finetune.config.plan import Plan
from finetune.config.recipe import DataSpec, HardwareSpec, Recipe


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a survey starts from."""

    data: DataSpec
    """The images, their division, and how they become tensors; what is null there is that of the weights."""
    seed: int
    backbone: str
    pretrained: bool
    hardware: HardwareSpec
    batch_size: int
    """Images per training step, by which training is timed."""
    normalize: str | None
    """Where a plan says that its mean and std come from; None: of a recipe, which may want them measured."""
    for_advice: bool
    """Measure what only the choice of a strategy needs."""
    for_training: bool
    """More than a probe will be made, so decoded images are kept."""
    for_flips: bool
    """Measure whether mirroring shows."""
    for_surgery: bool
    """Compare the gradients of the stages."""
    refits_probe: bool
    """Solve the probe on all labelled images too."""

    @property
    def is_decided(self) -> bool:
        """Whether it is of a plan."""
        return self.normalize is not None


def opening_of(wish: Recipe | Plan) -> Opening:
    """What a recipe wishes to be opened, or a plan says."""
    return _of_plan(wish) if isinstance(wish, Plan) else _of_recipe(wish)


def _of_recipe(recipe: Recipe) -> Opening:
    strategy, hardware = recipe.train.strategy, recipe.hardware
    if recipe.train.optimizer.name == "lbfgs" and hardware.precision == "auto":
        hardware = hardware.model_copy(update={"precision": "32"})  # as the plan will say
    return Opening(
        data=recipe.data,
        seed=recipe.seed,
        backbone=recipe.backbone or default_backbone(),
        pretrained=recipe.pretrained,
        hardware=hardware,
        batch_size=recipe.train.batch_size,
        normalize=None,
        for_advice=strategy is None,
        for_training=strategy != "probe",
        for_flips=strategy != "probe" and recipe.data.invariances is None,
        for_surgery=strategy == "surgical",
        refits_probe=recipe.data.split.refit is not False,
    )


def _of_plan(plan: Plan) -> Opening:
    return Opening(
        data=plan.data,
        seed=plan.seed,
        backbone=plan.backbone,
        pretrained=plan.pretrained,
        hardware=plan.hardware,
        batch_size=plan.train.batch_size,
        normalize=plan.data.normalize,
        for_advice=False,
        for_training=bool(plan.stages),
        for_flips=False,
        for_surgery=False,
        refits_probe=plan.probe_on == "labelled",
    )
