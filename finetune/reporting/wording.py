"""What was measured before the decision, and how evenly classes are spread, in sentences.

Shared by the page and the terminal. A measure that is not there gives no sentence.
"""

from collections.abc import Sequence

from finetune.config.facts import ChiralityFacts, Facts, ProfileFacts, ResponseFacts, ShiftFacts, SimilarityFacts
from finetune.config.imbalance import hides_classes
from finetune.config.measures import Measure
from finetune.config.scores import SplitScores
from finetune.reporting.svg import interval_text, is_number, percent, points, shorten

Baseline = tuple[str, float]
"""A name and an accuracy that nothing need be learned for."""

MAX_NAMED = 5
"""Source classes and pairs of mirrored classes told by name; so are classes that were not found."""


def baseline(facts: Facts) -> Baseline:
    """What needs no look at the images: guessing evenly or, where classes are uneven, always naming the largest one."""
    if any(hides_classes(facts.counts.get(role, ())) for role in ("train", "val")):
        return "always naming the largest class", facts.majority
    return "chance", facts.chance


def is_uneven(score: SplitScores) -> bool:
    """Whether the images are spread so unevenly over the classes that shares of all of them mislead."""
    return hides_classes([row.n for row in score.per_class])


def majority_sentence(score: SplitScores) -> str:
    """What always naming the largest class would give on the same images; nothing where they are spread evenly."""
    if not is_uneven(score):
        return ""
    rows = [row for row in score.per_class if row.n]
    largest = max(rows, key=lambda row: row.n)
    name, share = shorten(largest.name, 40), largest.n / sum(row.n for row in rows)
    alike = f", and balanced accuracy {percent(1 / len(rows))}" if len(rows) > 1 else ""
    return f"always naming {name}, the largest class, would give top-1 {percent(share)}{alike}"


def lost_classes(score: SplitScores) -> str:
    """Classes that were found no better than by chance: other images were called so as often as theirs might be."""
    table, told = score.confusion or (), []
    for place, row in enumerate(score.per_class):
        if row.recall is None or len(table) <= place:
            continue
        called = sum(line[place] for line in table) - table[place][place]
        others = sum(map(sum, table)) - row.n
        if others and row.recall.low <= called / others:
            name = shorten(row.name, 40)
            told.append(f"{name} ({table[place][place]} of {row.n}, and {called} of {others} others were called so)")
    if not told:
        return ""
    more = f" and {len(told) - MAX_NAMED} classes more" if len(told) > MAX_NAMED else ""
    return f"found no better than by chance: {', '.join(told[:MAX_NAMED])}{more}"


def depth_sentence(profile: ProfileFacts) -> str:
    """What the profile says of earlier stages, and on how many images."""
    judge = "on val" if profile.judged == "val" else f"by {profile.judged}"
    sample = f" Measured on {profile.num_images:,} training images, the logistic probe judged {judge}."
    stage, top = (shorten(profile.depths[i].stage, 40) for i in (profile.best, -1))
    if len(profile.depths) == 1:
        return f"There is one depth, {stage}.{sample}"
    if profile.best == len(profile.depths) - 1:
        return f"{stage} tells most of the classes, and it is the top.{sample}"
    by = f"leads {top}, the top, by {points(profile.lead, signed=False)} points"
    error = f"(standard error {points(profile.lead_error, signed=False)})"
    if profile.earlier is None:
        return f"{stage} {by} {error}, too little to tell from chance: the top serves as well.{sample}"
    return f"{stage} {by} {error}: these classes are told better by earlier features than by the last.{sample}"


def measure_rows(facts: Facts) -> list[tuple[str, str]]:
    """Name and words of each measure of similarity, and of the probe beside what needs no look; none without any."""
    rows = similarity_rows(facts.similarity)
    if rows and facts.probe is not None:
        name, share = baseline(facts)
        told = f"A linear probe gets {_share(facts.probe.val)} of the val images right"
        beside = f"{name} {'is' if name == 'chance' else 'gives'} {percent(share)}"
        rows.insert(1, ("Separability", f"{told}; {beside}"))
    return rows


