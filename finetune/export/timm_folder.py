"""A run's model as plain timm reads it: weights under timm's own names, and the `config.json` of its hub loader.

Nothing is handed over unchecked: the folder is loaded again by timm alone and must answer as the run does, on images of
the run where they are at hand.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.config.section import Section
from finetune.data.decoding import BadImage, center_crop
from finetune.data.frames import open_images
from finetune.data.loading import ImageStore, normalize
from finetune.data.split_names import few
from finetune.errors import FinetuneError, RunError
from finetune.inference.loading import load_final
from finetune.models.backbones import TORCHVISION
from finetune.models.classifier import Classifier
from finetune.models.heads import LinearHead
from finetune.process import as_guest
from finetune.runs.folder import RunFolder, write_whole

TOLERANCE = 1e-4
"""Largest difference of a logit between the run and plain timm, in 32 bits."""
IMAGES = 16
"""Images that both are asked about."""


class Exported(Section):
    """What was written, and how it was checked."""

    folder: str
    architecture: str
    """Of timm."""
    images: int
    """That the run and plain timm were asked about."""
    are_real: bool
    """Whether these were the run's own, and not noise."""
    difference: float
    """The largest, of a logit."""


@as_guest()
def export_timm(run: RunFolder, folder: Path) -> Exported:
    """Write `folder` with `model.safetensors`, `config.json`, `classes.txt` and `README.md`; what was checked.

    `timm.create_model(architecture, checkpoint_path="model.safetensors", num_classes=K)` loads it, and so does
    `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        run: finished; its whole model is taken.
        folder: must not be there yet.

    Raises:
        RunError: if timm has no place for a part of this model, the folder is there, or timm answers otherwise.
    """
    if folder.exists():
        raise RunError(f"{folder} is there already; name another folder with --out.")
    _refuse(run)
    classifier = load_final(run).float()
    name, options = classifier.backbone.network
    if "resized_to" in options:
        options = {**options, "img_size": options["resized_to"]}
        del options["resized_to"]
    plain = _plain(name, options, len(run.plan.classes))
    state = _state(classifier, plain, name)
    images, are_real = _images(run)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".export-") as parent:
        draft = Path(parent) / "export"
        draft.mkdir()
        write_whole(draft / "model.safetensors", lambda path: save_file(state, path))
        gap = _compare(classifier, name, options, draft / "model.safetensors", images)
        _write_texts(run, draft, name, options, plain)
        shutil.move(draft, folder)
    return Exported(folder=str(folder), architecture=name, images=len(images), are_real=are_real, difference=gap)


def _refuse(run: RunFolder) -> None:
    if run.file("ensemble.json").exists():
        raise RunError(f"{run.path} is an average of several networks, and timm loads one; export a member instead.")
    plan = run.plan
    if plan.stages and plan.head.kind != "linear":
        raise RunError(f"{run.path} has a head of kind {plan.head.kind}, and timm's networks end in a linear one.")
    if plan.stages and plan.regularization.fractional_pooling:
        raise RunError(f"{run.path} pools fractionally, which timm's networks do not.")


