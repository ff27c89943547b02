"""Evaluation: what the final model and the probe say of val and test, with intervals, side by side."""

import csv
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from finetune.config.facts import Facts
from finetune.config.plan import Plan
from finetune.config.scores import (
    AgainstCenter,
    AgainstProbe,
    AgainstTeacher,
    ByRole,
    Conformal,
    Draws,
    Experiment,
    Scores,
    SplitScores,
    TeacherScores,
    Temperature,
    ViewsGain,
)
from finetune.data.dataset import Dataset
from finetune.ensembles.build import score_members, selection_note
from finetune.evaluation.compare import selection_flags
from finetune.evaluation.held_out import (
    Answers,
    Fitting,
    What,
    held_out_note,
    is_refit,
    networks,
    probe_fitting,
    refit_record,
    role_fitting,
)
from finetune.evaluation.mc_dropout import compare_draws, draw
from finetune.evaluation.per_view import Looked, look_by_view, view_arrays, view_note, view_rows
from finetune.inference.predict import predict_probabilities, temper
from finetune.inference.teacher import read_answers
from finetune.inference.tta import permitted_views, view_names
from finetune.metrics.answers import ProbeAnswers
from finetune.metrics.calibration import fit_temperature, log_probabilities
from finetune.metrics.classification import score_predictions
from finetune.metrics.conformal import describe, fit_threshold
from finetune.metrics.significance import P, answered_right
from finetune.models.classifier import Classifier
from finetune.planning.next_step import next_experiment
from finetune.planning.planner import LEAST_CALIBRATION
from finetune.runs.folder import RunFolder, write_whole

JUDGED = ("val", "test")


def evaluate_run(
    run: RunFolder, dataset: Dataset, facts: Facts, probed: ProbeAnswers | None, views: str | None = None
) -> Scores:
    """Score the final model and the probe, and write `predictions.npz` and `scores.json`.

    Args:
        run: its stages are done.
        dataset: the same images as those of the plan.
        facts: what was measured on them.
        probed: what the probe of the plan says of them; None where there is no probe.
        views: other views than the plan's.
    """
    plan = run.plan
    views, fallback = permitted_views(views or plan.evaluate.views, plan.data.allowed_changes)
    probe = None if probed is None else probed.by_role
    is_probe = probe is not None and not plan.stages and views == "center"
    answering = {} if is_probe else networks(run)
    looked = _look_by_view(answering, dataset, plan, views)
    final = probe if is_probe else _network_answers(answering, dataset, plan, views, looked)
    assert final is not None
    what: What | None = ("model" if plan.stages else "probe") if is_refit(run) else None
    fitting = _fitting(dataset, plan, final, views, what, probed)
    labels = {role: dataset.labels(role) for role in (*JUDGED, "calibration")}
    tempered, temperature = _calibrate(plan, final, fitting)
    arrays = _arrays(tempered, labels, dataset) | view_arrays(looked)
    arrays |= _fitted_arrays(fitting, temperature, dataset)
    own, center, by_probe, paired, teacher = _score(tempered, labels, plan.classes, what), tempered, None, None, None
    if views != "center":
        single = _network_answers(answering, dataset, plan, "center", {})
        center, _ = _calibrate(plan, single, _fitting(dataset, plan, single, "center", what, probed))
    if probed is not None and probe is not None:
        tempered_probe, _ = _calibrate(plan, probe, probe_fitting(dataset, plan, probed))
        by_probe = _score(tempered_probe, labels, plan.classes, "probe" if plan.probe_on == "labelled" else None)
        paired = None if final is probe else _pair(AgainstProbe, tempered, tempered_probe, labels)
        arrays |= {f"probe_{role}_probabilities": rows.numpy() for role, rows in tempered_probe.items()}
    if plan.train.distillation.teacher is not None and run.membership is None:
        teacher, more = _beside_teacher(run, dataset, tempered, labels, views)
        arrays |= more
    flags = selection_flags(plan, probe_chosen_by=facts.probe.chosen_by if facts.probe else "val")
    scores = Scores(
        views=views,
        views_note=fallback,
        classes=plan.classes,
        refit=refit_record(dataset, plan, is_refit=what is not None),
        temperature=temperature,
        val=own.val,
        test=own.test,
        conformal=_promise(plan, final, labels, fitting) if len(fitting.labels) else None,
        views_table=view_rows(looked, labels["test"]),
        views_table_note=view_note(looked),
        center=None if center is tempered else _score(center, labels, plan.classes, what),
        views_gain=None if center is tempered else _gain(_num_crops(views, plan), tempered, center, labels),
        probe=by_probe,
        paired=paired,
        teacher=teacher,
        draws=_draw(answering, dataset, plan, center, labels, what) if plan.evaluate.mc_samples else None,
        next=_propose(run, dataset, num_stages=len(facts.backbone.stages)),
        chosen_by_val=(*flags, *([note] if (note := selection_note(run)) else [])),
        members=score_members(run, dataset, views) if run.file("ensemble.json").exists() else None,
    )
    write_whole(run.file("predictions.npz"), lambda path: _save(path, arrays))
    run.write_json("scores.json", scores.model_dump(mode="json"))
    return scores


