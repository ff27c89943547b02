"""The survey: look at the images with the backbone frozen, and write down what was found.

Nothing is decided here. `look` keeps the features and decoded images that later steps use; `survey`
gives the Facts alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from finetune.data.decoding import BadImage
from finetune.data.formats import Contents
from finetune.data.frames import frame_digests, open_images
from finetune.data.items import ROLES, Items
from finetune.data.loading import Batches, ImageStore
from finetune.data.normalization import measure_constants
from finetune.data.sources import Source
from finetune.data.splits import Split, cut_split, labelled_rows, refuse_idle, refuse_lost
from finetune.data.training_range import RangeMeter
from finetune.data.value_range import FULL_RANGE
from finetune.errors import DataError, RecipeError
from finetune.features.ancestry import overlap_warnings
from finetune.features.cache import FeatureCache
from finetune.features.extraction import Extraction, ImageTable, digest_images, extract
from finetune.features.image_facts import band_warnings, image_facts, range_warnings, split_facts
from finetune.features.measuring import PROBE_BYTES, Material, measure
from finetune.features.probing import Probe
from finetune.features.refitting import RefitProbe, refit_probe
from finetune.features.surgery import relative_gradients
from finetune.features.viewing import (
    backbone_facts,
    choose_view,
    fast_precision,
    fit_size,
    measure_machine,
    whose_constants,
)
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.classifier import Classifier
from finetune.models.frozen import FrozenBackbone
from finetune.recipe.facts import BadFile, Facts, Findings, RangeFacts
from finetune.recipe.reading import Wish, as_recipe
from finetune.recipe.refit import is_cross_fitted
from finetune.recipe.schema import Recipe
from finetune.recipe.shelf import default_backbone, read_zoo

GRADIENT_BATCH = 32
"""Images of each batch on which gradients are compared, where surgical fine-tuning asks for them."""
Progress = Callable[[str, int, int], None]


def survey_part(
    recipe: Recipe, part: int, parts: int, progress: Progress = lambda what, done, total: None
) -> Extraction:
    """Put the features of one part of all images into the cache, so that several processes or machines can share it.

    Args:
        recipe: which images, and which backbone looks at them.
        part: from 1.
        parts: in all; image number i belongs to part i modulo this.
        progress: as for `look`.

    Raises:
        DataError: if the features cannot be kept; otherwise as `look`.
    """
    survey = _Survey(recipe, progress, ROLES)
    found = survey.extract_part(part, parts)
    if survey.cache is not None and survey.cache.warnings:
        raise DataError(f"a part of the images is looked at for later: {survey.cache.warnings[0]}")
    return found


@dataclass(frozen=True, kw_only=True)
class Look:
    """Facts, and what was made on the way to them."""

    facts: Facts
    items: Items
    roles: tuple[str, ...]
    """Of each item: train, val, calibration, test, unused or bad."""
    digests: tuple[str, ...]
    """Of the bytes of each item, and of which frame it is."""
    files: tuple[str, ...]
    """Of the bytes of each item's file."""
    cache: FeatureCache | None
    """Holds the features of all items but bad and unused ones; None with random weights."""
    backbone: Backbone
    store: ImageStore
    probe: Probe | None
    """On the training images; None with random weights."""
    refit: RefitProbe | None = None
    """On all labelled images; None where the recipe wants none, or some of them were not looked at."""

    def indices(self, role: str) -> list[int]:
        """Items that play `role`, in the source's order."""
        return [index for index, own in enumerate(self.roles) if own == role]

    def labelled(self) -> list[int]:
        """Items that a refit trains on, in the source's order."""
        return labelled_rows(self.roles, self.files)

    def labels(self, role: str) -> torch.Tensor:
        """(N,) of the items that play `role`."""
        return torch.from_numpy(self.items.labels[self.indices(role)]).long()

    def stacked(self, role: str) -> torch.Tensor:
        """Features (N, D) of the items that play `role`."""
        assert self.cache is not None
        rows = self.cache.features([self.digests[index] for index in self.indices(role)])
        return rows if len(rows) else torch.empty(0, self.backbone.num_features)


