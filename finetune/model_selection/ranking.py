"""Which backbone to take: every candidate looks at some training images, and a probe on what it sees decides.

No measure of transferability wins on all tasks, so the cheap ones stand beside the probe and decide only where it
cannot: between backbones that it does not tell apart on these images. Images of val and test are never looked at.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from finetune.compute import Compute
from finetune.config.backbone_names import default_backbone, read_zoo
from finetune.config.card import Card, View
from finetune.config.facts import Ranking, RankRow, Unranked
from finetune.config.measures import Measure
from finetune.config.recipe import Recipe
from finetune.data.dataset import Dataset
from finetune.data.decoding import center_crop
from finetune.data.loading import ImageStore, normalize
from finetune.data.normalization import measure_constants
from finetune.data.splits import draw_sample
from finetune.errors import BackboneError, RecipeError
from finetune.features.cache import FeatureCache
from finetune.features.extraction import extract
from finetune.features.layer_profile import NEIGHBOURS, cross_validate, neighbours_left_out, proportion
from finetune.features.similarity import measure_distances, measure_response, source_logits
from finetune.features.survey import Progress
from finetune.features.viewing import (
    choose_view,
    whose_constants,
)
from finetune.metrics.transferability import h_score, leep, logme, nce
from finetune.model_selection.ordering import Seen, explain, measure_agreement, order_rows
from finetune.models.backbones import Backbone, load_backbone
from finetune.models.frozen import FrozenBackbone
from finetune.models.input_size import fit_size
from finetune.models.own import NOTHING, Given

MOST_IMAGES = 1000
"""Training images that every candidate looks at, at most."""
TIMED_IMAGES, TIMED_BATCHES = 16, 5
"""Images of a timed batch, and batches of which the median is taken, after one to warm up."""


def choose_backbone(
    recipe: Recipe, *, progress: Progress = lambda what, done, total: None, given: Given = NOTHING
) -> tuple[str, Ranking | None]:
    """The recipe's own backbone, or the best card at hand for its images, with the ranking where there was a choice.

    Random weights know nothing to choose by: they get the bundled architecture.

    Raises:
        DataError: if there are no images to rank on.
        BackboneError: if no card can be loaded.
        RecipeError: if no data is named.
    """
    if recipe.backbone is not None:
        return recipe.backbone, None
    if not recipe.pretrained:
        return default_backbone(), None
    cards = {name: card for name, card in read_zoo().items() if card.weights is None or card.weights.exists()}
    if len(cards) == 1:
        return next(iter(cards)), None
    ranking = rank_backbones(recipe, cards, progress=progress, given=given)
    return ranking.chosen, ranking


def rank_backbones(
    recipe: Recipe,
    cards: Mapping[str, Card],
    *,
    most_images: int = MOST_IMAGES,
    progress: Progress = lambda what, done, total: None,
    given: Given = NOTHING,
) -> Ranking:
    """Candidates in the order of choice; `why` says by which rule.

    Each looks through its own view, but for what the recipe overrides. A candidate that cannot be had is listed with
    the reason.

    Args:
        recipe: names the images, how they are divided, and what of the view is overridden; its backbone is ignored.
        cards: the candidates; one without a weights file stands for a timm or torchvision name.
        most_images: size of the sample of training images.
        progress: called with a candidate's name, images done, and images in all.
        given: images that are used instead of what the recipe would name.

    Raises:
        DataError: if there is nothing to learn from, or a file is broken and `data.on_bad_image` is fail.
        BackboneError: if there is no candidate, or none can be had.
        RecipeError: if no data is named, or random weights are asked for.
    """
    if not recipe.pretrained:
        raise RecipeError("pretrained is false: random weights know nothing that backbones could be ranked by.")
    if not cards:
        raise BackboneError("there is no backbone to rank. `finetune zoo list` shows those at hand.")
    images = _Images(recipe, given)
    while True:
        rows = images.draw(most_images)
        seen, unranked = _look_at_candidates(images, rows, cards, progress)
        if not images.found_bad:
            break
    if not seen:
        reasons = " ".join(f"{one.name}: {one.reason}" for one in unranked[:3])
        raise BackboneError(f"none of {len(unranked)} backbones could look at the images. {reasons}")
    ranked = order_rows(seen)
    return Ranking(
        root=str(images.dataset.source.root),
        classes=images.dataset.classes,
        num_images=len(rows),
        image_size=recipe.data.image_size,
        device=images.compute.device,
        rows=tuple(ranked),
        unranked=tuple(unranked),
        chosen=ranked[0].name,
        why=explain(ranked, len(rows)),
        agreement=tuple((a, b, value) for (a, b), value in measure_agreement(ranked).items()),
        features={"hits": sum(one.hits for one in seen), "misses": sum(one.misses for one in seen)},
        warnings=(*images.dataset.source.warnings, *images.warnings, *images.unkept),
    )


class _Images:
    """The recipe's images, divided as a run divides them, and the machine that looks at them."""

    def __init__(self, recipe: Recipe, given: Given = NOTHING) -> None:
        if recipe.data.root is None and given.source is None:
            raise RecipeError("no images are named. Give a folder: `finetune zoo rank FOLDER`, or set data.root.")
        self.recipe = recipe
        self.dataset = Dataset.open(recipe.data, recipe.seed, given.source)
        self.found_bad = False
        self.warnings: tuple[str, ...] = ()
        self.unkept: tuple[str, ...] = ()
        """That features are not kept, and why, or nothing."""
        self.compute = Compute.decide(recipe.hardware)

    def draw(self, most: int) -> list[int]:
        """A sample of the training images, without those known to be broken."""
        dataset, self.found_bad = self.dataset, False
        split = dataset.divide()
        lost = f"{len(dataset.bad)} images cannot be read and were left out."
        self.warnings = (*split.warnings, *([lost] if dataset.bad else []))
        train, labels = dataset.indices("train"), dataset.items.labels.tolist()
        return draw_sample(train, labels, dataset.files, most=most, seed=dataset.seed)  # one frame of a file

    def see(self, backbone: Backbone, rows: Sequence[int]) -> ImageStore:
        """Images as a candidate sees them; by constants of the images themselves where the recipe asks for them."""
        size, _ = fit_size(backbone, self.recipe.data.image_size)
        view, _ = choose_view(self.recipe.data, backbone, size)
        store = self.dataset.see(replace(view, value_range=self.dataset.span))
        if (kind := whose_constants(self.recipe.data, is_pretrained=True)).startswith("channel"):
            found = measure_constants(store, rows, size_pixels=size, kind=kind, seed=self.recipe.seed)
            store.view = replace(store.view, mean=found.mean, std=found.std)
        return store


