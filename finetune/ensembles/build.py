"""Ensembles: several trainings as one run folder, which is judged and used like that of a single training.

Either the predictions of all members are averaged, and every prediction costs as many networks; or their weights are
mixed (see `soups`), and it costs one. A mixture is a run like any other. An average also holds `ensemble.json` and
its members, each as a small run folder of its own under `members/`, so that it needs nothing from where they came.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from finetune.compute import Compute
from finetune.config.membership import Membership, Mixed
from finetune.config.plan import Plan, Stage
from finetune.config.reading import load_recipe, recipe_text
from finetune.config.scores import ByRole, MemberRow
from finetune.data.dataset import Dataset
from finetune.ensembles.members import (
    KINDS,
    Candidate,
    Members,
    Val,
    check_views,
    find_candidates,
    predict,
    refuse_strangers,
    selection_sentence,
)
from finetune.ensembles.soups import State, greedy_soup, interpolate, load_start, refuse_other_beginnings, sweep
from finetune.ensembles.soups import uniform_soup as mean_of
from finetune.errors import RunError
from finetune.inference.loading import load_ensemble
from finetune.inference.tta import permitted_views
from finetune.inference.whole_model import copy_model
from finetune.metrics.classification import log_loss
from finetune.metrics.selection import AVERAGES, MOST_MEMBERS, average, ensemble_table, greedy_selection
from finetune.runs.folder import AVERAGE_FILE, SOUP_FILE, RunFolder, append, write_whole
from finetune.training.watching import Curves

JUDGED = ("val", "test")
How = Literal["average", "greedy", "soup", "greedy_soup", "wise"]
Say = Callable[[str], None]


def selection_note(run: RunFolder) -> str | None:
    """A sentence on why the val score of an ensemble is no estimate; None where val chose nothing."""
    found = run.membership
    return found.selection_note if found else None


def score_members(run: RunFolder, dataset: Dataset, views: str | None = None) -> ByRole[tuple[MemberRow, ...]]:
    """The table of an average on val and test: each member, their mean, and the ensemble as it grows.

    Before any temperature, which is fitted to the whole.

    Args:
        run: has `ensemble.json`.
        dataset: its images.
        views: other views than the plan's.
    """
    plan, found = run.plan, run.membership
    assert found is not None
    views, _ = permitted_views(views or plan.evaluate.views, plan.data.allowed_changes)
    names = [f"{Path(one.run).name} {one.member}" for one in found.members]
    tables = {}
    for role in JUDGED:
        if rows := dataset.indices(role):
            ensemble = load_ensemble(run, is_held_out=role != "test")
            pairs = zip(ensemble.members, ensemble.views, strict=True)
            said = [predict(member, dataset, rows, plan, views, view) for member, view in pairs]
            labels, weights = dataset.labels(role), ensemble.weights.tolist()
            table = ensemble_table(torch.stack(said), labels, names=names, kind=ensemble.average, weights=weights)
            tables[role] = tuple(table)
    return ByRole[tuple[MemberRow, ...]](**tables)


def make_ensemble(
    runs: Sequence[RunFolder],
    *,
    how: How,
    members: Members = "final",
    average: str = "probability",
    folder: Path,
    say: Say,
    dataset: Dataset | None = None,
    alpha: float | None = None,
    most: int = MOST_MEMBERS,
) -> RunFolder:
    """A run folder at `folder` that stands for all of `runs`; nothing is judged yet.

    Independent restarts, or runs of different rates, regularisers and backbones, averaged; the last epochs or the
    snapshots of one run; or one network mixed from their weights. Equal weights count once, however often they come.

    Args:
        runs: finished, on the same images, classes and split; to mix their weights, also in the same view.
        how: `average` all predictions; `greedy`: those that val chooses; `soup`: the mean of all weights;
            `greedy_soup`: of those that do not harm it on val; `wise`: between the start and the end of one training.
        members: of each run its `final` weights, its `snapshots`, its `last` epochs, or `all` of them.
        average: of predictions, one of `finetune.metrics.selection.AVERAGES`.
        folder: is made; it may be there if it is empty.
        say: gets lines for people; `log.txt` gets them too.
        dataset: the images of the runs, where they are looked at already.
        alpha: for `wise`, the share of the end; None: the one that val likes best.
        most: for `greedy`, different members at most.

    Raises:
        RunError: if the runs do not fit together, or one is not finished or is an average itself.
        ValueError: if the arguments contradict each other.
    """
    _check(how, members, average, alpha)
    refuse_strangers(runs, is_mixture=how not in ("average", "greedy"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already, and a run folder is never overwritten; give a new name.")
    if how not in ("average", "greedy"):
        refuse_other_beginnings(runs)
    lines: list[str] = []

    def voice(text: str) -> None:
        lines.append(text)
        say(text)

    candidates = find_candidates(runs, members, voice)
    if how in ("average", "greedy"):
        made = _average(candidates, how, average, most, dataset, voice)
    else:
        made = _soup(candidates, how, alpha, dataset, voice)
    is_selected = how in ("greedy", "greedy_soup") or (how == "wise" and alpha is None)
    note = selection_sentence(candidates, is_selected=is_selected)
    chosen = {"selected_on": "val" if is_selected else None, "selection_note": note}
    target = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with target.lock():
        _write(target, made, made.record.model_copy(update=chosen), how)
        append(target.file("log.txt"), "".join(f"{line}\n" for line in lines))
    return target


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What is to be written: the run whose plan it has, its members or its mixed weights, and the record of both."""

    base: Candidate
    record: Membership
    members: tuple[Candidate, ...] = ()
    state: State | None = None
    held_out: State | None = None
    """The same mixture of weights before a refit; None where there was none."""


