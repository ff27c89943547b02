"""The survey: look at the images with the backbone frozen, and write down what was found.

Nothing is decided here. `look` keeps the data set, the backbone and its features for later steps.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.compute import Compute
from finetune.config.backbone_names import read_zoo
from finetune.config.facts import BadFile, Facts, Findings, RangeFacts
from finetune.config.opening import Opening, opening_of
from finetune.config.plan import Plan
from finetune.config.recipe import Recipe
from finetune.config.section import ROLES
from finetune.data.ancestry import overlap_warnings
from finetune.data.dataset import Dataset
from finetune.data.loading import Batches
from finetune.data.normalization import measure_constants
from finetune.data.splits import Split, refuse_idle
from finetune.data.value_range import FULL_RANGE
from finetune.errors import DataError, RecipeError
from finetune.features.cache import FeatureCache
from finetune.features.extraction import Extraction, ImageTable, extract
from finetune.features.image_facts import band_warnings, image_facts, range_warnings, split_facts
from finetune.features.measuring import PROBE_BYTES, Material, measure
from finetune.features.probing import Probe
from finetune.features.refitting import RefitProbe, refit_probe
from finetune.features.surgery import relative_gradients
from finetune.features.viewing import (
    backbone_facts,
    choose_view,
    measure_machine,
    whose_constants,
)
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.classifier import Classifier
from finetune.models.frozen import FrozenBackbone
from finetune.models.input_size import fit_size
from finetune.models.own import NOTHING, Given
from finetune.planning.refit import is_cross_fitted

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
    survey = _Survey(opening_of(recipe), progress, ROLES)
    found = survey.extract_part(part, parts)
    if survey.cache is not None and survey.cache.warnings:
        raise DataError(f"a part of the images is looked at for later: {survey.cache.warnings[0]}")
    return found


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Facts, and what was made on the way to them."""

    facts: Facts
    dataset: Dataset
    """Divided, and decoded in the view of the facts."""
    cache: FeatureCache | None
    """Holds the features of all images but bad and unused ones; None with random weights."""
    backbone: Backbone
    probe: Probe | None
    """On the training images; None with random weights."""
    refit: RefitProbe | None = None
    """On all labelled images; None where the recipe wants none, or some of them were not looked at."""

    def features(self, role: str) -> torch.Tensor:
        """(N, D) of the images that play `role`."""
        assert self.cache is not None
        rows = self.cache.features([self.dataset.digests[index] for index in self.dataset.indices(role)])
        return rows if len(rows) else torch.empty(0, self.backbone.num_features)


def look(
    wish: Recipe | Plan,
    progress: Progress = lambda what, done, total: None,
    *,
    roles_seen: Sequence[str] = ROLES,
    given: Given = NOTHING,
) -> Survey:
    """Open the images, divide them, extract features, and measure.

    Args:
        wish: which images, and which backbone looks at them; of a plan only what training and judging need is measured.
        progress: called with what is counted, how many are done, and of how many.
        roles_seen: images of other roles are listed and divided, but not opened.
        given: what is used instead of what the recipe would name.

    Raises:
        DataError: if there is nothing to learn from, or a file is broken and `data.on_bad_image` is fail.
        BackboneError: if the backbone cannot be had.
        RecipeError: if no data is named.
    """
    if wish.data.root is None and given.source is None:
        raise RecipeError("no images are named. Give a folder: `finetune train FOLDER`, or set data.root.")
    began, opening = time.perf_counter(), opening_of(wish)
    work = _Survey(opening, progress, roles_seen, given)
    split, found = work.divide_and_extract()
    dataset = work.dataset
    source, roles = dataset.source, dataset.roles
    refuse_idle(roles, [item.role for item in source.items], opening.data.split.val)
    seconds = {"images": round(time.perf_counter() - began, 3)}
    labels = torch.from_numpy(source.items.labels).long()
    probe, refit, findings, began = None, None, Findings(), time.perf_counter()
    if opening.pretrained:
        material = work.material(labels, split)
        probe, findings = measure(
            material,
            for_advice=opening.for_advice,
            for_training=opening.for_training,
            for_flips=opening.for_flips,
        )
        if opening.refits_probe and "calibration" in roles_seen:
            refit = refit_probe(material, probe, makes_folds=is_cross_fitted(findings))
        seconds["findings"] = round(time.perf_counter() - began, 3)
    gradients: dict[str, float] = {}
    if opening.for_surgery and probe is not None:
        gradients = work.measure_gradients(probe)
    facts = Facts(
        root=str(source.root),
        kind=source.kind,
        classes=source.classes,
        given_roles=tuple(role for role in source.items.counts() if role in ROLES),
        bad_images=tuple(
            BadFile(name=source.items[index].name, reason=why) for index, why in sorted(dataset.bad.items())
        ),
        num_images=len(source.items) - len(dataset.bad),
        warnings=(
            *source.warnings,
            *dataset.format_warnings,
            *split.warnings,
            *_partly(findings, split),
            *overlap_warnings(work.backbone.card, roles, dataset.files),
            *band_warnings(found.facts, dataset.bad.values()),
            *range_warnings(found.facts, source.items, dataset.store.view, dataset.value_range),
            *(work.cache.warnings if work.cache else ()),
        ),
        seconds=seconds,
        **work.settled(),
        **split_facts(split, roles, dataset.files, source.items.labels),
        **image_facts(found.facts, source.items),
        features={"hits": found.hits, "misses": found.misses, "bytes": work.cache.num_bytes if work.cache else 0},
        **{name: getattr(findings, name) for name in Findings.model_fields},
        gradients=gradients,
        chance=1 / len(source.classes),
    )
    return Survey(
        facts=facts, dataset=dataset, cache=work.cache, backbone=work.backbone.to("cpu"), probe=probe, refit=refit
    )


