"""The straight way: recipe and images to Facts, Facts to Plan, Plan to weights, weights to Scores, all to a report.

    recipe.yaml --load_recipe--> Recipe --+
                                          +--make_plan--> Plan --fit--> weights --evaluate--> Scores --> report
    images, zoo ------look-----> Facts ---+

Each arrow leaves its result in the run folder, and is skipped where the result is there already; so
`resume` is the same walk again. Nothing right of the plan reads the recipe, so a plan can be trained as well.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

from safetensors.torch import save_file

from finetune.compute import Compute, give_back_memory
from finetune.config.addresses import Login, split_login
from finetune.config.backbone_names import name_backbone, short_name
from finetune.config.facts import Ranking
from finetune.config.own import refuse_other_things
from finetune.config.plan import Plan
from finetune.config.reading import Wish, as_recipe, recipe_text
from finetune.config.recipe import Recipe
from finetune.config.scores import Scores
from finetune.config.section import Section
from finetune.data.torch_datasets import Handed
from finetune.errors import FinetuneError, RecipeError, RunError
from finetune.evaluation.evaluate import evaluate_run
from finetune.evaluation.page_images import seen_images, stored_images
from finetune.features.answers import probe_answers
from finetune.features.refitting import probe_tensors
from finetune.features.survey import Survey, look
from finetune.handing_in import Own, hand_in
from finetune.inference.teacher import find_teacher, load_teacher
from finetune.inference.whole_model import keep_model
from finetune.models.classifier import Classifier
from finetune.models.own import Model
from finetune.preparing import (
    Say,
    checked_plan,
    fitting_plan,
    refuse_nowhere,
    say_on_stderr,
    with_backbone,
    with_whole_root,
)
from finetune.process import as_guest
from finetune.reporting.html import write_report
from finetune.reporting.text import facts_text, plan_text, scores_text
from finetune.run import Run
from finetune.runs.folder import Clock, RunFolder, append, faults_told, find_run, runs_folder, sweep, write_whole
from finetune.runs.plan_files import as_plan
from finetune.runs.resume import (
    another_wish,
    moved_to,
    read_decided,
    read_wish,
    record_root,
    refuse_changes,
    refuse_other_beginning,
    refuse_other_own,
)
from finetune.runs.teacher import name_teacher
from finetune.saying import every_few_seconds
from finetune.tracking.tracker import Tracker, Unsent, default_uri, send_remaining
from finetune.training.optimization import check_optimizer
from finetune.training.own import OwnLoss
from finetune.training.setup import Vary
from finetune.training.watching import Curves, rewind


@as_guest()
def train(
    recipe: Wish | Plan | None = None,
    overrides: Sequence[str] = (),
    *,
    runs: str | Path | None = None,
    model: Model | None = None,
    dataset: Handed | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[object] = (),
    logger: object | None = None,
    vary: Vary | None = None,
    say: Say = say_on_stderr,
) -> Run:
    """A new run of `recipe`, from images to a report; its folder.

    Args:
        recipe: what to do; what it leaves open is decided from what is measured. A file, a shipped name or a folder of
            images stands for the recipe that `load_recipe` makes of it with `overrides`; None: all is left open. A
            plan, or the file of one, is carried out as it is: on the same machine the run is, bit for bit, the one that
            the plan came from.
        overrides: `section.key=value`; none beside a plan.
        runs: where the run folder is made; None: FINETUNE_RUNS, or `runs` here.
        model: your own network instead of a named backbone: a module of timm, or a `finetune.Network` that says where
            the head of any other module is, and how it wants its images. It stays as it is.
        dataset: your own images instead of a folder: a map-style torch data set of (image, label), or one for each
            role, such as `{"train": ..., "val": ...}`; see `open_datasets`. Resuming needs all of yours again.
        loss: your own loss: logits (B, K) and labels (B,), or targets (B, K) where images are mixed, to losses (B,) or
            their mean. Val is judged by cross-entropy as ever.
        callbacks: of Lightning, for the Trainer of every stage; they may stop it. What a plan decides is refused.
        logger: of Lightning, or several, beside our own curves.
        vary: your own change of training images: an image (H, W, 3) uint8 and a numpy generator to an image of the
            same shape, the label left true.
        say: gets every line for people; `log.txt` gets them too.

    Raises:
        RecipeError: if wishes contradict each other, or a plan does not fit the images, the backbone or itself.
    """
    give = partial(
        hand_in, model=model, dataset=dataset, loss=loss, callbacks=callbacks, logger=logger, vary=vary, say=say
    )
    if (plan := as_plan(recipe, overrides)) is not None:
        return _train_by(plan, give(plan), runs, say)
    assert not isinstance(recipe, Plan)
    recipe = as_recipe(recipe, overrides)
    if dataset is None:
        recipe = with_whole_root(recipe)
    recipe = name_teacher(recipe)
    find_teacher(recipe.train.distillation.teacher)  # a wrong one leaves no run folder
    check_optimizer(recipe.train.optimizer)
    recipe = name_backbone(recipe)
    own = give(recipe)
    named, ranking = with_backbone(recipe, say, own.given)
    name = recipe.name or (own.given.source.root if own.given.source else Path(str(recipe.data.root))).name
    return _new_run(named, recipe_text(recipe), name, runs, say, ranking, own)


def _train_by(plan: Plan, own: Own, runs: str | Path | None, say: Say) -> Run:
    """A new run of a plan: the walk from the plan on, once the images and the backbone are opened."""
    refuse_other_things(plan.own, own.things, run="the run of this plan", is_trained=False, verb="train")
    if plan.data.root is not None:
        refuse_nowhere(Path(plan.data.root))
    Compute.decide(plan.hardware)  # refuses what is not here before images are looked at
    check_optimizer(plan.train.optimizer)
    return _new_run(plan, plan.to_yaml(), plan.name, runs, say, None, own)


def _new_run(
    begins: Recipe | Plan,
    text: str,
    name: str,
    runs: str | Path | None,
    say: Say,
    ranking: Ranking | None,
    own: Own,
) -> Run:
    short = own.given.backbone.card.name if own.given.backbone else short_name(str(begins.backbone))
    run = Run.create(Path(runs or runs_folder()).expanduser(), name=name, backbone=short)
    try:
        with faults_told(run, begins.data.root):
            run.write_text("plan.yaml" if isinstance(begins, Plan) else "recipe.yaml", text)
        return _walk(run, begins, say, ranking, own)
    except FinetuneError:
        if not run.has_begun:  # it could not even be started, so nothing can go on
            shutil.rmtree(run.path, ignore_errors=True)
        raise


@as_guest()
def resume(
    path: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    model: Model | None = None,
    dataset: Handed | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[object] = (),
    logger: object | None = None,
    vary: Vary | None = None,
    say: Say = say_on_stderr,
) -> Run:
    """Go on with a run that was stopped, wherever it was; the result is that of an undisturbed run.

    Args:
        path: the run folder.
        overrides: `data.root=FOLDER` alone says where the same images are now. Other keys, such as
            `train.epochs=40`, make another run beside it, by its recipe and from its weights, once it is finished.
        model: what the run was begun with, if it was; so are the other arguments that `train` has, too.
        dataset: see there.
        loss: see there.
        callbacks: see there.
        logger: see there.
        vary: see there.
        say: gets every line for people.

    Returns:
        The run, or the other one.

    Raises:
        RunError: if `path` is no run, another process works on it, or images, weights or what was handed in have
            changed.
    """
    run, root = Run(find_run(path)), moved_to(overrides)
    if overrides and root is None:
        recipe = another_wish(run, overrides)
        say(f"{run.path} is finished, so this is another run: it begins from those weights, and its rates start anew.")
        return train(
            recipe, runs=run.path.absolute().parent, model=model, dataset=dataset, loss=loss, callbacks=callbacks,
            logger=logger, vary=vary, say=say,
        )  # fmt: skip
    give = partial(
        hand_in, model=model, dataset=dataset, loss=loss, callbacks=callbacks, logger=logger, vary=vary, say=say
    )
    if run.file("plan.yaml").exists():
        plan = read_decided(run, root)
        own = give(plan)
        refuse_other_own(run, own.things)
        return _walk(run, plan, say, None, own)
    wish = read_wish(run, root)
    own = give(wish)
    recipe, ranking = with_backbone(wish, say, own.given)
    return _walk(run, recipe, say, ranking, own)


@as_guest()
def evaluate(
    path: str | PathLike[str],
    *,
    views: str | None = None,
    model: Model | None = None,
    dataset: Handed | None = None,
    say: Say = say_on_stderr,
) -> Scores:
    """Judge a finished run again, perhaps in other views; the scores, which the run folder then holds.

    Args:
        path: the run folder.
        views: None: those of its plan.
        model: what the run was begun with, if it was.
        dataset: see there.
        say: gets every line for people.
    """
    run = RunFolder.open(path)
    own = hand_in(plan := read_decided(run), model=model, dataset=dataset, say=say)
    refuse_other_own(run, own.things, "evaluate")
    run.network = own.given.backbone
    with run.lock():
        seen = look(plan, every_few_seconds(say), given=own.given)
        refuse_changes(run, seen.facts)
        if not run.final_weights().exists():
            raise RunError(f"{path} is not trained to its end. `finetune resume {path}` goes on.")
        keep_model(run, seen.dataset, seen.backbone)
        scores = evaluate_run(run, seen.dataset, seen.facts, probe_answers(seen, run.plan), views)
        write_report(run.path, read_image=seen_images(seen.dataset))
    return scores


@as_guest()
def report(path: str | PathLike[str], *, say: Say = say_on_stderr) -> Path:
    """Write a run's page again, and send to MLflow what could not be sent before; the page."""
    run = RunFolder.open(path)
    run.existing("scores.json")
    with run.lock():
        page = write_report(run.path, read_image=stored_images(run))
        _tell_unsent(send_remaining(run.path, say), run, say)
    return page


