"""What the units of a network do: how activations spread, which units never wake, which layers get no gradient.

Activations are watched where they are called, as modules or as plain functions, so that a network that was written
without a thought of being watched is seen as a whole.

For diagnosis, and called by nothing else yet: `measure_units`, `judge_units`, `LayerUnits`, `measure_gradients`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from finetune.compute import exact
from finetune.models.activity import FLAT_BELOW, TWO_SIDED, Tally, Wakes, Watch
from finetune.models.layers import BatchNorm

NEARLY_DEAD = 1e-3
"""Share of samples that wake a unit, below which it is nearly dead."""
COLLAPSE, EXPLOSION = 0.05, 20.0
"""Standard deviation of the last layer's output over that of the first's."""
MOST_SATURATED, MOST_DEAD, MOST_RISE = 0.5, 0.2, 0.1
"""Shares of a layer beyond which it is worth a warning."""
VANISHING = 1e-3
"""Gradient over weight, as a share of the median layer's."""
FAINT = 1e-5
"""Gradient over weight of the lowest layer that trains, at a loss scaled to 1, below which it hardly moves."""


@dataclass(frozen=True, kw_only=True)
class LayerUnits:
    """What one call of an activation gave over all images."""

    name: str
    """Of the module, or of the module that called a function, then the function; `#2` is a second call."""
    kind: str
    num_units: int
    num_samples: int
    """Entries along the first axis: images, or windows where a network cuts images into them."""
    mean: float
    std: float
    zero_share: float
    """Sparsity: outputs that are exactly zero."""
    saturated_share: float | None
    """Outputs on one of two flat sides; None where the function has no two."""
    same_sign_share: float
    """Output vectors that do not hold both signs; all weight gradients of a unit that reads one share a sign."""
    can_die: bool
    is_silent: bool
    """All inputs were exactly zero, as in a branch whose last layer begins at zero: its units are not dead, their
    inputs have not begun to vary."""
    is_gate: bool
    """A sigmoid on one value per map, as in squeeze-and-excitation; it may well be closed."""
    dead: tuple[int, ...]
    """Units that no position of any image woke: no gradient reaches their weights."""
    nearly_dead: tuple[int, ...]
    """Units that fewer than one image in a thousand woke."""
    counts: tuple[int, ...]
    """Outputs in each bin of `GRID`."""
    is_finite: bool

    @property
    def centring(self) -> float:
        """|mean| / std: 0 is centred, and what reads it steps straight."""
        return abs(self.mean) / self.std if self.std else math.inf if self.mean else 0.0

    @property
    def dead_share(self) -> float:
        """Dead units over all units."""
        return len(self.dead) / self.num_units


@dataclass(frozen=True, kw_only=True)
class LayerGradients:
    """What one backward pass gave to the module that owns some weights, biases among them."""

    name: str
    gradient_norm: float
    """Of the loss divided by its value, so that networks and moments compare."""
    weight_norm: float
    zero_share: float
    """Gradients that are exactly zero."""
    is_frozen: bool
    is_vanishing: bool

    @property
    def ratio(self) -> float:
        """Norm of gradient over norm of weight."""
        return self.gradient_norm / self.weight_norm if self.weight_norm else math.inf if self.gradient_norm else 0.0


@torch.no_grad()
def measure_units(
    model: nn.Module, batches: Iterable[Any], *, device: str | torch.device = "cpu", batch_statistics: bool = False
) -> tuple[LayerUnits, ...]:
    """Each activation of `model` in the order of its calls; in evaluation mode, which is put back with all else.

    The per-layer statistics of Glorot & Bengio, AISTATS 2010, section 3,
    https://proceedings.mlr.press/v9/glorot10a.html. A few images can only overcount the dead.

    Args:
        model: on `device`. Arithmetic that is written out (`x * (x > 0)`) and fused kernels are not seen.
        batches: images (B, C, H, W) or any input, or tuples that begin with it.
        device: where to send the input.
        batch_statistics: normalise by each batch instead of by running statistics, which say nothing before
            training; they stay as they are.

    Raises:
        ValueError: if there is no batch.
    """
    watch = Watch()
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and batch_statistics]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None  # torch then takes those of the batch, and keeps none
        _run(model, batches, watch, device)
    finally:
        for norm, (mean, variance) in zip(norms, running, strict=True):
            norm.running_mean, norm.running_var = mean, variance
    return tuple(_layer(name, tally) for name, tally in watch.tallies.items())


