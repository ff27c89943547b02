"""What was measured before the decision, in sentences, from `facts.json` as it was read.

Shared by the page and the terminal. A measure that is not there gives no sentence.
"""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.imbalance import hides_classes
from finetune.reporting.figures import interval_text, is_number, percent, points, shorten

Part = Mapping[str, Any]
Baseline = tuple[str, float]
"""A name and an accuracy that nothing need be learned for."""

MAX_NAMED = 5
"""Source classes and pairs of mirrored classes told by name; so are classes that were not found."""


def earlier_depth(profile: Part) -> int | None:
    """The best depth where it leads the top by more than one standard error, as `ProfileFacts.earlier`."""
    best, lead, error = (profile.get(key) for key in ("best", "lead", "lead_error"))
    if not isinstance(best, int) or not (is_number(lead) and is_number(error)):
        return None
    return best if best < len(profile.get("depths") or ()) - 1 and lead > error else None  # type: ignore[operator]


def baseline(facts: Part) -> Baseline | None:
    """What needs no look at the images: guessing evenly or, where classes are uneven, always naming the largest one."""
    counts = facts.get("counts") or {}
    name, key = "chance", "chance"
    if any(hides_classes(counts.get(role) or ()) for role in ("train", "val")):
        name, key = "always naming the largest class", "majority"
    return (name, float(facts[key])) if is_number(facts.get(key)) else None


def is_uneven(score: Part) -> bool:
    """Whether the images of one entry of `scores.json` are spread so unevenly that shares of all of them mislead."""
    return bool(score.get("balanced_accuracy")) and hides_classes([row["n"] for row in score.get("per_class") or ()])


def majority_sentence(score: Part) -> str:
    """What always naming the largest class would give on the same images; nothing where they are spread evenly."""
    if not is_uneven(score):
        return ""
    rows = [row for row in score["per_class"] if row["n"]]
    largest = max(rows, key=lambda row: row["n"])
    name, share = shorten(str(largest["name"]), 40), largest["n"] / sum(row["n"] for row in rows)
    alike = f", and balanced accuracy {percent(1 / len(rows))}" if len(rows) > 1 else ""
    return f"always naming {name}, the largest class, would give top-1 {percent(share)}{alike}"


def lost_classes(score: Part) -> str:
    """Classes that were found no better than by chance: other images were called so as often as theirs might be."""
    table, told = score.get("confusion") or [], []
    for place, row in enumerate(score.get("per_class") or ()):
        if not row.get("n") or not row.get("recall") or len(table) <= place:
            continue
        called = sum(line[place] for line in table) - table[place][place]
        others = sum(map(sum, table)) - row["n"]
        if others and row["recall"]["low"] <= called / others:
            name = shorten(str(row["name"]), 40)
            told.append(f"{name} ({table[place][place]} of {row['n']}, and {called} of {others} others were called so)")
    if not told:
        return ""
    more = f" and {len(told) - MAX_NAMED} classes more" if len(told) > MAX_NAMED else ""
    return f"found no better than by chance: {', '.join(told[:MAX_NAMED])}{more}"


def depth_sentence(profile: Part) -> str:
    """What the profile says of earlier stages, and on how many images."""
    depths, best, lead = profile.get("depths") or (), profile.get("best"), profile.get("lead")
    if not isinstance(best, int) or not 0 <= best < len(depths):
        return ""
    count = profile.get("num_images")
    sample = f" Measured on {count:,} training images" if isinstance(count, int) else " Measured"
    judge = {"val": "on val"}.get(str(profile.get("judged")), f"by {profile.get('judged')}")
    sample += f", the logistic probe judged {judge}."
    stage, top = (shorten(str(depths[i].get("stage")), 40) for i in (best, -1))
    if len(depths) == 1:
        return f"There is one depth, {stage}.{sample}"
    if best == len(depths) - 1 or not (is_number(lead) and is_number(profile.get("lead_error"))):
        return f"{stage} tells most of the classes{', and it is the top' if best == len(depths) - 1 else ''}.{sample}"
    by = f"leads {top}, the top, by {points(float(lead or 0), signed=False)} points"
    error = f"(standard error {points(float(profile['lead_error']), signed=False)})"
    if earlier_depth(profile) is None:
        return f"{stage} {by} {error}, too little to tell from chance: the top serves as well.{sample}"
    return f"{stage} {by} {error}: these classes are told better by earlier features than by the last.{sample}"


