"""Scores of one peer from its answers, the same for all: the class of a test file is the folder it lies in."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.config.measures import Measure
from finetune.metrics.classification import log_losses
from finetune.metrics.intervals import bootstrap_mean
from finetune.metrics.shares import wilson


class AnswersError(ValueError):
    """A peer's answers are not what was asked for."""


@dataclass(frozen=True)
class Judged:
    """Accuracy and log loss with 95 % intervals of the test images, and which images were right."""

    top1: Measure
    log_loss: Measure
    hits: np.ndarray
    """(N,), bool, in the order of the sorted names."""


def judge(answers: Path, test: Path) -> Judged:
    """Score `answers` (an npz of names, probabilities (N, K), classes) on the files below `test`.

    Raises:
        AnswersError: if a file is missing or told twice, or a row is no distribution over all classes.
    """
    with np.load(answers) as stored:
        names, classes = [str(name) for name in stored["names"]], [str(name) for name in stored["classes"]]
        probabilities = torch.from_numpy(stored["probabilities"].astype(np.float64))
    wanted = sorted(path.relative_to(test).as_posix() for path in test.rglob("*") if path.is_file())
    if sorted(names) != wanted:
        odd = sorted(set(names) ^ set(wanted)) or ["a name twice"]
        raise AnswersError(f"{answers}: names differ from the {len(wanted)} files of {test}: {', '.join(odd[:3])} ...")
    if sorted(classes) != sorted({name.split("/")[0] for name in wanted}):
        raise AnswersError(f"{answers}: classes are {classes}, not the folders of {test}.")
    if probabilities.shape != (len(names), len(classes)) or not probabilities.isfinite().all():
        raise AnswersError(f"{answers}: probabilities are {tuple(probabilities.shape)} or not finite.")
    if probabilities.min() < 0 or not torch.allclose(probabilities.sum(1), torch.ones(len(names)).double(), atol=1e-3):
        raise AnswersError(f"{answers}: a row of probabilities does not sum to 1.")
    order = np.argsort(names)
    labels = torch.tensor([classes.index(names[place].split("/")[0]) for place in order])
    probabilities = probabilities[torch.from_numpy(order)]
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    hits = (probabilities.argmax(1) == labels).numpy()
    return Judged(
        top1=wilson(int(hits.sum()), len(hits)),
        log_loss=bootstrap_mean(log_losses(probabilities, labels), seed=0),
        hits=hits,
    )


def to_hex(hits: np.ndarray) -> str:
    """Which images were right, as one word of a table: `from_hex` reads it back."""
    return np.packbits(hits).tobytes().hex()


def from_hex(word: str, count: int) -> np.ndarray:
    """(count,), bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(word), np.uint8), count=count).astype(bool)
