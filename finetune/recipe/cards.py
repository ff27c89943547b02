"""Cards: what the zoo knows of a backbone, and the view it expects images in.

A card is a YAML file beside a safetensors file. It is data, so it is checked when read; and it is
knowledge, not a gate: timm and torchvision names work without one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import BackboneError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes the tensor a backbone expects: resize, centre crop, scale, normalise."""

    size_pixels: int
    """Height and width of the tensor."""
    shorter_pixels: int
    """The image's shorter side is resized to this before the crop; never below `size_pixels`."""
    interpolation: str
    mean: tuple[float, ...]
    """Per channel, in units of pixels / 255."""
    std: tuple[float, ...]
    value_range: tuple[float, float] = (0.0, 65535.0)
    """Values that become 0 and 255, where a file has more than 8 bits per channel."""
    frame: str = "first"
    """Of several frames or pages in a file: first or middle."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change with any field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one pretrained backbone. Fields follow `card.yaml`."""

    name: str
    arch: str
    """A timm architecture, or `torchvision/NAME`."""
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int
    """Outputs of the source head; 0 where the weights have none."""
    classes: tuple[str, ...] = ()
    pretrained_on: str = "unknown"
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    licence: str = "unknown"
    params_m: float | None = None
    """Millions of parameters, source head included."""
    weights: Path | None = None
    """The safetensors file; None where timm or torchvision fetches the weights."""
    sha256: str | None = None
    top1: float | None = None
    """Per cent, as the card reports it for the source task."""
    statistics: Path | None = None
    """Mean, covariance and class means of features of the source's images; None where nobody measured them."""
    statistics_sha256: str | None = None
    images: Path | None = None
    """Digests of the images that a run of ours trained these weights on; None where nobody recorded them."""

    def view(self, *, size_pixels: int | None = None) -> View:
        """The evaluation view at `size_pixels` (None: the size of pretraining), crop share kept."""
        size = size_pixels or self.input_size[1]
        return View(
            size_pixels=size,
            shorter_pixels=max(size, int(size / self.crop_pct)),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )


def read_card(path: Path) -> Card:
    """The card in the file `path`; its weights and class names lie in the same folder.

    Raises:
        BackboneError: if the file is no card, or a field is missing or of the wrong kind.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        folder, weights, statistics = path.parent, raw.get("weights") or {}, raw.get("statistics") or {}
        images = raw.get("images") or {}
        classes = folder / raw["classes"] if raw.get("classes") else None
        interpolation = str(raw["interpolation"])
        if interpolation not in INTERPOLATIONS:
            raise BackboneError(
                f"{path}: interpolation is {interpolation!r}; a card may say {', '.join(INTERPOLATIONS)}."
            )
        return Card(
            name=str(raw["name"]),
            arch=str(raw["arch"]),
            arch_kwargs=dict(raw.get("arch_kwargs") or {}),
            num_classes=int(raw["num_classes"]),
            classes=tuple(classes.read_text(encoding="utf-8").splitlines()) if classes and classes.exists() else (),
            pretrained_on=str(raw.get("pretrained_on", "unknown")),
            input_size=tuple(int(v) for v in raw["input_size"]),  # type: ignore[arg-type]
            mean=tuple(float(v) for v in raw["mean"]),
            std=tuple(float(v) for v in raw["std"]),
            interpolation=interpolation,
            crop_pct=float(raw.get("crop_pct", 1.0)),
            licence=str((raw.get("source") or {}).get("licence", raw.get("licence", "unknown"))),
            params_m=raw.get("params_m"),
            weights=folder / str(weights.get("file", "weights.safetensors")),
            sha256=raw.get("sha256"),
            top1=(raw.get("measured") or {}).get("top1"),
            statistics=folder / str(statistics["file"]) if statistics else None,
            statistics_sha256=str(statistics["sha256"]) if statistics else None,
            images=folder / str(images["file"]) if images else None,
        )
    except BackboneError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as fault:
        raise BackboneError(
            f"{path} is not a card we can read ({type(fault).__name__}: {fault}). A card needs name, arch, "
            "num_classes, input_size, mean, std and interpolation; `finetune zoo show` prints one that works."
        ) from fault
