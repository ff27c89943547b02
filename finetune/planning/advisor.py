"""The advisor: how deep to fine-tune, from how much data there is, how similar it is, and what the probe gets wrong.

Pure arithmetic on Facts. What a strategy gains is read from the measured matrix (`matrix.py`), and the
strategy whose gain is worth most when its cost is paid, at the price that `train.prefer` sets, is chosen.
"""

import math
from collections.abc import Sequence

from finetune.config.facts import Facts, ProfileFacts
from finetune.config.measures import Measure, Proportion
from finetune.config.plan import Advice
from finetune.config.section import Prefer
from finetune.planning.matrix import ORDER, STEP, Gain, Place, choose_at, gain_at

UNMEASURED = "not measured"
"""The cell where the recipe names the strategy, so that nothing was measured to advise."""
SMALL_PER_CLASS = 100
"""Below this median number of training images per class there is little data: a convention, for the picture."""
SIMILAR = 0.5
"""At and above this similarity the images count as similar to the source."""
SHIFT_CENTER, SHIFT_POWER = 0.07, 4.0
"""The shift of the earliest batch norms' inputs at which similarity is 0.5, and how fast it falls there."""
SOLVED = 0.985
"""A probe whose interval starts above this leaves nothing that val could show."""


def partial_depth(stages: int, profile: ProfileFacts | None = None) -> int:
    """Top stages that `partial` trains where the recipe does not say.

    All but the lowest quarter, and but one at least: the first layers are few weights that every image passes, and
    training is better without them (Kumar et al. 2022, https://arxiv.org/abs/2211.09359; `benchmarks/LOG.md`). Or all
    above the depth whose features lead the top by more than one standard error, if those are more.
    """
    above = 0 if profile is None or profile.earlier is None else stages - 1 - profile.earlier
    return max(1, stages - max(1, stages // 4), above)


def similarity_of_shift(shifts: Sequence[Measure]) -> tuple[float, float, float]:
    """One number in [0, 1] with its interval, from the shift of batch-norm inputs at each stage.

    Images that a network was trained on move the inputs of its batch norms by nothing, images of another kind move
    them. The earliest quarter of the stages is read, for later ones also move with the size of the image, whose borders
    they see. 1 / (1 + (shift / center)^power) puts it on a scale from 1 (like the source) to 0.
    """
    value, low, high = (
        1 / (1 + (max(0.0, early_shift(shifts, part)) / SHIFT_CENTER) ** SHIFT_POWER)
        for part in ("value", "high", "low")
    )
    return value, low, high


def early_shift(shifts: Sequence[Measure], part: str = "value") -> float:
    """The mean shift over the earliest quarter of the stages that have batch norm."""
    early = shifts[: math.ceil(len(shifts) / 4)]
    total: float = sum(getattr(shift, part) for shift in early)
    return total / len(early)


def similarity_of_probes(probe: Proportion, knn: Proportion, chance: float) -> tuple[float, float, float]:
    """The same where there is no batch norm: the mean share of the way from chance to perfect that frozen features go.

    The probe says whether the classes are linearly separable, the nearest neighbours whether the features already group
    them. It cannot tell a hard problem from strange images, which is why the shift goes first.
    """

    def lifted(first: float, second: float) -> float:
        return min(1.0, max(0.0, ((first + second) / 2 - chance) / (1 - chance)))

    return lifted(probe.value, knn.value), lifted(probe.low, knn.low), lifted(probe.high, knn.high)


def place_of(facts: Facts) -> Place | None:
    """Where these facts stand in the matrix; None where there is no probe or no similarity."""
    if facts.probe is None or facts.similarity is None:
        return None
    judged = facts.probe.left_out or facts.probe.val
    error = max(1 - judged.value, 0.5 / judged.n)
    return Place(facts.images_per_class.median, facts.similarity.value, error)


def expected_gain(facts: Facts, strategy: str) -> Gain | None:
    """Accuracy that a strategy is expected to add to the probe's, with the 95 % interval of a single run.

    None for a strategy that the matrix does not know, or where there is no probe.
    """
    place = place_of(facts)
    return None if place is None or strategy not in ORDER else gain_at(strategy, place)


def is_small(facts: Facts) -> bool:
    """Whether there is little data, by the images of the class in the middle."""
    return facts.images_per_class.median < SMALL_PER_CLASS


def advise(facts: Facts, prefer: Prefer = "balanced") -> Advice:
    """The strategy for these facts; facts without a probe (random weights) always mean `full`."""
    if facts.probe is None:
        why = "the weights are random, so there is nothing to keep"
        return _advice(facts, "random weights", "full", "full", why, prefer)
    place = place_of(facts)
    if place is None:
        why = "the recipe says so, and nothing was measured to advise otherwise"
        return _advice(facts, UNMEASURED, "partial", "full", why, prefer)
    cell = f"{'small' if is_small(facts) else 'large'}, {'similar' if place.similarity >= SIMILAR else 'different'}"
    gains = {strategy: gain_at(strategy, place) for strategy in ORDER}
    strategy = choose_at(place, prefer)
    runner_up = max((name for name in ORDER if name != strategy), key=lambda name: gains[name].value)
    listed = ", ".join(f"{name} {_points(gains[name])}" for name in ORDER[1:])
    why = (
        f"{place.images:g} training images per class, similarity {place.similarity:.2f}, the probe wrong on "
        f"{100 * place.error:.1f} %; expected above the probe, in points: {listed}; {_preference(strategy, prefer)}"
    )
    if facts.pilot:
        strategy, runner_up, why = _judge_pilot(facts)
    elif facts.probe.val.low >= SOLVED:
        strategy, runner_up = "probe", "partial"
        why = f"the probe's interval on val starts at {facts.probe.val.low:.3f}, so nothing is left to gain"
    return _advice(facts, cell, strategy, runner_up, why, prefer)


def _points(gain: Gain) -> str:
    return f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _preference(strategy: str, prefer: Prefer) -> str:
    price = f"{100 * STEP[prefer]:g} points for a training" if STEP[prefer] else "nothing, as accuracy alone counts"
    told = {"probe": "training is not worth its cost", "partial": "partial is worth its cost, full is not"}
    return f"{told.get(strategy, 'full is worth its cost')} ({price}; train.prefer {prefer})"


def _judge_pilot(facts: Facts) -> tuple[str, str, str]:
    """The strategy whose last pilot did best on val, the cheaper of equals; the second; and what was seen.

    A short training has not come to its end, but the probe has: the probe is chosen only where the best training is
    clearly worse, by more than the interval of the probe's accuracy.
    """
    assert facts.probe is not None
    last = {row.strategy: row.val.value for row in facts.pilot}
    spent = {row.strategy: row.seconds for row in facts.pilot}
    ranked = sorted(last, key=lambda name: (-last[name], ORDER.index(name)))
    shown = ", ".join(f"{name} {100 * last[name]:.1f} % after {spent[name]:.0f} s" for name in ranked)
    why = f"a pilot on {facts.probe.val.n} val images: {shown}; the probe, solved, {100 * facts.probe.val.value:.1f} %"
    if last[ranked[0]] < facts.probe.val.low:
        return "probe", ranked[0], why
    return ranked[0], ranked[1] if len(ranked) > 1 else "probe", why


def _advice(facts: Facts, cell: str, strategy: str, runner_up: str, why: str, prefer: Prefer) -> Advice:
    similar, place = facts.similarity, place_of(facts)
    return Advice(
        cell=cell,
        images_per_class=facts.images_per_class.median,
        similarity=similar.value if similar else 0.0,
        similarity_low=similar.low if similar else 0.0,
        similarity_high=similar.high if similar else 0.0,
        small_below=SMALL_PER_CLASS,
        similar_from=SIMILAR,
        probe_error=place.error if place else 0.0,
        prefer=prefer,
        strategy=strategy,
        runner_up=runner_up,
        why=why,
    )
