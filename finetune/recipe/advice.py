"""The advisor: how deep to fine-tune, from how much data there is and how similar it is.

Pure arithmetic on Facts, with every threshold named. The grid is the usual one: little and similar,
probe; little and different, train a part; more and similar, train all gently; more and different,
train all. The thresholds are conventions of ours until the regret benchmark has fitted them.
"""

from finetune.recipe.facts import Facts, Proportion
from finetune.recipe.plan import Advice

SMALL_PER_CLASS = 100
"""Below this median number of training images per class there is little data."""
SIMILAR = 0.75
"""At and above this similarity the frozen features already tell the classes apart."""
SOLVED = 0.985
"""A probe whose interval starts above this leaves nothing that val could show."""


def measure_similarity(probe: Proportion, knn: Proportion, chance: float) -> tuple[float, float, float]:
    """One number in [0, 1] with its interval: mean share of the way from chance to perfect that frozen features go.

    The probe says whether the classes are linearly separable, the nearest neighbours whether the
    features already group them; data far from the source does well on the first and badly on the second.
    """

    def lifted(first: float, second: float) -> float:
        return min(1.0, max(0.0, ((first + second) / 2 - chance) / (1 - chance)))

    return lifted(probe.value, knn.value), lifted(probe.low, knn.low), lifted(probe.high, knn.high)


def advise(facts: Facts) -> Advice:
    """The strategy for these facts; facts without a probe (random weights) always mean `full`."""
    per_class = facts.images_per_class.median
    is_small = per_class < SMALL_PER_CLASS
    if facts.probe is None or facts.similarity is None:
        why = "the weights are random, so there is nothing to keep"
        return _advice(facts, "random weights", "full", "full", why)
    similar = facts.similarity
    is_similar = similar.value >= SIMILAR
    why = (
        f"{per_class:g} training images per class ({'<' if is_small else '>='} {SMALL_PER_CLASS}), "
        f"similarity {similar.value:.2f} ({'>=' if is_similar else '<'} {SIMILAR}): "
        f"{'little' if is_small else 'enough'} data, {'similar to' if is_similar else 'different from'} the source"
    )
    if facts.probe.val.low >= SOLVED:
        strategy, runner_up = "probe", "full"
        why += f"; the probe's interval on val starts at {facts.probe.val.low:.3f}, so nothing is left to gain"
    elif is_small:
        strategy, runner_up = ("probe", "partial") if is_similar else ("partial", "full")
    else:
        strategy, runner_up = "full", "partial" if is_similar else "probe"
    cell = f"{'small' if is_small else 'large'}, {'similar' if is_similar else 'different'}"
    return _advice(facts, cell, strategy, runner_up, why)


def _advice(facts: Facts, cell: str, strategy: str, runner_up: str, why: str) -> Advice:
    similar = facts.similarity
    return Advice(
        cell=cell,
        images_per_class=facts.images_per_class.median,
        similarity=similar.value if similar else 0.0,
        similarity_low=similar.low if similar else 0.0,
        similarity_high=similar.high if similar else 0.0,
        small_below=SMALL_PER_CLASS,
        similar_from=SIMILAR,
        strategy=strategy,
        runner_up=runner_up,
        why=why,
    )
