"""Batches of normalised images, the same for any number of workers.

Images are decoded once and kept as small uint8 arrays. What is random is a pure function of (seed, epoch) for
the order and of (seed, epoch, index) for each augmentation, never of a generator that some worker has moved.
Where an image comes more than once in an epoch, its augmentation also depends on how often it came before.
"""

import hashlib
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from finetune.compute import start_method
from finetune.config.card import View
from finetune.data.augmentation import Augmentation
from finetune.data.decoding import BadImage, center_crop, decode_sizes, scaling
from finetune.data.items import Item
from finetune.data.sources import read_bytes
from finetune.errors import DataError

_ORDER, _VIEW, _TURNS, _PASS = b"order", b"view", b"turns", b"pass"


def normalize(batch: torch.Tensor, view: View) -> torch.Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float32, `(x / 255 - mean) / std`, in channels_last memory."""
    num, height, width, channels = batch.shape
    mean, std = torch.tensor([view.mean, view.std], dtype=torch.float64)
    # One row of constants, repeated over the width: broadcasting over 3 channels would not vectorise.
    scale = (1 / (255 * std)).float().repeat(width).to(batch.device)
    shift = (-mean / std).float().repeat(width).to(batch.device)
    rows = batch.reshape(num * height, width * channels).float()
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.view(num, height, width, channels).permute(0, 3, 1, 2)


class ImageStore:
    """Decoded images, resized but not cropped, in memory up to a bound; beyond it they are decoded each time."""

    def __init__(self, items: Sequence[Item], view: View, limit_bytes: int) -> None:
        self.items = items
        self.view = view
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        """Bytes of pixels kept; never above `limit_bytes`."""
        self._pixels: dict[int, np.ndarray] = {}

    def get(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of item `index`, shorter side `view.shorter_pixels`. Shared: do not write to them.

        Raises:
            BadImage: if the file holds no readable image.
            OSError: if the file cannot be read.
        """
        if (held := self._pixels.get(index)) is not None:
            return held
        item = self.items[index]
        (pixels,), _ = decode_sizes(read_bytes(item), [scaling(self.view, item.frame)])
        self.put(index, pixels)
        return pixels

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keep what was decoded elsewhere, if there is room; a second time changes nothing."""
        if index not in self._pixels and self.held_bytes + pixels.nbytes <= self.limit_bytes:
            self._pixels[index] = pixels
            self.held_bytes += pixels.nbytes


class Batches:
    """One epoch of (images, labels, indices) per iteration.

    Images are (B, 3, S, S) float32, normalised, channels_last; labels (B,) int64; indices (B,) int64 into the store.
    """

    def __init__(
        self,
        store: ImageStore,
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        batch_size: int,
        augmentation: Augmentation | None,
        shuffle: bool,
        seed: int,
        workers: int = 0,
        even: bool = False,
        mirror_labels: Sequence[int] | None = None,
        balanced: bool = False,
    ) -> None:
        """Prepare the batches; nothing is read yet.

        Args:
            store: where the images come from.
            indices: items of the store, in the order to give them when not shuffled.
            labels: as long as `indices`: the label of each.
            batch_size: B, at most; the last batch may be smaller.
            augmentation: None takes the centre crop of the store's view, as evaluation does.
            shuffle: another order each epoch.
            seed: not negative; with the epoch it fixes the order and every augmentation.
            workers: processes that decode and augment; 0 does so here. The batches are the same.
            even: the same number of batches, but of equal size up to one image, so that no step sees a rest alone.
            mirror_labels: by label, the one an image gets where the augmentation flips it horizontally; None: its own.
            balanced: draw as many images per epoch as there are, but every class equally often: see `draw_evenly`.

        Raises:
            ValueError: if lengths or sizes make no sense.
        """
        if len(indices) != len(labels):
            raise ValueError(f"there are {len(indices)} indices but {len(labels)} labels; they must match.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if balanced and not shuffle:
            raise ValueError("balanced batches are drawn at random, so shuffle must be True.")
        if augmentation is not None and augmentation.size_pixels != store.view.size_pixels:
            raise ValueError(f"augmentation gives {augmentation.size_pixels} px, the view {store.view.size_pixels}.")
        if mirror_labels is not None and len(labels) and len(mirror_labels) <= max(labels):
            raise ValueError(
                f"mirror_labels says nothing of label {max(labels)}, only of the first {len(mirror_labels)}."
            )
        self.store = store
        self.indices = np.asarray(indices, dtype=np.int64)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        turned = self.labels if mirror_labels is None else torch.tensor(mirror_labels, dtype=torch.int64)[self.labels]
        self.mirror_labels = turned
        """The label of each image's mirror image."""
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers
        self.even = even
        self.balanced = balanced
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentations of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return num_batches(len(self.indices), self.batch_size, even=self.even)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        order = self._order()
        places = np.arange(len(order))  # of an epoch: in balanced ones a position may stand at several
        ends = np.arange(1, len(self)) * self.batch_size
        plan = np.array_split(places, len(self) if self.even else ends) if len(self) else []
        # Without workers the same code runs here, and no generator of the caller is moved in either case.
        loader: DataLoader[_Drawn] = DataLoader(
            _Views(self.store, self.indices[order], self.augmentation, self.seed, self.epoch),
            batch_sampler=plan,  # type: ignore[arg-type]
            collate_fn=_as_is,
            num_workers=self.workers,
            worker_init_fn=_start_worker if self.workers else None,
            multiprocessing_context=start_method() if self.workers else None,  # only a fork shares the store
            generator=torch.Generator().manual_seed(self.seed),
        )
        for chosen, (pixels, are_mirrored) in zip(plan, loader, strict=True):
            positions = order[chosen]
            labels = torch.where(are_mirrored, self.mirror_labels[positions], self.labels[positions])
            yield normalize(pixels, self.store.view), labels, torch.from_numpy(self.indices[positions])

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.indices))
        order = _permutation(len(self.indices), _ORDER, self.seed, self.epoch)
        if self.balanced:
            drawn: np.ndarray = draw_evenly(self.labels.numpy(), seed=self.seed, epoch=self.epoch)[order]
            return drawn
        return order


