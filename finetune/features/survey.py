"""The survey: look at the images with the backbone frozen, and write down what was found.

Nothing is decided here. `look` keeps the features and decoded images that later steps use; `survey`
gives the Facts alone.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from finetune.data.decoding import BadImage
from finetune.data.loading import ImageStore
from finetune.data.normalization import measure_constants
from finetune.data.sources import ROLES, Item, Source, open_source
from finetune.data.splits import Split, cut_split
from finetune.errors import BackboneError, DataError, RecipeError
from finetune.features.cache import FeatureCache
from finetune.features.extraction import Extraction, digest_images, extract, num_cores
from finetune.features.measuring import Material, measure
from finetune.features.probing import Probe
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.frozen import FrozenBackbone
from finetune.recipe.cards import Card, View
from finetune.recipe.facts import (
    BackboneFacts,
    BadFile,
    Facts,
    Findings,
    MachineFacts,
    PerClass,
)
from finetune.recipe.schema import Recipe
from finetune.recipe.shelf import default_backbone, read_zoo

_OVERRIDES = ("image_size", "crop_pct", "interpolation", "mean", "std")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Facts, and what was made on the way to them."""

    facts: Facts
    items: tuple[Item, ...]
    roles: tuple[str, ...]
    """Of each item: train, val, calibration, test, unused or bad."""
    digests: tuple[str, ...]
    """Of the bytes of each item."""
    cache: FeatureCache | None
    """Holds the features of all items but bad and unused ones; None with random weights."""
    backbone: Backbone
    store: ImageStore
    probe: Probe | None

    def indices(self, role: str) -> list[int]:
        """Items that play `role`, in the source's order."""
        return [index for index, own in enumerate(self.roles) if own == role]

    def labels(self, role: str) -> torch.Tensor:
        """(N,) of the items that play `role`."""
        return torch.tensor([self.items[index].label for index in self.indices(role)], dtype=torch.long)

    def stacked(self, role: str) -> torch.Tensor:
        """Features (N, D) of the items that play `role`."""
        assert self.cache is not None
        rows = self.cache.features([self.digests[index] for index in self.indices(role)])
        return rows if len(rows) else torch.empty(0, self.backbone.num_features)


def survey(recipe: Recipe) -> Facts:
    """What there is to know about the recipe's images and backbone before anything is decided."""
    return look(recipe).facts


def look(
    recipe: Recipe, progress: Progress = lambda what, done, total: None, *, roles_seen: Sequence[str] = ROLES
) -> Look:
    """Open the images, divide them, extract features, and measure.

    Args:
        recipe: which images, and which backbone looks at them.
        progress: called with what is counted, how many are done, and of how many.
        roles_seen: images of other roles are listed and divided, but not opened.

    Raises:
        DataError: if there is nothing to learn from, or a file is broken and `data.on_bad_image` is fail.
        BackboneError: if the backbone cannot be had.
        RecipeError: if no data is named.
    """
    if recipe.data.root is None:
        raise RecipeError("no images are named. Give a folder: `finetune train FOLDER`, or set data.root.")
    began = time.perf_counter()
    work = _Survey(recipe, progress, roles_seen)
    roles, split, found = work.divide_and_extract()
    for role in ("train", "val"):
        if role not in roles:
            raise DataError(f"no images play the role {role}; raise data.split.{role} or add images.")
    source = work.source
    seconds = {"images": round(time.perf_counter() - began, 3)}
    labels = torch.tensor([item.label for item in source.items])
    probe, findings, began = None, Findings(), time.perf_counter()
    if recipe.pretrained:
        strategy = recipe.train.strategy
        probe, findings = measure(
            work.material(roles, labels, split),
            for_advice=strategy is None,
            for_flips=strategy != "probe" and recipe.data.invariances is None,
        )
        seconds["findings"] = round(time.perf_counter() - began, 3)
    facts = Facts(
        root=str(source.root),
        kind=source.kind,
        classes=source.classes,
        bad_images=tuple(BadFile(name=source.items[index].name, reason=why) for index, why in sorted(work.bad.items())),
        num_images=len(source.items) - len(work.bad),
        warnings=(*source.warnings, *split.warnings),
        backbone=_backbone_facts(work.backbone),
        view=work.view,
        crop_pct=recipe.data.crop_pct or work.backbone.card.crop_pct,
        normalize=work.normalize,
        normalized_images=work.normalized_images,
        overridden=work.overridden,
        machine=work.machine,
        seconds=seconds,
        **_split_facts(split, labels[[index for index, role in enumerate(roles) if role == "val"]]),
        **_image_facts(found, work.cache),
        **{name: getattr(findings, name) for name in Findings.model_fields},
        chance=1 / len(source.classes),
    )
    return Look(
        facts=facts,
        items=source.items,
        roles=roles,
        digests=tuple(work.digests),
        cache=work.cache,
        backbone=work.backbone.to("cpu"),
        store=work.store,
        probe=probe,
    )