def survey(recipe: Wish, overrides: Sequence[str] = ()) -> Facts:
    """What there is to know about a recipe's (or a folder's) images and backbone before anything is decided."""
    return look(as_recipe(recipe, overrides)).facts


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
    source = work.source
    refuse_idle(roles, [item.role for item in source.items], recipe.data.split.val)
    seconds = {"images": round(time.perf_counter() - began, 3)}
    labels = torch.from_numpy(source.items.labels).long()
    probe, refit, findings, began = None, None, Findings(), time.perf_counter()
    if recipe.pretrained:
        strategy = recipe.train.strategy
        material = work.material(roles, labels, split)
        probe, findings = measure(
            material,
            for_advice=strategy is None,
            for_training=strategy != "probe",
            for_flips=strategy != "probe" and recipe.data.invariances is None,
        )
        if recipe.data.split.refit is not False and "calibration" in roles_seen:
            refit = refit_probe(material, probe, makes_folds=is_cross_fitted(findings))
        seconds["findings"] = round(time.perf_counter() - began, 3)
    gradients: dict[str, float] = {}
    if recipe.train.strategy == "surgical" and probe is not None:
        gradients = work.measure_gradients(roles, labels, probe)
    facts = Facts(
        root=str(source.root),
        kind=source.kind,
        classes=source.classes,
        given_roles=tuple(role for role in source.items.counts() if role in ROLES),
        bad_images=tuple(BadFile(name=source.items[index].name, reason=why) for index, why in sorted(work.bad.items())),
        num_images=len(source.items) - len(work.bad),
        warnings=(
            *source.warnings,
            *work.format_warnings,
            *split.warnings,
            *_partly(findings, split),
            *overlap_warnings(work.backbone.card, roles, work.files),
            *band_warnings(found.facts, work.bad.values()),
            *range_warnings(found.facts, source.items, work.view, work.value_range),
            *(work.cache.warnings if work.cache else ()),
        ),
        seconds=seconds,
        **work.settled(),
        **split_facts(split, roles, work.files, source.items.labels),
        **image_facts(found.facts, source.items),
        features={"hits": found.hits, "misses": found.misses, "bytes": work.cache.num_bytes if work.cache else 0},
        **{name: getattr(findings, name) for name in Findings.model_fields},
        gradients=gradients,
        chance=1 / len(source.classes),
    )
    return Look(
        facts=facts,
        items=source.items,
        roles=roles,
        digests=tuple(work.digests),
        files=tuple(work.files),
        cache=work.cache,
        backbone=work.backbone.to("cpu"),
        store=work.store,
        probe=probe,
        refit=refit,
    )