class Summary(Section):
    """A finished run as one value."""

    run: str
    """The folder."""
    plan: Plan
    scores: Scores
    seconds: dict[str, float]
    """By part of the walk, and their total."""
    report: str


def summarize(run: RunFolder) -> Summary:
    """A finished run as one value."""
    seconds = run.read_json("environment.json")["seconds"]
    report = str(run.file("report.html"))
    return Summary(run=str(run.path), plan=run.plan, scores=run.scores, seconds=seconds, report=report)


def _walk(run: Run, begins: Recipe | Plan, say: Say, ranking: Ranking | None, own: Own) -> Run:
    """All steps that are not done yet: from the recipe where nothing is decided, else from the plan."""
    run.network = own.given.backbone
    with faults_told(run, begins.data.root), run.lock():
        sweep(run.path)
        voice = _logged(run, say)
        voice(f"run folder: {run.path}")
        try:
            _steps(run, begins, voice, ranking, own)
        except KeyboardInterrupt:
            voice(f"stopped. `finetune resume {run.path}` goes on from here.")
            raise
    return run


def _steps(run: RunFolder, begins: Recipe | Plan, say: Say, ranking: Ranking | None, own: Own) -> None:
    clock = Clock(run)
    # a teacher is read first, for images would take longer
    teacher = None if run.has_begun else find_teacher(begins.train.distillation.teacher)
    seen = look(begins, every_few_seconds(say), given=own.given)
    clock.lap("survey")
    give_back_memory()
    if run.has_begun:
        refuse_other_beginning(run, seen.facts)
        record_root(run, begins.data.root)
    else:
        facts = seen.facts.model_copy(update={"ranking": ranking, "teacher": teacher, "own": own.things})
        _begin(run, begins, replace(seen, facts=facts), own, say)
    login = split_login(begins.tracking.uri or "")[1]  # of a recipe; a plan holds none
    plan = run.plan
    curves = Curves(run.file("curves.csv"))
    for index, stage in enumerate(plan.stages):
        rewind(curves, f"{index + 1}-{stage.name}", run.stage_weights(index))
    tracker = _start_tracker(run, plan, say, login)
    try:
        classifier = _train_stages(run, plan, seen, own, tracker, say)
        clock.lap("training")
        give_back_memory()
        keep_model(run, seen.dataset, seen.backbone)
        if not run.file("scores.json").exists():
            evaluate_run(run, seen.dataset, seen.facts, probe_answers(seen, plan))
        del classifier
        clock.lap("evaluation")
        say(scores_text(run.scores))
        clock.write()
        page = write_report(run.path, read_image=seen_images(seen.dataset))
        say(f"report: {page}")
    except BaseException as fault:
        if tracker is not None:
            tracker.close("KILLED" if isinstance(fault, KeyboardInterrupt) else "FAILED", 2.0)
        raise
    if tracker is not None:
        _tell_unsent(tracker.close("FINISHED"), run, say)


