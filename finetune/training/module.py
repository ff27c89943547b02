"""One optimizer step over one batch, however little memory there is.

Optimization is manual so that a batch can be cut into micro-batches whose gradients add up to exactly
that of the whole: running out of memory halves the micro-batch and repeats the same batch, and the
effective batch, the schedule and the number of steps stay what the plan says.
"""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import RunError
from finetune.scores.calibration import fit_temperature
from finetune.training.optimization import gradient_norm, set_rates


class Finetuning(pl.LightningModule):
    """A classifier, its loss, and the step that lowers it."""

    def __init__(
        self,
        classifier: nn.Module,
        optimizer: torch.optim.Optimizer,
        factor: Callable[[int], float],
        *,
        clip_norm: float,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = classifier
        self.micro_batch: int | None = None
        """Images per forward pass; None: the whole batch."""
        self.totals = {"loss": 0.0, "hits": 0.0, "images": 0.0, "gradient_norm": 0.0, "steps": 0.0}
        self.rates: dict[str, float] = {}
        self.steps_done = 0
        self._optimizer, self._factor, self._clip_norm, self._warn = optimizer, factor, clip_norm, warn

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that the stage was given."""
        return self._optimizer

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """One optimizer step on images (B, C, H, W) and labels (B,)."""
        images, labels, _ = batch
        optimizer = self.optimizers()
        self.rates = set_rates(self._optimizer, self._factor(self.steps_done))
        loss, hits = self._accumulate(images, labels)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        norm = gradient_norm(
            (p for p in self.classifier.parameters() if p.requires_grad),
            self._clip_norm,
            scaler.get_scale() if scaler is not None else 1.0,
        )
        optimizer.step()  # type: ignore[union-attr]
        self.steps_done += 1
        for key, value in (("loss", loss * len(labels)), ("hits", hits), ("images", len(labels))):
            self.totals[key] += value
        self.totals["gradient_norm"] += norm
        self.totals["steps"] += 1

    def take_totals(self) -> dict[str, float]:
        """Sums since the last call, which are then zero."""
        taken, self.totals = self.totals, dict.fromkeys(self.totals, 0.0)
        return taken

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run must know and the weights do not say."""
        checkpoint["steps_done"], checkpoint["micro_batch"] = self.steps_done, self.micro_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The reverse of `on_save_checkpoint`."""
        self.steps_done, self.micro_batch = checkpoint["steps_done"], checkpoint["micro_batch"]

    def _accumulate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        """Gradient of the mean loss over the batch, in as many pieces as memory asks for; loss and hits."""
        while True:
            self._optimizer.zero_grad(set_to_none=True)
            try:
                return self._pieces(images, labels, self.micro_batch or len(labels))
            except RuntimeError as fault:
                if not is_out_of_memory(fault):
                    raise
                size = min(self.micro_batch or len(labels), len(labels))
            if size <= 1:
                raise RunError("one single image does not fit in memory; use a smaller data.image_size or backbone.")
            self.micro_batch = size // 2
            if images.is_cuda:
                torch.cuda.empty_cache()
            self._warn(
                f"out of memory at {size} images: going on with {self.micro_batch} at a time, "
                f"{len(labels)} per step as planned"
            )

    def _pieces(self, images: torch.Tensor, labels: torch.Tensor, size: int) -> tuple[float, int]:
        total, hits = 0.0, 0
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            logits = self.classifier(x)  # (b, K)
            loss = F.cross_entropy(logits.float(), y, reduction="sum") / len(labels)
            self.manual_backward(loss)
            total, hits = total + float(loss.detach()), hits + int((logits.detach().argmax(1) == y).sum())
        return total, hits


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether a GPU or the CPU allocator said that memory is short."""
    return isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in str(fault)


@torch.inference_mode()
def measure_loss(classifier: nn.Module, batches: Any, device: str, precision: str) -> tuple[float, float, float]:
    """Mean cross-entropy in nats, the same at the best temperature, and accuracy; in eval mode, which is put back."""
    was_training = classifier.training
    classifier.eval()
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    parts, wanted = [], []
    for images, labels, _ in batches:
        with torch.autocast(device, dtype=kinds.get(precision, torch.bfloat16), enabled=precision in kinds):
            parts.append(classifier(images.to(device)).double().cpu())
        wanted.append(labels)
    classifier.train(was_training)
    logits, labels = torch.cat(parts), torch.cat(wanted)
    loss = float(F.cross_entropy(logits, labels))
    tempered = fit_temperature(logits, labels).log_loss_after if logits.isfinite().all() else loss
    return loss, tempered, float((logits.argmax(1) == labels).double().mean())
