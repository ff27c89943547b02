"""A comparison of runs as plain text for a terminal, 100 columns wide."""

import textwrap
from collections.abc import Mapping, Sequence

from finetune.config.comparison import ComparedRun, Comparison, GroupPair, RunPair, SeedGroup
from finetune.config.measures import Measure
from finetune.reporting.text import WIDTH, percent

MOST_PAIRS = 20
"""Pairs that are told; those of the run with the highest accuracy come first."""


def comparison_text(found: Comparison) -> str:
    """What `compare` found: the table of runs, the pairs, the seeds, and what to mind.

    Runs are numbered in the order of the table, and only the table spells their names out.
    """
    numbers = {row.run: place for place, row in enumerate(found.runs, 1)}
    lines = ["Runs on test images, the highest accuracy first (95 % intervals)"]
    for row in found.runs:
        lines += _run_lines(row, numbers[row.run])
    if found.pairs:
        lines.append("Pairs, on the test images they share")
    for pair in found.pairs[:MOST_PAIRS]:
        lines += _pair_lines(pair, numbers)
    if (more := len(found.pairs) - MOST_PAIRS) > 0:
        lines.append(f"  and {more} more pairs of runs lower in the table, which the JSON holds")
    if found.seed_groups:
        lines.append("Seeds, where nothing else differs")
    for place, group in enumerate(found.seed_groups, 1):
        lines += _group_lines(group, f"S{place}", numbers)
    for two in found.group_pairs:
        lines += _group_pair_lines(two)
    for note in found.notes:
        lines += _wrapped("note: " + _numbered(note, numbers), indent=2, hang=8)
    return "\n".join(lines)


def _run_lines(row: ComparedRun, number: int) -> list[str]:
    told = (
        f"top-1 {percent(row.top1)}; log loss {_plain(row.log_loss)}; seed {row.seed}, {row.strategy}, {row.views} view"
    )
    return [*_wrapped(f"{number:>2}  {row.run}", indent=1, hang=5), *_wrapped(told, indent=5, hang=5)]


def _pair_lines(pair: RunPair, numbers: Mapping[str, int]) -> list[str]:
    names = f"{numbers[pair.first]} - {numbers[pair.second]}"
    one, two = names.split(" - ")
    p = f"p {_p(pair.p)}"
    if pair.p_adjusted != pair.p:
        p += f" (all pairs: {_p(pair.p_adjusted).removeprefix('= ')})"
    told = (
        f"{percent(pair.difference, signed=True)}; only {one} right: {pair.only_first_right}, only {two}: "
        f"{pair.only_second_right}; {p}; log loss {_plain(pair.log_loss_difference, signed=True)}"
    )
    said = pair.sentence.replace("the first", one).replace("the second", two)
    return [*_wrapped(f"{names:<7}  {told}", indent=2, hang=11), *_wrapped(said, indent=11, hang=11)]


def _group_lines(group: SeedGroup, name: str, numbers: Mapping[str, int]) -> Sequence[str]:
    runs, top1, loss = ", ".join(str(numbers[label]) for label in group.runs), group.top1, group.log_loss
    spread, low, high, of_loss = (part or 0.0 for part in (top1.spread, top1.low, top1.high, loss.spread))
    told = (
        f"{name}  runs {runs}: top-1 {100 * top1.mean:.1f} %, spread {100 * spread:.1f} points, mean in "
        f"[{100 * low:.1f}, {100 * high:.1f}]; log loss {loss.mean:.3f}, spread {of_loss:.3f}"
    )
    told += "" if group.same_images else "; each seed has test images of its own"
    return _wrapped(told, indent=2, hang=6)


def _group_pair_lines(pair: GroupPair) -> Sequence[str]:
    one, two, gap = f"S{pair.first}", f"S{pair.second}", pair.difference
    value, low, high = 100 * gap.mean, 100 * (gap.low or 0.0), 100 * (gap.high or 0.0)
    said = pair.sentence.replace("the first", one).replace("the second", two)
    told = f"{one} - {two}  {value:+.1f} points [{low:+.1f}, {high:+.1f}] over {gap.n} seeds: {said}"
    return _wrapped(told, indent=2, hang=11)


def _numbered(text: str, numbers: Mapping[str, int]) -> str:
    for name in sorted(numbers, key=len, reverse=True):  # one name may begin another
        text = text.replace(name, f"run {numbers[name]}")
    return text


def _plain(part: Measure, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{end:{sign}.3f}" for end in (part.value, part.low, part.high))
    return f"{value} [{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"


def _wrapped(text: str, *, indent: int, hang: int) -> Sequence[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * hang)
