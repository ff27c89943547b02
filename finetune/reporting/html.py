"""One HTML page that says what a run did, how well, and why.

The page is a function of the run folder alone: no clock, no model, no torch, so it can be written again at
any time and comes out the same. It needs no script and no network. Sentences are made from numbers by pure
functions, so that the page never claims what an interval does not carry.
"""

import base64
import csv
import io
import json
import math
import shlex
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageOps

from finetune.config.facts import Facts
from finetune.config.measures import Measure
from finetune.config.plan import Stage
from finetune.config.scores import Difference, SplitScores
from finetune.errors import FinetuneError, RunError
from finetune.reporting import svg
from finetune.reporting.curve import curve_figure, curve_sentence
from finetune.reporting.decision import decide
from finetune.reporting.svg import Series, percent
from finetune.reporting.verdict import judge, judged_role, main_score
from finetune.reporting.wording import is_uneven
from finetune.runs.folder import RunFolder, write_whole

ReadImage = Callable[[str], bytes]
"""Gives the encoded bytes of an image by the name it has in predictions.npz."""

NUM_THUMBNAILS = 12
THUMBNAIL_PIXELS = 128
MAX_MATRIX_CLASSES = 20
MAX_ROWS = 40
"""Rows of a table that a reader still reads; above it we show the worst, and the page stays small."""
MAX_CURVE_POINTS = 300

BALANCED = (("balanced_accuracy", "Balanced accuracy", True), ("macro_f1", "Macro F1", True))
"""Rows of the table of scores that weight classes alike: where they are uneven, the first."""
METRICS = (
    ("top1", "Top-1 accuracy", True),
    ("top5", "Top-5 accuracy", True),
    *BALANCED,
    ("log_loss", "Log loss", False),
    ("ece", "Calibration error (ECE)", True),
)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A wrong answer."""

    name: str
    """Of the image."""
    truth: str
    answer: str
    probability: float
    image: str = ""
    """A small JPEG as a data address."""


@dataclass(frozen=True, kw_only=True)
class Confused:
    """How often one class was taken for another."""

    truth: str
    answer: str
    count: int
    n: int
    """Images of the true class."""


def write_report(run_folder: Path, *, read_image: ReadImage | None = None) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and say where.

    Args:
        run_folder: holds scores.json, facts.json and plan.yaml; curves.csv, predictions.npz and
            environment.json where there are any.
        read_image: for thumbnails of mistakes; None leaves them out, as does an image that cannot be read.

    Raises:
        RunError: if a needed file is missing, or one is damaged.
    """
    page = render_report(run_folder, read_image=read_image)
    target = run_folder / "report.html"
    written = page.encode("utf-8", "replace")  # a file name may hold bytes that are no UTF-8
    write_whole(target, lambda path: path.write_bytes(written))
    return target


