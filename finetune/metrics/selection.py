"""Ensembles of predictions: their average, which members to take, and what each of them adds.

Everything here takes probabilities (M, N, K): M members, N images, K classes, each row summing to one. Members are
averaged first and made honest by one temperature after, for scaling does not commute with averaging
(Rahaman & Thiery, NeurIPS 2021, https://arxiv.org/abs/2007.08792).
"""

from collections.abc import Sequence

import torch

from finetune.config.scores import MemberRow
from finetune.metrics.calibration import log_probabilities
from finetune.metrics.classification import decide, expected_calibration_error, log_loss, top_k_accuracy

AVERAGES = ("probability", "logit")
MOST_MEMBERS = 5
"""Different members that a greedy selection takes at most: each costs one more network at every prediction."""
TOLERANCE = 1e-4
"""Nats of log loss that one more member must save."""


def average(
    probabilities: torch.Tensor, kind: str = "probability", weights: Sequence[float] | None = None
) -> torch.Tensor:
    """One distribution per image, (N, K), from those of M members; of the same type as given.

    `probability` is the arithmetic mean, whose log loss is never above the mean log loss of the members. `logit` is the
    normalised geometric mean, of which the same is true. One member comes back bit for bit.

    Args:
        probabilities: (M, N, K).
        kind: one of `AVERAGES`.
        weights: M of them, none negative; only their ratios matter. None: all alike.

    Raises:
        ValueError: if there is no member, `kind` is unknown, or the weights do not fit.
    """
    shares = _shares(probabilities, weights)
    if kind not in AVERAGES:
        raise ValueError(f"kind must be one of {', '.join(AVERAGES)}, got {kind!r}.")
    if len(probabilities) == 1:
        return probabilities[0]
    values = probabilities.double() if kind == "probability" else log_probabilities(probabilities)
    mean = (shares.to(values.device)[:, None, None] * values).sum(0) / shares.sum()
    return (mean if kind == "probability" else mean.softmax(-1)).to(probabilities.dtype)


def greedy_selection(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    *,
    most: int = MOST_MEMBERS,
    tolerance: float = TOLERANCE,
    kind: str = "probability",
) -> tuple[int, ...]:
    """Members in the order in which they were taken, some more than once: how often is their weight.

    Forward selection with replacement on the log loss (Caruana et al., ICML 2004,
    https://doi.org/10.1145/1015330.1015432). It begins with the best member and ends where no member saves more than
    `tolerance`, so the log loss falls along the path. Of equals the first is taken. The images must be val: the log
    loss of the result on them is no estimate of anything any more.

    Args:
        probabilities: (M, N, K).
        labels: (N,).
        most: different members at most.
        tolerance: nats, above 0.
        kind: of average, one of `AVERAGES`.

    Raises:
        ValueError: if there is no member or no image, or `most` or `tolerance` is not positive.
    """
    if most < 1 or not tolerance > 0:
        raise ValueError(f"most must be at least 1 and tolerance above 0, got {most} and {tolerance}.")
    num_members = len(_shares(probabilities, None))
    losses = [log_loss(member, labels) for member in probabilities]
    chosen = [min(range(num_members), key=losses.__getitem__)]
    best = losses[chosen[0]]
    while True:
        open_to = range(num_members) if len(set(chosen)) < most else sorted(set(chosen))
        trials = {m: _loss_of(probabilities, labels, [*chosen, m], kind) for m in open_to}
        taken = min(trials, key=trials.__getitem__)
        if not trials[taken] < best - tolerance:
            return tuple(chosen)
        chosen.append(taken)
        best = trials[taken]


def disagreement(probabilities: torch.Tensor) -> float:
    """Share of images on which two members decide differently, mean over pairs of M members; 0 for a single one."""
    decisions = torch.stack([decide(member) for member in probabilities])  # (M, N)
    num_members = len(decisions)
    if num_members == 1:
        return 0.0
    shares = [
        float((decisions[first] != decisions[second]).double().mean())
        for first in range(num_members)
        for second in range(first)
    ]
    return sum(shares) / len(shares)


def ensemble_table(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    *,
    names: Sequence[str] = (),
    kind: str = "probability",
    weights: Sequence[float] | None = None,
) -> list[MemberRow]:
    """Each member, the mean of members, and the ensemble of the first two, three, to all M, with what it gains.

    Args:
        probabilities: (M, N, K), before any temperature.
        labels: (N,).
        names: M of them; none: `member 1` and so on.
        kind: of average, one of `AVERAGES`.
        weights: as for `average`.

    Raises:
        ValueError: as `average`, or if there is no image, or not one name per member.
    """
    shares = _shares(probabilities, weights).tolist()
    num_members = len(probabilities)
    names = names or [f"member {number}" for number in range(1, num_members + 1)]
    rows = [
        _row(name, member, labels, num_members=1, disagreement=_lonely(probabilities, at), cost=1)
        for at, (name, member) in enumerate(zip(names, probabilities, strict=True))
    ]
    table = [*rows, _mean_row(rows, disagreement(probabilities))]
    for size in range(min(2, num_members), num_members + 1):
        first = probabilities[:size]
        mean = average(first, kind, shares[:size])
        row = _row(f"ensemble of {size}", mean, labels, num_members=size, disagreement=disagreement(first), cost=size)
        gain = row.accuracy - sum(member.accuracy for member in rows[:size]) / size
        table.append(row.model_copy(update={"gain": gain}))
    return table


def _row(
    name: str, probabilities: torch.Tensor, labels: torch.Tensor, *, num_members: int, disagreement: float, cost: int
) -> MemberRow:
    top1 = top_k_accuracy(probabilities, labels)
    return MemberRow(
        name=name,
        num_members=num_members,
        log_loss=log_loss(probabilities, labels),
        accuracy=top1.value,
        interval=top1,
        ece=expected_calibration_error(probabilities, labels),
        disagreement=disagreement,
        cost=cost,
    )


def _mean_row(rows: Sequence[MemberRow], disagreement: float) -> MemberRow:
    return MemberRow(
        name="mean of members",
        num_members=len(rows),
        log_loss=sum(row.log_loss for row in rows) / len(rows),
        accuracy=sum(row.accuracy for row in rows) / len(rows),
        interval=None,
        ece=sum(row.ece for row in rows) / len(rows),
        disagreement=disagreement,
        cost=1,
    )


def _lonely(probabilities: torch.Tensor, at: int) -> float:
    """How often one member decides differently from another, mean over the others."""
    pairs = [disagreement(probabilities[[at, other]]) for other in range(len(probabilities)) if other != at]
    return sum(pairs) / len(pairs) if pairs else 0.0


def _loss_of(probabilities: torch.Tensor, labels: torch.Tensor, chosen: Sequence[int], kind: str) -> float:
    members = sorted(set(chosen))
    return log_loss(average(probabilities[members], kind, [chosen.count(m) for m in members]), labels)


def _shares(probabilities: torch.Tensor, weights: Sequence[float] | None) -> torch.Tensor:
    """Weights (M,) in float64, checked."""
    if probabilities.ndim != 3 or not len(probabilities):
        raise ValueError(f"probabilities (M, N, K) with M >= 1 are needed, got shape {tuple(probabilities.shape)}.")
    shares = torch.ones(len(probabilities)) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    if len(shares) != len(probabilities) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < torch.inf:
        raise ValueError(f"weights must be {len(probabilities)} numbers, none negative and not all 0, got {weights}.")
    return shares.double()
