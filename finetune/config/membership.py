"""Membership: what a run was made of that stands for several, as `ensemble.json` (an average) or `soup.json` (one
network of mixed weights) tells it."""

from finetune.config.scores import Judged, Told


class JoinedMember(Judged):
    """One set of weights in it."""

    run: str
    run_digest: str
    """Of the run's plan."""
    member: str
    """Such as `final` or `cycle-1`."""
    weights_digest: str
    weight: float
    """Its share."""
    folder: str | None = None
    """Where an average keeps it, below its own folder; a mixture keeps none."""


class Mixed(Judged):
    """What val says of one mixture between the start and the end of a training."""

    alpha: float
    """The share of the end."""
    top1: float
    log_loss: float


class Membership(Judged):
    """What was joined, how, and by what choice."""

    how: str
    average: str | None = None
    """Of predictions: probability or logit; None of a mixture of weights."""
    num_candidates: int
    val_log_losses: tuple[float, ...] | None = None
    """Along the greedy choice of members."""
    sweep: tuple[Mixed, ...] | None = None
    alpha: float | None = None
    val_top1: tuple[float, ...] | None = None
    """Of each candidate of a greedy soup alone."""
    members: tuple[JoinedMember, ...]
    selected_on: Told[str] = None
    """What chose among the candidates; None where all were taken."""
    selection_note: Told[str] = None
    """Why the val score is no estimate."""
