"""Soups: one network whose weights are mixed from several, so that a prediction costs no more than that of one.

Trainings that began from the same weights mostly end in one basin, where the mean of two networks is a network
too; trainings that began apart do not, and their mean is noise. So members must have begun alike. Batch-norm
statistics belong to the weights they were taken under: where they differ among members, they are taken anew for
the mixture, and not mixed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from finetune.config.backbone_names import read_zoo
from finetune.config.card import OWN
from finetune.config.plan import Plan
from finetune.errors import BackboneError, RunError
from finetune.inference.whole_model import needs_network
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import one_probe
from finetune.models.input_size import fit_size
from finetune.models.lora import merge_lora
from finetune.runs.folder import RunFolder
from finetune.training.setup import make_classifier

State = Mapping[str, torch.Tensor]
ALPHAS = tuple(step / 10 for step in range(11))
_MEAN = ".running_mean"
_DRAWN_HEADS = ("small", "uniform", "xavier", "kaiming", "model")


class Score(NamedTuple):
    """What val says of one mixture."""

    top1: float
    log_loss: float
    """At the best temperature, for mixtures differ in how sure they are."""


Judge = Callable[[State], Score]
Renew = Callable[[State, tuple[str, ...]], State]
"""Weights and names of batch norms to the weights with statistics that were taken anew for those norms."""


@dataclass(frozen=True, kw_only=True)
class Soup:
    """What a greedy soup was made of."""

    state: State
    members: tuple[int, ...]
    """In the order in which they were added."""
    score: Score
    """Of the soup."""
    scores: tuple[Score, ...]
    """Of each candidate alone."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The mixtures between the start and the end of a training, and the one that val likes best."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...]
    alpha: float
    """With the least val loss; of equals the one nearest to the start."""
    state: State


def uniform_soup(states: Sequence[State], renew: Renew | None = None) -> State:
    """The mean of several weights (Wortsman et al., ICML 2022, section 2, https://arxiv.org/abs/2203.05482).

    Of identical weights it is those weights, bit for bit.

    Args:
        states: of networks of one architecture. Integer tensors are copied from the first.
        renew: takes statistics anew; needed where batch norm moved.

    Raises:
        RunError: if they are not of one architecture.
        ValueError: if there is none, or batch norm moved and `renew` is None.
    """
    return _mix(states, [1.0] * len(states), renew)


def greedy_soup(states: Sequence[State], *, judge: Judge, renew: Renew | None = None) -> Soup:
    """The mean of those weights that do not harm it (Wortsman et al., ICML 2022, algorithm 1).

    From the most to the least accurate on val; each is kept if the accuracy of the soup does not fall. So the soup
    is at least as accurate on val as the best of them, which makes its val accuracy no estimate of anything.

    Args:
        states: as for `uniform_soup`. Of equally accurate ones the earlier comes first.
        judge: what val says of weights.
        renew: as for `uniform_soup`.

    Raises:
        RunError: if they are not of one architecture.
        ValueError: as `uniform_soup`.
    """
    scores = [judge(state) for state in states]
    order = sorted(range(len(states)), key=lambda at: -scores[at].top1)
    chosen, soup = order[:1], uniform_soup([states[at] for at in order[:1]])
    best = scores[chosen[0]]
    for at in order[1:]:
        trial = uniform_soup([states[other] for other in (*chosen, at)], renew)
        if (found := judge(trial)).top1 >= best.top1:
            chosen, soup, best = [*chosen, at], trial, found
    return Soup(state=soup, members=tuple(chosen), score=best, scores=tuple(scores))