def num_batches(num_images: int, batch_size: int, *, even: bool = False) -> int:
    """Batches in an epoch; even ones of two images or more, where there are so many and a batch may hold them."""
    count = -(-num_images // batch_size)
    return count - 1 if even and count > 1 and batch_size > 1 and num_images // count < 2 else count


def draw_evenly(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Positions (N,) of the images of one epoch, every class equally often up to one; class after class.

    Each class walks through its images in a new order each time and goes on in the next epoch where it stopped. So no
    image comes a second time before all of its class came once, and over the epochs none of a common class is left out.

    Args:
        labels: (N,).
        seed: not negative; with the epoch it fixes the answer.
        epoch: from 0.
    """
    classes = np.unique(labels)
    first, last = epoch * len(labels), (epoch + 1) * len(labels)  # turns of all epochs in a row
    drawn = []
    for turn, label in enumerate(classes[_permutation(len(classes), _TURNS, seed)]):
        members = np.flatnonzero(labels == label)
        begin, end = (max(0, -(-(bound - turn) // len(classes))) for bound in (first, last))
        passes = range(begin // len(members), -(-end // len(members)))
        walk = [members[_permutation(len(members), _PASS, seed, int(label), number)] for number in passes]
        if walk:
            start = passes[0] * len(members)
            drawn.append(np.concatenate(walk)[begin - start : end - start])
    return np.concatenate(drawn) if drawn else np.arange(0)


def _permutation(length: int, purpose: bytes, *numbers: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(_seed_of(purpose, *numbers))).permutation(length)


_Drawn = tuple[torch.Tensor, torch.Tensor]
"""Views (B, S, S, 3) uint8, and which of them are mirrored (B,)."""


class _Views(Dataset[_Drawn]):
    """Whole batches of uint8 views, asked for by their places in the epoch."""

    def __init__(
        self, store: ImageStore, indices: np.ndarray, augmentation: Augmentation | None, seed: int, epoch: int
    ) -> None:
        self.store = store
        self.indices = indices
        self.times = _times_before(indices)
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = epoch

    def __getitems__(self, places: Sequence[int]) -> _Drawn:
        size = self.store.view.size_pixels
        views = np.empty((len(places), size, size, 3), dtype=np.uint8)
        are_mirrored = torch.zeros(len(places), dtype=torch.bool)
        for row, place in enumerate(places):
            views[row], are_mirrored[row] = self._view(int(self.indices[place]), self.times[place])
        return torch.from_numpy(views), are_mirrored

    def _view(self, index: int, times: int) -> tuple[np.ndarray, bool]:
        try:
            pixels = self.store.get(index)
        except (BadImage, OSError) as fault:
            name = self.store.items[index].name
            raise DataError(f"{name} cannot be read ({fault}). Was it changed since the data were surveyed?") from fault
        if self.augmentation is None:
            return center_crop(pixels, self.store.view.size_pixels), False
        again = (times,) if times else ()
        return self.augmentation.draw(pixels, _seed_of(_VIEW, self.seed, self.epoch, index, *again))


def _times_before(indices: np.ndarray) -> list[int]:
    """For each entry, how often it stands further to the front."""
    times, met = [], Counter[int]()
    for index in indices.tolist():
        times.append(met[index])
        met[index] += 1
    return times


def _seed_of(purpose: bytes, *numbers: int) -> int:
    """32 bits that depend on all arguments; neighbours are unrelated."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4, person=purpose).digest(), "little")


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    if cv2 := sys.modules.get("cv2"):  # only augmentation needs it, and importing it is slow
        cv2.setNumThreads(0)
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, _Views)
    info.dataset.store.limit_bytes = 0  # a worker lives for one epoch and rarely meets an image twice: keeping is waste
