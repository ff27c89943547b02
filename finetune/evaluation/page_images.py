"""Images of a run by name, for its page."""

import io
from collections.abc import Callable

from PIL import Image

from finetune.data.dataset import Dataset
from finetune.data.frames import open_images
from finetune.data.items import Item
from finetune.data.sources import read_bytes
from finetune.errors import FinetuneError
from finetune.runs.folder import RunFolder

Read = Callable[[str], bytes]
"""Name to bytes of an image file."""


def seen_images(dataset: Dataset) -> Read:
    """Those that were looked at."""
    by_name = {item.name: item for item in dataset.items}
    return lambda name: _picture(by_name[name])


def stored_images(run: RunFolder) -> Read | None:
    """Those of a run, as long as they are where they were; None elsewhere, for a page can do without."""
    data = run.plan.data
    try:
        items = open_images(data).items
    except FinetuneError:
        return None
    by_name = {item.name: item for item in items}
    return lambda name: _picture(by_name[name])


def _picture(item: Item) -> bytes:
    """The file; where the image is one frame of it, a file of that frame."""
    data = read_bytes(item)
    if not item.frame:
        return data
    stream = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.seek(item.frame)
        image.save(stream, "TIFF" if image.mode == "F" else "PNG")
    return stream.getvalue()
