"""Batch norm that is held still, folded into the convolution before it while training.

With fixed statistics a batch norm is one scale and one shift per channel. Multiplying the few weights by the scale,
instead of the many activations, saves a pass over them forwards and two backwards. Weights, scales and shifts keep
their places and their gradients: a step is the same step, to rounding.

Which convolution feeds which batch norm is watched, not guessed from names, so any architecture may come.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
        self.pairs: tuple[tuple[nn.Conv2d, _BatchNorm], ...] = ()
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                pairs, expected = watch_pairs(model, images)
                self.pairs = tuple(pair for pair in pairs if _is_plain(*pair))
                with self():
                    error = (model(images) - expected).abs().max() / expected.std().clamp(min=1e-12)
            if not float(error) < TOLERANCE:
                self.pairs = ()
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run every pair whose batch norm is in evaluation mode as one layer; outside, all is as it was."""
        still = [(conv, norm) for conv, norm in self.pairs if not norm.training and _pays(conv, norm)]
        for conv, norm in still:
            conv.forward = partial(_convolve, conv, norm)  # type: ignore[method-assign]
            norm.forward = partial(_pass_on, norm)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for pair in still:
                for module in pair:
                    del module.forward


def fold(
    model: nn.Module, *, size_pixels: int, device: str | torch.device, precision: str
) -> Callable[[], AbstractContextManager[None]]:
    """What to enter for a forward pass of training: a `Folding` in 32 bit; nothing else, where rounding is coarser."""
    return Folding(model, size_pixels=size_pixels, device=device) if precision == "32" else nullcontext


def example_images(size_pixels: int, device: str | torch.device) -> torch.Tensor:
    """Two images (2, 3, H, W) of noise, the same at every call."""
    images = torch.rand(2, 3, size_pixels, size_pixels, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=torch.channels_last)


def watch_pairs(model: nn.Module, images: torch.Tensor) -> tuple[list[tuple[nn.Conv2d, _BatchNorm]], torch.Tensor]:
    """Each convolution whose output goes straight into a batch norm, both called once; and what the network says."""
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    fed: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)  # the tensor is kept, so that no other gets its identity
        elif inputs and id(inputs[0]) in made:
            fed.append((made[id(inputs[0])][0], module))  # type: ignore[arg-type]

    watched = [module for module in model.modules() if isinstance(module, nn.Conv2d | _BatchNorm)]
    handles = [module.register_forward_hook(after) for module in watched]
    try:
        expected = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (conv, norm) for conv, norm in fed if calls[conv] == calls[norm] == 1 and norm.running_mean is not None
    ], expected


def layers_after(norm: _BatchNorm) -> list[nn.Module]:
    """timm's batch norms carry the dropout and the activation that follow them; torch's carry none."""
    return [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]


def _is_plain(conv: nn.Conv2d, norm: _BatchNorm) -> bool:
    """Whether both are layers that we know to compute, and nobody listens between them."""
    return type(conv).forward in _KNOWN and not conv._forward_hooks and not norm._forward_pre_hooks


def _pays(conv: nn.Conv2d, norm: _BatchNorm) -> bool:
    """Not where the scale alone trains: its gradient would have to come through that of all weights."""
    return conv.weight.requires_grad or norm.weight is None or not norm.weight.requires_grad


def _convolve(conv: nn.Conv2d, norm: _BatchNorm, inputs: torch.Tensor) -> torch.Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)  # (C,)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    if isinstance(conv, Conv2dSame):
        padded = pad_same(inputs, list(weight.shape[-2:]), list(conv.stride), list(conv.dilation))
        return F.conv2d(padded, weight, shift, conv.stride, 0, conv.dilation, conv.groups)
    return conv._conv_forward(inputs, weight, shift)


def _pass_on(norm: _BatchNorm, outputs: torch.Tensor) -> torch.Tensor:
    for layer in layers_after(norm):
        outputs = layer(outputs)
    return outputs