class _Survey:
    """What a survey works with: images, backbone, view, and which files have turned out broken."""

    def __init__(self, recipe: Recipe, progress: Progress, roles_seen: Sequence[str]) -> None:
        self.recipe, self._progress, self._roles_seen = recipe, progress, roles_seen
        self.source = open_source(Path(str(recipe.data.root)).expanduser())
        torch.manual_seed(recipe.seed)  # random weights, where asked for, follow the seed
        name = recipe.backbone or default_backbone()
        self.machine = measure_machine(recipe.hardware.devices)
        self.backbone = load_backbone(name, zoo=read_zoo(), pretrained=recipe.pretrained).eval()
        self.backbone.to(self.machine.device).to(memory_format=torch.channels_last)
        self.view, self.overridden = choose_view(recipe, self.backbone.card)
        refuse_size(self.backbone, self.view.size_pixels, self.machine.device)
        self.cache: FeatureCache | None = None
        self._frozen: FrozenBackbone | None = None
        self.normalize, self.normalized_images = whose_constants(recipe), 0
        self.store = ImageStore(self.source.items, self.view, int(recipe.hardware.image_cache_gb * 1e9))
        wish = recipe.hardware.precision
        self.precision = fast_precision(self.machine) if wish == "auto" else wish
        digests = digest_images(self.source.items)
        self.digests = [answer if isinstance(answer, str) else "" for answer in digests.values()]
        self.bad = {index: str(answer) for index, answer in digests.items() if isinstance(answer, BadImage)}

    def divide_and_extract(self) -> tuple[tuple[str, ...], Split, Extraction]:
        """Roles, the split, and the features; constants are measured first where the recipe asks for them."""
        if self.normalize.startswith("channel"):  # on the training images, once it is settled which those are
            roles, _, _ = self._divide(looks=False)
            rows = [index for index, role in enumerate(roles) if role == "train"]
            size, seed = self.view.size_pixels, self.recipe.seed
            found = measure_constants(self.store, rows, size_pixels=size, kind=self.normalize, seed=seed)
            self.view = replace(self.view, mean=found.mean, std=found.std)
            self.normalized_images = found.num_images
            self.store.view = self.view  # training normalises by the store's view; the decoded pixels stay
        return self._divide(looks=True)

    def _divide(self, *, looks: bool) -> tuple[tuple[str, ...], Split, Extraction]:
        """Cut the split and extract the images in it, again without any that turn out broken."""
        found = Extraction()
        while True:
            kept = self._readable()
            split = divide(self.recipe, self.source, self.digests, kept)
            roles = ["bad"] * len(self.source.items)
            for index, role in zip(kept, split.roles, strict=True):
                roles[index] = role
            more = self._extract(
                [i for i in kept if roles[i] in self._roles_seen and i not in found.facts], looks=looks
            )
            found.facts.update(more.facts)
            found.hits, found.misses = found.hits + more.hits, found.misses + more.misses
            if not more.bad:
                return tuple(roles), split, found
            self.bad.update(more.bad)

    def _readable(self) -> list[int]:
        items, bad = self.source.items, self.bad
        if bad and self.recipe.data.on_bad_image == "fail":
            named = "; ".join(f"{items[index].name} ({why})" for index, why in sorted(bad.items())[:5])
            raise DataError(f"{len(bad)} images cannot be read: {named}. Mend them, or set data.on_bad_image to skip.")
        kept = [index for index in range(len(items)) if index not in bad]
        if not kept:
            why = next(iter(bad.values()))
            raise DataError(f"none of the {len(bad)} images in {self.source.root} can be read: {why}.")
        return kept

    def _freeze(self) -> FrozenBackbone:
        if self._frozen is None:
            self._frozen = FrozenBackbone(self.backbone, size_pixels=self.view.size_pixels, device=self.machine.device)
        return self._frozen

    def material(self, roles: tuple[str, ...], labels: torch.Tensor, split: Split) -> Material:
        """What there is to measure on, once the images are divided and looked at."""
        assert self.cache is not None
        return Material(
            backbone=self.backbone,
            freeze=self._freeze,
            cache=self.cache,
            store=self.store,
            digests=self.digests,
            labels=labels,
            roles=roles,
            classes=self.source.classes,
            view=self.view,
            device=self.machine.device,
            precision=self.precision,
            split_digest=split.digest,
            seed=self.recipe.seed,
            batch_size=self.recipe.train.batch_size,
        )

    def _extract(self, indices: list[int], *, looks: bool) -> Extraction:
        looks = looks and self.recipe.pretrained
        if looks and self.cache is None:
            self.cache = FeatureCache(self.backbone.digest, self.view.digest, self.precision)
        return extract(
            self.source.items,
            self.digests,
            indices,
            self.view,
            backbone=self._freeze if looks else None,
            cache=self.cache if looks else None,
            store=None if self.recipe.train.strategy == "probe" else self.store,
            device=self.machine.device,
            precision=self.precision,
            progress=lambda done, total: self._progress("images", done, total),
        )


