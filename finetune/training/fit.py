"""Fit: one stage of a plan, one `Trainer.fit`. Killed at any moment, it goes on where its last epoch ended.

Everything random follows (seed, stage, epoch), every rate follows the step, and the whole state of the
stage is written after each epoch; so an interrupted run ends in the same weights, bit for bit on a CPU.
"""

import copy
import hashlib
import logging
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.compute import Compute
from finetune.config.decided import AveragingPlan
from finetune.config.plan import Plan, Stage
from finetune.data.loading import Batches
from finetune.models.batch_norm import set_momentum
from finetune.models.classifier import Classifier
from finetune.models.folding import fold
from finetune.models.lora import merge_lora
from finetune.planning.batch_norm import momentum_for
from finetune.planning.lr_schedules import Plateau, rate_factor
from finetune.process import quieten
from finetune.runs.folder import write_whole
from finetune.training.callbacks import Listeners
from finetune.training.checkpoints import Keeper, PlainFile
from finetune.training.distillation import make_distillation
from finetune.training.losses import Loss, make_loss
from finetune.training.mixup import Mixing
from finetune.training.module import DivergenceError, Finetuning, Step
from finetune.training.optimization import Anchor, make_optimizer
from finetune.training.own import NOTHING, OwnTraining, loss_by_image
from finetune.training.snapshots import read_members
from finetune.training.watching import WINDOW, Curves, Divergence, Recovery
from finetune.training.weight_averaging import WeightAverage
from finetune.training.wise_ft import StartMixture

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
"""Ours to Lightning's; so are `PRECISIONS`."""


def fit(
    plan: Plan,
    index: int,
    classifier: Classifier,
    train: Batches,
    val: Batches | None,
    folder: Path,
    curves: Curves,
    *,
    members: Path,
    origin: Mapping[str, torch.Tensor] | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
    teacher: nn.Module | None = None,
    own: OwnTraining = NOTHING,
    slowdown: float = 1.0,
    say: Callable[[str], None],
    notify: Callable[[], None],
) -> None:
    """Train `classifier` in place by stage `index` of the plan; it then holds the epoch that `train.checkpoint` names.

    Args:
        plan: what to do.
        index: of the stage, from 0.
        classifier: holds the weights that the stage begins from.
        train: batches of the images that the stage trains on.
        val: batches of the val images; None in a refit, which runs to its end.
        folder: gets `last.ckpt` after each epoch and its weights, as `Plan.weights_file` names them, at the end.
        curves: gets what is measured.
        members: folder for snapshots and the last epochs, where the plan keeps them.
        origin: pretrained weights by name, for `regularization.l2_sp`; None: those the stage begins from.
        start: weights by name that the first stage began from, for `train.averaging.wise_ft`.
        teacher: what `train.distillation.teacher` names, from the student's images to logits.
        own: the loss, callbacks and loggers that a program handed in.
        slowdown: share of all rates to train with; in a refit as the stage that it repeats ended.
        say: prints a line for people.
        notify: called when what the curves hold is there to stay, for the state after it is on disk.

    Raises:
        RunError: if training diverges, and does so again at a lower rate.
    """
    stage, weights, checkpoint = plan.stages[index], folder / plan.weights_file(index), folder / "last.ckpt"
    if weights.exists():
        if stage.trains == "lora":
            merge_lora(classifier.backbone)
        classifier.load_state_dict(load_file(weights))
        return
    _open(classifier, plan, index, len(train))
    before = copy.deepcopy(classifier.state_dict())
    device, compute = next(classifier.parameters()).device, Compute.of(plan.hardware)
    folding = fold(classifier.backbone, size_pixels=plan.view.size_pixels, device=device, precision=compute.precision)
    recovery, listeners = Recovery(), Listeners(own, is_watched=val is not None, say=say)
    while True:
        module = _make_module(plan, index, classifier, train, origin, teacher, folding, own, say)
        module.slowdown = slowdown * recovery.factor
        keeper = Keeper(plan, index, train, val, checkpoint, curves, members=members, say=say, notify=notify)
        keeper.mixture = _make_mixture(plan, index, start)
        done = torch.load(checkpoint, weights_only=True)["keeper"] if checkpoint.exists() else None
        if done is not None:
            keeper.load(done)
            say(f"stage {index + 1} ({stage.name}) goes on after epoch {keeper.epoch + 1}")
        if keeper.is_finished or not stage.epochs:
            break
        try:
            _run_trainer(plan, stage.epochs, module, train, keeper, listeners, checkpoint if done else None)
            break
        except DivergenceError as fault:
            recovery.times = max(recovery.times, int(module.slowdown < slowdown))  # tried before a kill
            say(recovery.after(str(fault), lr=stage.lr_head))
            if len(train) < WINDOW and checkpoint.exists():
                say(f"an epoch of fewer than {WINDOW} steps may spoil weights unseen, so the stage begins anew")
                _forget(checkpoint, members)
        classifier.load_state_dict(before)
        good = torch.load(checkpoint, weights_only=True)["keeper"]["epoch"] if checkpoint.exists() else -2
        curves.forget_after(keeper.label, good)
        notify()
    classifier.load_state_dict(keeper.best_state or before)
    if stage.trains == "lora":
        merge_lora(classifier.backbone)
    state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    write_whole(weights, lambda path: save_file(state, path))
    say(f"stage {index + 1} ({stage.name}): {keeper.verdict()}")