def _beside_teacher(
    run: RunFolder, dataset: Dataset, final: Answers, labels: Answers, views: str
) -> tuple[TeacherScores, dict[str, np.ndarray]]:
    """Scores of the teacher, and student minus teacher on the same images; and what the teacher answered.

    Args:
        run: the student.
        dataset: its images.
        final: its probabilities (N, K) by role.
        labels: (N,) by role.
        views: in which it looked at images.
    """
    teacher, answers = run.facts.teacher, read_answers(run, dataset, JUDGED)
    assert teacher is not None
    if answers is None:
        lacking = "its answers to these very images are not at hand, so the two are not compared"
        return TeacherScores(run=teacher.run, networks=teacher.networks, note=lacking), {}
    said, note = answers.probabilities, None
    if answers.views != views:
        note = f"it was judged in {answers.views} views and its student in {views}, so the views are compared as well"
    own = _score(said, labels, run.plan.classes)
    found = TeacherScores(
        run=teacher.run,
        networks=teacher.networks,
        views=answers.views,
        passes=teacher.networks * _num_crops(answers.views, run.plan),
        student_passes=_num_crops(views, run.plan),
        views_note=note,
        val=own.val,
        test=own.test,
        paired=_pair(AgainstTeacher, final, said, labels),
    )
    arrays = {f"teacher_{role}_probabilities": rows.numpy() for role, rows in said.items()}
    return found, {**arrays, "teacher_views": np.array(answers.views)}


def _num_crops(views: str, plan: Plan) -> int:
    return len(view_names(views, plan.view.size_pixels))


