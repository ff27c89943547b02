"""The ledger: what a run folder holds that MLflow should know, and how much of it was sent."""

import csv
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config.addresses import hide_logins
from finetune.config.measures import Measure
from finetune.config.scores import Scores
from finetune.runs.folder import write_whole

ARTIFACTS = ("report.html", "plan.yaml", "scores.json", "facts.json", "curves.csv")
"""Files that MLflow gets."""


@dataclass(kw_only=True)
class SentState:
    """`tracking.json`: how far the follower came."""

    uri: str
    experiment: str
    run_name: str
    tags: dict[str, str]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the MLflow run, by which it is found if we were killed before we learned its id."""
    mlflow_run_id: str | None = None
    replaced: list[str] = field(default_factory=list)
    """MLflow runs whose rows were taken back, to be ended."""
    sent_rows: int = 0
    told_rows: int = 0
    """Rows that MLflow has or may have: `sent_rows` and those under way."""
    told_chain: str = ""
    """The chain of the last of them; where the file holds another one, they were taken back."""
    sent_stages: list[str] = field(default_factory=list)
    chunk_times_ms: list[int] = field(default_factory=list)
    """Times of the rows after `sent_rows`, which may or may not have arrived."""
    sent_params: bool = False
    sent_scores: bool = False
    artifacts_sent: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    ended_ms: int | None = None
    finished: bool = False

    @classmethod
    def load(cls, path: Path) -> "SentState | None":
        """The state in the file `path`, or None."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{known.name: raw[known.name] for known in fields(cls) if known.name in raw})
        except (FileNotFoundError, ValueError, TypeError):  # written atomically: only a hand can damage it
            return None

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        text = json.dumps(asdict(self), indent=1)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class CurveRow(NamedTuple):
    """One value of curves.csv."""

    number: int
    chain: str
    """A digest of this row and all before it."""
    stage: str
    epoch: float
    step: int
    name: str
    value: float
    time_ms: int


class CurveReader:
    """The rows of a growing curves.csv; a last line without its newline is not a row yet."""

    def __init__(self, folder: Path) -> None:
        self._path, self._inode = folder / "curves.csv", 0
        self._start()

    def _start(self) -> None:
        self._offset, self.count, self._chain = 0, 0, ""

    def new_rows(self, limit: float = math.inf) -> Iterator[CurveRow]:
        """Rows since the last call, in the first `limit` bytes; from the first on if the file was written anew."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self._start()
            self._inode = facts.st_ino
            file.seek(self._offset)
            block = file.read(max(0, int(min(limit, facts.st_size)) - self._offset))
        block = block[: block.rfind(b"\n") + 1]
        is_top, self._offset = self._offset == 0, self._offset + len(block)
        time_ms = facts.st_mtime_ns // 1_000_000
        for line in block.decode(errors="replace").splitlines()[is_top:]:
            number, self.count = self.count, self.count + 1
            self._chain = hashlib.sha256(f"{self._chain}{line}".encode()).hexdigest()[:16]
            with suppress(ValueError):  # a row we cannot plot; it counts all the same
                stage, epoch, step, name, value = next(csv.reader([line]), [])
                where = (number, self._chain, stage, float(epoch), int(step))
                yield CurveRow(*where, clean_name(name), float(value), time_ms)


def best_values(rows: list[CurveRow]) -> list[tuple[str, float, int]]:
    """Name, value and step of the best validation figures; the epoch counts within its stage."""
    best: dict[str, tuple[str, float, int]] = {}
    for curve, sign, name in (("val/loss", -1, "best/val_loss"), ("val/top1", 1, "best/val_top1")):
        if seen := [row for row in rows if row.name == curve and math.isfinite(row.value)]:
            row = max(seen, key=lambda row: sign * row.value)
            best[name], best["best/epoch"] = (name, row.value, row.step), ("best/epoch", row.epoch, row.step)
    return list(best.values())


def final_values(scores: Scores) -> Iterator[tuple[str, float]]:
    """The scalars of the scores; those of val are `final/val/...`, since `val/top1` names a curve."""
    blocks = {"test": scores.test, "final/val": scores.val}
    if scores.probe is not None:
        blocks |= {f"probe/{role}": scores.probe.of(role) for role in ("val", "test")}
    for prefix, block in blocks.items():
        if block is None:
            continue
        if block.majority is not None:
            yield f"{prefix}/majority", block.majority
        for name in ("balanced_accuracy", "macro_f1", "top1", "top5", "log_loss", "ece"):
            measure: Measure | None = getattr(block, name)
            if measure is not None:
                yield f"{prefix}/{name}", measure.value
                yield from ((f"{prefix}/{name}_{end}", getattr(measure, end)) for end in ("low", "high"))


def flatten_plan(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings, and the stages by number, as one, with dots in the names; all else but strings as JSON."""
    if prefix == "stages":
        value = {str(number): stage for number, stage in enumerate(value)}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten_plan(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        yield clean_name(prefix), hide_logins(text)


def clean_name(text: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^/\w.\- ]", "_", text)[:250]


def cut_text(text: str, limit: int) -> str:
    """At most `limit` characters, of which the last third is the end: errors tell their cause there."""
    return text if len(text) <= limit else text[: limit - limit // 3 - 1] + "…" + text[-(limit // 3) :]


def file_digest(path: Path) -> str:
    """Sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_rows(folder: Path, limit: float = math.inf) -> int:
    """Whole rows in the first `limit` bytes of the curves."""
    curves = CurveReader(folder)
    list(curves.new_rows(limit))
    return curves.count


def artifact_digests(folder: Path) -> list[tuple[str, str]]:
    """Name and digest of every artifact that is there."""
    return [(name, file_digest(folder / name)) for name in ARTIFACTS if (folder / name).exists()]