def divide(recipe: Recipe, source: Source, digests: Sequence[str], kept: Sequence[int]) -> Split:
    """The split of the items `kept`, by the shares, the seed and the limit of the recipe."""
    spec, limit = recipe.data.split, recipe.data.max_train_per_class
    return cut_split(
        [source.items[index].label for index in kept],
        [digests[index] for index in kept],
        [source.items[index].role for index in kept],
        source.classes,
        val=spec.val,
        calibration=spec.calibration,
        test=spec.test,
        seed=recipe.seed,
        max_train_per_class=None if limit == "all" else limit,
    )


def refuse_size(backbone: Backbone, size_pixels: int, device: str) -> None:
    """Some networks take images of one size only; better said now than after the images are decoded.

    Raises:
        BackboneError: if this one does not take images of `size_pixels`.
    """
    own = backbone.card.input_size[1]
    if size_pixels == own:
        return
    try:
        with torch.inference_mode():
            backbone(torch.zeros(1, 3, size_pixels, size_pixels, device=device))
    except (AssertionError, RuntimeError, ValueError) as fault:
        said = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise BackboneError(
            f"{backbone.card.name} does not take images of {size_pixels} px ({said}). "
            f"Set data.image_size to {own}, the size it was pretrained at, or leave it null."
        ) from fault


def choose_view(recipe: Recipe, card: Card) -> tuple[View, tuple[str, ...]]:
    """The view of the weights with the recipe's overrides, and the names of those that differ."""
    wish = recipe.data
    size = wish.image_size or card.input_size[1]
    view = View(
        size_pixels=size,
        shorter_pixels=max(size, int(size / (wish.crop_pct or card.crop_pct))),
        interpolation=wish.interpolation or card.interpolation,
        mean=wish.mean or card.mean,
        std=wish.std or card.std,
    )
    own = {**{key: getattr(card, key) for key in _OVERRIDES if key != "image_size"}, "image_size": card.input_size[1]}
    differ = [key for key in _OVERRIDES if getattr(wish, key) is not None and getattr(wish, key) != own[key]]
    return view, tuple(differ)


def whose_constants(recipe: Recipe) -> str:
    """Where mean and std come from: the weights, the training images, or the recipe itself.

    Raises:
        RecipeError: if the recipe both gives them and asks for measured ones, or names ones it does not give.
    """
    wish = recipe.data
    if wish.mean is not None or wish.std is not None:
        if wish.normalize not in (None, "recipe"):
            raise RecipeError(f"data.mean and data.std are given, and data.normalize is {wish.normalize}; keep one.")
        return "recipe"
    if wish.normalize == "recipe":
        raise RecipeError("data.normalize is recipe, but data.mean and data.std are not given.")
    return wish.normalize or ("weights" if recipe.pretrained else "channel_mean_std")


def measure_machine(wish: str) -> MachineFacts:
    """What torch can use here."""
    has_gpu = torch.cuda.is_available() and wish != "cpu"
    return MachineFacts(
        device="cuda" if has_gpu else "cpu",
        cores=num_cores(),
        has_bf16=has_gpu and torch.cuda.is_bf16_supported(),
        has_fp16=has_gpu,
    )


def fast_precision(machine: MachineFacts) -> str:
    """The fastest arithmetic that a frozen backbone looks in well, here."""
    return "bf16" if machine.has_bf16 else "fp16" if machine.has_fp16 else "32"


def _split_facts(split: Split, val_labels: torch.Tensor) -> dict[str, Any]:
    per_class = [count for count in split.counts["train"] if count]
    commonest = float(torch.bincount(val_labels).max()) / len(val_labels) if len(val_labels) else 0.0
    return {
        "counts": split.counts,
        "leaks": split.leaks,
        "split_digest": split.digest,
        "images_per_class": PerClass(min=min(per_class), median=median(per_class), max=max(per_class)),
        "majority": commonest,
    }


def _image_facts(found: Extraction, cache: FeatureCache | None) -> dict[str, Any]:
    seen = list(found.facts.values())
    return {
        "image_kinds": dict(sorted(Counter(one.kind for one in seen).items())),
        "rotated": sum(one.is_rotated for one in seen),
        "median_width": median(one.width for one in seen),
        "median_height": median(one.height for one in seen),
        "features": {"hits": found.hits, "misses": found.misses, "bytes": cache.num_bytes if cache else 0},
    }


def _backbone_facts(backbone: Backbone) -> BackboneFacts:
    card = backbone.card
    return BackboneFacts(
        name=card.name,
        params_m=round(sum(p.numel() for p in backbone.parameters()) / 1e6, 3),
        num_features=backbone.num_features,
        stages=backbone.stages,
        pretrained_on=card.pretrained_on,
        input_size=card.input_size[1],
        licence=card.licence,
        weights_digest=backbone.digest,
        has_batch_norm=any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in backbone.modules()),
    )
