"""What each view says alone: kept beside the average, from the same look at the images."""

import shutil

import numpy as np
import pytest
import torch

import finetune as ft
from finetune.ensembling import ensemble
from finetune.evaluation import per_view
from finetune.evaluation.compare import compare
from finetune.features.survey import look
from finetune.inference.loading import load_final
from finetune.inference.predict import predict_in_batches, predict_probabilities
from finetune.inference.tta import average_views, view_names
from finetune.inference.tta_views import Viewer, open_viewer
from finetune.metrics.classification import log_loss
from finetune.runs.folder import RunFolder

SMALL = [
    "data.image_size=32",
    "data.crop_pct=0.8",
    "train.batch_size=16",
    "train.epochs=1",
    "tracking.enabled=false",
    "data.split.refit=false",
]
TEN = ["data.invariances=[hflip]", "evaluate.views=ten"]


def predict_views(classifier, store, indices, plan, views):
    """Probabilities (N, V, K)."""
    viewer = open_viewer(classifier, plan, views)
    return torch.cat([said.transpose(0, 1) for said in predict_in_batches(viewer, store, indices)])


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(shapes, folder):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *TEN, "train.strategy=full"])
    return ft.train(recipe, runs=folder, say=quiet)


@pytest.fixture(scope="module")
def seen(run):
    return look(ft.load_recipe(run.file("recipe.yaml")))


def copied(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    return RunFolder.open(tmp_path / "copy")


def arrays(run):
    with np.load(run.file("predictions.npz")) as stored:
        return dict(stored)


@pytest.mark.technique("T152", "T154")
@pytest.mark.parametrize("role", ["val", "test"])
def test_every_view_is_stored_under_its_name_and_their_mean_is_the_average(run, seen, role):
    stored = arrays(run)
    assert tuple(stored[f"{role}_view_names"]) == view_names("ten") and stored[f"{role}_view_names"].dtype.kind == "U"
    views = stored[f"{role}_view_probabilities"]
    said = predict_views(load_final(run), seen.dataset.store, seen.dataset.indices(role), run.plan, "ten")  # (N, V, K)
    assert views.dtype == np.float16 and np.array_equal(views, said.half().numpy())
    assert run.read_json("scores.json")["temperature"] is None  # too few images, so the average is not tempered
    np.testing.assert_allclose(views.astype(np.float64).mean(1), stored[f"{role}_probabilities"], atol=1e-3)
    assert "calibration_view_names" not in stored


@pytest.mark.technique("T152", "T154")
def test_the_table_tells_each_view_alone_beside_the_average(run, seen):
    rows, labels = run.read_json("scores.json")["views_table"], seen.dataset.labels("test")
    assert [row["name"] for row in rows] == [*view_names("ten"), "average"]
    said = predict_views(load_final(run), seen.dataset.store, seen.dataset.indices("test"), run.plan, "ten")
    answers = [*said.unbind(1), average_views(said.transpose(0, 1))]
    for row, own in zip(rows, answers, strict=True):
        assert row["top1"]["value"] == pytest.approx(float((own.argmax(1) == labels).double().mean()))
        assert row["log_loss"]["value"] == pytest.approx(log_loss(own, labels))
        assert row["top1"]["low"] <= row["top1"]["value"] <= row["top1"]["high"]
    losses = [row["log_loss"]["value"] for row in rows]
    assert len(set(losses)) > 5 and losses[-1] <= sum(losses[:-1]) / 10 + 1e-9  # Jensen


def test_the_average_is_that_of_the_predictions_bit_for_bit(run, seen):
    whole = predict_probabilities(load_final(run), seen.dataset.store, seen.dataset.indices("test"), run.plan, "ten")
    assert np.array_equal(arrays(run)["test_probabilities"], whole.numpy())


def test_no_image_is_looked_at_a_second_time_for_it(run, seen, tmp_path, monkeypatch):
    looks, judge = {}, Viewer.judge

    def counted(viewer, pictures):
        looks[viewer.views] = looks.get(viewer.views, 0) + len(pictures)
        return judge(viewer, pictures)

    monkeypatch.setattr(Viewer, "judge", counted)
    ft.evaluate(copied(run, tmp_path).path, say=quiet)
    count = sum(len(seen.dataset.indices(role)) for role in ("val", "calibration", "test"))
    assert looks == {"ten": count, "center": count}


def test_more_than_the_bound_is_left_out_with_a_note_and_the_table_stays(run, tmp_path, monkeypatch):
    copy = copied(run, tmp_path)
    monkeypatch.setattr(per_view, "MOST_BYTES", 100)
    scores = ft.evaluate(copy.path, say=quiet)
    assert "are not in predictions.npz: val" in scores.views_table_note
    assert scores.views_table == run.scores.views_table
    stored = arrays(copy)
    assert "test_view_probabilities" not in stored and len(stored["test_view_names"]) == 10
    assert "views_table_note" not in run.read_json("scores.json")


def test_one_view_has_no_table_and_files_without_views_are_still_compared_and_shown(run, tmp_path):
    copy = copied(run, tmp_path)
    scores = ft.evaluate(copy.path, views="center", say=quiet)
    assert scores.views_table is None and not any("_view_" in name for name in arrays(copy))
    assert compare([run, copy]).pairs[0].n == scores.test.n
    assert "views says alone" not in ft.report(copy.path, say=quiet).read_text()
    assert "What each of the 10 views says alone" in (page := run.file("report.html").read_text())
    assert all(f'<th scope="row">{name}</th>' in page for name in (*view_names("ten"), "average"))


@pytest.mark.slow
def test_of_an_ensemble_every_view_is_the_average_of_its_members(shapes, run, seen, folder):
    wishes = [f"data.root={shapes}", *SMALL, *TEN, "train.strategy=full", "seed=1", "data.split.seed=0"]
    other = ft.train(ft.load_recipe(None, wishes), runs=folder, say=quiet)
    made = ensemble([run.path, other.path], runs=folder, say=quiet)
    rows = seen.dataset.indices("test")
    both = [predict_views(load_final(one), seen.dataset.store, rows, one.plan, "ten") for one in (run, other)]
    assert not torch.equal(*both)
    stored = arrays(made)
    np.testing.assert_allclose(stored["test_view_probabilities"], sum(both) / 2, atol=1e-3)
    assert len(made.read_json("scores.json")["views_table"]) == 11
