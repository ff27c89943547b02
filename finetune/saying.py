"""Saying: lines for people while something takes long."""

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 5


def every_few_seconds(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """What to call with what is counted, how many are done, and of how many: now and then it says so."""
    last = [time.perf_counter()]

    def progress(what: str, done: int, total: int) -> None:
        if time.perf_counter() - last[0] > SECONDS_BETWEEN_LINES:
            last[0] = time.perf_counter()
            say(f"{what}: {done:,} of {total:,}")

    return progress
