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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image, ImageOps

from finetune.errors import FinetuneError, RunError
from finetune.recipe.runs import write_whole
from finetune.reporting import figures
from finetune.reporting.curve import curve_context
from finetune.reporting.decision import decision_context
from finetune.reporting.figures import Series, is_number, percent
from finetune.reporting.sentences import is_uneven
from finetune.reporting.verdict import judge, judged_role

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
    scores, facts, plan = (_read(run_folder, name) for name in ("scores.json", "facts.json", "plan.yaml"))
    environment = _read(run_folder, "environment.json", needed=False)
    predictions = _read_predictions(run_folder / "predictions.npz")
    role = judged_role(scores)
    classes = [str(name) for name in scores.get("classes") or facts.get("classes") or plan.get("classes") or ()]
    is_probe_only = not plan.get("stages") or (plan.get("train") or {}).get("strategy") == "probe"
    final, probe = scores.get(role) or {}, (scores.get("probe") or {}).get(role) or {}
    probabilities, labels, names = (predictions.get(f"{role}_{part}") for part in ("probabilities", "labels", "names"))
    bins, mistakes = [], []
    if probabilities is not None and labels is not None and names is not None:
        if probabilities.shape != (len(labels), len(classes)) or len(names) != len(labels):
            raise RunError(
                f"{run_folder}: predictions.npz holds {probabilities.shape} probabilities, {len(labels)} labels and "
                f"{len(names)} names for {len(classes)} classes; `finetune evaluate {run_folder}` writes it anew."
            )
        bins = figures.reliability_bins(probabilities, labels)
        mistakes = find_mistakes(probabilities, labels, names, classes)
    per_class = sorted(final.get("per_class") or (), key=lambda c: _value(c.get("recall"), missing=2.0))
    confusion = final.get("confusion") or []
    fits_matrix = 2 <= len(confusion) <= MAX_MATRIX_CLASSES and len(confusion) == len(classes)
    metrics = (*BALANCED, *(m for m in METRICS if m not in BALANCED)) if is_uneven(final) else METRICS
    return _template().render(
        figures=figures,
        run_name=run_folder.resolve().name,
        run_argument=shlex.quote(str(run_folder)),
        plan=plan,
        facts=facts,
        scores=scores,
        environment=environment,
        classes=classes,
        role=role,
        final=final,
        probe={} if is_probe_only else probe,
        is_probe_only=is_probe_only,
        verdict=judge(scores, is_probe_only=is_probe_only),
        strip=_draw_strip(final, None if is_probe_only else probe, facts),
        metrics=[m for m in metrics if is_number(_value(final.get(m[0]))) or is_number(_value(probe.get(m[0])))],
        per_class=per_class[:MAX_ROWS],
        num_hidden_classes=max(0, len(per_class) - MAX_ROWS),
        stage_keys=list(dict.fromkeys(key for stage in plan.get("stages") or () for key in stage if key != "name")),
        panels=draw_curves(run_folder / "curves.csv", is_taught=bool(facts.get("teacher"))),
        matrix=figures.confusion_matrix(confusion, classes) if fits_matrix else Markup(""),
        confused=confused_pairs(confusion, classes),
        reliability=figures.reliability_diagram(bins),
        mistakes=[{**mistake, "image": _thumbnail(mistake["name"], read_image)} for mistake in mistakes],
        decision=decision_context(facts, plan),
        curve=curve_context(facts.get("learning_curve") or {}),
        counts=count_rows(facts),
        max_rows=MAX_ROWS,
    )


def _draw_strip(final: Mapping[str, Any], probe: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> Markup:
    """The main score of the final model and of the probe, None where they are one; and what the largest class gives."""
    key = "balanced_accuracy" if is_uneven(final) else "top1"
    reference = next(
        ((n, facts[k]) for k, n in (("majority", "largest class"), ("chance", "chance")) if facts.get(k)), None
    )
    if is_uneven(final):
        reference = ("largest class", 1 / max(1, sum(1 for row in final["per_class"] if row["n"])))
    rows = [("probe" if probe is None else "final", final.get(key) or {})]
    rows += [] if probe is None else [("probe alone", probe.get(key) or {})]
    return figures.score_strip(rows, reference=reference)


def find_mistakes(
    probabilities: np.ndarray, labels: np.ndarray, names: np.ndarray, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """The wrong answers given with the highest probability, the surest first: name, truth, answer, probability."""
    if not len(labels):
        return []
    answer = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero((answer != labels) & np.isfinite(confidence))
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:NUM_THUMBNAILS]
    return [
        {
            "name": str(names[i]),
            "truth": classes[labels[i]],
            "answer": classes[answer[i]],
            "probability": float(confidence[i]),
        }
        for i in surest
    ]


def confused_pairs(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Off-diagonal cells from the fullest down: truth, answer, count, and n, the images of the true class."""
    if len(confusion) != len(classes):
        return []
    pairs: list[dict[str, Any]] = [
        {"truth": classes[row], "answer": classes[column], "count": count, "n": sum(line)}
        for row, line in enumerate(confusion)
        for column, count in enumerate(line)
        if count and row != column
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:20]


def count_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Images per class and role, in the order of the classes: name and one count per role."""
    counts = {role: row for role, row in (facts.get("counts") or {}).items() if row and any(row)}
    classes = facts.get("classes") or ()
    rows = [{role: row[i] for role, row in counts.items() if i < len(row)} for i in range(len(classes))]
    return [{"name": name, "counts": row} for name, row in zip(classes, rows, strict=True)] if counts else []


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
            panels.append(figures.line_panel(series, stages, title=title, **options))
    return [panel for panel in panels if panel]


def plain(value: object) -> str:
    """A value of a plan or an environment as a reader would write it; long ones are cut."""
    if value is None or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return figures.shorten(", ".join(plain(v) for v in value), 160) or "none"
    if isinstance(value, dict):  # a part of a plan goes by its name
        value = value.get("name") or json.dumps(value, ensure_ascii=False)
    text = str(value)
    return figures.shorten(text, 240)


def _read(folder: Path, name: str, *, needed: bool = True) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        if not needed:
            return {}
        raise RunError(
            f"{folder} has no {name}, so there is nothing to report yet; `finetune resume {folder}` goes on."
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as fault:
        raise RunError(f"{path} is damaged ({fault}); `finetune evaluate {folder}` writes scores anew.") from fault
    if not isinstance(content, dict):
        raise RunError(f"{path} should hold named values but holds {type(content).__name__}; was it edited by hand?")
    return content


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
    # chainable: a key that an older run folder lacks is shown as a dash, at any depth
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "plain": plain, "between": _between, "unbroken": _unbroken}
    environment.tests |= {"a_number": is_number}
    return environment.get_template("report.html.j2")


def _unbroken(text: str) -> str:
    return text.replace(" %", "\u00a0%")


def _between(score: object, *, shares: bool = True) -> str:
    if not (isinstance(score, Mapping) and is_number(score.get("low")) and is_number(score.get("high"))):
        return ""
    if shares:
        return f"{percent(score['low'], unit=False)}–{percent(score['high'], unit=False)}"
    return f"{score['low']:.3f}–{score['high']:.3f}"


def _value(score: object, *, missing: float = math.nan) -> float:
    value = score.get("value") if isinstance(score, Mapping) else None
    return float(value) if is_number(value) else missing  # type: ignore[arg-type]
