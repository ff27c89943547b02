"""Batch-norm statistics taken anew from the training images, with the weights held fixed.

Running averages trail behind the weights, and averaged weights have none of their own. One pass is enough for
most uses; layer by layer, every norm gets the moments of exactly what it will see when the network is used.
We add up counts, sums and squares in float64, so the order and the sizes of the batches do not matter to a layer.
`torch.optim.swa_utils.update_bn` averages the variances within batches instead, one vote per batch: it leaves out
what lies between batches, and lets a last batch of one image weigh as much as a full one.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finetune.compute import exact
from finetune.models.layers import BatchNorm
from finetune.models.modes import evaluating, modes_kept

IMAGES_AT_ONCE = 8
"""Images whose values are held in float64 at a time, so that memory stays small."""


def moving_norms(model: nn.Module) -> tuple[str, ...]:
    """Names of the batch norms whose statistics training moves: tracked, and not held still by `model.train()`."""
    with modes_kept(model):
        model.train()
        return tuple(name for name, module in model.named_modules() if _is_tracked(module) and module.training)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a batch norm normalises by the batch at hand, as the modules' modes are now; so images are not alone."""
    norms = (module for module in model.modules() if isinstance(module, BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)


def set_momentum(model: nn.Module, momentum: float, *, names: Collection[str] | None = None) -> None:
    """Let one training step move running statistics by the share `momentum`, as torch counts it.

    Args:
        model: the network.
        momentum: in (0, 1]; such as `momentum_for(steps_per_epoch)`.
        names: of the batch norms; None: those that training moves.

    Raises:
        ValueError: if `momentum` is no such share, or a name is not that of a tracked batch norm.
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must lie in (0, 1], got {momentum}.")
    for norm in _norms(model, names).values():
        norm.momentum = momentum


@torch.no_grad()
def pooled_statistics(
    model: nn.Module,
    batches: Iterable[Sequence[torch.Tensor]],
    *,
    device: str | torch.device,
    names: Collection[str] | None = None,
) -> None:
    """Set running means and variances to those of all images, in one pass over them.

    Each layer sees inputs that the layers below normalised by the statistics of the batch, as in training; for
    the first layer the result is exact, for deeper ones the larger the batch the closer. The variance is the
    unbiased one (Ioffe & Szegedy, ICML 2015, section 3.1, https://arxiv.org/abs/1502.03167), but over all images
    and not as the mean over batches. Dropout is off, as it will be when the statistics are used.

    Args:
        model: on `device`. Its modes and momenta are left as they are; `num_batches_tracked` is the number of batches.
        batches: of images (B, 3, H, W) and whatever follows them. A batch of one image joins the one before it.
        device: where to compute.
        names: of the batch norms; None: those that training moves. Without any, no batch is read.

    Raises:
        ValueError: if there is no image, or a name is not that of a tracked batch norm.
    """
    if not (norms := _norms(model, names)):
        return
    with evaluating(model), _using_batches(norms.values()):
        moments = _collect(model, norms, _in_company(images for images, *_ in batches), device)
    _store(norms, moments)


@torch.no_grad()
def exact_statistics(
    model: nn.Module,
    batches: Iterable[Sequence[torch.Tensor]],
    *,
    device: str | torch.device,
    names: Collection[str] | None = None,
) -> None:
    """Set running means and variances to those of what each layer sees when the network is used.

    Layer by layer in evaluation mode, so that each input is normalised by statistics that are final: the precise
    statistics of Wu & Johnson 2021, section 3, https://arxiv.org/abs/2105.07576, without their approximation by
    batches. Layers that do not feed one another share a pass. A second call changes nothing.

    Args:
        model: as for `pooled_statistics`.
        batches: as for `pooled_statistics`, but read once for every depth, the same each time: a list, or a loader
            without random changes of the images.
        device: where to compute.
        names: of the batch norms; None: those that training moves.

    Raises:
        ValueError: if `batches` can be read only once, there is no image, or a name is unknown.
    """
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, which ends after one pass; give a list or a loader.")
    if not (waiting := _norms(model, names)):
        return
    with evaluating(model):
        example = next((images[:1].to(device) for images, *_ in batches), None)
        while example is not None and (ready := _ready(model, waiting, example)):
            _store(ready, _collect(model, ready, (images for images, *_ in batches), device))
            waiting = {name: norm for name, norm in waiting.items() if name not in ready}
    if example is None:
        raise ValueError("batches holds no image, so there are no statistics to take.")


class _Moments:
    """Count, sum and sum of squares of every channel, in float64."""

    def __init__(self) -> None:
        self.values_per_channel = self.batches = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)  # (C,)

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs (B, C) or (B, C, ...) in."""
        self.values_per_channel += inputs.numel() // inputs.shape[1]
        self.batches += 1
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        for part in inputs.split(IMAGES_AT_ONCE):
            values = exact(part)
            self.total = self.total.to(values.device) + values.sum(axes)
            self.squares = self.squares.to(values.device) + values.square().sum(axes)


def _collect(
    model: nn.Module, norms: Mapping[str, BatchNorm], images: Iterable[torch.Tensor], device: str | torch.device
) -> dict[str, _Moments]:
    """What each of `norms` is given while the network looks at all images; a norm that never runs is left out."""
    moments: dict[str, _Moments] = {}
    num_images = 0
    with _watched(norms, lambda name, inputs: moments.setdefault(name, _Moments()).add(inputs)):
        for batch in images:
            model(batch.to(device))
            num_images += len(batch)
    if not num_images:
        raise ValueError("batches holds no image, so there are no statistics to take.")
    return moments


def _store(norms: Mapping[str, BatchNorm], moments: Mapping[str, _Moments]) -> None:
    if lonely := [name for name, seen in moments.items() if seen.values_per_channel < 2]:
        raise ValueError(f"{lonely[0]} saw a single value per channel, which has no variance; give more images.")
    for name, seen in moments.items():
        norm, n = norms[name], seen.values_per_channel
        assert norm.running_mean is not None and norm.running_var is not None
        mean = seen.total / n
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((seen.squares / n - mean.square()).clamp(min=0) * n / (n - 1))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(seen.batches)


def _ready(model: nn.Module, waiting: Mapping[str, BatchNorm], example: torch.Tensor) -> dict[str, BatchNorm]:
    """Those of `waiting` that no other of them feeds: with all of them spoiled, the ones that are given no NaN."""
    is_clean: dict[str, bool] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        is_clean[name] = is_clean.get(name, True) and not bool(inputs.isnan().any())

    means = {name: norm.running_mean for name, norm in waiting.items() if norm.running_mean is not None}
    kept = {name: mean.clone() for name, mean in means.items()}
    try:
        for mean in means.values():
            mean.fill_(torch.nan)
        with _watched(waiting, see):
            model(example)
    finally:
        for name, mean in means.items():
            mean.copy_(kept[name])
    clean = [name for name, is_so in is_clean.items() if is_so]
    return {name: waiting[name] for name in clean or list(is_clean)[:1]}  # a norm that feeds itself takes its turn


def _in_company(images: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same images with none alone in its batch, for one image has no batch statistics."""
    whole, rest = None, None
    for batch in images:
        rest = batch if rest is None else torch.cat([rest, batch])
        if len(rest) > 1:
            if whole is not None:
                yield whole
            whole, rest = rest, None
    if last := [part for part in (whole, rest) if part is not None]:
        yield torch.cat(last)


@contextmanager
def _watched(norms: Mapping[str, BatchNorm], see: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def look(module: nn.Module, inputs: Any) -> None:
            see(name, inputs[0])

        return look

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _using_batches(norms: Collection[BatchNorm]) -> Iterator[None]:
    """Normalise by statistics of each batch, and write none; within `evaluating`, which puts the modes back."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # as it is of all that keep statistics


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None and module.track_running_stats


def _norms(model: nn.Module, names: Collection[str] | None) -> dict[str, BatchNorm]:
    found = {name: module for name, module in model.named_modules() if _is_tracked(module)}
    wanted = moving_norms(model) if names is None else names
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(f"{', '.join(unknown)}: no batch norm of that name keeps statistics in this network.")
    return {name: found[name] for name in wanted}  # type: ignore[misc]
