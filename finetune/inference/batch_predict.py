"""Serving: class, probability and prediction set of new images, as a stream that never holds many at once."""

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image

from finetune.config.scores import Scores
from finetune.data.decoding import BadImage, ImageFacts
from finetune.data.formats import IMAGE_SUFFIXES
from finetune.data.frames import frames_of
from finetune.data.held import Held, hold
from finetune.data.items import Item
from finetune.data.tables import write_parquet
from finetune.data.walking import Left, image_files, is_hidden
from finetune.errors import DataError, RecipeError, RunError, names_beside, nearest
from finetune.inference.loading import load_final
from finetune.inference.notes import note_on, sum_up
from finetune.inference.predict import temper
from finetune.inference.tta import average_views
from finetune.inference.tta_views import AnyViewer, open_viewer
from finetune.inference.whole_model import hand_network
from finetune.metrics.conformal import prediction_set
from finetune.models.own import Model
from finetune.process import as_guest
from finetune.runs.folder import RunFolder, write_whole

FORMATS = ("csv", "jsonl", "parquet")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one image; `fault` instead where the image cannot be read."""

    name: str
    label: str | None
    probability: float | None
    """Of `label`, after temperature scaling."""
    probabilities: dict[str, float]
    """Of every class; where only the likeliest were asked for, of those, the likeliest first."""
    labels: tuple[str, ...] | None = None
    """The prediction set, the likeliest first; it may be empty. None where no coverage was asked for."""
    fault: str | None = None
    note: str | None = None
    """What to know of how the image was read, such as values that were clipped."""


_KINDS = {"name": "text", "label": "text", "probability": "number", "probabilities": "numbers"}
_KINDS |= {"labels": "texts", "fault": "text", "note": "text"}


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """How a row of probabilities becomes a prediction."""

    classes: tuple[str, ...]
    temperature: float
    average: str
    top_k: int | None
    threshold: float | None
    has_learned_deep: bool
    """Whether the run learned from images of more than 8 bits per channel, or was told their range."""


Picture = str | PathLike[str] | Image.Image | np.ndarray | torch.Tensor


@as_guest()
def predict(
    run: str | PathLike[str], images: Picture | Iterable[Picture], *, model: Model | None = None
) -> list[Prediction]:
    """Predictions for images: files, the images in folders in the order of their names, and images in memory.

    Args:
        run: a finished run, or its folder.
        images: one or several paths, Pillow images, arrays (H, W, 3) or (H, W), or tensors (3, H, W), in uint8.
        model: the network that the run was begun with, where it was handed in; its weights do not matter.

    Raises:
        DataError: if a path does not exist or no image is found.
        TypeError: if one of `images` is none.
        ValueError: if an array or tensor is of another shape or kind.
    """
    several = [images] if isinstance(images, str | PathLike | Image.Image | np.ndarray | torch.Tensor) else images
    found: list[Path | Held] = []
    for number, one in enumerate(several):
        if isinstance(one, str | PathLike):
            found += find_images([Path(one).expanduser()])
        else:
            found.append(hold(one, f"image {number}"))
    if not found:
        raise DataError("no images were given.")
    opened = RunFolder.open(run)
    if model is not None:
        hand_network(opened, model)
    return list(predict_stream(opened, found))


def predict_stream(
    run: RunFolder, names: Iterable[str | Path | Held], *, top_k: int | None = None, coverage: float | None = None
) -> Iterator[Prediction]:
    """Predictions one by one, in the order of `names`; names are taken, and images read, as they are needed.

    An image that cannot be read is told in its place, and the others are predicted. A run that took every frame of a
    file for an image answers once for a file, with the mean of the probabilities of its frames. A prediction set holds
    the true class with probability `coverage`, on average over images like those the run was calibrated on
    (Angelopoulos and Bates, 2021, https://arxiv.org/abs/2107.07511).

    Args:
        run: judged already.
        names: as in `expand_names`, or images in memory.
        top_k: how many of the likeliest classes to tell; None: all.
        coverage: of the prediction sets, the one the run was judged with; None: no sets.

    Raises:
        RecipeError: if `top_k` is below 1.
        RunError: if the run was not judged, or not with this coverage.
        BackboneError: if the run's backbone is not at hand.
    """
    if top_k is not None and top_k < 1:
        raise RecipeError(f"top_k is {top_k}; at least one class must be told.")
    plan, scores = run.plan, run.scores
    wish = _Wish(
        classes=plan.classes,
        temperature=scores.temperature_value,
        average=plan.evaluate.average,
        top_k=top_k,
        threshold=None if coverage is None else _threshold(run, scores, coverage),
        has_learned_deep=run.facts.value_range is not None,
    )
    return _stream(open_viewer(load_final(run), plan, scores.views), names, wish)


def _threshold(run: RunFolder, scores: Scores, coverage: float) -> float:
    known, path = scores.conformal, run.file("scores.json")
    if known is None:
        raise RunError(
            f"{path} has no conformal threshold, so no set can promise to cover {coverage:g}. `finetune evaluate "
            f"{run.path}` finds one if the run has calibration images; or ask for no coverage."
        )
    if abs(known.coverage - coverage) > 1e-9:
        raise RunError(
            f"{path} has the threshold of sets that cover {known.coverage:g} of images, and {coverage:g} is asked "
            f"for. Ask for {known.coverage:g}; another is chosen by evaluate.coverage of the recipe."
        )
    return known.threshold


def _stream(viewer: AnyViewer, names: Iterable[str | Path | Held], wish: _Wish) -> Iterator[Prediction]:
    with ThreadPoolExecutor(2) as pool:
        own: list[_Look] = []
        for look in _looks(viewer, names, wish, pool):
            own.append(look)
            if look.is_last:
                yield _prediction(wish, own)
                own = []


class _Look(NamedTuple):
    """What was seen of an image, or of one frame of a file."""

    item: Item
    is_last: bool
    """Of the frames in the file."""
    row: torch.Tensor | None
    """Probabilities (K,) before any temperature; None where it cannot be read."""
    told: str | None
    """Why it cannot be read; else what to know of how it was."""


def _looks(
    viewer: AnyViewer, names: Iterable[str | Path | Held], wish: _Wish, pool: ThreadPoolExecutor
) -> Iterator[_Look]:
    """One after the other, a batch at once, so that many frames of a file take no more memory than many files."""
    items = _items(names, is_each=viewer.view.frame == "each")
    while batch := list(islice(items, viewer.images_at_once)):
        yield from _look_at(viewer, batch, wish, pool)


def _look_at(
    viewer: AnyViewer, batch: Sequence[tuple[Item, bool]], wish: _Wish, pool: ThreadPoolExecutor
) -> list[_Look]:
    """What is seen of a batch; its pixels are gone when it returns."""
    read = list(pool.map(partial(_read, viewer), [item for item, _ in batch]))
    judged = viewer.judge([found[0] for found in read if not isinstance(found, str)])
    rows = iter(average_views(judged, wish.average))  # of (K,)
    looks = []
    for (item, is_last), found in zip(batch, read, strict=True):
        if isinstance(found, str):
            looks.append(_Look(item, is_last, None, found))
        else:
            told = note_on(found[1], viewer.view, has_learned_deep=wish.has_learned_deep)
            looks.append(_Look(item, is_last, next(rows), told))
    return looks


def _items(names: Iterable[str | Path | Held], *, is_each: bool) -> Iterator[tuple[Item, bool]]:
    for one in expand_names(names):
        path, data = (Path(one.name), one.data) if isinstance(one, Held) else (one, None)
        item = Item(name=str(one.name if isinstance(one, Held) else one), label=0, role=None, file=path, data=data)
        frames = frames_of(item) if is_each else [item]
        yield from ((frame, frame is frames[-1]) for frame in frames)


def _read(viewer: AnyViewer, item: Item) -> tuple[list[np.ndarray], ImageFacts] | str:
    """The crops of an image and what its file says of itself, or why there are none."""
    path = item.file
    try:
        return viewer.read_file(item)
    except BadImage as fault:
        return str(fault)
    except OSError as fault:
        if path.is_dir():
            return f"a folder without images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}"
        if not path.exists() and glob.has_magic(str(path)):
            return "no file is named like this"
        near = nearest(path.name, names_beside(path)) if isinstance(fault, FileNotFoundError) else ""
        return f"{fault.strerror or fault}{f'. {near}' if near else ''}"


def _prediction(wish: _Wish, looks: Sequence[_Look]) -> Prediction:
    """The answer for one file, from the one image or the frames in it."""
    name, rows = looks[0].item.name, [look.row for look in looks if look.row is not None]
    if not rows:
        return Prediction(name=name, label=None, probability=None, probabilities={}, fault=looks[0].told)
    average = torch.stack(rows).mean(0, keepdim=True)  # (1, K)
    shares = temper(average, wish.temperature)[0].tolist()
    probabilities = {label: round(value, 6) for label, value in zip(wish.classes, shares, strict=True)}
    ranked = sorted(probabilities, key=probabilities.__getitem__, reverse=True)  # of equals the first stays first
    labels = None
    if wish.threshold is not None:
        # Before the temperature, as the threshold was found: calibration images served to fit that.
        chosen = prediction_set(average, wish.threshold)[0].tolist()
        members = {label for label, is_in in zip(wish.classes, chosen, strict=True) if is_in}
        labels = tuple(label for label in ranked if label in members)
    told = probabilities if wish.top_k is None else {label: probabilities[label] for label in ranked[: wish.top_k]}
    return Prediction(
        name=name,
        label=ranked[0],
        probability=probabilities[ranked[0]],
        probabilities=told,
        labels=labels,
        note=sum_up([(look.row is not None, look.told) for look in looks]),
    )


def expand_names(names: Iterable[str | Path | Held]) -> Iterator[Path | Held]:
    """Image files by files, folders, patterns and `-`, as they are needed; nothing is opened.

    A folder gives the images below it, sorted; a pattern such as `photos/**/*.jpg`, where no file has that very name,
    the files that match it, sorted; `-` the names on the lines of standard input. What does not exist, matches nothing
    or holds no image comes as it is, so that its fault can be told in its place.
    """
    for name in names:
        if isinstance(name, Held):
            yield name
        elif str(name) == "-":
            yield from (path for line in sys.stdin if line.strip() for path in _expand(line.rstrip("\r\n")))
        else:
            yield from _expand(name)


def _expand(name: str | Path) -> Iterator[Path]:
    path, text = Path(name), str(name)
    if glob.has_magic(text) and not path.exists():
        # Unlike pathlib's, glob leaves out hidden files, as a shell does.
        matches = sorted(Path(match) for match in glob.iglob(text, recursive=True))  # noqa: PTH207
        fixed = set(Path(text).parts)  # who writes a hidden name means it
        files = [  # `**` matches folders too
            file
            for file in matches
            if not file.is_dir() and not any(is_hidden(part) for part in file.parts if part not in fixed)
        ]
        yield from files or [path]
    else:
        yield from (_images_below(path) or [path]) if path.is_dir() else [path]


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among `paths`, and the images below the folders among them, sorted.

    Raises:
        DataError: if a path does not exist or no image is found.
    """
    found = 0
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist. {nearest(path.name, names_beside(path))}".rstrip())
        below = _images_below(path) if path.is_dir() else [path]
        found += len(below)
        yield from below
    if not found:
        raise DataError(
            f"no images under {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}."
        )


def _images_below(folder: Path) -> list[Path]:
    return sorted(image_files(folder, Left()))


def write_predictions(predictions: Iterable[Prediction], format: str, handle: TextIO) -> int:
    """How many images could not be read, after a row for each image was written as it came.

    Columns, or keys, are the fields of `Prediction`. In csv, `probabilities` and `labels` are JSON, for class names may
    hold any separator; what is None is left empty.

    Args:
        predictions: taken one by one.
        format: csv or jsonl. For parquet see `save_predictions`.
        handle: a text file, opened with newline="".

    Raises:
        ValueError: if `format` is unknown.
    """
    if format not in ("csv", "jsonl"):
        raise ValueError(f"format must be csv or jsonl, got {format!r}.")
    faults = 0
    writer = csv.writer(handle, lineterminator="\n")
    if format == "csv":
        writer.writerow(_KINDS)
    for prediction in predictions:
        row = _row(prediction)
        faults += prediction.fault is not None
        if format == "csv":
            writer.writerow([_cell(row[key]) for key in _KINDS])
        else:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return faults


def save_predictions(predictions: Iterable[Prediction], path: Path) -> int:
    """How many images could not be read, after `path` was written: whole or not at all.

    Args:
        predictions: taken one by one.
        path: ends in .csv, .jsonl or .parquet, which says how to write it.

    Raises:
        RecipeError: if it ends otherwise.
    """
    format, faults = path.suffix.removeprefix(".").lower(), 0
    if format not in FORMATS:
        raise RecipeError(f"{path}: predictions are written as {', '.join(FORMATS)}; name the file so.")

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal faults
        for prediction in predictions:
            faults += prediction.fault is not None
            yield _row(prediction)

    def write(temporary: Path) -> None:
        nonlocal faults
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            faults = write_predictions(predictions, format, handle)

    if format == "parquet":
        write_parquet(rows(), path, _KINDS)
    else:
        write_whole(path, write)
    return faults


def _row(prediction: Prediction) -> dict[str, Any]:
    name = prediction.name.encode("utf-8", "backslashreplace").decode()  # names of files may hold any bytes
    return asdict(prediction) | {"name": name}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | tuple) else value
