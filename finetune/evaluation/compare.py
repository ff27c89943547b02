"""Comparing: which of several finished runs is better, as far as their test images can tell.

Only test counts. Val chose epochs, penalties and strategies (see `selection_flags`), so on val the run that chose
most looks best. Runs are compared image by image, matched by name; what cannot be told apart is said to be so.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from statistics import NormalDist

import numpy as np
import torch

from finetune.config.comparison import Apart, ComparedRun, Comparison, GroupPair, RunPair, SeedGroup, Seeds
from finetune.config.measures import Measure
from finetune.config.plan import Plan
from finetune.errors import RunError
from finetune.metrics.classification import decide, log_losses, top_k_accuracy
from finetune.metrics.intervals import bootstrap_mean, paired_difference
from finetune.metrics.significance import LEVEL, adjust, aggregate_seeds, images_needed, mcnemar, mean_difference
from finetune.process import as_guest
from finetune.runs.folder import RunFolder

POINT = 0.01
"""The difference that `images_needed` counts images for."""
LEAST_SEEDS = 3
"""With fewer in common, two groups of runs are not judged."""
_BY_USER = "the recipe says so"


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """One run's word on its test images, in the order of their names."""

    label: str
    plan: Plan
    views: str
    probe_chosen_by: str
    names: np.ndarray  # (N,)
    probabilities: torch.Tensor  # (N, K), columns as in the first run
    labels: torch.Tensor  # (N,)

    @property
    def is_right(self) -> torch.Tensor:
        return decide(self.probabilities) == self.labels  # (N,)

    def part(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether right, and the log loss, of some images; each (n,)."""
        where = torch.from_numpy(rows)
        return self.is_right[where], log_losses(self.probabilities[where], self.labels[where])


@as_guest()
def compare(runs: Sequence[str | PathLike[str]]) -> Comparison:
    """How finished runs differ on the test images that they share, with 95 % intervals. Nothing is chosen here.

    Args:
        runs: two or more, or their folders or names; judged, and none twice.

    Raises:
        RunError: if there are fewer than two, one is not judged or has no test images, they tell different classes
            apart, an image bears another label in another run, or no two of them have anything in common.
    """
    if len(runs) < 2:
        raise RunError(f"a comparison takes two runs or more, got {len(runs)}.")
    folders = [RunFolder.open(run) for run in runs]
    if len({run.path.resolve() for run in folders}) < len(folders):
        raise RunError("a run is named twice; name each once.")
    judged = [_read(run, label, folders[0]) for run, label in zip(folders, _labels(folders), strict=True)]
    rows = sorted(((_row(one), one) for one in judged), key=lambda pair: _place(pair[0]))
    judged = [one for _, one in rows]
    found, apart = [], []
    for first, second in combinations(judged, 2):
        if (beside := _beside(first, second)) is None:
            apart.append(Apart(first=first.label, second=second.label))
        else:
            found.append(beside)
    groups = _seed_groups(judged)
    if not found and not groups:
        raise RunError(
            f"{judged[0].label} and {judged[1].label} share no test image, so nothing can be compared. "
            "Give runs on the same images with the same seed, or images with a test folder of their own."
        )
    adjusted = adjust([beside.p for beside in found])
    pairs = tuple(_pair(beside, p_adjusted) for beside, p_adjusted in zip(found, adjusted, strict=True))
    return Comparison(
        classes=judged[0].plan.classes,
        runs=tuple(row for row, _ in rows),
        pairs=pairs,
        apart=tuple(apart),
        seed_groups=tuple(_summary(group) for group in groups),
        group_pairs=tuple(_group_pairs(groups)),
        notes=tuple(_notes(judged, pairs, apart, groups)),
    )


def selection_flags(plan: Plan, *, probe_chosen_by: str = "val") -> list[str]:
    """What looked at val on the way to a run's model, one entry `key: how`; so much does val flatter it.

    A score on images that something was chosen by is too good, for among several the luckiest is chosen. Test images
    choose nothing and are never named here.

    Args:
        plan: of the run.
        probe_chosen_by: `probe.chosen_by` of the run's facts: `val`, or `cross-validation` on training images.
    """
    why = {reason.key: reason.why for reason in plan.reasons}
    flags = []
    strategy = why.get("train.strategy", _BY_USER)
    if "pilot" in strategy.split():
        flags.append("train.strategy: short trainings were judged on val")
    elif not strategy.startswith(_BY_USER) and plan.pretrained:
        flags.append("train.strategy: the advice weighs how well frozen features do on val")
    if "best depth" in why.get("train.depth", ""):
        flags.append("train.depth: depths were compared on val, unless it is small")
    if "mirror images" in why.get("data.invariances", ""):
        flags.append("data.invariances: whether mirroring costs accuracy was measured on val")
    if plan.pretrained and probe_chosen_by == "val":
        flags.append("probe: its penalty has the lowest loss on val")
    if not plan.stages:
        return flags
    if plan.train.distillation.teacher is not None:
        flags.append("train.distillation.teacher: what val chose of the teacher, it teaches")
    if plan.train.checkpoint != "last":
        clearly = "the last epoch was kept, or an earlier one that was clearly better on val"
        kept = clearly if plan.train.checkpoint == "settled" else "the epoch with the lowest loss on val was kept"
        flags.append(f"train.checkpoint: {kept}")
        flags.append(f"train.patience: training stops where val has not improved {plan.train.patience} times in a row")
    else:
        flags.append("train.checkpoint: the last epoch was kept, but none that is clearly worse on val than the start")
    if any(stage.schedule.name == "plateau" for stage in plan.stages):
        flags.append("train.schedule: the rate drops where the loss on val no longer falls")
    return flags


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    names = [run.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _read(run: RunFolder, label: str, reference: RunFolder) -> _Judged:
    plan, scores, classes = run.plan, run.scores, reference.plan.classes
    if set(plan.classes) != set(classes):
        extra = ", ".join(sorted(set(plan.classes) - set(classes))[:5]) or "none"
        lacking = ", ".join(sorted(set(classes) - set(plan.classes))[:5]) or "none"
        raise RunError(
            f"{run.path} tells other classes apart than {reference.path}: only in the former {extra}; only in the "
            f"latter {lacking}. Compare runs of the same classes."
        )
    if not run.file("predictions.npz").exists():
        raise RunError(f"{run.path} has no predictions.npz. `finetune evaluate {run.path}` writes it.")
    with np.load(run.file("predictions.npz")) as stored:
        wanted = ("test_names", "test_probabilities", "test_labels")
        if lost := [name for name in wanted if name not in stored]:
            raise RunError(
                f"{run.path}/predictions.npz lacks {', '.join(lost)}. `finetune evaluate {run.path}` writes it again."
            )
        names, probabilities, labels = (stored[name] for name in wanted)
    if not len(names):
        raise RunError(f"{run.path} has no test images to compare on; start a run with data.split.test above 0.")
    names, rows = np.unique(names, return_index=True)  # an image that a table lists twice counts once
    order = [plan.classes.index(name) for name in classes]  # by column of the reference, the column here
    probe = run.facts.probe
    return _Judged(
        label=label,
        plan=plan,
        views=scores.views,
        probe_chosen_by=probe.chosen_by if probe else "val",
        names=names,
        probabilities=torch.from_numpy(probabilities[rows][:, order]),
        labels=torch.tensor([classes.index(plan.classes[label]) for label in labels[rows]]),
    )


def _row(one: _Judged) -> ComparedRun:
    plan = one.plan
    return ComparedRun(
        run=one.label,
        backbone=plan.backbone,
        strategy=str(plan.train.strategy),
        seed=plan.seed,
        views=one.views,
        n=len(one.names),
        top1=top_k_accuracy(one.probabilities, one.labels),
        log_loss=bootstrap_mean(log_losses(one.probabilities, one.labels), seed=0),
        chosen_by_val=tuple(selection_flags(plan, probe_chosen_by=one.probe_chosen_by)),
    )


def _place(row: ComparedRun) -> tuple[float, float, str]:
    return -row.top1.value, row.log_loss.value, row.run


def _shared(first: _Judged, second: _Judged) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images that both were tested on, in each run."""
    names, here, there = np.intersect1d(first.names, second.names, assume_unique=True, return_indices=True)
    is_other = (first.labels[torch.from_numpy(here)] != second.labels[torch.from_numpy(there)]).numpy()
    if is_other.any():
        raise RunError(
            f"{int(is_other.sum())} test images have one class in {first.label} and another in {second.label}, such as "
            f"{names[is_other][0]}. They are other images, or were sorted anew: train both runs on the same folder."
        )
    return here, there


@dataclass(frozen=True, kw_only=True)
class _Beside:
    """Two runs on the n test images that both have."""

    first: _Judged
    second: _Judged
    right: tuple[torch.Tensor, torch.Tensor]  # (n,) each
    losses: tuple[torch.Tensor, torch.Tensor]  # (n,) each

    @property
    def only_right(self) -> tuple[int, int]:
        first, second = self.right
        return int((first & ~second).sum()), int((~first & second).sum())

    @property
    def p(self) -> float:
        return mcnemar(*self.only_right)


def _beside(first: _Judged, second: _Judged) -> _Beside | None:
    """None where they share no image."""
    here, there = _shared(first, second)
    if not len(here):
        return None
    (right, losses), (other_right, other_losses) = first.part(here), second.part(there)
    return _Beside(first=first, second=second, right=(right, other_right), losses=(losses, other_losses))


def _pair(beside: _Beside, p_adjusted: float) -> RunPair:
    """First minus second, and what may be said of it among all the other pairs."""
    n, (only_first, only_second) = len(beside.right[0]), beside.only_right
    difference, needed = paired_difference(only_first, only_second, n), images_needed(only_first, only_second, n, POINT)
    return RunPair(
        first=beside.first.label,
        second=beside.second.label,
        n=n,
        only_in_first=len(beside.first.names) - n,
        only_in_second=len(beside.second.names) - n,
        only_first_right=only_first,
        only_second_right=only_second,
        difference=difference,
        log_loss_difference=mean_difference(*beside.losses),
        p=beside.p,
        images_needed=needed,
        p_adjusted=p_adjusted,
        is_told_apart=p_adjusted < LEVEL,
        sentence=_sentence(difference, needed, is_told_apart=p_adjusted < LEVEL),
    )


def _sentence(difference: Measure, needed: int, *, is_told_apart: bool) -> str:
    value, n = 100 * difference.value, difference.n
    if is_told_apart:
        return f"the {'first' if value > 0 else 'second'} is better by {abs(value):.1f} points on {n:,} images"
    if needed <= n:
        return f"cannot be told apart on {n:,} images, which are enough to see 1 point"
    return f"cannot be told apart on {n:,} images; about {_round(needed):,} would be needed to see 1 point"


def _round(count: int) -> int:
    """Two digits: nobody knows the share of images that tell better than that."""
    step = 10 ** max(0, len(str(count)) - 2)
    return round(count / step) * step


def _seed_groups(judged: Sequence[_Judged]) -> list[list[_Judged]]:
    """Runs whose plans differ in the seed alone, two or more, one for each seed, in the order of seeds."""
    groups: dict[str, dict[int, _Judged]] = {}
    for one in judged:
        groups.setdefault(_apart_from_seed(one), {}).setdefault(one.plan.seed, one)
    return [[group[seed] for seed in sorted(group)] for group in groups.values() if len(group) > 1]


def _apart_from_seed(one: _Judged) -> str:
    """The plan without the seed, without what follows from it, and without what changes no number."""
    leave = {"seed", "name", "tracking", "hardware", "split_digest", "advice", "reasons"}
    if not one.plan.pretrained:
        leave.add("weights_digest")  # random weights follow the seed
    plan = one.plan.model_dump(mode="json", exclude=leave)
    plan["data"]["split"].pop("seed")
    if str(plan["data"]["normalize"]).startswith("channel"):  # constants follow the split, and that the seed
        plan["data"] |= {"mean": None, "std": None}
    return json.dumps([plan, one.views, one.plan.hardware.devices, one.plan.hardware.precision], sort_keys=True)


def _summary(group: Sequence[_Judged]) -> SeedGroup:
    losses = [float(log_losses(one.probabilities, one.labels).mean()) for one in group]
    return SeedGroup(
        runs=tuple(one.label for one in group),
        seeds=tuple(one.plan.seed for one in group),
        top1=_within(aggregate_seeds([float(one.is_right.double().mean()) for one in group]), 0.0),
        log_loss=aggregate_seeds(losses),
        same_images=all(np.array_equal(group[0].names, one.names) for one in group),
    )


def _within(seeds: Seeds, least: float) -> Seeds:
    """A share, or a difference of two, has bounds that Student's t does not know."""
    if seeds.low is None or seeds.high is None:
        return seeds
    return seeds.model_copy(update={"low": max(least, seeds.low), "high": min(1.0, seeds.high)})


def _group_pairs(groups: Sequence[Sequence[_Judged]]) -> list[GroupPair]:
    """Each two groups by the seeds they share: differences of runs with the same seed on the same images."""
    found = []
    for (one, first), (two, second) in combinations(enumerate(groups, 1), 2):
        names, gaps = [], {}
        others = {run.plan.seed: run for run in second}
        for run in first:
            if (other := others.get(run.plan.seed)) is not None and len((parts := _shared(run, other))[0]):
                here, there = parts
                names.append(run.names[here])
                gaps[run.plan.seed] = (run.part(here)[0].double() - other.part(there)[0].double()).numpy()
        if len(gaps) > 1:
            mean = _mean_gap(np.concatenate(names), list(gaps.values()))
            said = _seeds_sentence(mean)
            gap = _within(mean, -1.0)
            found.append(GroupPair(first=one, second=two, seeds=tuple(gaps), difference=gap, sentence=said))
    return found


def _mean_gap(names: np.ndarray, gaps: Sequence[np.ndarray]) -> Seeds:
    """The mean difference over seeds, with an interval that holds both other seeds and other images.

    On few images the difference is often the same for every seed; the seeds alone would then leave no width.
    """
    over_seeds = aggregate_seeds([float(gap.mean()) for gap in gaps])
    assert over_seeds.high is not None
    _, place, counts = np.unique(names, return_inverse=True, return_counts=True)
    by_image = np.bincount(place, weights=np.concatenate(gaps)) / counts  # (n,), the mean over seeds
    error = NormalDist().inv_cdf(1 - LEVEL / 2) * by_image.std() / math.sqrt(len(by_image))
    half = math.hypot(over_seeds.high - over_seeds.mean, error)
    return over_seeds.model_copy(update={"low": over_seeds.mean - half, "high": over_seeds.mean + half})


def _seeds_sentence(gap: Seeds) -> str:
    assert gap.low is not None and gap.high is not None
    if gap.n < LEAST_SEEDS:
        return f"{gap.n} seeds are too few to tell which is better"
    if gap.low <= 0 <= gap.high:
        return f"cannot be told apart over {gap.n} seeds"
    return f"the {'first' if gap.mean > 0 else 'second'} is better by {abs(100 * gap.mean):.1f} points on average"


def _notes(
    judged: Sequence[_Judged],
    pairs: Sequence[RunPair],
    apart: Sequence[Apart],
    groups: Sequence[Sequence[_Judged]],
) -> list[str]:
    notes = []
    for pair in pairs:
        for missing, own, other in (
            (pair.only_in_first, pair.first, pair.second),
            (pair.only_in_second, pair.second, pair.first),
        ):
            if missing:
                notes.append(f"{missing:,} test images of {own} are no test images of {other}: left out")
    notes += [f"{pair.first} and {pair.second} share no test image, so they are no pair" for pair in apart]
    if len({one.plan.data.root for one in judged}) > 1 and len({one.plan.split_digest for one in judged}) > 1:
        notes.append("the runs name different folders of images; images are taken to be the same where names are")
    if len({one.views for one in judged}) > 1:
        notes.append("the runs were judged in different views, so the views are compared as well")
    if len(pairs) > 1:
        notes.append(f"sentences follow Holm's p over all {len(pairs)} pairs; intervals are those of each pair alone")
    if len(judged) > 2:
        notes.append(
            f"the first of {len(judged)} runs on test is also the luckiest of them: its score is a little high"
        )
    if not groups:
        notes.append("pairs speak of these networks; whether one recipe is better takes several seeds of each")
    elif any(np.array_equal(group[0].names, group[1].names) for group in groups):
        notes.append("the spread over seeds is that of training, on one set of test images; others would add to it")
    return notes
