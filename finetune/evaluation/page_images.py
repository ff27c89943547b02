"""Images of a run by name, for its page."""

from collections.abc import Callable
from pathlib import Path

from finetune.data.sources import open_source, read_bytes
from finetune.errors import FinetuneError
from finetune.features.survey import Look
from finetune.recipe.runs import RunFolder

Read = Callable[[str], bytes]
"""Name to bytes of the file."""


def seen_images(seen: Look) -> Read:
    """Those that were looked at."""
    by_name = {item.name: item for item in seen.items}
    return lambda name: read_bytes(by_name[name])


def stored_images(run: RunFolder) -> Read | None:
    """Those of a run, as long as they are where they were; None elsewhere, for a page can do without."""
    data = run.plan.data
    try:
        items = open_source(Path(str(data.root)), data.splits, data.columns.named).items
    except FinetuneError:
        return None
    by_name = {item.name: item for item in items}
    return lambda name: read_bytes(by_name[name])