def similarity_rows(similarity: SimilarityFacts | None) -> list[tuple[str, str]]:
    """Name and words of each measure of similarity; a measure that is not there gives none."""
    if similarity is None:
        return []
    value = f"{similarity.value:.2f} ({number(similarity.low)} to {number(similarity.high)})"
    rows = [("Similarity", f"{value}; 1: as the images of pretraining, 0: unlike them")]
    if similarity.control is not None:
        control = f"On features of the same network, untrained, a probe gets {_share(similarity.control)} right"
        rows.append(("Random weights", control))
    rows += _shift_row(similarity.shift)
    rows += _response_rows(similarity.response)
    if similarity.frechet is not None:
        words = f"{number(similarity.frechet)} from the source's images, in units of their spread (Fréchet)"
        rows.append(("Distance", words))
    if similarity.emd is not None:
        rows.append(("Earth mover", f"{similarity.emd:.2f} similar to the source's classes, where 1 is the same"))
    return rows


def chirality_sentence(chirality: ChiralityFacts) -> str:
    """Whether mirroring shows, and which classes are each other's mirror image."""
    share = chirality.share
    if share is None:
        return ""
    measured = f"the original was named in {_share(share)} of {share.n:,} pairs, where 50 % is guessing"
    verdict = {
        True: f"Mirroring goes unnoticed: {measured}.",
        False: f"Mirroring shows: {measured}.",
        None: f"Whether mirroring shows cannot be said yet: {measured}.",
    }[chirality.is_safe]
    if chirality.is_safe is False and share.low <= 0.5:
        verdict = f"The images show no side: {measured}."  # the names of the classes do
    pairs = [f"{shorten(a, 40)} and {shorten(b, 40)}" for a, b in chirality.sided]
    if not pairs:
        return verdict
    more = f", and {len(pairs) - MAX_NAMED} pairs more," if len(pairs) > MAX_NAMED else ""
    return f"{verdict} By their names, {'; '.join(pairs[:MAX_NAMED])}{more} are each other's mirror image."


def duration(seconds: object) -> str:
    """Such as `41 s`, `3.2 min`, `5.1 h` or `2.5 days`."""
    if not is_number(seconds):
        return "–"
    value = max(0.0, float(seconds))  # type: ignore[arg-type]
    if value < 59.5:
        return f"{value:.0f} s" if value >= 9.95 or value == 0 else f"{max(value, 0.1):.1f} s"
    for size, unit, most in ((60, "min", 59.95), (3600, "h", 47.95)):
        if value / size < most:
            return f"{value / size:.1f} {unit}"
    return f"{value / 86400:,.1f} days"


def memory(megabytes: object) -> str:
    """Such as `310 MB` or `2.4 GB`."""
    if not is_number(megabytes):
        return "–"
    value = max(0.0, float(megabytes))  # type: ignore[arg-type]
    return f"{value:.0f} MB" if value < 999.5 else f"{value / 1000:,.1f} GB"


def number(value: float) -> str:
    """Three digits or so; with an exponent only from 100,000 on."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:,.{digits}f}" if abs(value) < 99_999.5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−")


def _shift_row(shift: Sequence[ShiftFacts]) -> list[tuple[str, str]]:
    if not shift:
        return []
    most = max(shift, key=lambda part: part.mean.value)
    stage, mean = shorten(most.stage, 40), most.mean
    words = f"Channel means move most in {stage}: squared, by {_number(mean)} running variances"
    return [("Batch norm", words)]


def _response_rows(response: ResponseFacts | None) -> list[tuple[str, str]]:
    if response is None:
        return []
    words = f"The source classifier spreads the images over {_number(response.effective)} of {response.num_classes:,}"
    named = [f"{shorten(name, 40)} ({percent(share)})" for name, share in response.named[:MAX_NAMED]]
    return [("Source classes", words + (f"; most often {', '.join(named)}" if named else ""))]


def _share(part: Measure) -> str:
    return f"{percent(part.value)} ({interval_text(part)})"


def _number(part: Measure) -> str:
    return f"{number(part.value)} ({number(part.low)} to {number(part.high)})"
