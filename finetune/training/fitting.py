"""Fit: one stage of a plan, one `Trainer.fit`. Killed at any moment, it goes on where its last epoch ended.

Everything random follows (seed, stage, epoch), every rate follows the step, and the whole state of the
stage is written after each epoch; so an interrupted run ends in the same weights, bit for bit on a CPU.
"""

import copy
import hashlib
import logging
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file

from finetune.data.loading import Batches
from finetune.models.classifier import Classifier
from finetune.recipe.plan import Plan
from finetune.recipe.runs import write_whole
from finetune.training.module import Finetuning, measure_loss
from finetune.training.optimization import make_optimizer
from finetune.training.schedules import rate_factor
from finetune.training.watching import Curves, EarlyStop, is_clearly_worse

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Ours to Lightning's."""
POINTS_PER_EPOCH = 10
"""Rows of rates and step losses that an epoch leaves in the curves."""


def fit(
    plan: Plan,
    index: int,
    classifier: Classifier,
    train: Batches,
    val: Batches,
    folder: Path,
    curves: Curves,
    *,
    say: Callable[[str], None],
    notify: Callable[[], None],
) -> None:
    """Train `classifier` in place by stage `index` of the plan; its best epoch is what it holds afterwards.

    Args:
        plan: what to do.
        index: of the stage, from 0.
        classifier: holds the weights that the stage begins from.
        train: batches of the training images.
        val: batches of the val images.
        folder: gets `last.ckpt` after each epoch and `weights.safetensors` at the end.
        curves: gets what is measured.
        say: prints a line for people.
        notify: called when the curves have grown.
    """
    weights, checkpoint = folder / "weights.safetensors", folder / "last.ckpt"
    if weights.exists():
        classifier.load_state_dict(load_file(weights))
        return
    stage, train_spec = plan.stages[index], plan.train
    classifier.freeze(stage.trainable_stages, batch_norm=stage.batch_norm)
    steps = stage.epochs * len(train)
    module = Finetuning(
        classifier,
        make_optimizer(classifier, stage, train_spec.optimizer),
        lambda step: rate_factor(
            str(train_spec.schedule), step, steps=steps, warmup_fraction=train_spec.warmup_fraction
        ),
        clip_norm=train_spec.clip_norm,
        warn=say,
    )
    keeper = _Keeper(plan, index, train, val, checkpoint, curves, say=say, notify=notify)
    if checkpoint.exists():
        keeper.load(torch.load(checkpoint, weights_only=True)["keeper"])
        say(f"stage {index + 1} ({stage.name}) goes on after epoch {keeper.epoch + 1}")
    if not keeper.is_finished:
        _run_trainer(plan, stage.epochs, module, train, keeper, checkpoint if checkpoint.exists() else None)
    classifier.load_state_dict(keeper.best_state)
    state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    write_whole(weights, lambda path: save_file(state, path))
    say(f"stage {index + 1} ({stage.name}): {keeper.verdict()}")


