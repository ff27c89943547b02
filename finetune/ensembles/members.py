"""Members: the sets of weights that finished runs offer to an ensemble, whether they fit together, and what val says.

Nothing is averaged here. Equal weights are one member, however often they are offered: the last epoch of a run is often
its final weights too, and a vote counted twice is no second opinion.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.compute import Compute
from finetune.config.card import View
from finetune.config.membership import JoinedMember
from finetune.config.plan import Images, Plan
from finetune.data.dataset import Dataset
from finetune.ensembles.soups import Score, State
from finetune.errors import RecipeError, RunError
from finetune.inference.loading import load_final, load_held_out
from finetune.inference.predict import predict_probabilities
from finetune.inference.tta import check_crops, list_crops, permitted_views
from finetune.metrics.calibration import fit_temperature, log_probabilities
from finetune.metrics.classification import decide
from finetune.models.batch_norm import pooled_statistics
from finetune.runs.folder import AVERAGE_FILE, RunFolder
from finetune.runs.resume import read_decided
from finetune.training.setup import training_batches
from finetune.training.snapshots import Member, load_member, read_members

KINDS: dict[str, tuple[str, ...]] = {"final": (), "snapshots": ("cycle",), "last": ("last",), "all": ("cycle", "last")}
"""By what may be asked for, the kinds of kept members that answer to it."""
Members = Literal["final", "snapshots", "last", "all"]
_WISHES = {"snapshots": "snapshots=3", "last": "keep_last=3"}
"""What makes a run keep such members."""
_SAME_CLASSES = "Members must know the same classes in the same order."
_SAME_SPLIT = (
    "A test image of one may have taught the other, so no score of the two would be honest. Train them with the same "
    "images, shares and seed; with another seed only where the data name train, val, calibration and test themselves."
)
_SAME_VIEW = (
    "One network cannot look at images in two ways. Average the predictions instead (how=average), or train with the "
    "same data.image_size, crop_pct, interpolation, mean and std."
)


_SAME_END = (
    "Val may judge a mixture only of weights that have not seen it. Train both with the same data.split.refit, or "
    "average the predictions instead (how=average)."
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One set of weights that may become a member."""

    run: RunFolder
    plan: Plan
    member: Member | None
    """None: the final weights."""
    digest: str
    """Of the weights."""

    @property
    def name(self) -> str:
        """Of the run and of the weights in it."""
        return f"{self.run.path.name} {self.kind}"

    @property
    def kind(self) -> str:
        """Such as `final` or `cycle-1`."""
        return self.member.name if self.member else "final"

    def load(self, *, is_held_out: bool = False) -> nn.Module:
        """The classifier, in eval mode on the CPU; the one that val may judge, where there was a refit."""
        classifier = load_held_out(self.run) if is_held_out else load_final(self.run)
        if self.member:
            load_member(classifier, self.member)
        return classifier

    def state(self, *, is_held_out: bool = False) -> State:
        """All its tensors by name."""
        loaded = self.load(is_held_out=is_held_out)
        return {name: tensor.contiguous() for name, tensor in loaded.state_dict().items()}

    def joined(self, weight: float, folder: str | None = None) -> JoinedMember:
        """Where it came from, with its share in what is made of it, and where that keeps it."""
        return JoinedMember(
            run=str(self.run.path.resolve()),
            run_digest=hashlib.sha256(self.run.file("plan.yaml").read_bytes()).hexdigest(),
            member=self.kind,
            weights_digest=self.digest,
            weight=weight,
            folder=folder,
        )


