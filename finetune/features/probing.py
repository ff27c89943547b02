"""Linear probes on cached features: multinomial logistic regression, solved exactly; and nearest neighbours.

A probe is the baseline that every fine-tuned model must beat. Its penalty is chosen by images left out, and then it is
solved to the last step, the gradient in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from finetune.features.logistic import LogisticProblem, check_rows, solver_threads
from finetune.features.penalties import L2_GRID, Choice, Part, choose_penalty

TEMPERATURE = 0.07
"""Of the neighbours' votes: Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A solved probe. Its weights apply to raw features: the standardisation is folded in."""

    weight: torch.Tensor
    """(K, D) in float64."""
    bias: torch.Tensor
    """(K,) in float64."""
    l2: float
    objective: float
    """Mean cross-entropy plus penalty at the solution, in nats."""
    gradient_norm: float
    """Of the objective, over weights and bias on standardised features."""
    iterations: int
    """Newton steps in float64, from where those in float32 ended."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Map raw features (N, D) to logits (N, K) in float64."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_probe(
    features: torch.Tensor, labels: torch.Tensor, *, num_classes: int, l2: float, start: Probe | None = None
) -> Probe:
    """The minimiser of J(W, b) = mean cross-entropy + l2 / 2 |W|^2 over standardised features.

    The probe of Kornblith et al., CVPR 2019, https://arxiv.org/abs/1805.08974; `l2` is 1 / (C N) in
    scikit-learn's terms. Columns are centred, and scaled by `scale_of`. A class
    without images has its optimum at minus infinity; it gets weight 0 and the logit -log(N + 1) instead.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        num_classes: K.
        l2: penalty; the bias is not penalised.
        start: a probe of the same shape to begin from; it changes the time, not the answer.

    Raises:
        ValueError: if lengths differ, a label is out of range, a feature is not finite, or `l2` is not positive.
    """
    with solver_threads(features, num_classes):
        problem = LogisticProblem(features, labels, num_classes)
        near = problem.approach(l2).weights if start is None else problem.enter(start.weight, start.bias)
        return _solved(problem, near, l2)


def guess_near(
    features: torch.Tensor, labels: torch.Tensor, judges: torch.Tensor, *, num_classes: int, l2: float
) -> torch.Tensor:
    """Classes (M,) of images by a probe that is near its optimum, and good enough to count mistakes.

    Args:
        features: (N, D), raw.
        labels: (N,), integers in [0, num_classes).
        judges: (M, D), raw, of other images.
        num_classes: K.
        l2: penalty.

    Raises:
        ValueError: as `fit_probe`.
    """
    with solver_threads(features, num_classes):
        problem = LogisticProblem(features, labels, num_classes)
        return problem.logits(problem.inside(judges), problem.approach(l2).weights).argmax(1)


def sweep_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    val_features: torch.Tensor,
    val_labels: torch.Tensor,
    *,
    num_classes: int,
    grid: Sequence[float] = L2_GRID,
) -> tuple[Probe, Choice]:
    """The probe, solved exactly, whose penalty gives the smallest validation log loss, and how it was chosen.

    Raises:
        ValueError: as `fit_probe` and `choose_penalty`.
    """
    with solver_threads(train_features, num_classes):
        part = Part(train_features, train_labels, (val_features, val_labels), num_classes=num_classes)
        choice = choose_penalty([part], grid)
        return _solved(part.problem, part.weights(choice.l2), choice.l2), choice


def _solved(problem: LogisticProblem, near: torch.Tensor, l2: float) -> Probe:
    found = problem.solve(near, l2)
    weight, bias = problem.leave(found.weights)
    return Probe(
        weight=weight,
        bias=bias,
        l2=l2,
        objective=found.objective,
        gradient_norm=found.gradient_norm,
        iterations=found.steps,
    )


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    *,
    num_classes: int,
    k: int,
    chunk: int = 1024,
) -> torch.Tensor:
    """Classes (N,) by the votes of the k nearest training images, weighted by exp(cosine / 0.07).

    Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978, as DINO evaluates features.

    Raises:
        ValueError: if lengths differ, a label is out of range, or k is not in [1, training images].
    """
    check_rows(train_features, train_labels, num_classes)
    if not 1 <= k <= len(train_labels):
        raise ValueError(f"k must lie in 1 to {len(train_labels)} (the training images), got {k}.")
    known = F.normalize(train_features.float(), dim=1)
    one_hot = F.one_hot(train_labels, num_classes).float()  # (N_train, K)
    answers = [torch.empty(0, dtype=torch.long, device=features.device)]
    for rows in features.float().split(chunk):
        near = (F.normalize(rows, dim=1) @ known.T).topk(k, dim=1)
        votes = ((near.values - 1) / TEMPERATURE).exp()  # (B, k); the -1 keeps exp in range and changes no vote
        answers.append((one_hot[near.indices] * votes[..., None]).sum(1).argmax(1))
    return torch.cat(answers)