def _check(how: str, members: str, average: str, alpha: float | None) -> None:
    is_average = how in ("average", "greedy")
    for name, value, known in (
        ("how", how, ("average", "greedy", "soup", "greedy_soup", "wise")),
        ("members", members, tuple(KINDS)),
        ("average", average, AVERAGES if is_average else AVERAGES[:1]),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)} with how {how!r}, got {value!r}.")
    if alpha is not None and how != "wise":
        raise ValueError(f"alpha goes with how 'wise', and only with it; how is {how!r}.")


def _average(
    candidates: Sequence[Candidate], how: How, average: str, most: int, dataset: Dataset | None, say: Say
) -> _Made:
    """Members whose predictions are averaged: all of them, or those that val chooses."""
    chosen, losses = tuple(range(len(candidates))), None
    if how == "greedy":
        check_views(candidates[0].plan, candidates, lambda line: None)  # before val is looked at by any
        judge = Val(candidates[0], dataset)
        said = torch.stack([judge.probabilities(one.load(is_held_out=True), one.plan.view) for one in candidates])
        chosen = greedy_selection(said, judge.labels, most=most, kind=average)
        losses = _losses_along(said, judge.labels, chosen, average)
        names = ", ".join(candidates[at].name for at in chosen)
        say(f"chosen on {len(judge.labels)} val images, from {len(candidates)}: {names}")
    members = sorted(set(chosen))
    base = next((candidates[at] for at in members if candidates[at].plan.stages), None)
    if base is None:
        raise RunError(
            f"{candidates[members[0]].run.path} is a probe, and no trained run would be averaged with it. "
            "A probe is solved exactly, so restarts of it are all the same; use that run as it is."
        )
    check_views(base.plan, [candidates[at] for at in members], say)
    rows = [
        candidates[at].joined(chosen.count(at) / len(chosen), f"members/{number}")
        for number, at in enumerate(members, start=1)
    ]
    record = Membership(
        how=how, average=average, num_candidates=len(candidates), val_log_losses=losses, members=tuple(rows)
    )
    return _Made(base=base, record=record, members=tuple(candidates[at] for at in members))


def _losses_along(said: torch.Tensor, labels: torch.Tensor, chosen: Sequence[int], kind: str) -> tuple[float, ...]:
    return tuple(log_loss(average(said[list(chosen[:size])], kind), labels) for size in range(1, len(chosen) + 1))


