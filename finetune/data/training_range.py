"""The value range of a data set's images of more than 8 bits, measured once on a seeded sample of training images."""

from collections.abc import Iterable, Sequence

from finetune.data.decoding import read_levels
from finetune.data.items import Item
from finetune.data.sources import read_bytes
from finetune.data.splits import draw_sample
from finetune.data.value_range import Levels, MeasuredRange, measure_range

MOST_LOOKED_AT = 4096
"""Training images whose headers are read, to find those of more than 8 bits."""


class RangeMeter:
    """Measures value ranges; what it has read of an image it keeps, for a split may be cut several times."""

    def __init__(self, items: Sequence[Item], digests: Sequence[str], frame: str, seed: int) -> None:
        self._items, self._digests, self._frame, self._seed = items, digests, frame, seed
        self._known: dict[int, Levels | None] = {}

    def measure(self, rows: Iterable[int], labels: Sequence[int]) -> MeasuredRange | None:
        """The range of the training images `rows`; None where none of those looked at has more than 8 bits.

        Args:
            rows: places in the list of items.
            labels: of every item.
        """
        sample = draw_sample(rows, labels, self._digests, most=MOST_LOOKED_AT, seed=self._seed)
        return measure_range(self._levels(index) for index in sample)

    def _levels(self, index: int) -> Levels | None:
        if index not in self._known:
            try:
                data = read_bytes(item := self._items[index])
            except OSError:
                return None  # decoding says why
            self._known[index] = read_levels(data, self._frame if item.frame is None else item.frame)
        return self._known[index]
