"""A data set as a run uses it: images opened and digested, faulty ones named, divided into roles, decoded on demand."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch

from finetune.compute import num_cores
from finetune.config.card import View
from finetune.config.facts import RangeFacts
from finetune.config.recipe import DataSpec
from finetune.data.decoding import BadImage
from finetune.data.digests import digest_images
from finetune.data.formats import Contents
from finetune.data.frames import frame_digests, open_images
from finetune.data.items import Items
from finetune.data.loading import ImageStore
from finetune.data.sources import Source
from finetune.data.splits import Split, cut_split, labelled_rows, refuse_lost
from finetune.data.training_range import RangeMeter
from finetune.data.value_range import FULL_RANGE
from finetune.errors import DataError

BAD, ALL = "bad", "all"
"""The role of a file that cannot be read, and of every image where nothing is divided."""


class Dataset:
    """Images with their labels and roles.

    A faulty file shows when its bytes are read, or when they are decoded. Either way it is named in `bad` and has no
    part in the split, which therefore is cut again after `drop`.
    """

    def __init__(self, source: Source, spec: DataSpec, seed: int) -> None:
        """Read and digest every file; nothing is decoded or divided yet.

        Args:
            source: the list of images.
            spec: how they are divided, and what is done about faulty ones.
            seed: of the split, where the spec names none, and of samples.
        """
        self.source, self.spec, self.seed = source, spec, seed
        contents = Contents()
        answers = digest_images(source.items, contents) if source.digests is None else source.digests
        self.format_warnings = tuple(contents.warnings(source.classes))
        """Formats that stand under wrong names, or for one class alone."""
        self.files = tuple(answer if isinstance(answer, str) else "" for answer in answers)
        """Digest of the file of every item; empty where it cannot be read."""
        self.digests = tuple(frame_digests(source.items, self.files))
        """Digest of every item: of its file, and of which frame of it."""
        self.bad = {index: str(answer) for index, answer in enumerate(answers) if isinstance(answer, BadImage)}
        """Why an item cannot be read, by its number."""
        self.roles: tuple[str, ...] = tuple(BAD if index in self.bad else ALL for index in range(len(source.items)))
        """Of every item: one of `ROLES`, unused, bad, or all."""
        self.split: Split | None = None
        """How the readable images were divided last."""
        given = spec.value_range
        self.value_range = None if given is None else RangeFacts(low=given[0], high=given[1], why="the recipe says so")
        """Which values of deep images become 0 and 255; None where no image has more than 8 bits."""
        self._meter = RangeMeter(source.items, self.digests, spec.frame, seed)
        self._store: ImageStore | None = None

    @classmethod
    def open(cls, spec: DataSpec, seed: int, source: Source | None = None) -> "Dataset":
        """The images that a recipe names, or those that a program handed in, read and digested, not yet divided.

        Raises:
            DataError: as `open_source`.
        """
        return cls(source or open_images(spec), spec, seed)

    @property
    def items(self) -> Items:
        """Of all images, faulty ones too, sorted by name."""
        return self.source.items

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted names."""
        return self.source.classes

    @property
    def store(self) -> ImageStore:
        """Decoded images, in the view of `see`."""
        assert self._store is not None, "call `see` first"
        return self._store

    def see(self, view: View, limit_bytes: int = 0) -> ImageStore:
        """Decode for this view from now on, and keep up to so many bytes; `divide` sets its value range."""
        self._store = ImageStore(self.items, view, limit_bytes)
        return self._store

    @property
    def span(self) -> tuple[float, float]:
        """Values of deep images that become 0 and 255, as far as they are known."""
        return FULL_RANGE if self.value_range is None else (self.value_range.low, self.value_range.high)

    def indices(self, role: str) -> list[int]:
        """Numbers of the items that play `role`, in the source's order."""
        return [index for index, own in enumerate(self.roles) if own == role]

    def labels(self, role: str) -> torch.Tensor:
        """(N,) int64, of the items that play `role`."""
        return torch.from_numpy(self.items.labels[self.indices(role)]).long()

    def labelled(self) -> list[int]:
        """Numbers of the items that a refit trains on, in the source's order."""
        return labelled_rows(self.roles, self.files)

    def divide(self) -> Split:
        """Cut the split of the readable images, and measure the value range on those that are to be learned from.

        What was decoded with another range is forgotten: `store` is then another object.

        Raises:
            DataError: if no image is left, a class has lost all of its images, or there are faulty files and
                `data.on_bad_image` is fail.
        """
        kept = self._readable()
        share, limit = self.spec.split, self.spec.max_train_per_class
        split = cut_split(
            self.items.labels[kept].tolist(),
            [self.digests[index] for index in kept],
            [self.items.role(index) for index in kept],
            self.classes,
            val=share.val,
            calibration=share.calibration,
            test=share.test,
            seed=self.seed if share.seed is None else share.seed,
            max_train_per_class=None if limit == "all" else limit,
            files=[self.files[index] for index in kept],
        )
        roles = [BAD] * len(self.items)
        for index, role in zip(kept, split.roles, strict=True):
            roles[index] = role
        self.roles, self.split = tuple(roles), split
        if self.spec.value_range is None:
            found = self._meter.measure(self.indices("train"), self.items.labels.tolist())
            self.value_range = None if found is None else RangeFacts(**asdict(found))
            if self._store is not None and self._store.view.value_range != self.span:
                self.see(replace(self._store.view, value_range=self.span), self._store.limit_bytes)
        return split

    def drop(self, faults: Mapping[int, str]) -> None:
        """Take out images that turned out faulty when they were decoded; the others must be divided again.

        Args:
            faults: why, by number of the item.
        """
        self.bad.update(faults)
        self.roles = tuple(BAD if index in faults else role for index, role in enumerate(self.roles))

    def find_faults(self, rows: Sequence[int]) -> dict[int, str]:
        """Decode these images and say why those fail that do, by number of the item."""
        with ThreadPoolExecutor(num_cores()) as pool:
            faults = zip(rows, pool.map(self._fault, rows), strict=True)
            return {index: fault for index, fault in faults if fault is not None}

    def refuse_bad(self, or_else: str = "Mend them, or set data.on_bad_image to skip.") -> None:
        """Nothing, where faulty files may be left out.

        Args:
            or_else: what the user can do, as sentences.

        Raises:
            DataError: if there are some and `data.on_bad_image` is fail.
        """
        if self.bad and self.spec.on_bad_image == "fail":
            named = "; ".join(f"{self.items[index].name} ({why})" for index, why in sorted(self.bad.items())[:5])
            raise DataError(f"{len(self.bad)} images cannot be read: {named}. {or_else}")

    def _readable(self) -> list[int]:
        self.refuse_bad()
        kept = [index for index in range(len(self.items)) if index not in self.bad]
        if not kept:
            why = next(iter(self.bad.values()))
            raise DataError(f"none of the {len(self.bad)} images in {self.source.root} can be read: {why}.")
        refuse_lost(self.items, self.classes, self.bad)
        return kept

    def _fault(self, index: int) -> str | None:
        try:
            self.store.get(index)
        except BadImage as fault:
            return str(fault)
        except OSError as fault:
            return fault.strerror or str(fault)
        return None
