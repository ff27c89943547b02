"""Batch norm that is held still, folded into the convolution before it while training.

With fixed statistics a batch norm is one scale and one shift per channel. Multiplying the few weights by the scale,
instead of the many activations, saves a pass over them forwards and two backwards. Weights, scales and shifts keep
their places and their gradients: a step is the same step, to rounding.

Which convolution feeds which batch norm is watched, not guessed from names, so any architecture may come.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn

from finetune.compute import Precision
from finetune.models.layers import BatchNorm
from finetune.models.modes import evaluating

TOLERANCE = 1e-3
"""Greatest difference of a network's answers with fused or folded layers, as a share of their spread, before it is
not used."""
_KNOWN = (nn.Conv2d.forward, Conv2dSame.forward)


class Folding:
    """The pairs of convolution and batch norm in a network, and a context in which each runs as one."""

    def __init__(
        self, model: nn.Module, *, size_pixels: int, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Look at noise once to see what feeds what, and once more to see that folding changes nothing."""
        images = example_images(size_pixels, device).to(dtype)
        self._swaps: tuple[_Swap, ...] = ()
        with evaluating(model), torch.no_grad():
            pairs, expected = watch_pairs(model, images)
            self._swaps = tuple(_Swap(model, *pair) for pair in pairs if _is_plain(*pair))
            if not self._error(model, images, expected) < TOLERANCE:
                self._swaps = ()

    def _error(self, model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> float:
        try:
            with self():
                return float((model(images) - expected).abs().max() / expected.std().clamp(min=1e-12))
        except AttributeError:  # the network asks a layer for more than its answer
            return math.inf

    @property
    def pairs(self) -> tuple[tuple[nn.Conv2d, BatchNorm], ...]:
        """What can run as one, in the order in which it runs."""
        return tuple((swap.conv, swap.norm) for swap in self._swaps)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run every pair whose batch norm is in evaluation mode as one layer; outside, all is as it was."""
        still = [swap for swap in self._swaps if swap.is_due()]
        try:
            for swap in still:
                swap.put()
            yield
        finally:
            for swap in still:
                swap.take_back()


def fold(
    model: nn.Module, *, size_pixels: int, device: str | torch.device, precision: Precision
) -> Callable[[], AbstractContextManager[None]]:
    """What to enter for a forward pass of training: a `Folding` in 32 bit; nothing else, where rounding is coarser."""
    return Folding(model, size_pixels=size_pixels, device=device) if precision == "32" else nullcontext


def example_images(size_pixels: int, device: str | torch.device) -> torch.Tensor:
    """Two images (2, 3, H, W) of noise, the same at every call."""
    images = torch.rand(2, 3, size_pixels, size_pixels, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=torch.channels_last)


def watch_pairs(model: nn.Module, images: torch.Tensor) -> tuple[list[tuple[nn.Conv2d, BatchNorm]], torch.Tensor]:
    """Each convolution whose output goes straight into a batch norm, both called once; and what the network says."""
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    fed: list[tuple[nn.Conv2d, BatchNorm]] = []

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)  # the tensor is kept, so that no other gets its identity
        elif inputs and id(inputs[0]) in made:
            fed.append((made[id(inputs[0])][0], module))  # type: ignore[arg-type]

    watched = [module for module in model.modules() if isinstance(module, nn.Conv2d | BatchNorm)]
    handles = [module.register_forward_hook(after) for module in watched]
    try:
        expected = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (conv, norm) for conv, norm in fed if calls[conv] == calls[norm] == 1 and norm.running_mean is not None
    ], expected


def layers_after(norm: BatchNorm) -> list[nn.Module]:
    """timm's batch norms carry the dropout and the activation that follow them; torch's carry none."""
    return [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]


def _is_plain(conv: nn.Conv2d, norm: BatchNorm) -> bool:
    """Whether both are layers that we know to compute, and nobody listens between them."""
    is_known = type(conv).forward in _KNOWN and conv.padding_mode == "zeros"
    return is_known and not conv._forward_hooks and not norm._forward_pre_hooks


class _Convolution(nn.Module):
    """Both layers of a pair, without what follows the batch norm."""

    def __init__(self, conv: nn.Conv2d, norm: BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        conv, norm = self.conv, self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)  # (C,)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        if isinstance(conv, Conv2dSame):
            inputs = pad_same(inputs, list(weight.shape[-2:]), list(conv.stride), list(conv.dilation))
            return F.conv2d(inputs, weight, shift, conv.stride, 0, conv.dilation, conv.groups)
        return F.conv2d(inputs, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class _Rest(nn.Module):
    """What is left of the batch norm of a pair: what follows it, and who listens to it."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs
        for layer in layers_after(self.norm):
            outputs = layer(outputs)
        for hook in self.norm._forward_hooks.values():
            answer = hook(self.norm, (inputs,), outputs)
            outputs = outputs if answer is None else answer
        return outputs


class _Swap:
    """The layers of a pair, and the two that stand in for them, wherever they are in a network."""

    def __init__(self, model: nn.Module, conv: nn.Conv2d, norm: BatchNorm) -> None:
        self.conv, self.norm = conv, norm
        deputies: dict[nn.Module, nn.Module] = {conv: _Convolution(conv, norm), norm: _Rest(norm)}
        self._places = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module, deputies[module])
            for name, module in model.named_modules(remove_duplicate=False)
            if module in deputies
        ]

    def is_due(self) -> bool:
        """Not where the scale alone trains: its gradient would have to come through that of all weights."""
        pays = self.conv.weight.requires_grad or self.norm.weight is None or not self.norm.weight.requires_grad
        return pays and not self.norm.training

    def put(self) -> None:
        for parent, name, _, deputy in self._places:
            setattr(parent, name, deputy)

    def take_back(self) -> None:
        for parent, name, module, _ in self._places:
            setattr(parent, name, module)
