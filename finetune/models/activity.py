"""Watching activations where they are called, as modules or as plain functions, whatever the network."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from finetune.models.layers import Convolution
from finetune.models.modes import evaluating

FLAT_BELOW = {"relu": 0.0, "relu6": 0.0, "hardswish": -3.0, "hardmish": -2.0}
"""Pre-activation up to which output and gradient are exactly zero, by kind. A unit of any other kind cannot die."""
TWO_SIDED = {"tanh": (-0.97, 0.97), "hardtanh": (-0.97, 0.97), "sigmoid": (0.03, 0.97), "hardsigmoid": (0.03, 0.97)}
"""Outputs beyond which a function with two flat sides counts as saturated, by kind."""
KINDS = frozenset(
    {*FLAT_BELOW, *TWO_SIDED, "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "quickgelu", "silu", "mish",
     "softplus", "softsign", "logsigmoid", "maxout"}
)  # fmt: skip
GRID = tuple(round(0.1 * i - 3.05, 2) for i in range(62))
"""Edges of the histograms' 61 bins; zero is the middle of one. What lies outside counts in the outermost bins."""


def kind_of(name: str) -> str | None:
    """The kind behind the name of a class or function, of torch's or timm's; None if it is no activation."""
    plain = name.lower().replace("_", "").removesuffix("me")  # timm's memory-efficient ones end so
    plain = {"swish": "silu", "gelutanh": "gelu"}.get(plain, plain)
    return plain if plain in KINDS else None


class Watch(TorchFunctionMode):
    """Tallies every activation that runs inside it."""

    def __init__(self, make_tally: Callable[[str], "Tally"] | None = None) -> None:
        """Count with what `make_tally` makes of a kind; None: a `Tally`."""
        super().__init__()
        self._make_tally = make_tally or Tally
        self.tallies: dict[str, Tally] = {}
        self._calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._open: list[Tally | None] = []
        self._linear_width = 0

    def __enter__(self) -> "Watch":
        self._calls.clear()  # calls are counted anew in each forward pass
        return super().__enter__()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hook every module of `model`, in evaluation mode; both are put back."""
        handles: list[RemovableHandle] = []
        with evaluating(model):
            try:
                for name, module in model.named_modules():
                    enter, leave = self._hooks(name, kind_of(type(module).__name__))
                    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, values = None if self._open else kind_of(getattr(func, "__name__", "")), kwargs or {}
        if kind is None:
            return func(*args, **values)
        owner = self._running[-1] if self._running else ""
        tally = self._enter(f"{owner}.{kind}".lstrip("."), kind, args[0] if args else values.get("input"))
        output = func(*args, **values)
        self._leave(tally, output)
        return output

    def _hooks(self, name: str, kind: str | None) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._running.append(name)
            if kind is not None:
                is_inner = bool(self._open)  # an activation made of activations is one
                self._open.append(None if is_inner else self._enter(name or kind, kind, inputs[0] if inputs else None))

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if kind is not None:
                self._leave(self._open.pop(), output)
            elif isinstance(module, nn.Linear):
                self._linear_width = module.out_features
            elif isinstance(module, Convolution):
                self._linear_width = 0

        return enter, leave

    def _enter(self, name: str, kind: str, tensor: Any) -> "Tally | None":
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:  # the tanh of a lone weight, not of units
            return None
        self._calls[name] += 1
        name = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        tally = self.tallies.setdefault(name, self._make_tally(kind))
        tally.wake(self._by_unit(tensor))  # at once, for what comes may work in place
        return tally

    def _leave(self, tally: "Tally | None", output: Any) -> None:
        if tally is not None:
            tally.add(self._by_unit(output), is_gate=output.ndim == 4 and output.shape[2:].numel() == 1)

    def _by_unit(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, U, positions). After a linear map, or half of one, units come last; after a convolution second."""
        is_last = tensor.shape[-1] in (self._linear_width, self._linear_width // 2)
        return tensor.detach().movedim(-1 if is_last else 1, 1).flatten(2) if tensor.ndim > 2 else tensor[:, :, None]


class Tally:
    """Running sums of one call."""

    def __init__(self, kind: str) -> None:
        self.kind, self.is_finite, self.is_silent, self.is_gate = kind, True, True, False
        self.woken = torch.zeros(0, dtype=torch.long)
        self.num_units = self.num_samples = self.num_vectors = self.num_values = 0
        self.mean = self.squares = 0.0
        self.zeros = self.saturated = self.same_sign = 0
        self.counts = torch.zeros(len(GRID) - 1, dtype=torch.long)

    def wake(self, x: torch.Tensor) -> None:
        """Count what goes in, (B, U, P)."""
        self.num_samples += len(x)
        self.is_silent = self.is_silent and not bool(x.any())
        if self.kind in FLAT_BELOW:
            woken = (x > FLAT_BELOW[self.kind]).any(2).sum(0).cpu()
            self.woken = self.woken + woken if len(self.woken) else woken

    def add(self, y: torch.Tensor, *, is_gate: bool) -> None:
        """Count what comes out, (B, U, P)."""
        y = y.float()
        self.num_units, self.is_gate = y.shape[1], is_gate and self.kind in TWO_SIDED
        self.is_finite = self.is_finite and bool(y.isfinite().all())
        variance, mean = (float(value) for value in torch.var_mean(y, correction=0))
        total, shift = self.num_values + y.numel(), mean - self.mean  # merged as by Chan et al., without cancellation
        self.squares += variance * y.numel() + shift**2 * self.num_values * y.numel() / total
        self.mean += shift * y.numel() / total
        self.num_values = total
        self.zeros += int((y == 0).sum())
        self.num_vectors += y.shape[0] * y.shape[2]
        self.same_sign += int(((y >= 0).all(1) | (y <= 0).all(1)).sum())
        if self.kind in TWO_SIDED:
            low, high = TWO_SIDED[self.kind]
            self.saturated += int(((y < low) | (y > high)).sum())
        bins = (y[y.isfinite()].clamp(-3, 3) * 10).round().long() + 30  # histc has no deterministic form on a GPU
        self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()


class Wakes(Tally):
    """Counts only which units woke, at a tenth of the cost."""

    def add(self, y: torch.Tensor, *, is_gate: bool) -> None:
        """Remember how many units there are, (B, U, P)."""
        self.num_units = y.shape[1]
