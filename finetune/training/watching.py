"""What a training shows and leaves while it goes: `curves.csv`, and the rule that ends it."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.recipe.runs import write_whole

COLUMNS = ("stage", "epoch", "step", "name", "value")


class Curves:
    """Measured values of a run in long form, one row each, appended as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            write_whole(path, lambda temporary: temporary.write_text(",".join(COLUMNS) + "\n"))

    def append(self, stage: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Add one row per value. Epochs count from 0 within a stage (-1 is its start), and so do steps."""
        rows = [f"{stage},{epoch},{step},{name},{value!r}\n" for name, value in values.items()]
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write("".join(rows))

    def rows(self) -> list[dict[str, str]]:
        """Every whole row, oldest first."""
        with self.path.open(encoding="utf-8", newline="") as handle:
            return [row for row in csv.DictReader(handle) if row["value"]]

    def forget_after(self, stage: str, epoch: int) -> None:
        """Drop what an interrupted run wrote of `stage` after `epoch`."""
        kept = [row for row in self.rows() if row["stage"] != stage or int(row["epoch"]) <= epoch]
        text = "".join(",".join(row[column] for column in COLUMNS) + "\n" for row in kept)
        write_whole(self.path, lambda path: path.write_text(",".join(COLUMNS) + "\n" + text, encoding="utf-8"))


def rewind(curves: Curves, stage: str, folder: Path) -> None:
    """Drop from the curves what an unfinished stage wrote after its last whole epoch; before anybody reads them."""
    if (folder / "weights.safetensors").exists():
        return
    checkpoint, before_all = folder / "last.ckpt", -2
    done = torch.load(checkpoint, weights_only=True)["keeper"]["epoch"] if checkpoint.exists() else before_all
    curves.forget_after(stage, done)


def is_clearly_worse(top1: float, start: float, n: int) -> bool:
    """Whether accuracy on `n` images lies more than two standard errors below that at the start."""
    return start - top1 > 2 * math.sqrt((start * (1 - start) + top1 * (1 - top1)) / n)


@dataclass
class EarlyStop:
    """Look-ahead: stop once `patience` epochs in a row have not lowered the val loss.

    The start of the stage counts as epoch -1, so a training that only does harm changes nothing. Ties
    keep the earlier epoch, and a loss that is not a number is worse than any other. Where val is too small
    to tell epochs apart, `keeps_last` runs to the end and keeps the last epoch that val does not clearly speak
    against.
    """

    patience: int
    keeps_last: bool = False
    best_epoch: int = -1
    best_loss: float = math.inf

    def sees(self, epoch: int, loss: float, *, is_harmed: bool = False) -> bool:
        """Whether the epoch is to be kept, as things stand; never one that is clearly worse than the start."""
        if not is_harmed and loss < (math.inf if self.keeps_last else self.best_loss):
            self.best_epoch, self.best_loss = epoch, loss
            return True
        return False

    def is_over(self, epoch: int) -> bool:
        """Whether to stop after `epoch`."""
        return not self.keeps_last and epoch - self.best_epoch >= self.patience