def interpolate(start: State, end: State, alpha: float, renew: Renew | None = None) -> State:
    """(1 - alpha) start + alpha end (Wortsman et al., CVPR 2022, equation 1, https://arxiv.org/abs/2109.01903).

    At 0 and 1 it is `start` and `end`, their own statistics with them. Integer tensors are copied from the nearer one.

    Args:
        start: what a training began from.
        end: what it ended with.
        alpha: in [0, 1].
        renew: as for `uniform_soup`; needed between 0 and 1 where batch norm moved.

    Raises:
        RunError: if they are not of one architecture.
        ValueError: if `alpha` lies outside its range, or batch norm moved and `renew` is None.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    return _mix([start, end], [1 - alpha, alpha], renew)


def sweep(
    start: State, end: State, *, judge: Judge, alphas: Sequence[float] = ALPHAS, renew: Renew | None = None
) -> Sweep:
    """What val says of the mixtures between two weights, and the best of these; arguments as for `interpolate`.

    The more weight the start has, the more of what the backbone could do before is kept: where images will differ from
    val, a smaller alpha than the one chosen here is often the better one.
    """
    if not alphas:
        raise ValueError("alphas is empty; give shares of the end, such as 0, 0.5 and 1.")
    scores: list[Score] = []
    best, least, state = alphas[0], torch.inf, start
    for alpha in alphas:
        mixed = interpolate(start, end, alpha, renew)
        scores.append(judge(mixed))
        if scores[-1].log_loss < least:
            best, least, state = alpha, scores[-1].log_loss, mixed
    return Sweep(alphas=tuple(alphas), scores=tuple(scores), alpha=best, state=state)


def moved_norms(states: Sequence[State]) -> tuple[str, ...]:
    """Names of the batch norms whose statistics are not the same in all of `states`."""
    first = states[0]
    return tuple(
        name.removesuffix(_MEAN)
        for name in first
        if name.endswith(_MEAN)
        and not all(
            torch.equal(first[key], other[key])
            for other in states[1:]
            for key in (name, f"{name.removesuffix(_MEAN)}.running_var")
        )
    )


def load_start(run: RunFolder, *, is_held_out: bool = True) -> Classifier:
    """What the training of `run` began from: the pretrained backbone with the softened probe as its head.

    It is the zero point of `interpolate`: networks without a classifier of their own have no zero-shot one.

    Args:
        run: trained.
        is_held_out: with the probe of the training images as its head, and not that of a refit.

    Raises:
        RunError: if the training did not begin from the probe.
        BackboneError: if the backbone is not at hand, or has other weights now.
    """
    plan = run.plan
    begins, fresh = plan.head.init, plan.fresh_stages
    if not plan.stages or begins != "probe" or fresh:
        what = "trained nothing" if not plan.stages else f"began with head.init {begins}, reinit {fresh}"
        raise RunError(
            f"{run.path} {what}, so there is no working network at its start to go back to. "
            "Train with head.init=probe and without train.reinit, and mix that run with its start."
        )
    if plan.arch.startswith(OWN):
        raise needs_network(run)
    backbone = load_backbone(plan.backbone, zoo=read_zoo()).eval()
    fit_size(backbone, plan.view.size_pixels)
    if backbone.digest != plan.weights_digest:
        raise BackboneError(
            f"{plan.backbone} now has weights {backbone.digest[:12]}, but {run.path} began from "
            f"{plan.weights_digest[:12]}. Put the card it was made with first in FINETUNE_ZOO."
        )
    facts = run.facts
    counts = facts.counts["train"] if is_held_out or not plan.is_refit else facts.labelled
    probe = one_probe(load_file(run.file("probe.safetensors")), is_held_out=is_held_out or not plan.is_refit)
    classifier = make_classifier(plan, backbone, probe, counts)
    merge_lora(classifier.backbone)  # still without effect; the plain layers have the names of the trained ones
    return classifier.eval()


def refuse_other_beginnings(runs: Sequence[RunFolder]) -> None:
    """Nothing, where all trainings began from the same weights.

    Raises:
        RunError: naming what they began from, where two of them did not begin alike.
    """
    first = _beginning(runs[0].plan)
    for run in runs[1:]:
        for what, found in _beginning(run.plan).items():
            if found != first[what]:
                raise RunError(
                    f"{run.path} began with {what} {found}, {runs[0].path} with {first[what]}. Weights can be mixed "
                    "only of trainings that began alike; average the predictions of these instead."
                )


def _beginning(plan: Plan) -> dict[str, str]:
    """What decides the weights that a training begins from, in words."""
    head = plan.head
    is_drawn = head.kind == "mlp" or head.init in _DRAWN_HEADS or plan.fresh_stages > 0
    hidden = f" of {head.hidden} {head.activation} units" if head.kind == "mlp" else ""
    return {
        "backbone": plan.backbone,
        "backbone weights": plan.weights_digest[:12],
        "head": f"{head.kind}{hidden}, begun from {head.init}",
        "fresh stages": str(plan.fresh_stages),
        "a draw by seed": str(plan.seed) if is_drawn else "none",
    }


def _mix(states: Sequence[State], weights: Sequence[float], renew: Renew | None) -> State:
    if not states:
        raise ValueError("there are no weights to mix; give at least one.")
    _refuse_other_tensors(states)
    used = [(state, weight) for state, weight in zip(states, weights, strict=True) if weight]
    largest = max(used, key=lambda pair: pair[1])[0]
    mixed = {
        name: _weighted([(state[name], weight) for state, weight in used]) if tensor.is_floating_point() else
        tensor.clone() for name, tensor in largest.items()
    }  # fmt: skip
    if not (names := moved_norms([state for state, _ in used])):
        return mixed
    if renew is None:
        raise ValueError(f"batch norm moved ({len(names)} layers, such as {names[0]}): a mixture needs `renew`.")
    return renew(mixed, names)


def _weighted(parts: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    first = parts[0][0]
    if all(torch.equal(first, tensor) for tensor, _ in parts[1:]):  # what was frozen stays as it is, bit for bit
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, weight in parts:
        total += weight * tensor.double()
    return (total / sum(weight for _, weight in parts)).to(first.dtype)


def _refuse_other_tensors(states: Sequence[State]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    for number, other in enumerate(shapes[1:], start=2):
        if odd := sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name)):
            raise RunError(
                f"members 1 and {number} are not of one architecture: {odd[0]} is {shapes[0].get(odd[0], 'missing')} "
                f"in one and {other.get(odd[0], 'missing')} in the other ({len(odd)} tensors differ). "
                "Average their predictions instead of their weights."
            )