def _run_trainer(
    plan: Plan, epochs: int, module: Finetuning, train: Batches, keeper: "_Keeper", checkpoint: Path | None
) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning advises loader workers and a higher matmul precision; both are decided in the plan.
        warnings.filterwarnings("ignore", category=pl.utilities.rank_zero.LightningDeprecationWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", message=".*(does not have many workers|isinstance.treespec).*")
        trainer = pl.Trainer(
            accelerator="gpu" if plan.hardware.devices == "cuda" else "cpu",
            devices=1,
            precision=PRECISIONS[plan.hardware.precision],  # type: ignore[arg-type]
            max_epochs=epochs,
            callbacks=[keeper],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, train_dataloaders=train, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as leave:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, handler)  # Lightning turns Ctrl-C into a silent exit
            raise KeyboardInterrupt from leave


class _Keeper(pl.Callback):
    """Seeds each epoch, measures val, keeps the best weights, and writes the state after each epoch."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        train: Batches,
        val: Batches,
        checkpoint: Path,
        curves: Curves,
        *,
        say: Callable[[str], None],
        notify: Callable[[], None],
    ) -> None:
        self.plan, self.index, self.train, self.val = plan, index, train, val
        self.checkpoint, self.curves, self.say, self.notify = checkpoint, curves, say, notify
        self.stop = EarlyStop(patience=int(plan.train.patience or 1), keeps_last=plan.train.keep == "last")
        self.best_state: dict[str, torch.Tensor] = {}
        self.epoch, self.is_finished, self.start_top1 = -1, False, 0.0
        self._began, self._seen = 0.0, 0.0
        self._label = f"{index + 1}-{plan.stages[index].name}"

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `keeper`."""
        self.best_state, self.epoch, self.is_finished = state["best_state"], state["epoch"], state["is_finished"]
        self.stop.best_epoch, self.stop.best_loss = state["best_epoch"], state["best_loss"]
        self.start_top1 = state["start_top1"]

    def verdict(self) -> str:
        """Which epoch was kept, in words."""
        kept = "the start, for no epoch did better" if self.stop.best_epoch < 0 else f"epoch {self.stop.best_epoch + 1}"
        return f"{self.epoch + 1} epochs, kept {kept} (val loss at the best temperature {self.stop.best_loss:.4f})"

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure the starting point, which is the first candidate for the best."""
        if self.epoch >= 0:
            return
        self._measure(module, {})

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Everything random in this epoch follows (seed, stage, epoch)."""
        epoch = trainer.current_epoch
        key = hashlib.blake2b(f"{self.plan.seed} {self.index} {epoch}".encode(), digest_size=4).digest()
        torch.manual_seed(int.from_bytes(key, "little"))
        self.train.set_epoch(epoch)
        self._began, self._seen = time.perf_counter(), 0.0
        assert isinstance(module, Finetuning)
        module.take_totals()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        """Leave a few rows per epoch, so that a long one can be watched."""
        assert isinstance(module, Finetuning)
        every = max(1, len(self.train) // POINTS_PER_EPOCH)
        if module.steps_done % every == 0:
            values = {f"lr/{part}": rate for part, rate in module.rates.items()}
            mean = module.totals["loss"] / max(1.0, module.totals["images"])
            self.curves.append(
                self._label, trainer.current_epoch, module.steps_done, {**values, "train/running_loss": mean}
            )
            self.notify()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, keep the best, write the state, and stop if nothing more is to be had."""
        assert isinstance(module, Finetuning)
        self.epoch = trainer.current_epoch
        seconds, totals = time.perf_counter() - self._began, module.take_totals()
        self._measure(
            module,
            {
                "train/loss": totals["loss"] / totals["images"],
                "train/top1": totals["hits"] / totals["images"],
                "gradient_norm": totals["gradient_norm"] / totals["steps"],
                "images_per_second": totals["images"] / seconds,
            },
        )
        self.is_finished = self.stop.is_over(self.epoch) or self.epoch + 1 == self.plan.stages[self.index].epochs
        write_whole(self.checkpoint, lambda path: trainer.save_checkpoint(path))
        trainer.should_stop = self.is_finished

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the best weights and the rule's state."""
        checkpoint["keeper"] = {
            "best_state": self.best_state,
            "epoch": self.epoch,
            "is_finished": self.is_finished,
            "best_epoch": self.stop.best_epoch,
            "best_loss": self.stop.best_loss,
            "start_top1": self.start_top1,
        }

    def _measure(self, module: pl.LightningModule, values: dict[str, float]) -> None:
        assert isinstance(module, Finetuning)
        hardware = self.plan.hardware
        loss, tempered, top1 = measure_loss(module.classifier, self.val, hardware.devices, hardware.precision)
        self.start_top1 = top1 if self.epoch < 0 else self.start_top1
        is_harmed = is_clearly_worse(top1, self.start_top1, len(self.val.indices))
        if self.stop.sees(self.epoch, tempered, is_harmed=is_harmed):
            self.best_state = {
                name: copy.deepcopy(value.detach().cpu()) for name, value in module.classifier.state_dict().items()
            }
        values = {**values, "val/loss": loss, "val/tempered_loss": tempered, "val/top1": top1}
        self.curves.append(self._label, self.epoch, module.steps_done, values)
        self.notify()
        epochs = self.plan.stages[self.index].epochs
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        where = f"epoch {self.epoch + 1}/{epochs}" if self.epoch >= 0 else "start"
        self.say(f"{self._label}  {where}  {shown}{'  *' if self.stop.best_epoch == self.epoch else ''}")
