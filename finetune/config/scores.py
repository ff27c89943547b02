"""Scores: what was judged of a run, each number with its interval. A frozen value, kept as `scores.json`.

The file is the dump of the value. What does not apply to a run is None, and is left out of the file; only where the
absence is itself an answer (`Told`) is it written, as null.
"""

from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from finetune.config.measures import Measure, Proportion

T = TypeVar("T")
_TOLD = "told"
Told = Annotated[T | None, _TOLD]
"""None is written as null: that there is none is worth telling."""


class Judged(BaseModel):
    """A frozen part of what was judged; a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_serializer(mode="wrap")
    def _leave_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        told = {name for name, field in type(self).model_fields.items() if _TOLD in field.metadata}
        return {name: value for name, value in dump(self).items() if value is not None or name in told}


class _OfRole(Generic[T]):
    def of(self, role: str) -> T | None:
        """What is said of the images of `role`, val or test; None where there are none."""
        found: T | None = getattr(self, role)
        return found


class ByRole(Judged, _OfRole[T], Generic[T]):
    """The same of val and of test."""

    val: T | None = None
    test: T | None = None


class ClassScore(Judged):
    """How one class fares. What cannot be measured is None, not zero."""

    name: str
    n: int
    """Images of this class."""
    precision: Told[Proportion] = None
    """Share of the images called so that are so; None where none was called so."""
    recall: Told[Proportion] = None
    """Share of the images of this class that were found; None where there are none."""
    f1: Told[float] = None
    """2TP / (2TP + FP + FN); None where the class occurs neither as truth nor as decision."""


class SplitScores(Judged):
    """Every score of one model on the images of one role."""

    n: int
    majority: float | None = None
    """Share of the largest class: the top-1 accuracy of naming it always. None in runs of before it was kept."""
    balanced_accuracy: Measure
    """The mean recall of the classes."""
    macro_f1: Measure | None = None
    """The mean F1 of the classes; None in runs of before it was kept."""
    top1: Proportion
    top5: Told[Proportion] = None
    """None for five classes or fewer, where it could not fail."""
    log_loss: Measure
    """In nats."""
    ece: Measure
    """Expected calibration error, in [0, 1]."""
    per_class: tuple[ClassScore, ...]
    """In the order of the classes."""
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Counts (K, K): rows are the truth, columns the decision. None where it would be a million of them."""
    held_out: str | None = None
    """Who answered, where it is not the model that is shipped."""


class Difference(Judged):
    """One accuracy minus another on the same images, with its paired 95 % interval."""

    difference: float
    low: float
    high: float
    n: int

    @property
    def measure(self) -> Measure:
        """The same as a number with its interval."""
        return Measure(value=self.difference, low=self.low, high=self.high, n=self.n)


class Paired(Difference):
    """A difference in top-1 accuracy, with the images that one of the two alone answers rightly."""

    SIDES: ClassVar[tuple[str, str]]
    """What the two are called: the counts are `only_SIDE_right`."""
    balanced: Difference | None = None
    """The same in balanced accuracy; None in runs of before it was kept."""


class AgainstProbe(Paired):
    """The final model minus the probe."""

    SIDES = ("final", "probe")
    only_final_right: int
    only_probe_right: int


class AgainstTeacher(Paired):
    """The student minus its teacher."""

    SIDES = ("final", "teacher")
    only_final_right: int
    only_teacher_right: int


class AgainstCenter(Paired):
    """All views minus the centre alone."""

    SIDES = ("final", "center")
    only_final_right: int
    only_center_right: int

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, found: Any) -> Any:
        """Runs of before called the centre `probe` here."""
        if isinstance(found, dict) and "only_probe_right" in found:
            return {"only_center_right" if key == "only_probe_right" else key: found[key] for key in found}
        return found


class AgainstOrdinary(Paired):
    """The mean of draws minus the ordinary answer."""

    SIDES = ("draws", "ordinary")
    only_draws_right: int
    only_ordinary_right: int
    log_loss_difference: Measure


class Temperature(Judged):
    """A fitted temperature, and what it did to the images it was fitted on."""

    value: Told[float] = None
    """Above 1 where the classifier was too sure. None where the images name no temperature: all are
    right (the colder the better), confidence misleads (the hotter the better), or logits are constant.
    Leave the probabilities as they are then."""
    n: int
    """Images it was fitted on; they must have served no other purpose."""
    log_loss_before: float
    log_loss_after: float
    """Never above `log_loss_before`."""
    ece_before: float
    ece_after: float
    """15 bins; biased upward for small n."""
    held_out: str | None = None
    """Who answered, where it is not the model that is shipped."""