def _soup(candidates: Sequence[Candidate], how: How, alpha: float | None, dataset: Dataset | None, say: Say) -> _Made:
    """Mixed weights, and what they were mixed from."""
    base = next((candidate for candidate in candidates if candidate.plan.stages), None)
    if base is None:
        raise RunError(
            f"{candidates[0].run.path} is a probe, whose weights no training moved; there is nothing to mix."
        )
    val, shares = Val(base, dataset), [1 / len(candidates)] * len(candidates)
    ends = [candidate.state(is_held_out=True) for candidate in candidates]
    tried, top1 = None, None
    if how == "wise":
        if len(candidates) != 1:
            raise RunError(f"wise mixes one network with the start of its training; it was given {len(candidates)}.")
        start = load_start(base.run).state_dict()
        if alpha is None:
            found = sweep(start, ends[0], judge=val.judge, renew=val.renew)
            state, alpha = found.state, found.alpha
            tried = tuple(
                Mixed(alpha=share, top1=score.top1, log_loss=score.log_loss)
                for share, score in zip(found.alphas, found.scores, strict=True)
            )
        else:
            state = interpolate(start, ends[0], alpha, val.renew)
        shares = [alpha]
        say(f"mixed: {alpha:g} of the end of the training, {1 - alpha:g} of its start")
    elif how == "soup":
        state = mean_of(ends, val.renew)
    else:
        soup = greedy_soup(ends, judge=val.judge, renew=val.renew)
        state, shares = soup.state, [(at in soup.members) / len(soup.members) for at in range(len(candidates))]
        top1 = tuple(score.top1 for score in soup.scores)
        say(f"mixed: {len(soup.members)} of {len(candidates)} sets of weights; val accuracy {soup.score.top1:.4f}")
    rows = [one.joined(share) for one, share in zip(candidates, shares, strict=True) if share or how == "wise"]
    record = Membership(
        how=how, num_candidates=len(candidates), sweep=tried, alpha=alpha, val_top1=top1, members=tuple(rows)
    )
    if not base.plan.is_refit:
        return _Made(base=base, record=record, state=state)
    return _Made(base=base, record=record, state=_mix_refits(candidates, how, shares, val), held_out=state)


def _mix_refits(candidates: Sequence[Candidate], how: How, shares: Sequence[float], val: Val) -> State:
    """The mixture that val chose of the weights before their refits, of the weights after them."""
    renew = partial(val.renew, on="labelled")
    ends = [candidate.state() for candidate, share in zip(candidates, shares, strict=True) if share or how == "wise"]
    if how == "wise":
        start = load_start(candidates[0].run, is_held_out=False).state_dict()
        return interpolate(start, ends[0], shares[0], renew)
    return mean_of(ends, renew)


def _write(target: RunFolder, made: _Made, record: Membership, how: How) -> None:
    """All files of the new run; the plan last, for it marks a run that can go on."""
    base = made.base
    plan = base.plan.model_copy(update={"name": f"{base.plan.name}-{how}", "stages": _last_stages(base.plan)})
    for number, member in enumerate(made.members, start=1):
        _write_member(RunFolder(target.file(f"members/{number}")), member)
    own = 0 if made.state is not None else made.members.index(base) + 1
    for name, state in zip(_weights_of(plan), (made.held_out or made.state, made.state), strict=False):
        if state is None:  # so that the folder counts as trained; who reads `ensemble.json` does not read this
            _copy(target.file(f"members/{own}/{name}"), target.file(name))
        else:
            _save(target.file(name), state)
    for name in ("facts.json", "probe.safetensors"):
        _copy(base.run.file(name), target.file(name))
    if (wish := base.run.file("recipe.yaml")).exists():  # of the training that lent its plan
        target.write_text("recipe.yaml", recipe_text(load_recipe(wish).model_copy(update={"name": plan.name})))
    environment = Compute.of(plan.hardware, or_cpu=True).describe()
    target.write_json("environment.json", {**environment, "seconds": {}})
    Curves(target.file("curves.csv"))  # nothing was trained
    target.write_json(SOUP_FILE if made.state is not None else AVERAGE_FILE, record.model_dump(mode="json"))
    target.write_text("plan.yaml", plan.to_yaml())


def _write_member(folder: RunFolder, member: Candidate) -> None:
    plan = member.plan.model_copy(update={"stages": _last_stages(member.plan)})
    sources = (member.run.held_out_weights(), member.run.final_weights())
    for name, source in zip(_weights_of(plan), sources, strict=False):
        if member.member:
            _save(folder.file(name), member.state())
        else:
            _copy(source, folder.file(name))
    folder.write_text("plan.yaml", plan.to_yaml())
    copy_model(member.run, folder)


def _last_stages(plan: Plan) -> tuple[Stage, ...]:
    """The stages whose weights judge: of those on the training images the last, and the last of a refit."""
    found = sorted({plan.last_stage("train"), len(plan.stages) - 1} - {-1})
    return tuple(plan.stages[index] for index in found)


def _weights_of(plan: Plan) -> list[str]:
    """Where a run with such stages keeps their weights."""
    names = [f"stages/{at + 1}-{stage.name}/{plan.weights_file(at)}" for at, stage in enumerate(plan.stages)]
    return names or ["probe.safetensors"]


def _copy(source: Path, path: Path) -> None:
    write_whole(path, lambda temporary: shutil.copyfile(source, temporary))


def _save(path: Path, state: State) -> None:
    write_whole(path, lambda temporary: save_file({n: t.contiguous() for n, t in state.items()}, temporary))