class _Survey:
    """What a survey works with: images, backbone, view, and which files have turned out broken."""

    def __init__(self, recipe: Recipe, progress: Progress, roles_seen: Sequence[str]) -> None:
        self.recipe, self._progress, self._roles_seen = recipe, progress, roles_seen
        self.source = open_images(recipe.data)
        torch.manual_seed(recipe.seed)  # random weights, where asked for, follow the seed
        name = recipe.backbone or default_backbone()
        self.machine = measure_machine(recipe.hardware.devices)
        self.backbone = load_backbone(name, zoo=read_zoo(), pretrained=recipe.pretrained).eval()
        self.backbone.to(self.machine.device).to(memory_format=torch.channels_last)
        size, self.size_note = fit_size(self.backbone, recipe.data.image_size)
        self.view, self.overridden = choose_view(recipe, self.backbone, size)
        self.cache: FeatureCache | None = None
        self._frozen: FrozenBackbone | None = None
        self.normalize, self.normalized_images = whose_constants(recipe), 0
        self.store = ImageStore(self.source.items, self.view, int(recipe.hardware.image_cache_gb * 1e9))
        wish = recipe.hardware.precision
        self.precision = fast_precision(self.machine) if wish == "auto" else wish
        contents = Contents()
        digests = digest_images(self.source.items, contents)
        self.format_warnings = contents.warnings(self.source.classes)
        self.files = [answer if isinstance(answer, str) else "" for answer in digests]
        self.digests = frame_digests(self.source.items, self.files)
        self.bad = {index: str(answer) for index, answer in enumerate(digests) if isinstance(answer, BadImage)}
        self._meter = RangeMeter(self.source.items, self.digests, self.view.frame, recipe.seed)
        given = recipe.data.value_range
        self.value_range = None if given is None else RangeFacts(low=given[0], high=given[1], why="the recipe says so")

    def extract_part(self, part: int, parts: int) -> Extraction:
        """Look at every image of one part of the list, whatever its role; nothing is divided or measured."""
        if not self.recipe.pretrained or self.normalize.startswith("channel"):
            raise RecipeError(
                "features are kept for pretrained weights with constants known beforehand, not for these."
            )
        kept = self._readable()
        self._settle_range(kept, divide(self.recipe, self.source, self.digests, self.files, kept))
        return self._extract([index for index in range(part - 1, len(self.digests), parts) if self.digests[index]])

    def _settle_range(self, kept: Sequence[int], split: Split) -> bool:
        """Measure which values become 0 and 255, on the training images; whether pixels decoded before are void."""
        if self.recipe.data.value_range is not None:
            return False
        rows = [index for index, role in zip(kept, split.roles, strict=True) if role == "train"]
        found = self._meter.measure(rows, self.source.items.labels.tolist())
        self.value_range = None if found is None else RangeFacts(**asdict(found))
        span = FULL_RANGE if found is None else (found.low, found.high)
        if span == self.view.value_range:
            return False
        self.view, self.cache = replace(self.view, value_range=span), None
        self.store = ImageStore(self.source.items, self.view, self.store.limit_bytes)
        return True

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
        found = Extraction(ImageTable(len(self.source.items)))
        while True:
            kept = self._readable()
            split = divide(self.recipe, self.source, self.digests, self.files, kept)
            if self._settle_range(kept, split):
                found = Extraction(ImageTable(len(self.source.items)))
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
        refuse_lost(items, self.source.classes, bad)
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
            files=self.files,
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

    def settled(self) -> dict[str, Any]:
        """The fields of `Facts` on the backbone, and on how it sees images."""
        return {
            "backbone": backbone_facts(self.backbone),
            "view": self.view,
            "crop_pct": self.recipe.data.crop_pct or self.backbone.card.crop_pct,
            "size_note": self.size_note,
            "normalize": self.normalize,
            "normalized_images": self.normalized_images,
            "value_range": self.value_range,
            "overridden": self.overridden,
            "machine": self.machine,
        }

    def measure_gradients(self, roles: tuple[str, ...], labels: torch.Tensor, probe: Probe) -> dict[str, float]:
        """How large the gradients of the probe's loss are for the weights of each stage, on training images."""
        rows = [index for index, role in enumerate(roles) if role == "train"]
        size = min(GRADIENT_BATCH, len(rows))
        batches = Batches(
            self.store, rows, labels[rows].tolist(), batch_size=size, augmentation=None, shuffle=True,
            seed=self.recipe.seed, even=True,
        )  # fmt: skip
        head = torch.nn.Linear(probe.weight.shape[1], probe.weight.shape[0])
        head.load_state_dict({"weight": probe.weight.float(), "bias": probe.bias.float()})
        device = self.machine.device
        classifier = Classifier(self.backbone, head.to(device))
        return relative_gradients(classifier, ((x.to(device), y.to(device)) for x, y, _ in batches))

    def _extract(self, indices: list[int], *, looks: bool = True) -> Extraction:
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


def _partly(findings: Findings, split: Split) -> list[str]:
    """A word where the probe has not seen all training images."""
    num_train = sum(split.counts["train"])
    if findings.probe is None or findings.probe.train.n == num_train:
        return []
    told = f"the probe was solved on {findings.probe.train.n:,} of {num_train:,} training images, drawn class by class"
    return [f"{told}, for the features of all would take over {PROBE_BYTES / 1e9:g} GB."]


def divide(recipe: Recipe, source: Source, digests: Sequence[str], files: Sequence[str], kept: Sequence[int]) -> Split:
    """The split of the items `kept`, by the shares, the seed and the limit of the recipe."""
    spec, limit = recipe.data.split, recipe.data.max_train_per_class
    return cut_split(
        source.items.labels[list(kept)].tolist(),
        [digests[index] for index in kept],
        [source.items.role(index) for index in kept],
        source.classes,
        val=spec.val,
        calibration=spec.calibration,
        test=spec.test,
        seed=recipe.seed if spec.seed is None else spec.seed,
        max_train_per_class=None if limit == "all" else limit,
        files=[files[index] for index in kept],
    )
