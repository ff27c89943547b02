"""Tables of README and docs are what the benchmarks left, to the letter, and tell the version that was measured."""

import re
from pathlib import Path

import pytest

from finetune.config.recipe import recipe_keys

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
WRONG_ON_PURPOSE = "train.optimizer.learning_rate"
"""What the peers' conduct is tried with."""


def test_every_table_is_told_apart():
    assert len(MEASURED) >= 12
    assert {name for _, name, _ in TABLES} - {name for _, name, _ in MEASURED} == DRAWN_OTHERWISE


def test_keys_in_pages_scripts_and_messages_exist():
    """After a key was renamed the old name stands nowhere, but where it is refused and in the log of changes."""
    written = re.compile(
        r"\b((?:data|augment|head|regularization|train|evaluate|hardware|tracking)\.[a-z_][a-z_.]*)=(?![=\s])"
    )
    files = [*PAGES, *(path for part in ("benchmarks", "finetune", "recipes") for path in (ROOT / part).rglob("*.*"))]
    files = [
        path for path in files if path.suffix in (".py", ".md", ".yaml") and path.name not in ("LOG.md", "renamed.py")
    ]
    found = {(path.name, key) for path in files for key in written.findall(path.read_text(encoding="utf-8"))}
    assert len(found) > 100
    assert not sorted((name, key) for name, key in found if key not in {*recipe_keys(), WRONG_ON_PURPOSE})


@pytest.mark.parametrize(("page", "name", "text"), MEASURED, ids=[name for _, name, _ in MEASURED])
def test_a_table_is_what_its_benchmark_left(page, name, text):
    left = (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()
    version = r"Measured with version [0-9a-f]{7,} \(\d{4}-\d\d-\d\d\)\."
    assert re.fullmatch(rf"{re.escape(left)}\n\n{version}\n", text), (
        f"{page.name}: `python docs/readme.py` writes {name}"
    )
