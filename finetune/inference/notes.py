"""Notes on answers: how an image was read, where that may surprise. A note is no fault; the answer stands."""

from collections import Counter
from collections.abc import Sequence

from finetune.config.card import View
from finetune.data.decoding import ImageFacts


def note_on(facts: ImageFacts, view: View, *, has_learned_deep: bool) -> str | None:
    """What to know of an image of such facts, or nothing.

    Args:
        facts: of its file.
        view: in which it was seen.
        has_learned_deep: whether the range of values of more than 8 bits was measured or given, not only assumed.
    """
    low, high = view.value_range
    if facts.kind == "16-bit" and not has_learned_deep:
        return (
            f"more than 8 bits per channel, but the run learned from 8-bit images only; values {low:g} to {high:g} are "
            "mapped to 0..255"
        )
    if facts.is_clipped:
        return f"values outside {low:g} to {high:g}, the range of the run, are clipped"
    return None


def sum_up(frames: Sequence[tuple[bool, str | None]]) -> str | None:
    """The note on a file of which something was seen; of several frames, with how many of them it concerns.

    Args:
        frames: of each, whether it was seen, and what was told of it.
    """
    counts = Counter(told if is_seen else f"cannot be read ({told})" for is_seen, told in frames if told)
    if len(frames) == 1:
        return next(iter(counts), None)
    return "; ".join(f"{count} of {len(frames)} frames: {told}" for told, count in counts.items()) or None
