"""Tables of README and docs are what the benchmarks left, to the letter, and tell the version that was measured."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = [
    (page, *found.groups())
    for page in PAGES
    for found in re.finditer(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", page.read_text(encoding="utf-8"), re.DOTALL)
]
MEASURED = [(page, name, text) for page, name, text in TABLES if (RESULTS / f"{name}.md").exists()]
DRAWN_OTHERWISE = {"demo", "plan", "rank", "recipes", "speed", "peers"}
"""Output of commands, headers of recipes, and tables that are put together from several files."""


def test_every_table_is_told_apart():
    assert len(MEASURED) >= 12
    assert {name for _, name, _ in TABLES} - {name for _, name, _ in MEASURED} == DRAWN_OTHERWISE


@pytest.mark.parametrize(("page", "name", "text"), MEASURED, ids=[name for _, name, _ in MEASURED])
def test_a_table_is_what_its_benchmark_left(page, name, text):
    left = (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
    version = r"Measured with version [0-9a-f]{7,} \(\d{4}-\d\d-\d\d\)\."
    assert re.fullmatch(rf"{re.escape(left)}\n\n{version}\n", text), (
        f"{page.name}: `python docs/readme.py` writes {name}"
    )
