"""Averages of weights along one training: the accuracy of many models at the cost of one.

An average holds the parameters that train and nothing else: torch's `AveragedModel` copies the whole network, the
frozen part included. Buffers are not averaged. Counters and tables stay as they are, and batch-norm statistics
that belong to other weights are of no use: they are taken anew for the averaged ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from finetune.models.batch_norm import moving_norms

Renew = Callable[[nn.Module], object]
"""Takes batch-norm statistics anew; `lambda model: pooled_statistics(model, batches, device=device)`, for one."""


class WeightAverage:
    """A moving average of the weights that train.

    `ema` is d * average + (1 - d) * weights, from the weights it begins with (Polyak & Juditsky, 1992, use the plain
    mean; the exponential one forgets the start). `swa` is the plain mean of the weights it is shown (Izmailov et al.,
    UAI 2018, section 3.2, https://arxiv.org/abs/1803.05407).
    """

    def __init__(self, classifier: nn.Module, *, kind: Literal["ema", "swa"], decay: float | None = None) -> None:
        """Begin from the weights of `classifier` whose `requires_grad` is set.

        Args:
            classifier: what is trained; it is not held on to.
            kind: of average.
            decay: d, in (0, 1), with `ema` only.

        Raises:
            ValueError: if the kind is unknown, the decay does not go with it, or nothing trains.
        """
        if kind not in ("ema", "swa"):
            raise ValueError(f"kind must be ema or swa, got {kind!r}.")
        if (kind == "ema") != (decay is not None and 0 < decay < 1):
            raise ValueError(f"a decay in (0, 1) goes with ema, and only with it; kind is {kind}, decay is {decay}.")
        self.kind, self.decay = kind, decay
        self.num_shown = 0
        """Updates so far."""
        self._weights = {n: p.detach().clone() for n, p in classifier.named_parameters() if p.requires_grad}
        if not self._weights:
            raise ValueError("no parameter trains, so there is nothing to average; freeze less.")

    @property
    def num_bytes(self) -> int:
        """Memory that the average takes."""
        return sum(tensor.nbytes for tensor in self._weights.values())

    @torch.no_grad()
    def update(self, classifier: nn.Module) -> None:
        """Let the weights as they are now enter the average; `classifier` is not touched."""
        weights = self._live_weights(classifier)
        step = get_swa_multi_avg_fn() if self.decay is None else get_ema_multi_avg_fn(self.decay)
        step(list(self._weights.values()), weights, self.num_shown)
        self.num_shown += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: plain values, and the tensors themselves, which the next update changes."""
        return {"kind": self.kind, "decay": self.decay, "num_shown": self.num_shown, "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: if it is of another kind of average, or of other weights.
        """
        if (found := (state["kind"], state["decay"])) != (self.kind, self.decay):
            raise ValueError(f"the state is of {found[0]} with decay {found[1]}, not {self.kind} with {self.decay}.")
        weights = state["weights"]
        if _shapes(weights) != _shapes(self._weights):
            odd = sorted(_shapes(weights).items() ^ _shapes(self._weights).items())[0]
            raise ValueError(f"the state is of other weights; {odd[0]} {odd[1]} is on one side only.")
        self.num_shown = state["num_shown"]
        self._weights = {name: weights[name].clone() for name in self._weights}

    @torch.no_grad()
    def apply_to(self, classifier: nn.Module, renew: Renew) -> None:
        """Put the average in the place of the weights, and let `renew` take batch-norm statistics for it.

        Where batch norm is frozen `renew` finds no norm that moves, and what is stored stays.

        Raises:
            ValueError: if a plain mean was shown no weights yet.
        """
        if self.kind == "swa" and not self.num_shown:
            raise ValueError("the mean has been shown no weights yet; update it before it is used.")
        for live, average in zip(self._live_weights(classifier), self._weights.values(), strict=True):
            live.copy_(average)
        renew(classifier)

    @contextmanager
    def swapped(self, classifier: nn.Module, renew: Renew) -> Iterator[None]:
        """Within it, `classifier` is as after `apply_to`; afterwards it is what it was, bit for bit."""
        raw = {name: tensor.detach().clone() for name, tensor in self._touched(classifier).items()}
        try:
            self.apply_to(classifier, renew)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._touched(classifier).items():
                    tensor.copy_(raw[name])

    def _touched(self, classifier: nn.Module) -> dict[str, torch.Tensor]:
        """The averaged weights and the buffers of every norm whose statistics move."""
        norms = set(moving_norms(classifier))
        buffers = {n: buffer for n, buffer in classifier.named_buffers() if n.rpartition(".")[0] in norms}
        return {**dict(zip(self._weights, self._live_weights(classifier), strict=True)), **buffers}

    def _live_weights(self, classifier: nn.Module) -> list[torch.Tensor]:
        """The classifier's tensors in our order; ours follow them to another device."""
        parameters = dict(classifier.named_parameters())
        live: list[torch.Tensor] = [parameters[name] for name in self._weights]
        if live[0].device != next(iter(self._weights.values())).device:
            self._weights = {name: tensor.to(live[0].device) for name, tensor in self._weights.items()}
        return live


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