def _propose(run: RunFolder, dataset: Dataset, *, num_stages: int) -> Experiment | None:
    """The one change to try next, from how training and val stood after the last epoch."""
    last, watched = dict[str, float](), run.stage_names("train")
    with run.file("curves.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["name"] in ("train/top1", "val/top1") and row["value"] and row["stage"] in watched:
                last[row["name"]] = float(row["value"])
    if "train/top1" not in last:
        return None
    return next_experiment(
        run.plan,
        train_top1=last["train/top1"],
        val_top1=last["val/top1"],
        num_train=len(dataset.indices("train")),
        num_val=len(dataset.indices("val")),
        num_stages=num_stages,
    )


def _look_by_view(answering: Mapping[str, Classifier], dataset: Dataset, plan: Plan, views: str) -> dict[str, Looked]:
    """What each view says of val and test; nothing where there is one view."""
    if _num_crops(views, plan) == 1:
        return {}
    return {
        role: look_by_view(answering[role], dataset.store, dataset.indices(role), dataset.labels(role), plan, views)
        for role in JUDGED
        if dataset.indices(role)
    }


def _network_answers(
    answering: Mapping[str, Classifier], dataset: Dataset, plan: Plan, views: str, looked: Mapping[str, Looked]
) -> dict[str, torch.Tensor]:
    """Averaged over views; roles that were `looked` at are not looked at again."""
    how = plan.evaluate.average
    return {
        role: looked[role].average
        if role in looked
        else predict_probabilities(answering[role], dataset.store, dataset.indices(role), plan, views, how)
        for role in (*JUDGED, "calibration")
    }


def _fitting(
    dataset: Dataset,
    plan: Plan,
    answers: Answers,
    views: str,
    what: What | None,
    probed: ProbeAnswers | None,
) -> Fitting:
    """What a temperature of these answers is fitted to; folds looked at the centre alone."""
    if not plan.stages and probed is not None and views == "center":
        return probe_fitting(dataset, plan, probed)
    return role_fitting(dataset, answers, what)


def _calibrate(plan: Plan, probabilities: Answers, fitting: Fitting) -> tuple[Answers, Temperature | None]:
    """Everything at the temperature that suits the fitting images best, and what it changed there."""
    if not plan.evaluate.calibrate or len(fitting.labels) < LEAST_CALIBRATION:
        return dict(probabilities), None
    fitted = fit_temperature(log_probabilities(fitting.probabilities), fitting.labels)
    tempered = {role: temper(rows, fitted.value or 1.0) for role, rows in probabilities.items()}
    return tempered, fitted.model_copy(update={"held_out": fitting.note})


def _promise(plan: Plan, probabilities: Answers, labels: Answers, fitting: Fitting) -> Conformal:
    """Prediction sets at the planned coverage, and what they are like on test.

    From probabilities before the temperature: the same images served to fit that.
    """
    coverage, count = plan.evaluate.coverage, len(fitting.labels)
    threshold, test = fit_threshold(fitting.probabilities, fitting.labels, coverage), None
    if len(labels["test"]):
        test = describe(probabilities["test"], labels["test"], threshold, coverage=coverage, num_calibration=count)
    return Conformal(coverage=coverage, threshold=threshold, num_calibration=count, held_out=fitting.note, test=test)


def _fitted_arrays(fitting: Fitting, temperature: Temperature | None, dataset: Dataset) -> dict[str, np.ndarray]:
    """Out-of-fold answers, tempered as all others are; nothing where the calibration images were fitted to."""
    if not fitting.rows:
        return {}
    tempered = temper(fitting.probabilities, (temperature and temperature.value) or 1.0)
    return {
        "out_of_fold_probabilities": tempered.numpy(),
        "out_of_fold_labels": fitting.labels.numpy(),
        "out_of_fold_names": np.array([dataset.items[row].name for row in fitting.rows], dtype=str),
    }


def _draw(
    answering: Mapping[str, Classifier],
    dataset: Dataset,
    plan: Plan,
    center: Answers,
    labels: Answers,
    what: What | None,
) -> Draws:
    """Draws of the head's dropout in the centre view, beside the ordinary answer in that view; both tempered."""
    if not isinstance(answering["test"], Classifier):
        return Draws(n=0, sentence="no draws: several networks are averaged, and each is judged without dropout")
    roles = (*JUDGED, "calibration")
    drawn = {role: draw(answering[role], dataset.store, dataset.indices(role), plan) for role in roles}
    means = {role: one.mean for role, one in drawn.items()}
    tempered, temperature = _calibrate(plan, means, role_fitting(dataset, means, what))
    own = _score(tempered, labels, plan.classes, what)
    compared = compare_draws(plan.evaluate.mc_samples, drawn, tempered, center, labels)
    return compared.model_copy(update={"temperature": temperature, "val": own.val, "test": own.test})


def _score(
    probabilities: Answers, labels: Answers, classes: tuple[str, ...], what: What | None = None
) -> ByRole[SplitScores]:
    """By role; beside val stands who answered, where `what` was refit since."""
    val, test = (
        score_predictions(probabilities[role], labels[role], classes) if len(labels[role]) else None for role in JUDGED
    )
    if what is not None and val is not None:
        val = val.model_copy(update={"held_out": held_out_note(what)})
    return ByRole[SplitScores](val=val, test=test)


def _pair(kind: type[P], final: Answers, other: Answers, labels: Answers) -> ByRole[P]:
    """Final minus the other, which `kind` names, on the same images."""
    val, test = (
        answered_right(kind, final[role], other[role], labels[role]) if len(labels[role]) else None for role in JUDGED
    )
    return ByRole[kind](val=val, test=test)  # type: ignore[valid-type]


def _gain(num_crops: int, final: Answers, center: Answers, labels: Answers) -> ViewsGain:
    found = _pair(AgainstCenter, final, center, labels)
    return ViewsGain(crops=num_crops, val=found.val, test=found.test)


def _arrays(
    probabilities: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor], dataset: Dataset
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for role, rows in probabilities.items():
        arrays[f"{role}_probabilities"] = rows.numpy()
        arrays[f"{role}_labels"] = labels[role].numpy()
        arrays[f"{role}_names"] = np.array([dataset.items[index].name for index in dataset.indices(role)], dtype=str)
    return arrays


def _save(path: Any, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as handle:  # a name without .npz would be given one
        np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]
