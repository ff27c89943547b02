"""Digests of the bytes of image files: what a split, a cache and a memory of seen images know an image by."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from finetune.compute import num_cores
from finetune.data.decoding import BadImage
from finetune.data.formats import Contents
from finetune.data.frames import is_of_same_file
from finetune.data.items import Item
from finetune.data.sources import read_bytes

_AT_ONCE = 256


def digest_images(items: Sequence[Item], contents: Contents | None = None) -> list[str | BadImage]:
    """Digest of the file of every item, or the fault that reading it met; `contents` is told of the bytes, too.

    A file of several frames, which stand one after the other, is read once or, rarely, twice.
    """

    def digest(item: Item) -> str | BadImage:
        try:
            data = read_bytes(item)
        except OSError as fault:
            return BadImage(fault.strerror or str(fault))
        if contents is not None:
            contents.note(item, data)
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def digest_some(first: int) -> list[str | BadImage]:
        found: list[str | BadImage] = []
        some = items[first : first + _AT_ONCE]
        for place, item in enumerate(some):
            found.append(found[-1] if place and is_of_same_file(some[place - 1], item) else digest(item))
        return found

    if len(items) and items[0].row is not None:  # rows of mapped shards: threads would only wait for each other
        return [own for first in range(0, len(items), _AT_ONCE) for own in digest_some(first)]
    with ThreadPoolExecutor(num_cores()) as pool:  # in parts, for a thread's task costs as much as a small file
        parts = pool.map(digest_some, range(0, len(items), _AT_ONCE))
        return [answer for part in parts for answer in part]