def _look_at_candidates(
    images: _Images, rows: Sequence[int], cards: Mapping[str, Card], progress: Progress
) -> tuple[list[Seen], list[Unranked]]:
    """What every candidate came to; cut short at the first that meets broken files."""
    zoo = {name: card for name, card in cards.items() if card.weights is not None}
    seen: list[Seen] = []
    unranked: list[Unranked] = []
    for name, card in cards.items():
        try:
            backbone = load_backbone(name if name in zoo else card.name, zoo=zoo).eval()
            backbone.to(images.compute.device).to(memory_format=torch.channels_last)
            answer = _look(images, rows, backbone, lambda done, total, name=name: progress(name, done, total))  # type: ignore[misc]
        except BackboneError as fault:
            unranked.append(Unranked(name=name, reason=str(fault)))
            continue
        if answer is None:
            break
        seen.append(answer)
    return seen, unranked


def _look(
    images: _Images, rows: Sequence[int], backbone: Backbone, progress: Callable[[int, int], None]
) -> Seen | None:
    """What one candidate came to; None where files turned out broken."""
    store, dataset = images.see(backbone, rows), images.dataset
    view = store.view
    frozen = FrozenBackbone(backbone, size_pixels=view.size_pixels, device=images.compute.device)
    cache = FeatureCache(backbone.digest, view.digest, images.compute.precision)
    found = extract(
        dataset.items,
        dataset.digests,
        rows,
        view,
        backbone=lambda: frozen,
        cache=cache,
        store=None,
        compute=images.compute,
        progress=progress,
    )
    images.unkept = cache.warnings
    if found.bad:
        dataset.drop(found.bad)
        images.found_bad = True
        return None
    features = cache.features([dataset.digests[index] for index in rows])  # (N, D)
    if not features.isfinite().all():
        raise BackboneError(f"{backbone.card.name} gives features that are not finite; its weights are damaged.")
    timed = [rows[place % len(rows)] for place in range(TIMED_IMAGES)]
    crops = np.stack([center_crop(store.get(index), view.size_pixels) for index in timed])
    milliseconds = time_images(frozen, crops, view, images.compute)
    labels = torch.from_numpy(dataset.items.labels[list(rows)]).long()
    return _measure(backbone.to("cpu"), features, labels, images, view.size_pixels, milliseconds, found.hits)


