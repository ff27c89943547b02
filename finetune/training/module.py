"""One optimizer step over one batch, however little memory there is.

Optimization is manual so that a batch can be cut into micro-batches whose gradients add up to that of the
whole: as the plan says, and smaller where memory runs out, which halves the micro-batch and repeats the same
batch. The effective batch, the schedule and the number of steps stay what the plan says. Batch norm that takes its
statistics from the batch knows no such sum: a piece is normalised by itself. There, running out of memory is an error.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from finetune.compute import Compute, exact, free_gpu_memory
from finetune.errors import RunError
from finetune.metrics.calibration import fit_temperature
from finetune.models.batch_norm import uses_batch_statistics
from finetune.models.classifier import Classifier
from finetune.models.modes import evaluating
from finetune.planning.lr_schedules import Plateau
from finetune.training.distillation import Distillation
from finetune.training.losses import Loss
from finetune.training.mixup import Mixing
from finetune.training.optimization import Anchor, gradient_norm, set_rates
from finetune.training.watching import Divergence, update_ratio
from finetune.training.weight_averaging import WeightAverage

RATIO_EVERY = 10
"""Steps between two measurements of how far an update moves the weights: measuring copies them."""


class DivergenceError(Exception):
    """Training left the road; the message says by how much. `fit` catches it and goes back."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step is made of beside the classifier and the optimizer."""

    loss: Loss
    factor: Callable[[int], float]
    """Share of the peak rate by step."""
    clip_norm: float
    seed: int
    """Of what is drawn in a step."""
    mixing: Mixing | None = None
    anchor: Anchor | None = None
    distillation: Distillation | None = None


