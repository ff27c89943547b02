"""Keeping: what is measured and chosen after each epoch of a stage, and the state that is written."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from finetune.compute import Compute
from finetune.config.plan import Plan
from finetune.data.loading import Batches
from finetune.models.activation_statistics import dead_share
from finetune.models.batch_norm import exact_statistics, pooled_statistics
from finetune.models.classifier import Classifier
from finetune.planning.lr_schedules import cycle_ends
from finetune.runs.folder import write_whole
from finetune.training.module import Finetuning, ValLoss, measure_loss
from finetune.training.snapshots import keep_newest, save_member
from finetune.training.watching import Curves, EarlyStop, is_clearly_higher, is_clearly_worse
from finetune.training.wise_ft import StartMixture

POINTS_PER_EPOCH = 10
"""Rows of rates and step losses that an epoch leaves in the curves."""
DEAD_RISE = 0.1
"""A rise of the share of dead units over that at the start that is worth a word."""
DEAD_LOOKS = 5
"""Epochs of a stage after which units are counted, about: it costs a forward pass and more."""


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint where it is told to.

    Lightning's own goes by way of the system's temporary folder, which may be full, and where a killed process leaves
    its half for ever.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write all of `checkpoint` to the file `path`; whoever calls renames it when it is whole."""
        with Path(path).open("wb") as file:  # by its name, torch would call a full disk "unexpected pos"
            torch.save(checkpoint, file)


