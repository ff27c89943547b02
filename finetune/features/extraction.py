"""Features of images by a frozen backbone: decoding in threads beside the forward pass, cached by content.

What was done is kept shard by shard, so a killed extraction of a million images goes on where it was.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from finetune.compute import Compute, num_cores
from finetune.config.card import View
from finetune.data.decoding import KINDS, BadImage, ImageFacts, center_crop, decode, facts_row, scaling
from finetune.data.items import Item
from finetune.data.loading import ImageStore, normalize
from finetune.data.sources import read_bytes
from finetune.features.cache import FeatureCache
from finetune.models.frozen import FrozenBackbone
from finetune.planning.micro_batch import PASS_PIXELS

BATCH = 64
"""Images looked at together."""
AHEAD = 4 * BATCH
"""Images that may be decoded but not yet looked at; bounds memory."""


class ImageTable:
    """What decoding found out about images, by their places in a list: 16 bytes each, seen or not."""

    def __init__(self, num_items: int) -> None:
        self._rows = np.full((num_items, 4), -1, dtype=np.int32)

    def put(self, index: int, facts: ImageFacts) -> None:
        """Remember one image."""
        self._rows[index] = facts_row(facts)

    def put_rows(self, indices: Sequence[int], rows: np.ndarray) -> None:
        """Remember some images, from rows (N, 4) as `facts_row` writes them."""
        self._rows[list(indices)] = rows

    def update(self, other: "ImageTable") -> None:
        """Take over what another table of the same list has seen."""
        seen = other._rows[:, 0] >= 0
        self._rows[seen] = other._rows[seen]

    def __contains__(self, index: int) -> bool:
        return bool(self._rows[index, 0] >= 0)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Widths, heights, places in `KINDS`, and bits of `facts_row`, of the images that were seen; (N,) each."""
        widths, heights, kinds, flags = self._rows[self._rows[:, 0] >= 0].T
        return widths, heights, kinds, flags

    def having(self, flag: int) -> list[int]:
        """Places in the list of the images that were seen and have `flag` among the bits of `facts_row`."""
        return np.flatnonzero((self._rows[:, 0] >= 0) & (self._rows[:, 3] & flag > 0)).tolist()

    def of_kind(self, kind: str) -> list[int]:
        """Places in the list of the images that were seen and are of one of `KINDS`."""
        return np.flatnonzero((self._rows[:, 0] >= 0) & (self._rows[:, 2] == KINDS.index(kind))).tolist()


@dataclass
class Extraction:
    """What one pass over some images found."""

    facts: ImageTable
    bad: dict[int, str] = field(default_factory=dict)
    """Reason by item index."""
    hits: int = 0
    misses: int = 0


def extract(
    items: Sequence[Item],
    digests: Sequence[str],
    indices: Sequence[int],
    view: View,
    *,
    backbone: Callable[[], FrozenBackbone] | None,
    cache: FeatureCache | None,
    store: ImageStore | None,
    compute: Compute,
    progress: Callable[[int, int], None],
) -> Extraction:
    """Look once at every image of `indices` that the cache does not know.

    Args:
        items: all images of the source.
        digests: of the bytes of each item, and of which frame it is.
        indices: which items to look at.
        view: how an image becomes a tensor.
        backbone: makes the network, if any image is to be looked at; None only decodes, to find broken files.
        cache: what is known already, and where features go; None exactly where `backbone` is.
        store: keeps decoded images for training, up to its bound.
        compute: where the network is, and its precision.
        progress: called with the number of images done and in all.
    """
    found, todo = Extraction(ImageTable(len(items))), list(indices)
    if cache is not None:
        known = cache.known([digests[index] for index in indices])
        todo = [index for index, here in zip(indices, known, strict=True) if not here]
        done = [index for index, here in zip(indices, known, strict=True) if here]
        found.facts.put_rows(done, cache.facts([digests[index] for index in done]))
        found.hits = len(done)
    network: FrozenBackbone | None = None
    batch: list[tuple[int, np.ndarray, ImageFacts]] = []
    for count, (index, answer) in enumerate(_decode_ahead(items, todo, view), 1):
        if isinstance(answer, BadImage):
            found.bad[index] = str(answer)
        else:
            pixels, facts = answer
            found.facts.put(index, facts)
            found.misses += 1
            if store is not None:
                store.put(index, pixels)
            batch.append((index, center_crop(pixels, view.size_pixels), facts))
        if batch and (len(batch) == BATCH or count == len(todo)):
            if backbone is not None and cache is not None:
                network = network or backbone()
                rows = look_at(network, np.stack([crop for _, crop, _ in batch]), view, compute)
                for row, (position, _, facts) in enumerate(batch):
                    cache.put(digests[position], [depth[row] for depth in rows], facts)
            batch = []
            progress(count, len(todo))
    if cache is not None:
        cache.flush()
    return found


def _decode_ahead(
    items: Sequence[Item], indices: Sequence[int], view: View
) -> Iterator[tuple[int, tuple[np.ndarray, ImageFacts] | BadImage]]:
    """Decoded images in order, at most AHEAD of them waiting."""

    def work(index: int) -> tuple[np.ndarray, ImageFacts] | BadImage:
        try:
            item = items[index]
            pixels, facts = decode(read_bytes(item), **scaling(view, item.frame)._asdict())
        except BadImage as fault:
            return fault
        return pixels, facts

    with ThreadPoolExecutor(num_cores()) as pool:
        waiting: deque[tuple[int, Future[tuple[np.ndarray, ImageFacts] | BadImage]]] = deque()
        for index in indices:
            waiting.append((index, pool.submit(work, index)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def look_at_all(backbone: FrozenBackbone, crops: np.ndarray, view: View, compute: Compute) -> list[torch.Tensor]:
    """(N, D_k) at each depth k, from any number of crops (N, H, W, 3) in uint8."""
    parts = [look_at(backbone, crops[at : at + BATCH], view, compute) for at in range(0, len(crops), BATCH)]
    return [torch.cat(depth) for depth in zip(*parts, strict=True)]


def look_at(backbone: FrozenBackbone, crops: np.ndarray, view: View, compute: Compute) -> list[torch.Tensor]:
    """(B, D_k) at each depth k in float32 on the CPU, from at most 64 crops (B, H, W, 3) in uint8."""
    count, at_once = len(crops), _images_at_once(view, compute)
    if rest := -count % at_once:  # kernels for another batch size round differently; features shall not depend on it
        crops = np.concatenate([crops, np.zeros((rest, *crops.shape[1:]), dtype=crops.dtype)])
    parts = []
    with compute.autocast():
        for some in torch.from_numpy(crops).split(at_once):
            parts.append([depth.cpu() for depth in backbone(normalize(some.to(compute.device), view))])
    return [torch.cat(depth)[:count] for depth in zip(*parts, strict=True)]


def _images_at_once(view: View, compute: Compute) -> int:
    """Images per forward pass: all on a GPU, halves of that on a CPU until their activations are few."""
    size = BATCH
    while compute.device == "cpu" and size > 1 and size * view.size_pixels**2 > PASS_PIXELS:
        size //= 2
    return size
