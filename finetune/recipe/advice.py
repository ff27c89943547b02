"""The advisor: how deep to fine-tune, from how much data there is, how similar it is, and what the probe gets wrong.

Pure arithmetic on Facts. What a strategy gains is predicted as a share of the probe's errors, from the number of
training images and the similarity; the cheapest strategy that comes near the best is chosen. All constants but the
conventions below are fitted to `zoo/results.csv` by `benchmarks/regret.py`, which also says what the advice costs.
"""

import math
from collections.abc import Mapping, Sequence

from finetune.recipe.facts import Facts, Measure, ProfileFacts, Proportion
from finetune.recipe.plan import Advice

UNMEASURED = "not measured"
"""The cell where the recipe names the strategy, so that nothing was measured to advise."""
SMALL_PER_CLASS = 100
"""Below this median number of training images per class there is little data: a convention, for the picture."""
SIMILAR = 0.5
"""At and above this similarity the images count as similar to the source."""
SHIFT_CENTER, SHIFT_POWER = 0.07, 4.0
"""The shift of the earliest batch norms' inputs at which similarity is 0.5, and how fast it falls there."""
GAINS = {"partial": (-0.142, 0.170, 0.280), "full": (-0.128, 0.158, 0.256)}
"""Share of the probe's errors that a strategy mends: constant, per tenfold of training images, for being different."""
GAIN_ERRORS = {"partial": 0.123, "full": 0.118}
"""Standard deviation of that share around its prediction."""
LEAST_GAIN = 0.005
"""Accuracy that training must be expected to add to the probe, which costs nothing."""
WORTH = 0.01
"""Accuracy by which full must be expected to beat partial to be taken: it costs more, and differences below it are
noise between cells, which to follow loses on data sets that the rule was not fitted to."""
SOLVED = 0.985
"""A probe whose interval starts above this leaves nothing that val could show."""
ORDER = ("probe", "partial", "full")
"""From cheap to dear."""


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
    return sum(getattr(shift, part) for shift in early) / len(early)


def similarity_of_probes(probe: Proportion, knn: Proportion, chance: float) -> tuple[float, float, float]:
    """The same where there is no batch norm: the mean share of the way from chance to perfect that frozen features go.

    The probe says whether the classes are linearly separable, the nearest neighbours whether the features already group
    them. It cannot tell a hard problem from strange images, which is why the shift goes first.
    """

    def lifted(first: float, second: float) -> float:
        return min(1.0, max(0.0, ((first + second) / 2 - chance) / (1 - chance)))

    return lifted(probe.value, knn.value), lifted(probe.low, knn.low), lifted(probe.high, knn.high)


def expected_gain(facts: Facts, strategy: str) -> tuple[float, float, float] | None:
    """Accuracy that a strategy is expected to add to the probe's, with the 95 % interval of a single run.

    None for a strategy that was never run, or where there is no probe.
    """
    if strategy == "probe":
        return 0.0, 0.0, 0.0
    if strategy not in GAINS or facts.probe is None or facts.similarity is None:
        return None
    errors = 1 - (facts.probe.left_out or facts.probe.val).value
    share = mended_share(strategy, num_train=sum(facts.counts["train"]), similarity=facts.similarity.value)
    error = 1.96 * GAIN_ERRORS[strategy]
    return share * errors, (share - error) * errors, min(1.0, share + error) * errors


def mended_share(strategy: str, *, num_train: int, similarity: float) -> float:
    """The share of the probe's errors that a strategy is expected to mend; below 0 it is expected to do harm."""
    base, per_tenfold, different = GAINS[strategy]
    return max(-1.0, min(0.95, base + per_tenfold * math.log10(num_train) + different * (1 - similarity)))


def choose(gains: Mapping[str, float]) -> str:
    """The strategy to take, by the gain that is expected of each of `ORDER`."""
    best = max(gains.values())
    if best < LEAST_GAIN:
        return "probe"
    return "full" if gains["full"] >= gains["partial"] + WORTH else "partial"


def _preference(gains: Mapping[str, float]) -> str:
    if choose(gains) == "full":
        return "full is expected to be clearly better"
    return f"partial, for full costs more and is not expected to be better by {100 * WORTH:g}"


def is_small(facts: Facts) -> bool:
    """Whether there is little data, by the images of the class in the middle."""
    return facts.images_per_class.median < SMALL_PER_CLASS


def advise(facts: Facts) -> Advice:
    """The strategy for these facts; facts without a probe (random weights) always mean `full`."""
    if facts.probe is None:
        why = "the weights are random, so there is nothing to keep"
        return _advice(facts, "random weights", "full", "full", why)
    if facts.similarity is None:
        why = "the recipe says so, and nothing was measured to advise otherwise"
        return _advice(facts, UNMEASURED, "partial", "full", why)
    per_class, similar = facts.images_per_class.median, facts.similarity.value
    cell = f"{'small' if is_small(facts) else 'large'}, {'similar' if similar >= SIMILAR else 'different'}"
    gains = {strategy: (expected_gain(facts, strategy) or (0.0,))[0] for strategy in ORDER}
    strategy = choose(gains)
    runner_up = max((name for name in ORDER if name != strategy), key=gains.__getitem__)
    listed = ", ".join(f"{name} {100 * gains[name]:+.1f}" for name in ORDER[1:])
    why = (
        f"{sum(facts.counts['train']):,} training images, {per_class:g} per class; similarity {similar:.2f}; expected "
        f"above the probe, in points: {listed}; "
        + (f"less than {100 * LEAST_GAIN:g} is not worth a training" if strategy == "probe" else _preference(gains))
    )
    if facts.pilot:
        strategy, runner_up, why = _judge_pilot(facts)
    elif facts.probe.val.low >= SOLVED:
        strategy, runner_up = "probe", "partial"
        why = f"the probe's interval on val starts at {facts.probe.val.low:.3f}, so nothing is left to gain"
    return _advice(facts, cell, strategy, runner_up, why)


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