@torch.no_grad()
def dead_share(model: nn.Module, batches: Iterable[Any], *, device: str | torch.device = "cpu") -> float:
    """Share of the units that could die and never fire, of layers that are not silent; in evaluation mode.

    Args:
        model: on `device`; as it was, afterwards.
        batches: as for `measure_units`, which tells all of this and more, at ten times the cost.
        device: where to send the input.

    Raises:
        ValueError: if there is no batch.
    """
    watch = Watch(Wakes)
    _run(model, batches, watch, device)
    mortal = [tally for tally in watch.tallies.values() if tally.kind in FLAT_BELOW and not tally.is_silent]
    return sum(int((tally.woken == 0).sum()) for tally in mortal) / max(1, sum(tally.num_units for tally in mortal))


def _run(model: nn.Module, batches: Iterable[Any], watch: Watch, device: str | torch.device) -> None:
    num_batches = 0
    with watch.on(model):
        for batch in batches:
            images = (batch if isinstance(batch, torch.Tensor) else batch[0]).to(device)
            with watch:
                model(images)
            num_batches += 1
    if not num_batches:
        raise ValueError("batches is empty; give at least one batch of images.")


def _layer(name: str, tally: Tally) -> LayerUnits:
    """Everything that was counted of one call."""
    awake = tally.woken.tolist()
    return LayerUnits(
        name=name, kind=tally.kind, num_units=tally.num_units, num_samples=tally.num_samples, mean=tally.mean,
        std=math.sqrt(tally.squares / tally.num_values), zero_share=tally.zeros / tally.num_values,
        saturated_share=tally.saturated / tally.num_values if tally.kind in TWO_SIDED else None,
        same_sign_share=tally.same_sign / tally.num_vectors, can_die=tally.kind in FLAT_BELOW,
        is_silent=tally.is_silent, is_gate=tally.is_gate,
        dead=tuple(unit for unit, times in enumerate(awake) if not times),
        nearly_dead=tuple(u for u, times in enumerate(awake) if 0 < times < NEARLY_DEAD * tally.num_samples),
        counts=tuple(tally.counts.tolist()), is_finite=tally.is_finite,
    )  # fmt: skip