def refuse_strangers(runs: Sequence[RunFolder], *, is_mixture: bool) -> None:
    """Nothing, where all runs are finished and were taught and judged on the same images.

    Args:
        runs: those that shall become one.
        is_mixture: their weights are to be mixed, and so they must also look at images in the same view.

    Raises:
        RunError: if there is none, or one is not finished, is an average itself, or differs in what must be the same.
    """
    if not runs:
        raise RunError("there are no runs to make an ensemble of; name the folders of at least one.")
    first = runs[0].plan
    for run in runs:
        if run.file(AVERAGE_FILE).exists():
            raise RunError(f"{run.path} is an average itself; name the runs that are its members.")
        plan = run.plan
        if not run.final_weights().exists():
            raise RunError(f"{run.path} is not trained to its end. `finetune resume {run.path}` goes on.")
        for what, ours, theirs, do in (
            ("classes", first.classes, plan.classes, _SAME_CLASSES),
            ("split of the images", first.split_digest[:12], plan.split_digest[:12], _SAME_SPLIT),
            ("view", first.view, plan.view, _SAME_VIEW),
            ("end", _end(first), _end(plan), _SAME_END),
        ):
            if ours != theirs and (is_mixture or what not in ("view", "end")):
                raise RunError(f"{run.path} has another {what} than {runs[0].path}: {_difference(theirs, ours)}. {do}")


def _end(plan: Plan) -> str:
    return "trained on all labelled images" if plan.is_refit else "trained on the training images"


def _difference(theirs: Any, ours: Any) -> str:
    """Where the two differ first, for people."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        pairs = zip((*theirs, *[None] * len(ours)), (*ours, *[None] * len(theirs)), strict=False)
        at, (one, other) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        return f"number {at + 1} is {one!r} and not {other!r}"
    return f"{theirs}, and not {ours}"


def find_candidates(runs: Sequence[RunFolder], members: Members, say: Callable[[str], None]) -> list[Candidate]:
    """All that may become members, in the order of `runs`; of equal weights the first alone.

    Args:
        runs: finished.
        members: of each run its `final` weights, its `snapshots`, its `last` epochs, or `all` of them.
        say: hears of what counts once.

    Raises:
        RunError: if a run kept no such weights, or a file is damaged.
    """
    found: dict[str, Candidate] = {}
    for run in runs:
        plan, kinds = run.plan, KINDS[members]
        kept = [one for one in read_members(run.file("snapshots")) if one.name.partition("-")[0] in kinds]
        if not kept and members in _WISHES:
            raise RunError(
                f"{run.path} kept no {members}. Train with train.averaging.{_WISHES[members]}, or take members=final."
            )
        own: list[Member | None] = [None] if members in ("final", "all") else []
        for member in (*own, *kept):
            candidate = Candidate(run=run, plan=plan, member=member, digest=_digest(run, plan, member))
            if twin := found.get(candidate.digest):
                say(f"{candidate.name} has the weights of {twin.name}; the two count once")
            else:
                found[candidate.digest] = candidate
    return list(found.values())


def check_views(plan: Plan, members: Sequence[Candidate], say: Callable[[str], None]) -> None:
    """Nothing, where each member can take the views that `plan` is judged in; a line where they look differently.

    Raises:
        RunError: if a view cannot be cut out of the images that a member looks at.
    """
    views, _ = permitted_views(plan.evaluate.views, plan.data.allowed_changes)
    own = [member.plan.view for member in members]
    for member, view in zip(members, own, strict=True):
        try:
            check_crops(list_crops(views, view.size_pixels), view)
        except RecipeError as fault:
            raise RunError(f"{member.name} looks at {view.size_pixels} px: {fault}") from fault
    if len(set(own)) > 1:
        sizes = ", ".join(dict.fromkeys(f"{view.size_pixels} of {view.shorter_pixels} px" for view in own))
        say(f"members look at images as each was trained: {sizes}; a file is decoded once")


def selection_sentence(candidates: Sequence[Candidate], *, is_selected: bool) -> str | None:
    """Why the val score of what is made of `candidates` is no estimate; None where val chose nothing."""
    is_stopped = any(not one.member and one.plan.stages and one.plan.train.checkpoint != "last" for one in candidates)
    uses = [word for word, is_so in (("select members", is_selected), ("stop them", is_stopped)) if is_so]
    if not uses:
        return None
    return f"val was used to {' and to '.join(uses)}, so its score is not reported as an estimate; read that on test"


class Val:
    """What val says of weights, and statistics of the training images; these are opened when first needed."""

    def __init__(self, base: Candidate, dataset: Dataset | None) -> None:
        """Judge by the plan and the images of `base`, which are `dataset` where they are open already."""
        self._base, self._dataset = base, dataset
        self._classifier: nn.Module | None = None

    @property
    def dataset(self) -> Dataset:
        """The images.

        Raises:
            RunError: if they are no longer those of the plan.
        """
        if self._dataset is None:
            self._dataset = open_again(self._base.run)
        refuse_other_images(self._base.run, self._dataset)
        return self._dataset

    @property
    def labels(self) -> torch.Tensor:
        """(N,) of the val images."""
        return self.dataset.labels("val")

    def probabilities(self, classifier: nn.Module, view: View | None = None) -> torch.Tensor:
        """(N, K) of the val images, in the views of the plan; `view` is the classifier's, where it is another."""
        plan = self._base.plan
        views, _ = permitted_views(plan.evaluate.views, plan.data.allowed_changes)
        return predict(classifier, self.dataset, self.dataset.indices("val"), plan, views, view)

    def judge(self, state: State) -> Score:
        """Accuracy and log loss of a network with these weights."""
        said = self.probabilities(self._filled(state))
        hits = int((decide(said) == self.labels).sum())
        return Score(hits / len(said), fit_temperature(log_probabilities(said), self.labels).log_loss_after)

    def renew(self, state: State, names: tuple[str, ...], on: Images = "train") -> State:
        """The same weights with pooled statistics of these images, as training sees them, for these norms."""
        plan, classifier = self._base.plan, self._filled(state)
        device = Compute.of(plan.hardware, or_cpu=True).device
        train = training_batches(plan, self.dataset, on)
        pooled_statistics(classifier.to(device), train, device=device, names=names)
        return {name: tensor.detach().cpu().clone() for name, tensor in classifier.state_dict().items()}

    def _filled(self, state: State) -> nn.Module:
        if self._classifier is None:
            self._classifier = self._base.load()
        self._classifier.load_state_dict(state)
        return self._classifier


