"""New images in a stream: names in, predictions out, bad files told in their place, memory bounded."""

import csv
import io
import itertools
import json
import shutil
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.config.scores import Conformal, Temperature
from finetune.data.items import Item
from finetune.data.loading import ImageStore
from finetune.data.tables import write_parquet
from finetune.errors import DataError, RecipeError, RunError
from finetune.inference import tta_views
from finetune.inference.batch_predict import (
    Prediction,
    expand_names,
    find_images,
    predict,
    predict_stream,
    save_predictions,
    write_predictions,
)
from finetune.inference.loading import load_final
from finetune.inference.predict import predict_in_batches
from finetune.inference.tta import average_views
from finetune.inference.tta_views import BATCH, open_viewer
from finetune.metrics.conformal import prediction_set

WISHES = ["data.image_size=32", "train.batch_size=16", "train.epochs=1", "train.strategy=probe"]


def predict_views(classifier, store, indices, plan, views):
    """Probabilities (N, V, K)."""
    viewer = open_viewer(classifier, plan, views)
    return torch.cat([said.transpose(0, 1) for said in predict_in_batches(viewer, store, indices)])


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *WISHES, "tracking.enabled=false", "data.split.refit=false"])
    return ft.train(recipe, runs=tmp_path_factory.mktemp("serving"), say=lambda text: None)


@pytest.fixture
def photo(shapes):
    return shapes / "disc" / "00.png"


def remember(run, tmp_path, **scores):
    """A copy of the run whose scores.json says `scores` too."""
    shutil.copytree(run.path, tmp_path / "run")
    copied = ft.Run.open(tmp_path / "run")
    copied.write_json("scores.json", run.scores.model_copy(update=scores).model_dump(mode="json"))
    return copied


def fitted(value):
    """A temperature."""
    return Temperature(value=value, n=9, log_loss_before=1, log_loss_after=1, ece_before=0, ece_after=0)


def sets_within(threshold):
    """Prediction sets promised to hold the true class of 80 %."""
    return Conformal(coverage=0.8, threshold=threshold, num_calibration=9)


def test_the_stream_says_what_the_list_says_across_batches(run, shapes):
    listed = predict(run, [shapes])
    assert len(listed) == 72 > BATCH
    assert list(predict_stream(run, [str(shapes)])) == listed
    assert [answer.name for answer in listed] == [str(path) for path in sorted(shapes.rglob("*.png"))]
    assert all(list(answer.probabilities) == list(run.plan.classes) for answer in listed)


def test_bad_images_are_told_in_their_place_and_the_rest_is_done(run, photo, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:400])
    (tmp_path / "none").mkdir()
    names = [photo, "empty.png", "cut.png", "lost.png", "none", "*.webp", photo]
    answers = list(predict_stream(run, [tmp_path / name for name in names]))
    assert [answer.name for answer in answers] == [str(tmp_path / name) for name in names]
    assert [answer.fault is None for answer in answers] == [True, False, False, False, False, False, True]
    assert answers[0].label == answers[-1].label and answers[0].label in run.plan.classes
    reasons = ("empty", "truncated", "No such file", "folder without", "no file is")
    for answer, reason in zip(answers[1:-1], reasons, strict=True):
        assert reason in answer.fault and answer.label is None and answer.probabilities == {}


