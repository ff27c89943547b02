"""What a pass over the images found out about the files, and how they were divided: in numbers, and in warnings."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from finetune.config.card import View
from finetune.config.facts import PerClass, RangeFacts
from finetune.data.decoding import BEYOND, FRAMES, KINDS, ROTATED
from finetune.data.items import Item, Items
from finetune.data.splits import Split, labelled_rows
from finetune.features.extraction import ImageTable


def image_facts(seen: ImageTable, items: Items) -> dict[str, Any]:
    """The fields of `Facts` on kinds, sizes, turns and frames of those of the images that were seen."""
    widths, heights, kinds, flags = seen.columns()
    animated = [items[index] for index in seen.having(FRAMES)]
    frames = [item for item in animated if item.frame is not None]
    held = {KINDS[place]: count for place, count in enumerate(np.bincount(kinds).tolist()) if count}
    return {
        "image_kinds": dict(sorted(held.items())),
        "rotated": int((flags & ROTATED > 0).sum()),
        "several_frames": len(animated) - len(frames) + len({(item.file, item.row) for item in frames}),
        "frame_images": len(frames),
        "median_width": float(np.median(widths)),
        "median_height": float(np.median(heights)),
    }


def band_warnings(seen: ImageTable, bad: Iterable[str]) -> list[str]:
    """A word where some images were refused for a band that is no transparency, and others were taken."""
    refused, taken = sum("no transparency" in reason for reason in bad), len(seen.of_kind("alpha"))
    if not (refused and taken):
        return []
    return [
        f"{refused:,} images were refused for a last channel that is no transparency, and {taken:,} others with such a "
        "channel were laid over white; if it is a band in all of them, convert them to RGB."
    ]


def range_warnings(seen: ImageTable, items: Sequence[Item], view: View, found: RangeFacts | None) -> list[str]:
    """A word where images hold values that the range does not, or where no training image said what it is."""
    said, (low, high) = [], view.value_range
    if found is None and (wide := seen.of_kind("16-bit")):
        said.append(
            f"{len(wide):,} images have more than 8 bits per channel, but no training image that was looked at has; "
            f"values {low:g} to {high:g} are mapped to 0..255. If they hold others, set data.value_range."
        )
    if beyond := seen.having(BEYOND):
        said.append(
            f"{len(beyond):,} images hold values outside {low:g} to {high:g}, which are clipped, such as "
            f"{items[beyond[0]].name}; data.value_range sets another range."
        )
    return said


def split_facts(split: Split, roles: Sequence[str], files: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
    """The fields of `Facts` on the division.

    Args:
        split: of the images that can be read.
        roles: of every image.
        files: per image, a hash of its file.
        labels: (N,) of every image.
    """
    per_class, num_classes = [count for count in split.counts["train"] if count], len(split.counts["train"])
    val = np.bincount(labels[[index for index, role in enumerate(roles) if role == "val"]])
    return {
        "counts": split.counts,
        "labelled": tuple(np.bincount(labels[labelled_rows(roles, files)], minlength=num_classes).tolist()),
        "leaks": split.leaks,
        "split_digest": split.digest,
        "images_per_class": PerClass(min=min(per_class), median=median(per_class), max=max(per_class)),
        "majority": float(val.max()) / float(val.sum()) if len(val) else 0.0,
    }
