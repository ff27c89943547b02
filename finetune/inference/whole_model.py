"""The whole model of a run in its own folder: `model.safetensors`, and a card that says which network it is for.

So a run predicts on a machine with no zoo, and its folder is one of a zoo's: other runs can begin from its weights.
The card is written last, for it says that the model is there.
"""

import copy
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune.config.backbone_names import read_zoo
from finetune.config.card import OWN, Card, read_card
from finetune.config.plan import Plan
from finetune.data.ancestry import record_seen
from finetune.data.dataset import Dataset
from finetune.errors import BackboneError, RunError
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.heads import one_probe
from finetune.models.input_size import fit_size
from finetune.models.own import Model, open_network
from finetune.runs.folder import RunFolder, write_whole

MODEL, CARD, CLASSES, SEEN = "model.safetensors", "card.yaml", "classes.txt", "seen.npz"


def keep_model(run: RunFolder, dataset: Dataset, backbone: Backbone) -> None:
    """Write the model, its card, its classes, and digests of the images it was trained on, where they are not yet.

    Nothing is written for an average, whose members are networks of their own.

    Args:
        run: its stages are done.
        dataset: its images.
        backbone: of its plan; where the probe is the model, as it was loaded.
    """
    if run.file("ensemble.json").exists():
        return
    plan, is_kept = run.plan, run.file(CARD).exists()
    if is_kept and (not plan.stages or _digest(run.final_weights()) == read_card(run.file(CARD)).sha256):
        return
    if plan.stages:
        _copy(run.final_weights(), run.file(MODEL))
    else:
        tensors = {f"backbone.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
        probe = one_probe(load_file(run.file("probe.safetensors")), is_held_out=False)
        tensors |= {f"head.linear.{name}": tensor for name, tensor in probe.items()}
        write_whole(run.file(MODEL), lambda path: save_file(tensors, path))
    record_seen(run.file(SEEN), _own_images(plan, dataset), backbone.card)
    _write_card(run, _card(run, plan, dataset, backbone))


def copy_model(run: RunFolder, member: RunFolder) -> None:
    """Give `member`, which holds a plan and weights of the network of `run`, a model and a card of its own."""
    if not run.file(CARD).exists():
        return
    _copy(member.final_weights() if member.plan.stages else run.file(MODEL), member.file(MODEL))
    if run.file(SEEN).exists():
        _copy(run.file(SEEN), member.file(SEEN))
    _write_card(member, yaml.safe_load(run.file(CARD).read_text(encoding="utf-8")))


def load_network(run: RunFolder, *, is_held_out: bool = False) -> tuple[Backbone, dict[str, torch.Tensor] | None]:
    """The backbone of a run, and the weights of its whole model; None of a probe that an older version made.

    Args:
        run: its stages are done.
        is_held_out: the weights before a refit, where there was one.

    Raises:
        BackboneError: if the run holds no model and its backbone is not at hand, or has other weights now.
        RunError: if its weights before the refit are gone.
    """
    plan = run.plan
    weights = _weights(run, plan, is_held_out)
    if run.file(CARD).exists() or plan.arch.startswith(OWN):
        state = load_file(weights)
        if is_held_out and not plan.stages:
            probe = one_probe(load_file(run.file("probe.safetensors")), is_held_out=True)
            state |= {f"head.linear.{name}": tensor for name, tensor in probe.items()}
        return _empty_backbone(run, plan), state
    try:
        backbone = load_backbone(plan.backbone, zoo=read_zoo(), pretrained=plan.pretrained and not plan.stages)
    except BackboneError as fault:
        raise BackboneError(
            f"{run.path} holds no card.yaml, so it was made by an older version, with {plan.backbone}, whose card is "
            f"needed. {fault} Where it is at hand, `finetune evaluate {run.path}` makes the folder whole."
        ) from fault
    if plan.stages:
        return backbone, load_file(weights)
    if backbone.digest != plan.weights_digest:
        raise BackboneError(
            f"{plan.backbone} now has weights {backbone.digest[:12]}, but {run.path} was made with "
            f"{plan.weights_digest[:12]}. Put the card it was made with first in FINETUNE_ZOO."
        )
    return backbone, None


def _empty_backbone(run: RunFolder, plan: Plan) -> Backbone:
    """The backbone of a run with whatever weights."""
    if not plan.arch.startswith(OWN):
        card = read_card(run.file(CARD))
        return load_backbone(card.name, zoo={card.name: card}, pretrained=False)
    if not isinstance(run.network, Backbone):
        raise needs_network(run)
    backbone = copy.deepcopy(run.network)
    fit_size(backbone, plan.view.size_pixels)
    return backbone


def hand_network(run: RunFolder, model: Model) -> None:
    """Give `run` the network that it was begun with; its weights do not matter.

    Raises:
        RunError: if the run can build its own.
        BackboneError: as `open_network`.
    """
    if not run.plan.arch.startswith(OWN):
        raise RunError(f"{run.path} was begun with {run.plan.backbone}, which it can build; leave model= out.")
    run.network = open_network(model)


def needs_network(run: RunFolder) -> BackboneError:
    """An error for a run whose network a program handed in, where none does so now."""
    return BackboneError(
        f"{run.path} holds the weights of {run.plan.arch.removeprefix(OWN)}, a network that was handed in from Python, "
        "and not what builds it. Hand it in again, with any weights: finetune.load_run(run, model=...), "
        "finetune.predict(run, images, model=...)."
    )


def _weights(run: RunFolder, plan: Plan, is_held_out: bool) -> Path:
    """The file with the weights of the whole model, in the stage that made them or as the run ships them."""
    if not plan.stages:
        return run.file(MODEL)
    path = run.held_out_weights() if is_held_out else run.final_weights()
    if path.exists():
        return path
    if is_held_out and plan.is_refit:
        raise RunError(
            f"{path} is gone, the weights before the refit, and only these can judge val and calibration. Put the "
            "file back, or train again."
        )
    return run.file(MODEL)


def _own_images(plan: Plan, dataset: Dataset) -> dict[str, list[str]]:
    """Digests of files by what they were for: `train`, `val`, and what a refit learned from beside `train`."""
    if not plan.stages:
        return {}
    own = {role: [dataset.files[index] for index in dataset.indices(role)] for role in ("train", "val")}
    if plan.is_refit:
        own["refit"] = [dataset.files[index] for index in dataset.labelled() if dataset.roles[index] != "train"]
    return own


def _card(run: RunFolder, plan: Plan, dataset: Dataset, backbone: Backbone) -> dict[str, Any]:
    origin, view = backbone.card, plan.view
    arch, options = backbone.network
    return {
        "name": run.path.resolve().name,
        "arch": arch,
        "arch_kwargs": options,
        "num_classes": len(plan.classes),
        "classes": CLASSES,
        "pretrained_on": _history(origin, plan, dataset),
        "source": {"licence": origin.licence, "begun_from": origin.name},
        "input_size": [3, view.size_pixels, view.size_pixels],
        "mean": list(view.mean),
        "std": list(view.std),
        "interpolation": view.interpolation,
        "crop_pct": plan.data.crop_pct,
        "params_m": run.facts.backbone.params_m,
        "weights": {"file": MODEL},
        "images": {"file": SEEN},
    }


def _history(origin: Card, plan: Plan, dataset: Dataset) -> str:
    """What the weights were trained on, one after the other; a probe leaves those of its backbone as they were."""
    if not plan.stages:
        return origin.pretrained_on
    names = ", ".join(plan.classes[:5]) + (", ..." if len(plan.classes) > 5 else "")
    count = len(dataset.labelled() if plan.is_refit else dataset.indices("train"))
    own = f"{count:,} images of {len(plan.classes)} classes ({names})"
    return f"{origin.pretrained_on}, then {own}" if plan.pretrained else own


def _write_card(run: RunFolder, card: Mapping[str, Any]) -> None:
    run.write_text(CLASSES, "".join(f"{name}\n" for name in run.plan.classes))
    whole = {**card, "sha256": _digest(run.file(MODEL))}
    run.write_text(CARD, yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=110))


def _copy(source: Path, path: Path) -> None:
    write_whole(path, lambda temporary: shutil.copyfile(source, temporary))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