def _begin(run: RunFolder, begins: Recipe | Plan, seen: Survey, own: Own, say: Say) -> None:
    """Write what was measured and what was decided; the probe and the plan last, for they mark a run that can go on."""
    decided = fitting_plan(begins, seen) if isinstance(begins, Plan) else checked_plan(begins, seen)
    if own.training.vary is not None and decided.train.optimizer.name == "lbfgs":
        raise RecipeError("train.optimizer.name is lbfgs, which needs the same loss at every look; leave vary out.")
    run.write_json("facts.json", seen.facts.model_dump(mode="json"))
    run.write_json("environment.json", Compute.of(decided.hardware).describe())
    tensors = probe_tensors(seen.probe, seen.refit if decided.probe_on == "labelled" else None)
    write_whole(run.file("probe.safetensors"), lambda path: save_file(tensors, path))
    run.write_text("plan.yaml", decided.to_yaml())
    say(facts_text(seen.facts))
    say(plan_text(decided))


def _train_stages(
    run: RunFolder, plan: Plan, seen: Survey, own: Own, tracker: Tracker | None, say: Say
) -> Classifier | None:
    if not plan.stages:
        return None
    from finetune.training.staged import train_stages  # here, for a probe need not wait for Lightning

    notify = tracker.notify if tracker is not None else (lambda: None)
    teach = partial(load_teacher, plan)
    return train_stages(run, plan, seen.dataset, seen.backbone, own=own.training, teach=teach, say=say, notify=notify)


def _start_tracker(run: RunFolder, plan: Plan, say: Say, login: Login | None) -> Tracker | None:
    if not plan.tracking.enabled:
        return None
    uri = plan.tracking.uri
    tracker = Tracker(
        run.path,
        uri=default_uri(run.path.parent) if uri == "beside the runs" else uri,
        experiment=plan.tracking.experiment,
        run_name=run.path.name,
        tags={"backbone": plan.backbone, "strategy": plan.train.strategy, "run_folder": str(run.path.resolve())},
        warn=say,
        login=login,
    )
    tracker.start()
    tracker.notify()
    return tracker


def _tell_unsent(unsent: Unsent, run: RunFolder, say: Say) -> None:
    if unsent:
        say(
            f"MLflow did not get everything ({unsent.reason}); all of it is in the run folder. "
            f"`finetune report {run.path}` sends the rest."
        )


def _logged(run: RunFolder, say: Say) -> Say:
    def voice(text: str) -> None:
        say(text)
        append(run.file("log.txt"), f"{time.strftime('%H:%M:%S')}  {text}\n")

    return voice
