"""Cards: what the zoo knows of a backbone, and the view it expects images in.

A card is a YAML file beside a safetensors file. It is data, so it is checked when read: it may name an architecture
and describe its shape, but no other file, no address and no code. And it is knowledge, not a gate: timm and
torchvision names work without one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import BackboneError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
OWN = "own/"
"""Begins the architecture of a network that a program handed in; what follows is where its class is defined."""
ARCH = re.compile(r"(torchvision/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?|own/[\w.<>]+")
"""Names of architectures in timm or torchvision, or one handed in: no address (`hf-hub:`), no folder (`local-dir:`)."""
# fmt: off
ARCH_KWARGS = frozenset([
    # size and shape of what comes in
    "img_size", "image_size", "in_chans", "patch_size", "window_size", "pad_type", "dynamic_img_size",
    "dynamic_img_pad", "strict_img_size", "always_partition", "output_stride", "stem_width", "stem_type", "stem_chs",
    "stem_size", "fix_stem", "resized_to",
    # depth and width
    "depth", "depths", "embed_dim", "embed_dims", "dim", "dims", "num_heads", "mlp_ratio", "mlp_ratios", "channels",
    "layers", "width_mult", "width_factor", "hidden_dim", "mlp_dim", "num_layers", "num_features", "head_hidden_size",
    "cardinality", "base_width", "growth_rate", "block_config", "num_init_features", "reduced_tail",
    "inverted_residual_setting", "round_nearest", "bn_size", "ratio",
    # blocks
    "act_layer", "norm_layer", "norm_eps", "bn_eps", "bn_momentum", "bn_tf", "aa_layer", "block_reduce_first",
    "down_kernel_size", "avg_down", "init_values", "ls_init_value", "kernel_sizes", "conv_mlp", "conv_bias",
    "use_grn", "layer_scale", "stochastic_depth_prob", "qkv_bias", "qk_norm", "proj_bias", "pre_norm",
    "scale_attn_norm", "scale_mlp_norm", "num_parallel", "reg_tokens", "class_token", "no_embed_class", "pos_embed",
    "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_rot_pos_emb", "swiglu_mlp", "scale_mlp",
    "scale_attn_inner", "rope_grid_offset", "rope_grid_indexing", "rope_type", "num_reg_tokens", "use_post_norm",
    "use_pre_transformer_norm", "use_post_transformer_norm", "ref_feat_shape", "attn_type",
    # pooling and what stands above it
    "global_pool", "fc_norm", "final_norm", "head_norm_first", "head_init_scale", "use_fc_norm",
    "pool_include_prefix",
    # regularization
    "drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate", "dropout",
    "attention_dropout",
])
# fmt: on
"""What a card may say of its architecture; `checkpoint_path`, `pretrained_cfg`, `cache_dir` and their like read files,
ask the network, or run code, and are refused."""


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
    """Of several frames or pages in a file: first or middle; each, where every one is an image."""

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
    is_before_refit: bool = False
    """The weights are those that a refit repeated, and have not seen what it learned from beside them."""

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
        weights, statistics = raw.get("weights") or {}, raw.get("statistics") or {}
        classes = _inside(path, raw["classes"]) if raw.get("classes") else None
        images = raw.get("images") or {}
        interpolation = str(raw["interpolation"])
        if interpolation not in INTERPOLATIONS:
            raise BackboneError(
                f"{path}: interpolation is {interpolation!r}; a card may say {', '.join(INTERPOLATIONS)}."
            )
        return Card(
            name=str(raw["name"]),
            arch=_checked_arch(path, str(raw["arch"])),
            arch_kwargs=_checked_kwargs(path, dict(raw.get("arch_kwargs") or {})),
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
            weights=_inside(path, weights.get("file", "weights.safetensors")),
            sha256=raw.get("sha256"),
            top1=(raw.get("measured") or {}).get("top1"),
            statistics=_inside(path, statistics["file"]) if statistics else None,
            statistics_sha256=str(statistics["sha256"]) if statistics else None,
            images=_inside(path, images["file"]) if images else None,
        )
    except BackboneError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as fault:
        raise BackboneError(
            f"{path} is not a card we can read ({type(fault).__name__}: {fault}). A card needs name, arch, "
            "num_classes, input_size, mean, std and interpolation; `finetune zoo show` prints one that works."
        ) from fault


def _checked_arch(path: Path, arch: str) -> str:
    if not ARCH.fullmatch(arch):
        raise BackboneError(
            f"{path}: arch is {arch!r}; a card may name an architecture of timm, or torchvision/NAME, but no address "
            "and no folder."
        )
    return arch


def _checked_kwargs(path: Path, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := sorted(str(key) for key in kwargs if key not in ARCH_KWARGS):
        raise BackboneError(
            f"{path}: arch_kwargs holds {', '.join(unknown)}; a card may describe the shape of its architecture, with "
            "such keys as img_size, depth or global_pool, but name no files and load no weights. Remove it."
        )
    if strange := sorted(str(key) for key, value in kwargs.items() if not _is_plain(value)):
        raise BackboneError(f"{path}: arch_kwargs.{strange[0]} is {kwargs[strange[0]]!r}; give numbers or a name.")
    return kwargs


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float) or bool(re.fullmatch(r"\w*", str(value)))


def _inside(path: Path, name: object) -> Path:
    """The file called so beside the card `path`."""
    if Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
        raise BackboneError(f"{path}: {name} does not lie beside the card, and a card reads no other folder.")
    return path.parent / str(name)
