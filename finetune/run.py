"""A run as Python programs use it: its model, scores, classes and page, beside the folder that holds them."""

from functools import cached_property
from os import PathLike
from pathlib import Path

from torch import nn

from finetune.inference.loading import load_final
from finetune.inference.whole_model import hand_network
from finetune.models.own import Model
from finetune.process import as_guest
from finetune.runs.folder import RunFolder


class Run(RunFolder):
    """A run folder; what it holds is read when it is asked for."""

    @cached_property
    def model(self) -> nn.Module:
        """The final model in evaluation mode on the CPU: normalised images (B, 3, S, S) to logits (B, K).

        S is `plan.view.size_pixels`, K the number of classes; constants of the normalisation are in `plan.view`.
        An average of several runs gives the logarithm of mean probabilities for logits.

        Raises:
            RunError: if it is not trained to its end.
            BackboneError: if its weights are gone.
        """
        with as_guest():  # who makes a network draws its first weights
            return load_final(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return self.plan.classes

    @property
    def report(self) -> Path:
        """The page."""
        return self.file("report.html")


def load_run(named: str | PathLike[str], *, model: Model | None = None) -> Run:
    """The run that is named by its folder, by the beginning of its name among the runs, or by `latest`.

    Args:
        named: see above.
        model: the network that the run was begun with, where it was handed in; its weights do not matter.

    Raises:
        RunError: if there is none, or there are several.
    """
    run = Run.open(named)
    if model is not None:
        hand_network(run, model)
    return run