def _measure(
    backbone: Backbone,
    features: torch.Tensor,
    labels: torch.Tensor,
    images: _Images,
    size: int,
    milliseconds: float,
    hits: int,
) -> Seen:
    card, classes, seed = backbone.card, images.dataset.classes, images.recipe.seed
    found = cross_validate(features, labels, num_classes=len(classes), seed=seed)
    right = found.predictions == labels
    k = min(NEIGHBOURS, len(labels) - 1)
    near = neighbours_left_out(features, labels, num_classes=len(classes), k=k)
    of_source: dict[str, object] = {}
    if backbone.source_head is not None:
        logits = source_logits(backbone, features)  # (N, C)
        named = logits.argmax(1)
        of_source = {
            "leep": leep(logits.double().softmax(1), labels, num_classes=len(classes)),
            "nce": nce(named, labels, num_classes=len(classes)),
            "response": measure_response(logits, card.classes, seed=seed),
            "taken_for": _taken_for(named, labels, classes, card.classes),
        }
    if card.statistics is not None:
        frechet, emd = measure_distances(features, labels, card.statistics, len(classes), sha256=card.statistics_sha256)
        of_source |= {"frechet": frechet, "emd": emd}
    tensors = [*backbone.parameters(), *backbone.buffers()]
    row = RankRow(
        name=card.name,
        is_tied=True,
        behind=Measure(value=0, low=0, high=0, n=len(labels)),
        probe=proportion(right),
        neighbours=proportion(near == labels),
        logme=logme(features, labels, num_classes=len(classes)),
        h_score=h_score(features, labels, num_classes=len(classes)),
        milliseconds=milliseconds,
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        params_m=round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6, 3),
        num_features=backbone.num_features,
        image_size=size,
        source_size=backbone.source_size,
        pretrained_on=card.pretrained_on,
        licence=card.licence,
        top1=card.top1,
        **of_source,  # type: ignore[arg-type]
    )
    return Seen(row=row, right=right, log_loss=found.log_loss, hits=hits, misses=len(labels) - hits)


def time_images(frozen: FrozenBackbone, crops: np.ndarray, view: View, compute: Compute) -> float:
    """Milliseconds per image of a batch of decoded crops (B, H, W, 3) uint8: the median of a few, after a warm-up."""
    seconds = []
    for _ in range(TIMED_BATCHES + 1):
        began = time.perf_counter()
        batch = normalize(torch.from_numpy(crops).to(compute.device), view)
        with compute.autocast():
            frozen(batch)[-1].cpu()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds[1:]) / len(crops)


def _taken_for(
    named: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], source_classes: Sequence[str]
) -> tuple[tuple[str, str, float], ...]:
    rows = []
    for label in labels.unique().tolist():
        counts = torch.bincount(named[labels == label])
        best = int(counts.argmax())
        source = source_classes[best] if best < len(source_classes) else f"class {best}"
        rows.append((classes[label], source, int(counts[best]) / int(counts.sum())))
    return tuple(rows)