def _forget(checkpoint: Path, members: Path) -> None:
    for member in read_members(members):
        member.path.unlink()
    checkpoint.unlink()


def _open(classifier: Classifier, plan: Plan, index: int, steps_per_epoch: int) -> None:
    """Let train what the stage says, and nothing else."""
    stage = plan.stages[index]
    classifier.freeze(
        stage.trainable_stages,
        batch_norm=stage.batch_norm,
        only=stage.trains,
        layers=stage.layers,
        freezes_first=stage.freezes_first,
    )
    if stage.batch_norm != "frozen":
        set_momentum(classifier, momentum_for(steps_per_epoch))


def _make_module(
    plan: Plan,
    index: int,
    classifier: Classifier,
    train: Batches,
    origin: Mapping[str, torch.Tensor] | None,
    teacher: nn.Module | None,
    folding: Callable[[], AbstractContextManager[None]],
    own: OwnTraining,
    say: Callable[[str], None],
) -> Finetuning:
    stage, spec, averaging = plan.stages[index], plan.train, plan.train.averaging
    is_last, steps = index == plan.last_stage(stage.images), stage.epochs * len(train)
    keeps_average = is_last and averaging.kind in ("ema", "swa")
    swa_start = averaging.swa_start if keeps_average and averaging.kind == "swa" else None
    plateau = Plateau(factor=stage.schedule.factor, patience=stage.schedule.patience)
    pulls = plan.regularization.l2_sp
    anchored = _pretrained(classifier, stage) if pulls else []
    optimizer = make_optimizer(classifier, stage, spec.optimizer, anchored=anchored)
    counts = train.labels.bincount(minlength=len(plan.classes)).tolist()
    augment = plan.augment
    step = Step(
        loss=_loss(plan, counts) if own.loss is None else loss_by_image(own.loss),
        factor=lambda step: plateau.factor * rate_factor(
            stage.schedule,
            step,
            epochs=stage.epochs,
            steps_per_epoch=len(train),
            swa_start=swa_start,
            swa_lr=averaging.swa_lr,
        ),
        clip_norm=spec.clip_norm,
        seed=_seed(f"{plan.seed} {plan.repeated(index)} mixing"),
        mixing=Mixing(augment.mixup, augment.cutmix, len(plan.classes)) if augment.mixup or augment.cutmix else None,
        anchor=Anchor(classifier, anchored, pulls, start=origin) if pulls else None,
        distillation=make_distillation(plan, teacher),
    )  # fmt: skip
    return Finetuning(
        classifier,
        optimizer,
        step,
        plateau=plateau if stage.schedule.name == "plateau" else None,
        divergence=Divergence(len(plan.classes), spec.divergence_threshold),
        average=_make_average(classifier, averaging) if keeps_average else None,
        average_from=0 if swa_start is None else round(swa_start * steps),
        folding=folding,
        micro_batch=plan.hardware.micro_batch or None,
        warn=say,
    )


def _loss(plan: Plan, counts: Sequence[int]) -> Loss:
    imbalance, smoothing = plan.train.imbalance, plan.regularization.label_smoothing
    return make_loss(imbalance.kind, counts, smoothing=smoothing, gamma=imbalance.gamma, beta=imbalance.beta)


def _make_mixture(plan: Plan, index: int, start: Mapping[str, torch.Tensor] | None) -> StartMixture | None:
    share, is_last = plan.train.averaging.wise_ft, index == plan.last_stage(plan.stages[index].images)
    if start is None or not is_last or share == 1:
        return None
    return StartMixture(start, share)


def _make_average(classifier: Classifier, spec: AveragingPlan) -> WeightAverage:
    if spec.kind == "ema":
        return WeightAverage(classifier, kind="ema", decay=spec.ema_decay)
    return WeightAverage(classifier, kind="swa")


def _pretrained(classifier: Classifier, stage: Stage) -> list[str]:
    """Names of trained weights that began as pretrained ones."""
    backbone, kept = classifier.backbone, len(classifier.backbone.stages) - stage.fresh_stages
    return [
        f"backbone.{name}"
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad and backbone.stage_of[name] < kept
    ]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _run_trainer(
    plan: Plan,
    epochs: int,
    module: Finetuning,
    train: Batches,
    keeper: Keeper,
    listeners: Listeners,
    checkpoint: Path | None,
) -> None:
    quieten("pytorch_lightning", logging.ERROR)
    with warnings.catch_warnings():
        # Lightning advises loader workers and a higher matmul precision; both are decided in the plan.
        warnings.filterwarnings("ignore", category=pl.utilities.rank_zero.LightningDeprecationWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*(does not have many workers|isinstance.treespec).*")
        compute = Compute.of(plan.hardware)
        trainer = pl.Trainer(
            accelerator=ACCELERATORS[compute.device],
            devices=1,
            precision=PRECISIONS[compute.precision],  # type: ignore[arg-type]
            max_epochs=epochs,
            callbacks=listeners.around(keeper),
            plugins=[PlainFile()],
            num_sanity_val_steps=0,
            **listeners.options,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, train_dataloaders=train, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as leave:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, handler)  # Lightning turns Ctrl-C into a silent exit
            raise KeyboardInterrupt from leave
