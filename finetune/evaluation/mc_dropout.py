"""Draws: what averaging over the head's dropout gains over the ordinary answer, and how far draws disagree.

Dropout left on at test draws from an approximate posterior (Gal & Ghahramani, ICML 2016,
https://arxiv.org/abs/1506.02142). The entropy of the mean over draws is all the doubt there is; the part of it that is
disagreement between draws is the mutual information of answer and weights (BALD: Houlsby et al., 2011,
https://arxiv.org/abs/1112.5745), the rest is doubt that every draw has. Only the head is drawn: see `draw_in_batches`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from finetune.config.measures import Measure
from finetune.config.plan import Plan
from finetune.config.scores import AgainstOrdinary, ByRole, Draws
from finetune.data.loading import ImageStore
from finetune.inference.predict import draw_in_batches
from finetune.metrics.classification import log_losses
from finetune.metrics.intervals import bootstrap_mean
from finetune.metrics.significance import answered_right, mean_difference
from finetune.models.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the draws said of N images, before any temperature."""

    mean: torch.Tensor  # (N, K) float32
    entropy: torch.Tensor  # (N,) float64, of the mean, in nats
    mutual_information: torch.Tensor  # (N,) float64, in nats; never negative


def draw(classifier: Classifier, store: ImageStore, indices: Sequence[int], plan: Plan) -> Drawn:
    """The mean over `plan.evaluate.mc_samples` draws by the plan's seed, and their doubts; no draw is kept.

    Raises:
        RunError: if nothing in the head is random in training.
    """
    means, entropies, shared = [torch.empty(0, len(plan.classes))], [torch.empty(0).double()], [torch.empty(0).double()]
    for drawn in draw_in_batches(classifier, store, indices, plan, plan.evaluate.mc_samples, plan.seed):  # (S, B, K)
        mean = drawn.double().mean(0)
        means.append(mean.float())
        entropies.append(entropy(mean))
        shared.append(entropy(drawn.double()).mean(0))
    whole = torch.cat(entropies)
    information = (whole - torch.cat(shared)).clamp(min=0)  # rounding alone goes below
    return Drawn(mean=torch.cat(means), entropy=whole, mutual_information=information)


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Of each row along the last axis, in nats; from 0 to log K."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def compare_draws(
    num_draws: int,
    drawn: Mapping[str, Drawn],
    tempered: Mapping[str, torch.Tensor],
    ordinary: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
) -> Draws:
    """The mean of draws minus the ordinary answer, image by image, and the doubts, each with its 95 % interval.

    Args:
        num_draws: S.
        drawn: by role.
        tempered: by role (N, K), the mean of draws at its own temperature.
        ordinary: by role (N, K), the ordinary answer in the same view, at its own temperature.
        labels: by role, (N,); only val and test are compared.
    """
    roles = [role for role in ("val", "test") if len(labels[role])]
    paired = {role: _pair(tempered[role], ordinary[role], labels[role]) for role in roles}
    return Draws(
        n=num_draws,
        paired=ByRole[AgainstOrdinary](**paired),
        entropy=ByRole[Measure](**{role: bootstrap_mean(drawn[role].entropy, seed=0) for role in roles}),
        mutual_information=ByRole[Measure](
            **{role: bootstrap_mean(drawn[role].mutual_information, seed=0) for role in roles}
        ),
        sentence=draws_sentence(num_draws, paired[roles[-1]], roles[-1]) if roles else None,
    )


def _pair(drawn: torch.Tensor, ordinary: torch.Tensor, labels: torch.Tensor) -> AgainstOrdinary:
    losses = mean_difference(log_losses(drawn, labels), log_losses(ordinary, labels))
    return answered_right(AgainstOrdinary, drawn, ordinary, labels, {"log_loss_difference": losses})


def draws_sentence(num_draws: int, pair: AgainstOrdinary, role: str) -> str:
    """What the draws gained, or that these images cannot show it."""
    value, low, high = (100 * part for part in (pair.difference, pair.low, pair.high))
    loss = pair.log_loss_difference
    told = "better" if low > 0 else "worse" if high < 0 else "no difference that these images could show"
    sure = "lower" if loss.high < 0 else "higher" if loss.low > 0 else "not told apart"
    return (
        f"the mean of {num_draws} draws of the head minus the ordinary answer on {role}: {value:+.1f} % "
        f"[{low:+.1f}, {high:+.1f}] of {pair.n}: {told}; log loss {loss.value:+.3f} "
        f"[{loss.low:+.3f}, {loss.high:+.3f}]: {sure}"
    )