class SetScores(Judged):
    """What the prediction sets of some images are like."""

    promised: float
    """Share of sets that shall hold the true class."""
    threshold: float
    num_calibration: int
    """Images that the threshold was fitted on."""
    coverage: Proportion
    """Share of sets that hold the true class."""
    expected: tuple[float, float]
    """Where `coverage` should lie, over endlessly many images."""
    mean_size: Measure
    """Classes in a set."""
    largest: int
    single: int
    """Sets of one class."""
    single_right: int
    empty: int
    note: Told[str] = None
    """What the reader must know."""


class Conformal(Judged):
    """The prediction sets of a run."""

    coverage: float
    """Share of sets that shall hold the true class."""
    threshold: float
    """The largest 1 - p that a class in a set may have, before any temperature."""
    num_calibration: int
    held_out: str | None = None
    """Who answered for the calibration images, where it is not the model that is shipped."""
    test: SetScores | None = None


class ViewRow(Judged):
    """What one view says alone, or their average."""

    name: str
    top1: Proportion
    log_loss: Measure


class ViewsGain(Judged, _OfRole[AgainstCenter]):
    """All views minus the centre alone."""

    crops: int
    """Passes through the network that an image takes."""
    val: AgainstCenter | None = None
    test: AgainstCenter | None = None


class TeacherScores(Judged, _OfRole[SplitScores]):
    """The teacher beside its student."""

    run: str
    networks: int
    views: str | None = None
    """In which it looked at images; None where its answers are not at hand, and so is all but `note`."""
    passes: int | None = None
    """Through a network, for one image."""
    student_passes: int | None = None
    views_note: str | None = None
    val: SplitScores | None = None
    test: SplitScores | None = None
    paired: ByRole[AgainstTeacher] | None = None
    note: str | None = None
    """Why the two are not compared."""


class Draws(Judged, _OfRole[SplitScores]):
    """The mean over draws of the head's dropout, in the centre view, beside the ordinary answer there."""

    n: int
    """Draws; 0 where nothing could be drawn, as `sentence` says."""
    temperature: Told[Temperature] = None
    val: SplitScores | None = None
    test: SplitScores | None = None
    paired: ByRole[AgainstOrdinary] | None = None
    entropy: ByRole[Measure] | None = None
    """Of the mean, in nats: all the doubt there is."""
    mutual_information: ByRole[Measure] | None = None
    """The part of it that is disagreement between draws."""
    sentence: str | None = None


class MemberRow(Judged):
    """One line of the table of an ensemble: a member, the mean of members, or the ensemble of the first few."""

    name: str
    num_members: int
    """Whose predictions are in it; of the mean, all."""
    log_loss: float
    accuracy: float
    interval: Told[Proportion] = None
    """Of the accuracy; None for the mean of members, which is no share of images."""
    ece: float
    disagreement: float
    """Share of images on which two members decide differently: a member with the others, else mean over pairs."""
    cost: int
    """Networks that a prediction has to run."""
    gain: Told[float] = None
    """Accuracy above the mean accuracy of its members; None where nothing is averaged."""


class Refit(Judged):
    """What was trained again on all labelled images, and who so answers for which."""

    model: bool
    probe: bool
    num_images: dict[str, int]
    """By role."""
    note: str


class Experiment(Judged):
    """One change of the recipe that is worth trying next."""

    key: str
    value: str
    why: str


class Scores(Judged, _OfRole[SplitScores]):
    """All that was judged of one run: `val` and `test` of the final model, over its views, after its temperature."""

    views: str
    views_note: Told[str] = None
    """Why they are not those that were asked for."""
    classes: tuple[str, ...]
    refit: Refit | None = None
    temperature: Told[Temperature] = None
    val: SplitScores | None = None
    test: SplitScores | None = None
    conformal: Conformal | None = None
    """None where there are no calibration images."""
    views_table: tuple[ViewRow, ...] | None = None
    """On test, before any temperature: each view in its order, then their average. None where there is one view."""
    views_table_note: str | None = None
    center: ByRole[SplitScores] | None = None
    """The final model in the centre view alone, where there are more."""
    views_gain: ViewsGain | None = None
    probe: ByRole[SplitScores] | None = None
    """None where the backbone has random weights."""
    paired: ByRole[AgainstProbe] | None = None
    """None where the final model is the probe."""
    teacher: TeacherScores | None = None
    draws: Draws | None = None
    next: Told[Experiment] = None
    chosen_by_val: tuple[str, ...] = ()
    """What looked at val on the way to the model, one entry `key: how`; so much does val flatter it."""
    members: ByRole[tuple[MemberRow, ...]] | None = None
    """Of an average of several networks."""

    @property
    def is_probe(self) -> bool:
        """Whether the final model is the probe itself."""
        return self.probe is not None and self.paired is None

    @property
    def temperature_value(self) -> float:
        """What logits are divided by; 1 where nothing was fitted."""
        return (self.temperature and self.temperature.value) or 1.0
