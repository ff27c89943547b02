"""A case for the tables of conflicts: a recipe, facts, and what their rows ask of the two."""

from dataclasses import dataclass

from finetune.config.facts import Facts, TeacherFacts
from finetune.config.model_keys import AugmentSpec, HeadSpec, RegularizationSpec
from finetune.config.recipe import AveragingSpec, Recipe, TrainSpec
from finetune.planning.activations import judge_activation
from finetune.planning.refit import has_more, refit_obstacle
from finetune.planning.wise_ft import hindrances


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is wished, what is known, and which strategy it comes to, as far as that is known."""

    recipe: Recipe
    facts: Facts
    strategy: str | None
    """None: the recipe leaves it open, and no advice was asked yet."""
    why: str = ""
    """The advice."""

    @property
    def train(self) -> TrainSpec:
        """Of the recipe."""
        return self.recipe.train

    @property
    def averaging(self) -> AveragingSpec:
        """Of the recipe."""
        return self.recipe.train.averaging

    @property
    def head(self) -> HeadSpec:
        """Of the recipe."""
        return self.recipe.head

    @property
    def augment(self) -> AugmentSpec:
        """Of the recipe."""
        return self.recipe.augment

    @property
    def rules(self) -> RegularizationSpec:
        """Of the recipe."""
        return self.recipe.regularization

    @property
    def is_drawn(self) -> bool:
        """Whether some weights of the backbone are random when training begins."""
        return not self.recipe.pretrained or self.train.reinit > 0

    @property
    def num_stages(self) -> int:
        """Of the backbone."""
        return len(self.facts.backbone.stages)

    @property
    def num_train(self) -> int:
        """Training images."""
        return sum(self.facts.counts["train"])

    @property
    def cycles(self) -> int:
        """Of the schedule as the recipe says, or as the snapshots ask for."""
        is_said = "cycles" in self.train.schedule.model_fields_set
        return self.train.schedule.cycles if is_said else self.averaging.snapshots

    @property
    def mixture(self) -> str:
        """What is in the way of a mixture that the recipe asks for."""
        if self.averaging.wise_ft in (None, 1) or self.strategy == "probe":
            return ""
        return ", and ".join(hindrances(self.recipe, self.facts, self.strategy or "full"))

    @property
    def obstacle(self) -> str:
        """What is in the way of a refit that the recipe asks for."""
        is_wanted = self.recipe.data.split.refit and self.strategy != "probe" and has_more(self.facts)
        return refit_obstacle(self.train) if is_wanted else ""

    @property
    def activation(self) -> str:
        """Why the hidden layer cannot have its activation."""
        verdict = judge_activation(self.head.activation)
        return verdict.why if verdict.verdict == "refused" else ""

    @property
    def drops(self) -> bool:
        """Whether the head drops anything in training."""
        return bool(self.head.dropout or self.head.drop_connect)

    @property
    def classes(self) -> str:
        """Of the images."""
        return ", ".join(self.facts.classes)

    @property
    def swapped(self) -> list[str]:
        """Every class that `data.flip_label_pairs` names, as often as it does."""
        return [name for pair in self.recipe.data.flip_label_pairs for name in pair]

    @property
    def strangers(self) -> str:
        """Those that are no class."""
        return ", ".join(repr(name) for name in dict.fromkeys(self.swapped) if name not in self.facts.classes)

    @property
    def twice(self) -> str:
        """Those that are named more than once."""
        return ", ".join(repr(name) for name in dict.fromkeys(self.swapped) if self.swapped.count(name) > 1)

    @property
    def judged(self) -> str:
        """Why the model is the probe, where it is."""
        return "the recipe says so" if self.train.strategy else f"the advice is: {self.why}"

    @property
    def teacher(self) -> str | None:
        """As the recipe names it."""
        return self.train.distillation.teacher

    @property
    def known(self) -> TeacherFacts | None:
        """What is known of the teacher that the recipe names."""
        return None if self.teacher is None else self.facts.teacher

    @property
    def knows_others(self) -> bool:
        """Whether the teacher knows other classes than those of the images, or in another order."""
        return self.known is not None and self.known.classes != self.facts.classes

    @property
    def knows_split(self) -> bool | None:
        """Whether the teacher was trained on this very split; None where no teacher is known."""
        return None if self.known is None else self.known.split_digest == self.facts.split_digest

    @property
    def their_run(self) -> str:
        """The teacher's folder."""
        return self.known.run if self.known else ""

    @property
    def their_split(self) -> str:
        """Of the teacher's images, cut short."""
        return self.known.split_digest[:12] if self.known else ""

    @property
    def their_classes(self) -> str:
        """The first that the teacher knows."""
        return ", ".join(self.known.classes[:5]) if self.known else ""

    @property
    def our_classes(self) -> str:
        """The first that the student will know."""
        return ", ".join(self.facts.classes[:5])

    @property
    def other_view(self) -> dict[str, tuple[object, object]]:
        """By key of `data`, what the teacher's view and the student's have, where the two differ.

        Mean and std may differ: the teacher is given its own.
        """
        known, facts, pairs = self.known, self.facts, dict[str, tuple[object, object]]()
        if known is not None:
            pairs["image_size"] = (known.view.size_pixels, facts.view.size_pixels)
            pairs["crop_pct"] = (known.crop_pct, facts.crop_pct)
            pairs["interpolation"] = (known.view.interpolation, facts.view.interpolation)
        return {key: (theirs, ours) for key, (theirs, ours) in pairs.items() if theirs != ours}

    @property
    def our_view(self) -> str:
        """Where it differs, as it is here."""
        return ", ".join(f"{key} {ours}" for key, (_, ours) in self.other_view.items())

    @property
    def their_view(self) -> str:
        """Where it differs, as the recipe would say it."""
        return " ".join(f"data.{key}={theirs}" for key, (theirs, _) in self.other_view.items())