class _Survey:
    """What a survey works with: the data set, the backbone and how it sees."""

    def __init__(self, opening: Opening, progress: Progress, roles_seen: Sequence[str], given: Given = NOTHING) -> None:
        self.opening, self._progress, self._roles_seen = opening, progress, roles_seen
        self.machine = measure_machine(opening.hardware.devices)
        hardware = opening.hardware
        self.compute = (
            Compute.of(hardware, or_cpu=True) if opening.is_decided else Compute.decide(hardware, self.machine)
        )
        self.dataset = Dataset.open(opening.data, opening.seed, given.source)
        torch.manual_seed(opening.seed)  # random weights, where asked for, follow the seed
        if given.backbone is not None:
            self.backbone = copy.deepcopy(given.backbone)
        else:
            self.backbone = load_backbone(opening.backbone, zoo=read_zoo(), pretrained=opening.pretrained).eval()
        self.backbone.to(self.compute.device).to(memory_format=torch.channels_last)
        size, self.size_note = fit_size(self.backbone, opening.data.image_size)
        view, self.overridden = choose_view(opening.data, self.backbone, size)
        self.dataset.see(view, int(opening.hardware.image_cache_gb * 1e9))
        self.cache: FeatureCache | None = None
        self._frozen: FrozenBackbone | None = None
        self.normalize, self.normalized_images = _constants(opening), 0

    def extract_part(self, part: int, parts: int) -> Extraction:
        """Look at every image of one part of the list, whatever its role; nothing is divided or measured."""
        if not self.opening.pretrained or self.normalize.startswith("channel"):
            raise RecipeError(
                "features are kept for pretrained weights with constants known beforehand, not for these."
            )
        self.dataset.divide()  # which settles the value range
        digests = self.dataset.digests
        return self._extract([index for index in range(part - 1, len(digests), parts) if digests[index]])

    def divide_and_extract(self) -> tuple[Split, Extraction]:
        """The split, and the features; constants are measured first where the recipe asks for them."""
        if self.normalize.startswith("channel") and not self.opening.is_decided:
            # on the training images, once it is settled which those are
            self._divide(looks=False)
            store, rows = self.dataset.store, self.dataset.indices("train")
            size, seed = store.view.size_pixels, self.opening.seed
            found = measure_constants(store, rows, size_pixels=size, kind=self.normalize, seed=seed)
            self.normalized_images = found.num_images
            store.view = replace(store.view, mean=found.mean, std=found.std)  # the decoded pixels stay as they are
        return self._divide(looks=True)

    def _divide(self, *, looks: bool) -> tuple[Split, Extraction]:
        """Cut the split and extract the images in it, again without any that turn out broken."""
        dataset = self.dataset
        found, store = Extraction(ImageTable(len(dataset.items))), dataset.store
        while True:
            split = dataset.divide()
            if dataset.store is not store:  # another value range: what was seen before is void
                found, store, self.cache = Extraction(ImageTable(len(dataset.items))), dataset.store, None
            wanted = [index for index, role in enumerate(dataset.roles) if role in self._roles_seen]
            more = self._extract([index for index in wanted if index not in found.facts], looks=looks)
            found.facts.update(more.facts)
            found.hits, found.misses = found.hits + more.hits, found.misses + more.misses
            if not more.bad:
                return split, found
            dataset.drop(more.bad)

    def _freeze(self) -> FrozenBackbone:
        if self._frozen is None:
            size = self.dataset.store.view.size_pixels
            self._frozen = FrozenBackbone(self.backbone, size_pixels=size, device=self.compute.device)
        return self._frozen

    def material(self, labels: torch.Tensor, split: Split) -> Material:
        """What there is to measure on, once the images are divided and looked at."""
        assert self.cache is not None
        dataset = self.dataset
        return Material(
            backbone=self.backbone,
            freeze=self._freeze,
            cache=self.cache,
            store=dataset.store,
            digests=dataset.digests,
            files=dataset.files,
            labels=labels,
            roles=dataset.roles,
            classes=dataset.classes,
            view=dataset.store.view,
            compute=self.compute,
            split_digest=split.digest,
            seed=self.opening.seed,
            batch_size=self.opening.batch_size,
        )

    def settled(self) -> dict[str, Any]:
        """The fields of `Facts` on the backbone, and on how it sees images."""
        return {
            "backbone": backbone_facts(self.backbone),
            "view": self.dataset.store.view,
            "crop_pct": self.opening.data.crop_pct or self.backbone.card.crop_pct,
            "size_note": self.size_note,
            "normalize": self.normalize,
            "normalized_images": self.normalized_images,
            "value_range": self._range_to_tell(),
            "overridden": self.overridden,
            "machine": self.machine,
        }

    def _range_to_tell(self) -> RangeFacts | None:
        """Nothing where a plan says no more than that there are no deep images."""
        found = self.dataset.value_range
        return None if self.opening.is_decided and self.dataset.span == FULL_RANGE else found

    def measure_gradients(self, probe: Probe) -> dict[str, float]:
        """How large the gradients of the probe's loss are for the weights of each stage, on training images."""
        rows, labels = self.dataset.indices("train"), self.dataset.labels("train").tolist()
        size = min(GRADIENT_BATCH, len(rows))
        batches = Batches(
            self.dataset.store, rows, labels, batch_size=size, augmentation=None, shuffle=True,
            seed=self.opening.seed, even=True,
        )  # fmt: skip
        head = torch.nn.Linear(probe.weight.shape[1], probe.weight.shape[0])
        head.load_state_dict({"weight": probe.weight.float(), "bias": probe.bias.float()})
        device = self.compute.device
        classifier = Classifier(self.backbone, head.to(device))
        return relative_gradients(classifier, ((x.to(device), y.to(device)) for x, y, _ in batches))

    def _extract(self, indices: list[int], *, looks: bool = True) -> Extraction:
        looks, dataset = looks and self.opening.pretrained, self.dataset
        view = dataset.store.view
        if looks and self.cache is None:
            self.cache = FeatureCache(self.backbone.digest, view.digest, self.compute.precision)
        return extract(
            dataset.items,
            dataset.digests,
            indices,
            view,
            backbone=self._freeze if looks else None,
            cache=self.cache if looks else None,
            store=None if not self.opening.for_training else dataset.store,
            compute=self.compute,
            progress=lambda done, total: self._progress("images", done, total),
        )


def _constants(opening: Opening) -> str:
    """Where mean and std come from; a plan holds them, and says so too."""
    return opening.normalize or whose_constants(opening.data, is_pretrained=opening.pretrained)


def _partly(findings: Findings, split: Split) -> list[str]:
    """A word where the probe has not seen all training images."""
    num_train = sum(split.counts["train"])
    if findings.probe is None or findings.probe.train.n == num_train:
        return []
    told = f"the probe was solved on {findings.probe.train.n:,} of {num_train:,} training images, drawn class by class"
    return [f"{told}, for the features of all would take over {PROBE_BYTES / 1e9:g} GB."]
