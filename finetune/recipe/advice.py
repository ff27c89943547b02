"""The advisor: how deep to fine-tune, from how much data there is and how similar it is.

Pure arithmetic on Facts, with every threshold named. The grid is the usual one: little and similar,
probe; little and different, train a part; more and similar, train all gently; more and different,
train all. The thresholds are conventions of ours until the regret benchmark has fitted them.
"""

from dataclasses import dataclass

from finetune.recipe.facts import Facts, Proportion

SMALL_PER_CLASS = 100
"""Below this median number of training images per class there is little data."""
SIMILAR = 0.75
"""At and above this similarity the frozen features already tell the classes apart."""
SOLVED = 0.985
"""A probe whose interval starts above this leaves nothing that val could show."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The cell of the grid, what to do there, what came second, and why."""

    is_small: bool
    is_similar: bool
    strategy: str
    runner_up: str
    why: str

    @property
    def cell(self) -> str:
        """Such as `small, similar`."""
        return f"{'small' if self.is_small else 'large'}, {'similar' if self.is_similar else 'different'}"


def measure_similarity(probe: Proportion, knn: Proportion, chance: float) -> float:
    """One number in [0, 1]: mean share of the way from chance to perfect that frozen features go.

    The probe says whether the classes are linearly separable, the nearest neighbours whether the
    features already group them; data far from the source does well on the first and badly on the second.
    """
    lifted = [(part.value - chance) / (1 - chance) for part in (probe, knn)]
    return min(1.0, max(0.0, sum(lifted) / 2))


def advise(facts: Facts) -> Advice:
    """The strategy for these facts; facts without a probe (random weights) always mean `full`."""
    per_class = facts.images_per_class.median
    is_small = per_class < SMALL_PER_CLASS
    if facts.probe is None or facts.similarity is None:
        why = "the weights are random, so there is nothing to keep"
        return Advice(is_small=is_small, is_similar=False, strategy="full", runner_up="full", why=why)
    is_similar = facts.similarity >= SIMILAR
    measured = (
        f"{per_class:g} training images per class ({'<' if is_small else '>='} {SMALL_PER_CLASS}), "
        f"similarity {facts.similarity:.2f} ({'>=' if is_similar else '<'} {SIMILAR}): "
        f"{'little' if is_small else 'enough'} data, {'similar to' if is_similar else 'different from'} the source"
    )
    if facts.probe.val.low >= SOLVED:
        strategy, runner_up = "probe", "full"
        measured += f"; the probe's interval on val starts at {facts.probe.val.low:.3f}, so nothing is left to gain"
    elif is_small:
        strategy, runner_up = ("probe", "partial") if is_similar else ("partial", "full")
    else:
        strategy, runner_up = "full", "partial" if is_similar else "probe"
    return Advice(is_small=is_small, is_similar=is_similar, strategy=strategy, runner_up=runner_up, why=measured)