class Finetuning(pl.LightningModule):
    """A classifier, its loss, and the step that lowers it."""

    def __init__(
        self,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        step: Step,
        *,
        plateau: Plateau | None = None,
        divergence: Divergence | None = None,
        average: WeightAverage | None = None,
        average_from: int = 0,
        folding: Callable[[], AbstractContextManager[None]] = nullcontext,
        micro_batch: int | None = None,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = classifier
        self.micro_batch = micro_batch
        """Images per forward pass, at most; None: the whole batch."""
        self.totals: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.steps_done = 0
        self.slowdown = 1.0
        """What going back after a divergence multiplies all rates by."""
        self.plateau, self.average, self._average_from = plateau, average, average_from
        self._optimizer, self._step, self._divergence, self._warn = optimizer, step, divergence, warn
        self._folding = folding

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that the stage was given."""
        return self._optimizer

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """One optimizer step on images (B, C, H, W) and labels (B,).

        Raises:
            DivergenceError: if the loss says that going on is of no use; the weights are then lost.
        """
        images, labels, _ = batch
        targets = labels
        if self._step.mixing is not None:
            key = hashlib.blake2b(f"{self._step.seed} {self.steps_done}".encode(), digest_size=4).digest()
            images, targets = self._step.mixing(images, labels, int.from_bytes(key, "little"))
        self.rates = set_rates(self._optimizer, self._step.factor(self.steps_done) * self.slowdown)
        if isinstance(self._optimizer, torch.optim.LBFGS):
            loss, hits, norm = self._search(images, targets)
        else:
            loss, hits, norm = self._descend(images, targets)
        self.steps_done += 1
        self._add(loss=loss * len(labels), hits=hits, images=len(labels), gradient_norm=norm, steps=1)
        if self._divergence is not None and (why := self._divergence.sees(loss)):
            raise DivergenceError(why)
        if self.average is not None and self.steps_done > self._average_from:
            self.average.update(self.classifier)

    def refuse_epoch(self, loss: float) -> None:
        """End the attempt where a whole epoch was bad, so that no checkpoint ever holds a state gone wrong.

        Raises:
            DivergenceError: if its mean loss, or that of val, is not finite, or too many times the first.
        """
        rule = self._divergence
        if not math.isfinite(loss):
            raise DivergenceError(f"the loss over an epoch is {loss}")
        if rule is not None and rule.ratio and loss > rule.ratio * max(rule.first, math.log(rule.num_classes)):
            raise DivergenceError(f"the loss over an epoch is {loss:.3g}, and began at {rule.first:.3g}")

    def take_totals(self) -> dict[str, float]:
        """Sums since the last call, which are then zero."""
        taken, self.totals = self.totals, {}
        return taken

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run must know and the weights do not say."""
        checkpoint["steps_done"], checkpoint["micro_batch"] = self.steps_done, self.micro_batch
        checkpoint["slowdown"] = self.slowdown
        checkpoint["plateau"] = self.plateau.state_dict() if self.plateau else {}
        checkpoint["average"] = self.average.state_dict() if self.average else {}
        checkpoint["divergence"] = asdict(self._divergence) if self._divergence else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The reverse of `on_save_checkpoint`; a slowdown set since then stays."""
        self.steps_done, self.micro_batch = checkpoint["steps_done"], checkpoint["micro_batch"]
        if self.plateau is not None:
            self.plateau.load_state_dict(checkpoint["plateau"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        if self._divergence is not None:
            self._divergence = Divergence(**checkpoint["divergence"])
            # Where rates were lowered since, the losses before that do not count as divergence.
            if self.slowdown < checkpoint["slowdown"]:
                self._divergence.recent = []
        self.slowdown = min(self.slowdown, checkpoint["slowdown"])

    def _descend(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, int, float]:
        """A step along the gradient; loss, hits, and the norm of the gradient."""
        loss, hits = self._accumulate(images, targets)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        if self._step.anchor is not None:
            self._step.anchor.add_gradient(scale)
        trained = [p for p in self.classifier.parameters() if p.requires_grad]
        norm = gradient_norm(trained, self._step.clip_norm, scale)
        is_measured = self.steps_done % RATIO_EVERY == 0
        before = [p.detach().clone() for p in trained] if is_measured else []
        self.optimizers().step()  # type: ignore[union-attr]
        if is_measured:
            self._add(update_ratio=update_ratio(before, trained), ratios=1)
        return loss, hits, norm

    def _search(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, int, float]:
        """A step of L-BFGS, which looks at the same batch several times; loss and hits before it."""
        seen: list[tuple[float, int]] = []

        def closure() -> float:
            seen.append(self._accumulate(images, targets))
            pull = 0.0
            if self._step.anchor is not None:
                self._step.anchor.add_gradient()
                pull = self._step.anchor.loss()
            for parameter in trained:  # torch lays gradients end to end, which it can only do where they are plain
                parameter.grad = None if parameter.grad is None else parameter.grad.contiguous()
            return seen[-1][0] + pull

        trained = [p for p in self.classifier.parameters() if p.requires_grad]
        self._optimizer.step(closure)
        return *seen[0], gradient_norm(trained, float("inf"))

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def _accumulate(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
        """Gradient of the mean loss over the batch, in as many pieces as memory asks for; loss and hits.

        Raises:
            RunError: if memory is too short for one image, or for a batch that may not be cut.
        """
        if self.micro_batch and self.micro_batch < len(targets) and uses_batch_statistics(self.classifier):
            self._warn("a batch norm here normalises by the images at hand, so all of a step pass at once")
            self.micro_batch = None
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            try:
                return self._pieces(images, targets, self.micro_batch or len(targets))
            except RuntimeError as fault:
                if not is_out_of_memory(fault):
                    raise
                size = min(self.micro_batch or len(targets), len(targets))
            if size <= 1:
                raise RunError("one single image does not fit in memory; use a smaller data.image_size or backbone.")
            if uses_batch_statistics(self.classifier):
                raise RunError(
                    f"out of memory at {size} images, and a batch cannot be cut where batch norm trains: each piece "
                    "would be normalised by its own statistics, and the gradient would be another. Start a new run "
                    f"with a train.batch_size below {size}, or with train.batch_norm=frozen."
                )
            self.micro_batch = size // 2
            free_gpu_memory(images.device)
            self._warn(
                f"out of memory at {size} images: going on with {self.micro_batch} at a time, "
                f"{len(targets)} per step as planned"
            )

    def _pieces(self, images: torch.Tensor, targets: torch.Tensor, size: int) -> tuple[float, int]:
        total, hits = 0.0, 0
        pieces = -(-len(targets) // size)  # equal up to one image, so that no pass is for a few alone
        for x, y in zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
            with self._folding():
                logits = self.classifier(x)  # (b, K)
            losses = self._step.loss(logits.float(), y)  # (b,)
            if self._step.distillation is not None:
                losses = self._step.distillation(losses, logits, x)
            loss = losses.sum() / len(targets)
            self.manual_backward(loss)
            wanted = y if y.ndim == 1 else y.argmax(1)
            total, hits = total + float(loss.detach()), hits + int((logits.detach().argmax(1) == wanted).sum())
        return total, hits


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether a GPU or the CPU allocator said that memory is short."""
    told = str(fault)
    return isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in told or "MPS backend out of" in told


@dataclass(frozen=True, kw_only=True)
class ValLoss:
    """What val says of one state of the classifier."""

    loss: float
    """Mean cross-entropy in nats, over images."""
    chosen_by: float
    """The same at the best temperature, over images or over classes alike."""
    top1: float
    balanced_top1: float
    """Mean over classes of the share that is right."""
    losses: torch.Tensor
    """(N,) of each image, weighted, at the best temperature; their mean is `chosen_by`."""


@torch.inference_mode()
def measure_loss(
    classifier: nn.Module, batches: Any, compute: Compute, *, choose: str = "loss", at_once: int = 0
) -> ValLoss:
    """What `batches` say of the classifier in eval mode, which is put back; by `choose`, `loss` or `balanced`.

    No more than `at_once` images pass through it together; 0: all of a batch.
    """
    parts, wanted = [], []
    with evaluating(classifier):
        for images, labels, _ in batches:
            with compute.autocast():
                for some in images.split(at_once or len(images)):
                    parts.append(exact(classifier(some.to(compute.device))).cpu())
            wanted.append(labels)
    logits, labels = torch.cat(parts), torch.cat(wanted)
    counts = labels.bincount(minlength=logits.shape[1]).double()
    weights = 1 / counts[labels]  # every class that val holds counts alike
    loss = float(F.cross_entropy(logits, labels))
    tempered, temperature = loss, 1.0
    if logits.isfinite().all():
        found = fit_temperature(logits, labels, weights=weights if choose == "balanced" else None)
        tempered, temperature = found.log_loss_after, found.value or 1.0
    losses = F.cross_entropy(logits / temperature, labels, reduction="none")
    if choose == "balanced":
        losses = losses * weights / weights.mean()
    is_right = (logits.argmax(1) == labels).double()
    balanced = float((is_right * weights).sum() / (counts > 0).sum())
    return ValLoss(loss=loss, chosen_by=tempered, top1=float(is_right.mean()), balanced_top1=balanced, losses=losses)