def test_a_batch_of_nothing_but_bad_images_is_told_too(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert [answer.fault for answer in predict_stream(run, [tmp_path])] == ["not an image"]
    assert list(predict_stream(run, [])) == []


def test_an_endless_stream_is_answered_as_it_comes(run, photo):
    taken = itertools.count()
    answers = predict_stream(run, (photo for _ in taken))
    first = list(itertools.islice(answers, 3 * BATCH + 1))
    assert len({answer.label for answer in first}) == 1
    assert next(taken) <= 4 * BATCH  # no more names than the batches that were begun
    answers.close()


def test_never_more_images_are_decoded_and_held_than_a_batch(run, photo, monkeypatch):
    alive, most, original = weakref.WeakSet(), 0, tta_views.decode_sizes

    class Pixels(np.ndarray):
        __hash__ = object.__hash__

    def watched(*args, **kwargs):
        nonlocal most
        (pixels,), facts = original(*args, **kwargs)
        alive.add(pixels := pixels.view(Pixels))
        most = max(most, len(alive))
        return [pixels], facts

    monkeypatch.setattr(tta_views, "decode_sizes", watched)
    for _ in predict_stream(run, [photo] * 200):
        assert not alive  # gone before the first answer of a batch is given
    assert 0 < most <= BATCH


def test_memory_does_not_grow_with_the_number_of_images(run, photo):
    def peak(count):
        answers = predict_stream(run, itertools.repeat(photo, count))
        tracemalloc.start()
        assert sum(1 for _ in answers) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(BATCH)  # what is loaded once
    least = 32 * 32 * 3  # bytes of a crop
    assert peak(10 * BATCH) - peak(2 * BATCH) < BATCH * least  # eight batches of crops, if they were held


def test_the_likeliest_classes_come_first_and_are_calibrated(run, shapes):
    everything, two = (list(predict_stream(run, [shapes / "disc"], top_k=k)) for k in (None, 2))
    for all_, few in zip(everything, two, strict=True):
        assert list(few.probabilities.items()) == sorted(all_.probabilities.items(), key=lambda one: -one[1])[:2]
        assert few.label == next(iter(few.probabilities)) and few.probability == few.probabilities[few.label]
    (many,) = predict_stream(run, [shapes / "disc" / "00.png"], top_k=99)
    assert sum(many.probabilities.values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(RecipeError, match="top_k is 0"):
        predict_stream(run, [], top_k=0)


def test_probabilities_follow_the_stored_temperature(run, photo, tmp_path):
    warm = remember(run, tmp_path, temperature=fitted(3.0))
    cool = remember(run, tmp_path / "other", temperature=None)
    (one,), (other,) = (list(predict_stream(which, [photo])) for which in (warm, cool))
    logits = torch.tensor(list(other.probabilities.values())).log()
    assert list(one.probabilities.values()) == pytest.approx((logits / 3).softmax(0).tolist(), abs=1e-3)


@pytest.mark.parametrize("how", ["probability", "logit"])
def test_the_average_and_the_views_are_those_of_the_scores(run, shapes, tmp_path, how):
    copied = remember(run, tmp_path, views="five@44", temperature=None)
    plan = run.plan.model_copy(update={"evaluate": run.plan.evaluate.model_copy(update={"average": how})})
    copied.write_text("plan.yaml", plan.to_yaml())
    store = ImageStore(
        [Item(name="", label=0, role=None, file=file) for file in find_images([shapes])], run.plan.view, 0
    )
    views = predict_views(load_final(run), store, range(72), run.plan, "five@44").transpose(0, 1)
    answers = [list(answer.probabilities.values()) for answer in predict_stream(copied, [shapes])]
    assert torch.allclose(torch.tensor(answers), average_views(views, how), atol=1e-5)
    other = average_views(views, {"probability": "logit", "logit": "probability"}[how])
    assert not torch.allclose(torch.tensor(answers), other, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_a_prediction_set_holds_the_classes_within_the_threshold_the_likeliest_first(run, shapes, tmp_path, threshold):
    copied = remember(run, tmp_path, conformal=sets_within(threshold), temperature=None)
    for answer in predict_stream(copied, [shapes / "disc"], coverage=0.8):
        rows = torch.tensor([list(answer.probabilities.values())])
        chosen = prediction_set(rows, threshold)[0].tolist()
        members = {label for label, is_in in zip(answer.probabilities, chosen, strict=True) if is_in}
        assert set(answer.labels) == members
        assert list(answer.labels) == sorted(members, key=lambda label: -answer.probabilities[label])


def test_sets_are_made_before_the_temperature_as_their_threshold_was(run, shapes, tmp_path):
    sets = []
    for value in (1.0, 50.0):
        copied = remember(run, tmp_path / str(value), conformal=sets_within(0.6), temperature=fitted(value))
        sets.append([answer.labels for answer in predict_stream(copied, [shapes], coverage=0.8)])
    assert sets[0] == sets[1] and any(sets[0])


def test_a_coverage_that_is_not_there_is_refused_with_the_way_out(run, photo, tmp_path):
    with pytest.raises(RunError, match=r"no conformal threshold.*`finetune evaluate .*calibration images"):
        predict_stream(remember(run, tmp_path, conformal=None), [photo], coverage=0.9)
    copied = remember(run, tmp_path / "other", conformal=sets_within(0.5))
    with pytest.raises(RunError, match=r"cover 0\.8 of images, and 0\.9 is asked for\. Ask for 0\.8"):
        predict_stream(copied, [photo], coverage=0.9)
    assert [answer.labels for answer in predict_stream(copied, [photo])] == [None]


def test_names_are_files_folders_patterns_and_lines_of_standard_input(tmp_path, monkeypatch):
    for name in ("b/1.png", "b/c/2.JPG", "b/notes.txt", "b/.3.png", "a.png", "d[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a.png\n\nb\n*.png\n-\n"))
    assert [str(path) for path in expand_names(["b", Path("a.png"), "**/*.png", "d[1].png", "x*", "lost.png"])] == [
        *("b/1.png", "b/c/2.JPG", "a.png"),
        *("a.png", "b/1.png", "d[1].png"),
        *("d[1].png", "x*", "lost.png"),
    ]
    assert [str(path) for path in expand_names(["-"])] == ["a.png", "b/1.png", "b/c/2.JPG", "a.png", "d[1].png", "-"]


def test_a_list_of_paths_must_exist(tmp_path):
    with pytest.raises(DataError, match="lost does not exist"):
        list(find_images([tmp_path / "lost"]))
    with pytest.raises(DataError, match="no images under"):
        list(find_images([tmp_path]))


ANSWERS = [
    Prediction(
        name='a, "b".png', label="x;y", probability=0.75, probabilities={"x;y": 0.75, "é": 0.25}, labels=("x;y",)
    ),
    Prediction(name="bad\udcff.png", label=None, probability=None, probabilities={}, fault="not an image"),
    Prediction(name="c.png", label="é", probability=1.0, probabilities={"é": 1.0}, labels=()),
]


def test_csv_and_lines_of_json_give_back_what_was_written():
    handles = {format: io.StringIO() for format in ("csv", "jsonl")}
    for format, handle in handles.items():
        assert write_predictions(iter(ANSWERS), format, handle) == 1
        handle.getvalue().encode()  # no name breaks the file
    lines = [json.loads(line) for line in handles["jsonl"].getvalue().splitlines()]
    assert [line["name"] for line in lines] == ['a, "b".png', "bad\\udcff.png", "c.png"]
    assert [line["labels"] for line in lines] == [["x;y"], None, []]
    assert [line["fault"] for line in lines] == [None, "not an image", None]
    rows = list(csv.DictReader(io.StringIO(handles["csv"].getvalue())))
    assert list(rows[0]) == ["name", "label", "probability", "probabilities", "labels", "fault", "note"]
    for row, line in zip(rows, lines, strict=True):
        assert (row["name"], row["label"], row["fault"]) == (line["name"], line["label"] or "", line["fault"] or "")
        assert json.loads(row["probabilities"]) == line["probabilities"]
        assert (json.loads(row["labels"]) if row["labels"] else None) == line["labels"]
    with pytest.raises(ValueError, match="csv or jsonl, got 'xml'"):
        write_predictions([], "xml", io.StringIO())


def test_rows_are_written_as_they_come():
    handle = io.StringIO()

    def answers():
        yield ANSWERS[0]
        assert handle.getvalue().count("\n") == 1
        yield ANSWERS[1]

    assert write_predictions(answers(), "jsonl", handle) == 1


def test_a_saved_file_is_of_the_kind_its_name_says_and_whole_or_absent(tmp_path):
    for suffix in ("csv", "jsonl", "parquet"):
        assert save_predictions(iter(ANSWERS), tmp_path / f"out.{suffix}") == 1
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist(maps_as_pydicts="strict")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == lines

    def broken():
        yield ANSWERS[0]
        raise KeyboardInterrupt

    for suffix in ("csv", "parquet"):
        with pytest.raises(KeyboardInterrupt):
            save_predictions(broken(), tmp_path / f"half.{suffix}")
    assert not list(tmp_path.glob("*half*"))
    with pytest.raises(RecipeError, match="written as csv, jsonl, parquet"):
        save_predictions([], tmp_path / "out.txt")


def test_a_table_is_written_in_parts_even_where_a_column_begins_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.tables._ROWS", 3)
    rows = [{"a": None if n < 5 else f"{n}", "b": n / 2} for n in range(8)]
    assert write_parquet(iter(rows), tmp_path / "t.parquet", {"a": "text", "b": "number"}) == 8
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == rows
    assert pq.read_metadata(tmp_path / "t.parquet").num_row_groups == 3
    with pytest.raises(ValueError, match="not date"):
        write_parquet([], tmp_path / "t.parquet", {"a": "date"})


def test_an_image_of_any_shape_is_answered(run, tmp_path):
    for number, size in enumerate([(1, 1), (300, 7), (33, 32)]):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{number}.png")
    assert all(answer.fault is None for answer in predict_stream(run, [tmp_path]))
