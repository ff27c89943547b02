"""A ranking of backbones as plain text for a terminal, 100 columns wide."""

import textwrap
from collections.abc import Sequence

from finetune.config.facts import Ranking, RankRow

WIDTH = 100
NAMED = 3
"""Classes of which it is told what a source classifier takes them for."""
_LONGEST = 34
"""Columns of a backbone's name."""


def ranking_text(ranking: Ranking) -> str:
    """Fit, cost and what is known of each, best first, then what is chosen and why."""
    size = f"all at {ranking.image_size} px, as data.image_size says" if ranking.image_size else "each at its own size"
    classes = f"{ranking.num_images:,} training images of {len(ranking.classes)} classes"
    lines = [f"Ranking of {len(ranking.rows)} backbones on {classes}, {size}", ""]
    lines += [*_fits(ranking.rows), "", *_costs(ranking.rows), ""]
    said = [line for row in ranking.rows for line in _source_says(row)]
    lines += ["What their source classifiers take the images for", *said, ""] if said else []
    if ranking.agreement:
        lines += [*_wrapped(_agreement(ranking)), ""]
    for one in ranking.unranked:
        lines += _wrapped(f"Not ranked: {one.name}: {one.reason}")
    for warning in ranking.warnings:
        lines += _wrapped(f"Warning: {warning}")
    return "\n".join([*lines, *_wrapped(ranking.why)])


def _agreement(ranking: Ranking) -> str:
    own = [f"{b} {value:+.2f}" for a, b, value in ranking.agreement if a == "probe"]
    others = sorted((value, f"{a} and {b}") for a, b, value in ranking.agreement if a != "probe")
    said = f"Agreement, as rank correlation over {len(ranking.rows)}:"
    said += f" with the probe {', '.join(own)};" if own else ""
    if others:
        (least, pair), (most, other) = others[0], others[-1]
        said += f" among the rest {least:+.2f} ({pair}) to {most:+.2f} ({other})."
    return said.rstrip(";.") + "."


def _fits(rows: Sequence[RankRow]) -> list[str]:
    has_ties = sum(row.is_tied for row in rows) > 1
    cells = [("backbone", "probe [95 %]", "k-NN", "LogME", "H-score", "LEEP", "NCE")]
    for row in rows:
        probe, low, high = (100 * value for value in (row.probe.value, row.probe.low, row.probe.high))
        mark = "=" if has_ties and row.is_tied else ""
        cells.append((
            _cut(row.name),
            f"{mark}{probe:.1f} [{low:.1f}, {high:.1f}]",
            f"{100 * row.neighbours.value:.1f}",
            f"{row.logme:.3f}",
            f"{row.h_score:.3f}",
            _number(row.leep, 3),
            _number(row.nce, 3),
        ))  # fmt: skip
    notes = ["probe and k-NN in %; higher is better in all."]
    if has_ties:
        notes.append("=: the probe cannot be told from the best.")
    if any(row.leep is None for row in rows):
        notes.append("n/a: no source classifier.")
    return [*_table(cells), *textwrap.wrap(" ".join(notes), WIDTH - 2, initial_indent="  ", subsequent_indent="  ")]


def _costs(rows: Sequence[RankRow]) -> list[str]:
    cells = [("backbone", "ms/image", "MB", "M par.", "px", "source top-1", "licence", "pretrained on")]
    cells += [
        (
            _cut(row.name),
            f"{row.milliseconds:.1f}",
            f"{row.megabytes:.1f}",
            f"{row.params_m:.2f}",
            f"{row.image_size}",
            "n/a" if row.top1 is None else f"{row.top1:.1f} %",
            _cut(row.licence, 12),
            _cut(row.pretrained_on, 20),
        )
        for row in rows
    ]
    return _table(cells, left=(0, 6, 7))


def _source_says(row: RankRow) -> list[str]:
    lines = []
    if row.response is not None:
        effective, count = row.response.effective.value, row.response.num_classes
        parts = [f"{own}: {_cut(source, 44)} ({100 * share:.0f} %)" for own, source, share in row.taken_for[:NAMED]]
        more = " ..." if len(row.taken_for) > NAMED else ""
        surely = f"{100 * row.response.confidence.value:.0f} % sure"
        lines = _wrapped(
            f"{row.name}: {effective:.0f} of {count:,} classes, {surely}; {'; '.join(parts)}{more}", indent="  "
        )
    if row.frechet is not None or row.emd is not None:
        said = f"{row.name}: distance from its source's images {_number(row.frechet, 2)} (Frechet), "
        said += f"similarity of classes {_number(row.emd, 2)} (earth mover, 1 is the same)"
        if row.source_size != row.image_size:
            said += f"; its source was seen at {row.source_size} px, and the change of size counts, too"
        lines += _wrapped(said, indent="  ")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _table(cells: Sequence[tuple[str, ...]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        ("  " + "  ".join(f"{cell:<{w}}" if k in left else f"{cell:>{w}}" for k, (cell, w) in enumerate(
            zip(row, widths, strict=True)))).rstrip()
        for row in cells
    ]  # fmt: skip


def _cut(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " if indent else "")