def render_report(run_folder: Path, *, read_image: ReadImage | None = None) -> str:
    """The page as text; arguments and errors as in `write_report`."""
    run = RunFolder(run_folder)
    for name in ("scores.json", "facts.json", "plan.yaml"):
        run.existing(name)
    scores, facts, plan = run.scores, run.facts, run.plan
    role, is_probe_only = judged_role(scores), not plan.stages
    final, probe = scores.of(role), None if is_probe_only or scores.probe is None else scores.probe.of(role)
    bins, mistakes = _read_answers(run, role, scores.classes)
    per_class = sorted(final.per_class, key=lambda c: c.recall.value if c.recall else 2.0) if final else []
    confusion = (final and final.confusion) or ()
    fits_matrix = 2 <= len(confusion) <= MAX_MATRIX_CLASSES and len(confusion) == len(scores.classes)
    said = curve_sentence(facts.learning_curve).replace("->", "→")
    return _template().render(
        figures=svg,
        run_name=run_folder.resolve().name,
        run_argument=shlex.quote(str(run_folder)),
        plan=plan,
        facts=facts,
        scores=scores,
        environment=run.read_json("environment.json") if run.file("environment.json").exists() else {},
        classes=scores.classes,
        role=role,
        final=final,
        has_probe=probe is not None,
        is_probe_only=is_probe_only,
        verdict=judge(scores, is_probe_only=is_probe_only),
        strip=_draw_strip(final, probe, facts, is_probe_only=is_probe_only) if final else "",
        score_rows=score_rows(final, probe) if final else [],
        per_class=per_class[:MAX_ROWS],
        num_hidden_classes=max(0, len(per_class) - MAX_ROWS),
        stage_rows=stage_rows(plan.stages),
        panels=draw_curves(run_folder / "curves.csv", is_taught=facts.teacher is not None),
        matrix=svg.confusion_matrix(confusion, scores.classes) if fits_matrix else Markup(""),
        confused=confused_pairs(confusion, scores.classes),
        reliability=svg.reliability_diagram(bins),
        mistakes=[replace(mistake, image=_thumbnail(mistake.name, read_image)) for mistake in mistakes],
        decision=decide(facts, plan),
        curve_sentence=said[:1].upper() + said[1:],
        curve_figure=curve_figure(facts.learning_curve),
        roles=[role for role, row in facts.counts.items() if any(row)],
        max_rows=MAX_ROWS,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A line of the table of scores."""

    name: str
    final: Measure
    probe: Measure | None
    is_share: bool


def score_rows(final: SplitScores, probe: SplitScores | None) -> list[ScoreRow]:
    """The scores that were measured, what counts classes alike first where they are uneven."""
    metrics = (*BALANCED, *(m for m in METRICS if m not in BALANCED)) if is_uneven(final) else METRICS
    return [
        ScoreRow(name=name, final=own, probe=getattr(probe, key, None), is_share=is_share)
        for key, name, is_share in metrics
        if (own := getattr(final, key)) is not None
    ]


def stage_rows(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """What each stage decides, a line for each key, with its value in every stage in words."""
    dumped = [stage.model_dump(mode="json") for stage in stages]
    keys = [key for key in Stage.model_fields if key != "name"] if stages else []
    return [(key.replace("_", " "), [plain(stage[key]) for stage in dumped]) for key in keys]


def _draw_strip(final: SplitScores, probe: SplitScores | None, facts: Facts, *, is_probe_only: bool) -> Markup:
    """The main score of the final model, and of the probe where that is another; and what the largest class gives."""
    reference = ("largest class", facts.majority) if facts.majority else ("chance", facts.chance)
    if is_uneven(final):
        reference = ("largest class", 1 / max(1, sum(1 for row in final.per_class if row.n)))
    rows = [("probe" if is_probe_only else "final", main_score(final))]
    if probe is not None:
        rows.append(("probe alone", probe.balanced_accuracy if is_uneven(final) else probe.top1))
    return svg.score_strip(rows, reference=reference)


def _read_answers(run: RunFolder, role: str, classes: Sequence[str]) -> tuple[list[svg.Bin], list[Mistake]]:
    """Bins of confidence and the surest mistakes, from the stored predictions; none without them."""
    predictions = _read_predictions(run.file("predictions.npz"))
    probabilities, labels, names = (predictions.get(f"{role}_{part}") for part in ("probabilities", "labels", "names"))
    if probabilities is None or labels is None or names is None:
        return [], []
    if probabilities.shape != (len(labels), len(classes)) or len(names) != len(labels):
        raise RunError(
            f"{run.path}: predictions.npz holds {probabilities.shape} probabilities, {len(labels)} labels and "
            f"{len(names)} names for {len(classes)} classes; `finetune evaluate {run.path}` writes it anew."
        )
    return svg.reliability_bins(probabilities, labels), find_mistakes(probabilities, labels, names, classes)


def find_mistakes(
    probabilities: np.ndarray, labels: np.ndarray, names: np.ndarray, classes: Sequence[str]
) -> list[Mistake]:
    """The wrong answers given with the highest probability, the surest first."""
    if not len(labels):
        return []
    answer = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero((answer != labels) & np.isfinite(confidence))
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:NUM_THUMBNAILS]
    return [
        Mistake(
            name=str(names[i]), truth=classes[labels[i]], answer=classes[answer[i]], probability=float(confidence[i])
        )
        for i in surest
    ]


def confused_pairs(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[Confused]:
    """Off-diagonal cells from the fullest down."""
    if len(confusion) != len(classes):
        return []
    pairs = [
        Confused(truth=classes[row], answer=classes[column], count=count, n=sum(line))
        for row, line in enumerate(confusion)
        for column, count in enumerate(line)
        if count and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:20]


def draw_curves(path: Path, *, is_taught: bool = False) -> list[Markup]:
    """The panels for which `curves.csv` holds values, none without it; `is_taught`: train loss is a teacher's too."""
    measured, stages = _read_curves(path)
    rates = {name: name.removeprefix("lr/") for name in measured if name.startswith("lr/")}
    wanted: tuple[tuple[str, dict[str, str], dict[str, bool]], ...] = (
        (f"Loss{' (train: labels and teacher)' * is_taught}", {"train/loss": "train", "val/loss": "val"}, {}),
        ("Top-1 accuracy", {"train/top1": "train", "val/top1": "val"}, {"shares": True}),
        ("Learning rate", rates, {"log": True}),
        ("Gradient norm", {"gradient_norm": "all parameters"}, {"log": True}),
        ("Images per second", {"images_per_second": "training"}, {}),
    )
    panels = []
    for title, names, options in wanted:
        series = [Series(name=shown, points=_thin(measured[name])) for name, shown in names.items() if name in measured]
        if series:
            panels.append(svg.line_panel(series, stages, title=title, **options))
    return [panel for panel in panels if panel]


def plain(value: object) -> str:
    """A value of a plan or an environment as a reader would write it; long ones are cut."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return svg.shorten(", ".join(plain(v) for v in value), 160) or "none"
    if isinstance(value, dict):  # a part of a plan goes by its name
        value = value.get("name") or json.dumps(value, ensure_ascii=False)
    text = str(value)
    return svg.shorten(text, 240)


def _read_predictions(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {n: stored[n] for n in stored.files if n.startswith(("test_", "val_")) and "_view_" not in n}
    except (ValueError, EOFError, zipfile.BadZipFile) as fault:
        raise RunError(f"{path} is damaged ({fault}); `finetune evaluate {path.parent}` writes it anew.") from fault


def _read_curves(path: Path) -> tuple[dict[str, tuple[tuple[str, float, float], ...]], list[tuple[str, float, float]]]:
    """Measured points by name, and (stage, first step, last step); of rows written twice the later one counts."""
    found: dict[str, dict[tuple[str, float], float]] = {}
    spans: dict[str, tuple[float, float]] = {}
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))) if path.is_file() else ()
    for row in rows:
        try:
            stage, step, value = str(row["stage"]), float(row["step"]), float(row["value"])
        except (KeyError, TypeError, ValueError):
            continue  # the last row of a run that was killed may be torn
        if math.isfinite(step) and math.isfinite(value):
            found.setdefault(row["name"], {})[stage, step] = value
            first, last = spans.get(stage, (step, step))
            spans[stage] = min(first, step), max(last, step)
    ordered = sorted(spans.items(), key=lambda item: item[1])
    measured = {
        name: tuple(sorted(((stage, step, v) for (stage, step), v in values.items()), key=lambda p: p[1]))
        for name, values in found.items()
    }
    return measured, [(stage, *span) for stage, span in ordered]


def _thin(line: tuple[tuple[str, float, float], ...]) -> tuple[tuple[str, float, float], ...]:
    """At most MAX_CURVE_POINTS points, each the mean of its neighbours within one stage."""
    size = math.ceil(len(line) / MAX_CURVE_POINTS)
    if size <= 1:
        return line
    thinned = []
    for stage in dict.fromkeys(name for name, _, _ in line):
        own = [(step, value) for name, step, value in line if name == stage]
        for start in range(0, len(own), size):
            steps, values = zip(*own[start : start + size], strict=True)
            thinned.append((stage, steps[-1], math.fsum(values) / len(values)))
    return tuple(thinned)


def _thumbnail(name: str, read_image: ReadImage | None) -> str:
    """A small JPEG as a data address, or nothing where the image cannot be had."""
    if read_image is None:
        return ""
    try:
        with Image.open(io.BytesIO(read_image(name))) as opened:
            opened.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to white
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, LookupError, FinetuneError, Image.DecompressionBombError):
        return ""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    paper = Image.new("RGBA", image.size, "white")
    stream = io.BytesIO()
    Image.alpha_composite(paper, image).convert("RGB").save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "plain": plain, "between": _between, "unbroken": _unbroken}
    return environment.get_template("report.html.j2")


def _unbroken(text: str) -> str:
    return text.replace(" %", "\u00a0%")


def _between(score: Measure | Difference, *, shares: bool = True) -> str:
    if shares:
        return f"{percent(score.low, unit=False)}–{percent(score.high, unit=False)}"
    return f"{score.low:.3f}–{score.high:.3f}"