def measure_gradients(model: nn.Module, loss: torch.Tensor) -> tuple[LayerGradients, ...]:
    """Gradient over weight of each module that owns weights; every `.grad` stays as it is, the graph is used up.

    A layer vanishes if its ratio is below a thousandth of the median layer's. A gradient that is exactly zero in a
    network with weights of zero (a fresh head, the last scale of a residual branch) is as it must be.

    Args:
        model: in the mode in which it made `loss`.
        loss: a scalar that depends on the weights.

    Raises:
        ValueError: if `loss` has no graph.
    """
    if not loss.requires_grad:
        raise ValueError("loss has no graph: make it outside of no_grad, with at least one weight that trains.")
    owned = {name or type(model).__name__: list(m.parameters(recurse=False)) for name, m in model.named_modules()}
    owned = {name: own for name, own in owned.items() if own}
    trained = [p for own in owned.values() for p in own if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
    scale, rows = abs(float(loss.detach())) or 1.0, []
    is_excused = any("bias" not in name.rpartition(".")[2] and not p.any() for name, p in model.named_parameters())
    for name, own in owned.items():
        gradients = [torch.zeros_like(p) if found[p] is None else found[p] for p in own if p.requires_grad]
        zeros, total = sum(int((g == 0).sum()) for g in gradients), sum(g.numel() for g in gradients)
        rows.append(
            LayerGradients(
                name=name, gradient_norm=_norm(gradients) / scale, weight_norm=_norm(own),
                zero_share=zeros / total if total else 0.0, is_frozen=not gradients, is_vanishing=False,
            )
        )  # fmt: skip
    judged = [row for row in rows if not row.is_frozen and not (is_excused and row.zero_share == 1)]
    limit = VANISHING * median([row.ratio for row in judged if math.isfinite(row.ratio)] or [0.0])
    fading = {row.name for row in judged if row.ratio < limit or row.zero_share == 1}
    return tuple(replace(row, is_vanishing=row.name in fading) for row in rows)


def judge_units(
    layers: Sequence[LayerUnits], *, before: Sequence[LayerUnits] = (), gradients: Sequence[LayerGradients] = ()
) -> tuple[str, ...]:
    """What is wrong, in sentences, each with its first layer, its numbers and what to do; empty if nothing is.

    Args:
        layers: as measured now.
        before, gradients: of the same network earlier, for what has risen since; and of its gradients.
    """
    if not layers:
        return ("no activation was seen: the network has none, or writes them out as plain arithmetic.",)
    forward = (_judge_spread(layers), _judge_saturation(layers), *_judge_deaths(layers, before))
    return tuple(verdict for verdict in (*forward, _judge_gradients(gradients)) if verdict)


def _judge_spread(layers: Sequence[LayerUnits]) -> str:
    for layer in layers:
        if not layer.is_finite:
            return f"{layer.name} gives values that are not finite: the signal explodes. Use smaller initial weights."
    first, last, index = layers[0], layers[-1], len(layers)
    while index and not COLLAPSE * first.std <= layers[index - 1].std <= EXPLOSION * first.std:
        index -= 1  # back to where it was lost for good; a gate in between may dip for itself
    if index == len(layers) and first.std:
        return ""
    what, use = ("explodes", "smaller") if last.std > first.std else ("collapses", "larger")
    return (
        f"the signal {what}: its std goes from {first.std:.3g} in {first.name} to {last.std:.3g} in {last.name}, lost "
        f"at {layers[index % len(layers)].name} (ratios from {COLLAPSE:g} to {EXPLOSION:g} are sound). Use "
        f"{use} initial weights: kaiming for ReLU, xavier for tanh."
    )


def _judge_saturation(layers: Sequence[LayerUnits]) -> str:
    shares = {x.name: x.saturated_share for x in layers if x.saturated_share and not x.is_gate}
    if not (bad := [name for name, share in shares.items() if share > MOST_SATURATED]):
        return ""
    return (
        f"{len(bad)} of {len(layers)} layers are saturated, {bad[0]} the first: up to {max(shares.values()):.0%} of "
        "outputs lie where the function passes no gradient. Use smaller initial weights, a lower rate or ReLU."
    )


def _judge_deaths(layers: Sequence[LayerUnits], before: Sequence[LayerUnits]) -> list[str]:
    earlier = {layer.name: layer.dead_share for layer in before}
    rise = {x.name: x.dead_share - earlier.get(x.name, 1.0) for x in layers if x.is_finite and not x.is_silent}
    risen = [layer for layer in layers if rise.get(layer.name, 0.0) > MOST_RISE]
    bad = [x for x in layers if x.name in rise and x.dead_share > MOST_DEAD and x not in risen]
    causes = "Causes, the likeliest first: learning rate too high, bad initialisation."
    verdicts = []
    if risen:
        worst = max(risen, key=lambda layer: rise[layer.name])
        verdicts.append(
            f"units died since the last look in {len(risen)} layers, most in {worst.name}: {earlier[worst.name]:.0%} "
            f"of its {worst.num_units} were dead, now {worst.dead_share:.0%} are. {causes}"
        )
    if bad:
        worst = max(bad, key=lambda layer: layer.dead_share)
        cause = "They were before: bad initialisation, not the rate." if worst.name in earlier else causes
        verdicts.append(
            f"many units are dead in {len(bad)} layers, most in {worst.name}: {len(worst.dead)} of {worst.num_units} "
            f"never wake on {worst.num_samples} samples. {cause}"
        )
    return verdicts


def _judge_gradients(gradients: Sequence[LayerGradients]) -> str:
    trained = [row for row in gradients if not row.is_frozen]
    broken = next((row for row in trained if not math.isfinite(row.gradient_norm)), None)
    if broken is not None:
        return f"the gradient of {broken.name} is not finite. Lower the learning rate, or look at the images."
    if fading := [row for row in trained if row.is_vanishing]:
        return (
            f"gradients vanish in {len(fading)} of {len(trained)} layers, {fading[0].name} the first: "
            f"{fading[0].ratio:.2g} of its weights, below {VANISHING:g} of the median layer. They will hardly move."
        )
    if trained and 0 < trained[0].ratio < FAINT:
        return (
            f"gradients fade before {trained[0].name}, the lowest layer that trains: {trained[0].ratio:.2g} of its "
            f"weights, below {FAINT:g}. The initial weights are too small, or units are saturated or dead."
        )
    return ""


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(exact(tensor.detach()).square().sum()) for tensor in tensors))
