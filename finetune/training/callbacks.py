"""Lightning's callbacks and loggers that a program hands in, beside our own keeping.

They are handed to the Trainer of each stage, and begin each in the state that they were handed in with. What a plan
decides is not theirs: which weights are kept, what moves, at which rate, and how many images make a step.
"""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as known
from pytorch_lightning.loggers import Logger

from finetune.errors import RecipeError, RunError
from finetune.training.checkpoints import Keeper
from finetune.training.module import Finetuning
from finetune.training.own import OwnTraining

_DECIDED: tuple[tuple[type[pl.Callback], str], ...] = (
    (known.Checkpoint, "a run keeps its own state after each epoch, and train.checkpoint says whose weights remain"),
    (known.BaseFinetuning, "what moves is said by train.strategy, train.depth and train.layers"),
    (known.StochasticWeightAveraging, "weights are averaged by train.averaging"),
    (known.WeightAveraging, "weights are averaged by train.averaging"),
    (known.GradientAccumulationScheduler, "a step has train.batch_size images, hardware.micro_batch of them at once"),
    (known.LearningRateFinder, "rates are said by train.optimizer"),
    (known.BatchSizeFinder, "a step has train.batch_size images"),
)


def checked(own: OwnTraining) -> OwnTraining:
    """The same with the states of its callbacks, where all are Lightning's and do nothing that a plan decides.

    Raises:
        RecipeError: naming each that is not or does, and the key that decides.
        RunError: if the state of one could not be kept.
    """
    faults = [fault for callback in own.callbacks for fault in _faults(callback)]
    faults += [
        f"logger= is a {type(one).__name__}; give a logger of pytorch_lightning, or a list of them."
        for one in loggers_of(own)
        if not isinstance(one, Logger)
    ]
    if faults:
        raise RecipeError("\n".join(faults))
    callbacks: list[Any] = list(own.callbacks)
    for callback in callbacks:
        _refuse_state(callback)
    return replace(own, states=tuple(copy.deepcopy(callback.state_dict()) for callback in callbacks))


def _faults(callback: object) -> list[str]:
    name = type(callback).__name__
    if not isinstance(callback, pl.Callback):
        return [f"callbacks= holds a {name}; give callbacks that are imported from pytorch_lightning."]
    return [f"callbacks= holds a {name}, but {why}." for kind, why in _DECIDED if isinstance(callback, kind)][:1]


def loggers_of(own: OwnTraining) -> list[Any]:
    """None, one or several."""
    if own.logger is None:
        return []
    return list(own.logger) if isinstance(own.logger, list | tuple) else [own.logger]


class Listeners:
    """What was handed in, as it listens to one stage."""

    def __init__(self, own: OwnTraining, *, is_watched: bool, say: Callable[[str], None]) -> None:
        """Choose those that have something to listen to.

        Args:
            own: as `checked` gives it.
            is_watched: whether val is measured; where not, what monitors it is left out.
            say: is told so.
        """
        pairs: list[tuple[Any, dict[str, Any]]] = list(zip(own.callbacks, own.states, strict=True))
        self._pairs = [pair for pair in pairs if is_watched or not _monitors_val(pair[0])]
        self.loggers = loggers_of(own)
        if left_out := [type(one).__name__ for one, _ in pairs if not is_watched and _monitors_val(one)]:
            say(f"nothing watches val in a refit, so it goes without {', '.join(left_out)}")

    @property
    def callbacks(self) -> list[pl.Callback]:
        """Those that listen."""
        return [callback for callback, _ in self._pairs]

    def around(self, keeper: Keeper) -> list[pl.Callback]:
        """All callbacks of an attempt at the stage: first what measures, then those that listen, then what writes.

        Those that listen are put into the state that they were handed in with.
        """
        keeper.has_listeners = bool(self._pairs or self.loggers)
        for callback, state in self._pairs:
            if state:
                callback.load_state_dict(copy.deepcopy(state))
        return [keeper, *self.callbacks, Writer(keeper)]

    @property
    def options(self) -> dict[str, Any]:
        """Of the Trainer."""
        return {
            "logger": self.loggers or False,
            "enable_progress_bar": any(isinstance(one, known.ProgressBar) for one in self.callbacks),
            "enable_model_summary": any(isinstance(one, known.ModelSummary) for one in self.callbacks),
        }


def _monitors_val(callback: object) -> bool:
    return str(getattr(callback, "monitor", "")).startswith("val/")


class Writer(known.Checkpoint):
    """Writes the state once everybody has seen the epoch: Lightning calls what is a `Checkpoint` after all others."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep what is to remain where a callback stopped the stage, and write the state."""
        assert isinstance(module, Finetuning)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback not in (self, self._keeper):
                _refuse_state(callback)
        if trainer.should_stop:
            self._keeper.finish(module)
        self._keeper.write(trainer)


def _refuse_state(callback: Any) -> None:
    """Raises RunError where the state of a callback is of a kind that only pickle could keep."""
    kept = io.BytesIO()
    try:
        torch.save(callback.state_dict(), kept)
        kept.seek(0)
        torch.load(kept, weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, AttributeError, TypeError) as fault:
        raise RunError(
            f"the state_dict of {type(callback).__name__} holds more than numbers, texts, tensors, lists and dicts, so "
            "it could not go on after a crash: no run is unpickled. Let it return plain values."
        ) from fault