def _plain(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    import timm

    if name.startswith(TORCHVISION):
        raise RunError(f"{name} is a network of torchvision, which timm does not build.")
    return timm.create_model(name, num_classes=num_classes, **options).eval()


def _state(classifier: Classifier, plain: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The weights under timm's names: those of the backbone, and the head as the network's own classifier."""
    assert isinstance(classifier.head, LinearHead)
    own = classifier.backbone.model.state_dict()
    extra = {key: value.shape for key, value in plain.state_dict().items() if key not in own}
    head = {"weight": classifier.head.linear.weight.detach(), "bias": classifier.head.linear.bias.detach()}
    found = {key: head[part] for key in extra if (part := key.rpartition(".")[2]) in head}
    shapes = {key: value.shape for key, value in found.items()}
    if shapes != extra or len(found) != 2 or set(own) - set(plain.state_dict()):
        raise RunError(f"timm's {name} has no single linear classifier that this head could be ({', '.join(extra)}).")
    return {key: value.detach().contiguous().clone() for key, value in {**own, **found}.items()}


def _images(run: RunFolder) -> tuple[torch.Tensor, bool]:
    """(N, 3, H, W) of the run's images as the network takes them; of noise where they are not at hand."""
    view, crops = run.plan.view, list[np.ndarray]()
    try:
        items = open_images(run.plan.data).items
    except FinetuneError:
        items = None
    if items is not None:
        store = ImageStore(items, view, 0)
        for index in range(0, len(items), max(1, len(items) // IMAGES)):
            try:
                crops.append(center_crop(store.get(index), view.size_pixels))
            except (BadImage, OSError):
                continue
    noise = np.random.default_rng(0).integers(0, 256, (4, view.size_pixels, view.size_pixels, 3), dtype=np.uint8)
    return normalize(torch.from_numpy(np.stack(crops) if crops else noise), view), bool(crops)


@torch.inference_mode()
def _compare(classifier: Classifier, name: str, options: dict[str, Any], file: Path, images: torch.Tensor) -> float:
    """The largest difference of a logit between the run and what timm loads from `file`."""
    import timm

    num_classes = classifier.head.linear.out_features  # type: ignore[union-attr]
    loaded = timm.create_model(name, checkpoint_path=str(file), num_classes=num_classes, **options).eval()
    ours, theirs = classifier(images), loaded(images)
    gap = float((ours - theirs).abs().max())
    if not gap <= TOLERANCE:
        raise RunError(
            f"timm's {name} answers {gap:.2g} otherwise than the run does, more than {TOLERANCE:g}, so nothing was "
            "exported: this network takes features of another kind to its classifier."
        )
    return gap


def _write_texts(run: RunFolder, folder: Path, name: str, options: dict[str, Any], plain: nn.Module) -> None:
    plan, view = run.plan, run.plan.view
    mean, std = list(view.mean), list(view.std)
    config = {
        "architecture": name,
        "num_classes": len(plan.classes),
        "label_names": list(plan.classes),
        "model_args": options,
        "pretrained_cfg": {
            "input_size": [3, view.size_pixels, view.size_pixels],
            "fixed_input_size": bool(options.get("img_size")),
            "interpolation": view.interpolation,
            "crop_pct": plan.data.crop_pct,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "num_classes": len(plan.classes),
            "classifier": plain.default_cfg.get("classifier"),  # type: ignore[union-attr, operator]
            "first_conv": plain.default_cfg.get("first_conv"),  # type: ignore[union-attr, operator]
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{one}\n" for one in plan.classes), encoding="utf-8")
    (folder / "README.md").write_text(_card(run, name, options), encoding="utf-8")


def _card(run: RunFolder, name: str, options: dict[str, Any]) -> str:
    """What a reader needs who has this folder alone."""
    plan, facts, scores = run.plan, run.facts, run.scores
    view, (low, high) = plan.view, plan.data.value_range or (0, 65535)
    told = "not judged on test images"
    if scores.test is not None:
        top1 = scores.test.top1
        share = [f"{100 * part:.1f}" for part in (top1.value, top1.low, top1.high)]
        told = f"{share[0]} % [{share[1]}, {share[2]}] of {top1.n} test images right (95 % interval)"
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"""# {plan.name}

{len(plan.classes)} classes ({few(plan.classes)}; all in `classes.txt`): {told}.

- network: {name}, begun from {plan.backbone}, whose licence is: {facts.backbone.licence}
- trained: {plan.train.strategy}, on {sum(facts.labelled if plan.is_refit else facts.counts["train"]):,} images
- images: shorter side {view.shorter_pixels} px, centre crop {view.size_pixels} px, {view.interpolation};
  of more than 8 bits, values from {low:g} to {high:g} become 0 to 255

```python
import timm, torch
from PIL import Image

model = timm.create_model(
    {name!r}, checkpoint_path="model.safetensors", num_classes={len(plan.classes)}{more}
).eval()
classes = open("classes.txt", encoding="utf-8").read().splitlines()
view = timm.data.create_transform(
    input_size={view.size_pixels}, crop_pct={plan.data.crop_pct}, interpolation={view.interpolation!r},
    mean={tuple(view.mean)}, std={tuple(view.std)},
)
with torch.inference_mode():
    logits = model(view(Image.open("photo.jpg").convert("RGB"))[None])[0]
share = (logits / {scores.temperature_value:.6g}).softmax(0)  # the temperature of the run
print(classes[int(share.argmax())], float(share.max()))
```
"""
