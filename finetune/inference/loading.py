"""Loading: the network that a run ended with, or the average of several, ready to be asked."""

import torch
from safetensors.torch import load_file

from finetune.inference.ensemble_model import Ensemble
from finetune.inference.whole_model import load_network
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.models.regularization import insert_fractional_pooling
from finetune.models.weights import load_strictly
from finetune.runs.folder import AVERAGE_FILE, RunFolder

_DO = "Put the weights of this run back, or hand in the network that it was begun with."


def load_final(run: RunFolder) -> Classifier:
    """The classifier a run ended with, in eval mode on the CPU.

    Args:
        run: a run whose stages are done.

    Raises:
        BackboneError: if the run holds no model, and its backbone is not at hand or not that of the plan.
        RunError: if the run has no plan.
    """
    return _load(run, is_held_out=False)


def load_held_out(run: RunFolder) -> Classifier:
    """The classifier that val and calibration images may judge: before the refit; the final one where there is none.

    Args:
        run: a run whose stages are done.

    Raises:
        As `load_final`, or RunError if its weights are gone.
    """
    return _load(run, is_held_out=True)


def _load(run: RunFolder, *, is_held_out: bool) -> Classifier:
    if run.file(AVERAGE_FILE).exists():
        return load_ensemble(run, is_held_out=is_held_out)  # type: ignore[return-value]
    plan = run.plan
    backbone, state = load_network(run, is_held_out=is_held_out)
    if plan.stages and plan.regularization.fractional_pooling:
        insert_fractional_pooling(backbone, plan.view.size_pixels)
    probe = load_file(run.file("probe.safetensors")) if state is None else {"weight": None, "bias": None}
    head = make_head(
        backbone.num_features,
        len(plan.classes),
        kind=plan.head.kind,
        hidden=plan.head.hidden,
        activation=plan.head.activation,
        init="probe" if state is None else "small",  # what is drawn is overwritten below
        dropout=plan.head.dropout,
        drop_connect=plan.head.drop_connect,
        weight=probe["weight"],
        bias=probe["bias"],
    )
    classifier = Classifier(backbone, head)
    if state is not None:
        load_strictly(classifier, state, str(run.path), plan.arch or plan.backbone, do=_DO)
    return classifier.eval().to(memory_format=torch.channels_last)


def load_ensemble(run: RunFolder, *, is_held_out: bool = False) -> Ensemble:
    """The average that `run` is, in eval mode on the CPU.

    Args:
        run: holds its members.
        is_held_out: of each that was refit, the network before that, which val may judge.

    Raises:
        RunError: if `run` is no average, or a member is missing.
        BackboneError: if the card of a member's backbone is not at hand.
    """
    run.existing(AVERAGE_FILE)
    found = run.membership
    assert found is not None and found.average is not None
    folders = [RunFolder.open(run.file(str(one.folder))) for one in found.members]
    weights, views = [one.weight for one in found.members], [folder.plan.view for folder in folders]
    load = load_held_out if is_held_out else load_final
    return Ensemble([load(folder) for folder in folders], weights, found.average, views).eval()