def measure_rows(facts: Part) -> list[tuple[str, str]]:
    """Name and words of each measure of similarity."""
    similarity = facts.get("similarity") or {}
    rows = []
    if is_number(similarity.get("value")):
        value = f"{similarity['value']:.2f}{_span(similarity)}"
        rows.append(("Similarity", f"{value}; 1: as the images of pretraining, 0: unlike them"))
    if probe := _share((facts.get("probe") or {}).get("val")):
        beside = baseline(facts)
        told = f"; {beside[0]} {'is' if beside[0] == 'chance' else 'gives'} {percent(beside[1])}" if beside else ""
        rows.append(("Separability", f"A linear probe gets {probe} of the val images right{told}"))
    if control := _share(similarity.get("control")):
        rows.append(("Random weights", f"On features of the same network, untrained, a probe gets {control} right"))
    rows += _shift_row(similarity.get("shift") or ())
    rows += _response_rows(similarity.get("response") or {})
    if is_number(similarity.get("frechet")):
        words = f"{number(similarity['frechet'])} from the source's images, in units of their spread (Fréchet)"
        rows.append(("Distance", words))
    if is_number(similarity.get("emd")):
        rows.append(("Earth mover", f"{similarity['emd']:.2f} similar to the source's classes, where 1 is the same"))
    return rows


def chirality_sentence(chirality: Part) -> str:
    """Whether mirroring shows, and which classes are each other's mirror image."""
    share, told = chirality.get("share") or {}, _share(chirality.get("share"))
    if not told:
        return ""
    measured = f"the original was named in {told} of {share.get('n', 0):,} pairs, where 50 % is guessing"
    verdict = {
        True: f"Mirroring goes unnoticed: {measured}.",
        False: f"Mirroring shows: {measured}.",
        None: f"Whether mirroring shows cannot be said yet: {measured}.",
    }[chirality.get("is_safe")]
    if chirality.get("is_safe") is False and is_number(share.get("low")) and share["low"] <= 0.5:
        verdict = f"The images show no side: {measured}."  # the names of the classes do
    pairs = [f"{shorten(str(a), 40)} and {shorten(str(b), 40)}" for a, b in chirality.get("sided") or ()]
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


def _shift_row(shift: Any) -> list[tuple[str, str]]:
    known = [part for part in shift if is_number((part.get("mean") or {}).get("value"))]
    if not known:
        return []
    most = max(known, key=lambda part: part["mean"]["value"])
    stage, mean = shorten(str(most.get("stage")), 40), most["mean"]
    words = f"Channel means move most in {stage}: squared, by {number(mean['value'])}{_span(mean)} running variances"
    return [("Batch norm", words)]


def _response_rows(response: Part) -> list[tuple[str, str]]:
    effective = response.get("effective") or {}
    if not is_number(effective.get("value")):
        return []
    of = f" of {count:,}" if isinstance(count := response.get("num_classes"), int) else ""
    words = f"The source classifier spreads the images over {number(effective['value'])}{_span(effective)}{of}"
    most = (response.get("named") or ())[:MAX_NAMED]
    named = [f"{shorten(str(name), 40)} ({percent(share)})" for name, share in most]
    return [("Source classes", words + (f"; most often {', '.join(named)}" if named else ""))]


def _share(part: Any) -> str:
    if not (isinstance(part, Mapping) and is_number(part.get("value"))):
        return ""
    has_ends = is_number(part.get("low")) and is_number(part.get("high"))
    return percent(part["value"]) + (f" ({interval_text(part)})" if has_ends else "")


def _span(part: Part) -> str:
    if not (is_number(part.get("low")) and is_number(part.get("high"))):
        return ""
    return f" ({number(part['low'])} to {number(part['high'])})"