class Keeper(pl.Callback):
    """Seeds each epoch, measures val, and keeps the weights to be shipped; writes the state when it is told to.

    Without val, in a refit, nothing is measured and the last epoch is kept.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        train: Batches,
        val: Batches | None,
        checkpoint: Path,
        curves: Curves,
        *,
        members: Path,
        say: Callable[[str], None],
        notify: Callable[[], None],
    ) -> None:
        self.plan, self.index, self.train, self.val = plan, index, train, val
        self.checkpoint, self.curves, self.members, self.say, self.notify = checkpoint, curves, members, say, notify
        self.compute = Compute.of(plan.hardware)
        stage, averaging = plan.stages[index], plan.train.averaging
        has_cycles = stage.schedule.name in ("cyclic", "cosine_restarts")
        self._ends = cycle_ends(stage.schedule, stage.epochs) if has_cycles else ()
        self._is_last = index == plan.last_stage(stage.images)
        self._snapshots = self._ends if self._is_last and averaging.snapshots else ()
        self.stop = EarlyStop(
            patience=plan.train.patience, keeps_last=plan.train.checkpoint == "last", cycle_ends=self._ends
        )
        self.best_state: dict[str, torch.Tensor] = {}
        self.best_losses = torch.empty(0)
        """(N,) of the val images, of the epoch that is kept as things stand."""
        self.epoch, self.is_finished, self.start_top1, self.start_dead = -1, False, 0.0, 0.0
        self.mixture: StartMixture | None = None
        """With the start of the training, where what ships is one."""
        self.has_listeners = False
        """Whether callbacks or loggers want to know what is measured."""
        self.label = f"{index + 1}-{stage.name}"
        self._began = 0.0

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `keeper`."""
        self.best_state, self.epoch, self.is_finished = state["best_state"], state["epoch"], state["is_finished"]
        self.stop.best_epoch, self.stop.best_loss = state["best_epoch"], state["best_loss"]
        self.start_top1, self.start_dead = state["start_top1"], state["start_dead"]
        self.best_losses = state.get("best_losses", self.best_losses)

    def verdict(self) -> str:
        """Which epoch was kept, in words."""
        if self.val is None:
            return f"{self.epoch + 1} epochs on {len(self.train.indices):,} labelled images, to the end"
        kept = "the start, for no epoch did better" if self.stop.best_epoch < 0 else f"epoch {self.stop.best_epoch + 1}"
        return f"{self.epoch + 1} epochs, kept {kept} (val loss at the best temperature {self.stop.best_loss:.4f})"

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure the starting point, which is the first candidate for the best."""
        if self.epoch < 0 and self.val is not None:
            self._measure(module, self.val, {})

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Everything random in this epoch follows (seed, stage, epoch)."""
        epoch = trainer.current_epoch
        stage = self.plan.repeated(self.index)
        key = hashlib.blake2b(f"{self.plan.seed} {stage} {epoch}".encode(), digest_size=4).digest()
        torch.manual_seed(int.from_bytes(key, "little"))
        self.train.set_epoch(epoch)
        self._began = time.perf_counter()
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
                self.label, trainer.current_epoch, module.steps_done, {**values, "train/running_loss": mean}
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, keep the best, and stop if nothing more is to be had."""
        assert isinstance(module, Finetuning)
        self.epoch = trainer.current_epoch
        seconds, totals = time.perf_counter() - self._began, module.take_totals()
        values = {
            "train/loss": totals["loss"] / totals["images"],
            "train/top1": totals["hits"] / totals["images"],
            "gradient_norm": totals["gradient_norm"] / totals["steps"],
            "images_per_second": totals["images"] / seconds,
        }
        if totals.get("ratios"):
            values["update_ratio"] = totals["update_ratio"] / totals["ratios"]
        module.refuse_epoch(values["train/loss"])
        self.is_finished = self.epoch + 1 == self.plan.stages[self.index].epochs
        if self.val is None:
            self._keep_end(module, values)
        else:
            self._judge(module, self.val, values)
        trainer.should_stop |= self.is_finished

    def finish(self, module: Finetuning) -> None:
        """The stage ends with this epoch, whoever stopped it; without val its weights are kept."""
        if not self.is_finished and self.val is None:
            with self._shipped(module):
                self._keep(module.classifier)
        self.is_finished = True

    def write(self, trainer: pl.Trainer) -> None:
        """The whole state, from which a killed training goes on."""
        write_whole(self.checkpoint, lambda path: trainer.save_checkpoint(path))
        self.notify()

    def _judge(self, module: Finetuning, val: Batches, values: dict[str, float]) -> None:
        """Measure val after an epoch, and what follows for the rates and for going on."""
        found = self._measure(module, val, values)
        module.refuse_epoch(found.loss if not math.isfinite(found.loss) else 0.0)
        self._keep_members(module, val)
        if module.plateau is not None and module.plateau.sees(found.chosen_by):
            self.say(f"{self.label}  val does not improve: rates are now {module.plateau.factor:g} of the schedule's")
        self.is_finished |= self.stop.is_over(self.epoch)

    def _keep_end(self, module: Finetuning, values: dict[str, float]) -> None:
        """Where no val watches: what training itself says goes to the curves, and the last epoch is kept."""
        self._tell(module, values, {})
        if self.is_finished:
            with self._shipped(module):
                self._keep(module.classifier)

    def _keep(self, classifier: nn.Module) -> None:
        self.stop.best_epoch = self.epoch
        self.best_state = {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}

    def _tell(self, module: Finetuning, values: dict[str, float], more: dict[str, float]) -> None:
        """Values to the curves and, but for `more`, to people."""
        self.curves.append(self.label, self.epoch, module.steps_done, {**values, **more})
        if self.epoch >= 0 and self.has_listeners:
            module.log_dict({**values, **more, "stage": float(self.index + 1)})
        epochs = self.plan.stages[self.index].epochs
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        where = f"epoch {self.epoch + 1}/{epochs}" if self.epoch >= 0 else "start"
        is_kept = self.val is not None and self.stop.best_epoch == self.epoch
        self.say(f"{self.label}  {where}  {shown}{'  *' if is_kept else ''}")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the weights to be kept and the rule's state."""
        checkpoint["keeper"] = {
            "best_state": self.best_state,
            "best_losses": self.best_losses,
            "epoch": self.epoch,
            "is_finished": self.is_finished,
            "best_epoch": self.stop.best_epoch,
            "best_loss": self.stop.best_loss,
            "start_top1": self.start_top1,
            "start_dead": self.start_dead,
        }

    def _measure(self, module: pl.LightningModule, val: Batches, values: dict[str, float]) -> ValLoss:
        """Judge what would be shipped, keep it if it is the best, and leave rows in the curves."""
        assert isinstance(module, Finetuning)
        train, judged = self.plan.train, (val, self.compute)
        is_averaged = module.average is not None and module.average.num_shown > 0
        if is_averaged:
            raw = measure_loss(module.classifier, *judged, at_once=self._at_once)
            values = {**values, "val/raw_loss": raw.loss, "val/raw_top1": raw.top1}
        with self._shipped(module):
            found = measure_loss(module.classifier, *judged, choose=str(train.monitor), at_once=self._at_once)
            dead = self._dead_share(module.classifier, val)
            top1 = found.balanced_top1 if train.monitor == "balanced" else found.top1
            if self.epoch < 0:
                self.start_top1, self.start_dead = top1, dead or 0.0
            is_harmed = is_clearly_worse(top1, self.start_top1, len(val.indices))
            is_best = self.stop.sees(self.epoch, found.chosen_by, is_harmed=is_harmed)
            if is_best or (not is_harmed and self._has_settled(found)):
                self.stop.best_loss, self.best_losses = found.chosen_by, found.losses
                self._keep(module.classifier)
        values = {**values, "val/loss": found.loss, "val/tempered_loss": found.chosen_by, "val/top1": found.top1}
        if train.monitor == "balanced":
            values["val/balanced_top1"] = found.balanced_top1
        self._tell(module, values, {} if dead is None else {"dead_units": dead})
        if dead is not None and dead > self.start_dead + DEAD_RISE:
            self.say(
                f"{self.label}  {dead:.0%} of the units never fire on val, {self.start_dead:.0%} did not at the start; "
                "a lower train.optimizer.lr keeps them awake"
            )
        return found

    def _has_settled(self, found: ValLoss) -> bool:
        """Whether this is where the rate has fallen to its end, and no earlier epoch was clearly better on val."""
        stage = self.plan.stages[self.index]
        is_end = self.epoch + 1 == stage.epochs and (self._is_last or stage.schedule.name != "constant")
        return (
            self.plan.train.checkpoint == "settled" and is_end and not is_clearly_higher(found.losses, self.best_losses)
        )

    @contextlib.contextmanager
    def _shipped(self, module: Finetuning) -> Iterator[None]:
        """What would ship in place: the average with statistics of its own, the mixture with the start, or both."""
        with contextlib.ExitStack() as stack:
            if module.average is not None and module.average.num_shown > 0:
                stack.enter_context(module.average.swapped(module.classifier, self._renew_statistics))
            if self.mixture is not None:
                stack.enter_context(self.mixture.swapped(module.classifier))
            yield

    def _renew_statistics(self, classifier: nn.Module) -> None:
        """Batch-norm statistics of trained stages anew, from the training images as training sees them."""
        take = exact_statistics if self.plan.train.averaging.batch_norm == "exact" else pooled_statistics
        take(classifier, self.train, device=self.compute.device)

    def _dead_share(self, classifier: Classifier, val: Batches) -> float | None:
        """Share of units that never fire, on the first val batch; at the start, the end, and some epochs between."""
        epochs = self.plan.stages[self.index].epochs
        if (self.epoch + 1) % math.ceil(epochs / DEAD_LOOKS) and self.epoch + 1 != epochs:
            return None
        images = next(iter(val))[0]
        parts = images.split(self._at_once or len(images))
        return dead_share(classifier, parts, device=self.compute.device)

    @property
    def _at_once(self) -> int:
        """Val images per pass: as in training where its steps are cut; 0: all of a batch."""
        size = self.plan.hardware.micro_batch
        return size if size < self.plan.train.batch_size else 0

    def _keep_members(self, module: Finetuning, val: Batches) -> None:
        """Write the raw weights where the plan keeps them, with what val says of them."""
        epoch, most = self.epoch + 1, self.plan.train.averaging.keep_last if self._is_last else 0
        if epoch not in self._snapshots and not most:
            return
        raw = measure_loss(module.classifier, val, self.compute, at_once=self._at_once)
        facts = {"epoch": epoch, "val_loss": raw.loss, "val_top1": raw.top1}
        if epoch in self._snapshots:
            save_member(self.members, f"cycle-{self._snapshots.index(epoch) + 1}", module.classifier, facts)
        if most:
            save_member(self.members, f"last-{epoch}", module.classifier, facts)
            keep_newest(self.members, "last", most)