def open_again(run: RunFolder) -> Dataset:
    """The images of a run, divided as they were, in the view of its plan; those that were faulty then stay out.

    Raises:
        DataError: if they hold nothing that could be learned from.
        RunError: if they are not where they were.
    """
    plan, then = read_decided(run), run.facts.bad_images
    dataset, faults = Dataset.open(plan.data, plan.seed), {bad.name: bad.reason for bad in then}
    names = map(dataset.items.name, range(len(dataset.items)))
    dataset.drop({index: faults[name] for index, name in enumerate(names) if name in faults})
    dataset.divide()
    dataset.see(plan.view, int(plan.hardware.image_cache_gb * 1e9))
    return dataset


def refuse_other_images(run: RunFolder, dataset: Dataset) -> None:
    """Nothing, where these are the images of the run.

    Raises:
        RunError: if not.
    """
    now = "" if dataset.split is None else dataset.split.digest
    if now != run.plan.split_digest:
        raise RunError(
            f"the images have changed since {run.path} was made ({run.plan.split_digest[:12]}, now {now[:12]}). "
            "Put them back."
        )


def predict(
    classifier: nn.Module, dataset: Dataset, rows: Sequence[int], plan: Plan, views: str, view: View | None = None
) -> torch.Tensor:
    """(N, K) of the images `rows`; `view` is the classifier's, where it is not the plan's."""
    how = plan.evaluate.average
    return predict_probabilities(classifier, dataset.store, rows, plan, views, how, view)  # type: ignore[arg-type]


def _digest(run: RunFolder, plan: Plan, member: Member | None) -> str:
    """Sha256 over names, dtypes, shapes and bytes of all weights, read from their files."""
    digest = hashlib.sha256(b"" if plan.stages else plan.weights_digest.encode())  # a probe's file holds its head alone
    tensors: dict[str, torch.Tensor] = {}
    for path in (run.final_weights(), *([member.path] if member else [])):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as fault:
            raise RunError(f"{path} cannot be read ({fault}). Leave its run out, or train it again.") from fault
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
