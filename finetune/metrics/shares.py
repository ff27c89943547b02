"""A share with its score interval: needs no torch, so that pages and tables have it too."""

import math
from statistics import NormalDist

from finetune.config.measures import Proportion


def wilson(hits: int, n: int, confidence: float = 0.95) -> Proportion:
    """The share `hits / n` with its score interval; never below 0 or above 1.

    Wilson, JASA 1927, https://doi.org/10.1080/01621459.1927.10502953, without continuity correction.

    Raises:
        ValueError: if `n` is not positive (a share of nothing: skip it), or `hits` is not in [0, n].
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"a share needs 0 <= hits <= n and n >= 1, got hits={hits}, n={n}.")
    z = normal_quantile(confidence)
    share, shrink = hits / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if hits == 0 else max(0.0, center - half)  # rounding leaves 1e-18 where theory says 0
    high = 1.0 if hits == n else min(1.0, center + half)
    return Proportion(value=share, low=low, high=high, n=n)


def normal_quantile(confidence: float) -> float:
    """How many standard errors to either side hold `confidence` of a normal distribution."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}.")
    return NormalDist().inv_cdf((1 + confidence) / 2)
