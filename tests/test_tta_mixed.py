"""Averages of runs that look at images in different views: each member sees what it sees alone, from one decoding."""

import numpy as np
import pytest
import torch
from conftest import role_of
from PIL import Image
from torch import nn

import finetune as ft
from finetune.data.loading import ImageStore
from finetune.ensembles.build import make_ensemble, score_members
from finetune.ensembling import ensemble as combine
from finetune.errors import RunError
from finetune.evaluation.compare import compare
from finetune.evaluation.other_data import evaluate_elsewhere
from finetune.features.survey import look
from finetune.inference import tta_views
from finetune.inference.batch_predict import predict, predict_stream
from finetune.inference.ensemble_model import Ensemble
from finetune.inference.loading import load_ensemble, load_final
from finetune.inference.predict import predict_in_batches, predict_probabilities
from finetune.inference.tta_views import MixedViewer, Viewer, open_viewer
from finetune.metrics.calibration import log_probabilities
from finetune.metrics.selection import average
from finetune.runs.teacher import read_teacher

SMALL = [
    "train.batch_size=16",
    "train.epochs=1",
    "tracking.enabled=false",
    "data.split.refit=false",
    "data.invariances=[hflip]",
]
LARGE = ["data.image_size=48", "data.crop_pct=0.8", "data.interpolation=bicubic"]
SHIFTED = ["data.image_size=32", "data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.3,0.25]"]


def predict_views(classifier, store, indices, plan, views):
    """Probabilities (N, V, K)."""
    viewer = open_viewer(classifier, plan, views)
    return torch.cat([said.transpose(0, 1) for said in predict_in_batches(viewer, store, indices)])


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def photographs(shapes, tmp_path_factory):
    """The drawn shapes as larger JPEGs, which are decoded at another reduced size for 32 and for 48 pixels."""
    root = tmp_path_factory.mktemp("jpegs") / "shapes"
    for folder in sorted(shapes.iterdir()):
        for number, path in enumerate(sorted(folder.iterdir())):
            role = role_of(number)
            (root / role / folder.name).mkdir(parents=True, exist_ok=True)
            image = Image.open(path).resize((220, 170 + 20 * (number % 3)), Image.Resampling.BICUBIC)
            image.save(root / role / folder.name / f"{path.stem}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def pool(photographs, tmp_path_factory):
    """32 px; 48 px with another crop and interpolation; 32 px with other constants, a probe."""
    folder = tmp_path_factory.mktemp("pool")

    def start(*wishes):
        return ft.train(ft.load_recipe(None, [f"data.root={photographs}", *SMALL, *wishes]), runs=folder, say=quiet)

    full = "train.strategy=full"
    return start("data.image_size=32", full), start(*LARGE, full, "seed=1"), start(*SHIFTED, "train.strategy=probe")


@pytest.fixture(scope="module")
def seen(pool):
    return look(ft.load_recipe(pool[0].file("recipe.yaml")))


@pytest.fixture(scope="module")
def joined(pool, tmp_path_factory):
    return combine([run.path for run in pool], runs=tmp_path_factory.mktemp("joined"), say=quiet)


def alone(run, seen, views, role="test"):
    """What a run says by view (V, N, K), from images prepared for it alone."""
    store = ImageStore(seen.dataset.items, run.plan.view, limit_bytes=0)
    return predict_views(load_final(run), store, seen.dataset.indices(role), run.plan, views).transpose(0, 1)


@pytest.mark.technique("T158")
@pytest.mark.parametrize("kind", ["probability", "logit"])
@pytest.mark.parametrize("views", ["center", "ten", "resolutions,whole"])
@pytest.mark.slow
def test_every_member_says_what_it_says_alone_bit_for_bit(pool, seen, views, kind):
    assert len({run.plan.view for run in pool}) == 3
    classifier = Ensemble([load_final(run) for run in pool], [1, 2, 1], kind, [run.plan.view for run in pool])
    found = predict_views(classifier, seen.dataset.store, seen.dataset.indices("test"), pool[0].plan, views).transpose(
        0, 1
    )
    said = torch.stack([alone(run, seen, views) for run in pool])  # (M, V, N, K)
    wanted = average(said.flatten(1, 2), kind, [0.25, 0.5, 0.25]).view(said.shape[1:])
    assert torch.equal(found, wanted)
    assert not torch.equal(said[0], said[1])


@pytest.mark.technique("T158")
def test_the_run_that_is_made_is_judged_so_and_its_table_tells_each_member(pool, seen, joined):
    said = torch.stack([alone(run, seen, "center")[0] for run in pool])
    with np.load(joined.file("predictions.npz")) as stored:
        np.testing.assert_allclose(stored["test_probabilities"], average(said).numpy(), rtol=0, atol=1e-7)
    labels = seen.dataset.labels("test")
    for row, own in zip(joined.read_json("scores.json")["members"]["test"], said, strict=False):
        assert row["accuracy"] == pytest.approx(float((own.argmax(1) == labels).double().mean()))
        assert row["log_loss"] == pytest.approx(float(nn.functional.nll_loss(log_probabilities(own), labels)), abs=1e-6)
    assert "members look at images as each was trained: 32 of 3" in joined.file("log.txt").read_text()
    assert "48 of 60 px; a file is decoded once" in joined.file("log.txt").read_text()


def test_the_order_of_members_does_not_matter(pool, seen, tmp_path):
    said = []
    for number, runs in enumerate((pool, pool[::-1], (pool[1], pool[0], pool[2]))):
        made = make_ensemble(runs, how="average", folder=tmp_path / str(number), say=quiet)
        classifier = load_ensemble(made)
        said.append(
            predict_probabilities(classifier, seen.dataset.store, seen.dataset.indices("test"), made.plan, "ten")
        )
    assert made.plan.view == pool[1].plan.view
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], rtol=0, atol=1e-6)


def test_an_ensemble_of_one_larger_run_is_that_run_bit_for_bit(pool, seen, tmp_path):
    made = make_ensemble(pool[1:2], how="average", folder=tmp_path / "one", say=quiet)
    found = predict_views(load_ensemble(made), seen.dataset.store, seen.dataset.indices("test"), made.plan, "ten")
    assert torch.equal(found.transpose(0, 1), alone(pool[1], seen, "ten"))


def test_a_file_is_read_and_decoded_in_one_go_for_all_members(pool, seen, joined, monkeypatch):
    viewer, reads, sizes = open_viewer(load_final(joined), joined.plan, "ten"), [], []
    read, decode = tta_views.read_bytes, tta_views.decode_sizes
    monkeypatch.setattr(tta_views, "read_bytes", lambda item: reads.append(item) or read(item))
    monkeypatch.setattr(tta_views, "decode_sizes", lambda data, wanted: sizes.append(wanted) or decode(data, wanted))
    crops = viewer.read(seen.dataset.store, seen.dataset.indices("test")[0])
    assert isinstance(viewer, MixedViewer) and len(reads) == 1
    assert [[one.shorter_pixels for one in wanted] for wanted in sizes] == [[pool[0].plan.view.shorter_pixels, 60]]
    assert [crop.shape[0] for crop in crops] == [32] * 10 + [48] * 10  # other constants need no pixels of their own
    assert len(viewer.crops) == 10 and viewer.judge([crops]).shape == (10, 1, 3)


def test_members_of_one_view_are_looked_at_together(pool):
    view = pool[0].plan.view
    together = Ensemble([load_final(pool[0])] * 2, views=[view] * 2)
    assert isinstance(open_viewer(together, pool[0].plan, "center"), Viewer)


def test_one_tensor_is_refused_where_it_cannot_suit_all(pool):
    classifier = Ensemble([load_final(run) for run in pool], views=[run.plan.view for run in pool])
    with pytest.raises(ValueError, match="one tensor cannot suit them all"):
        classifier(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="as many views, got 1"):
        Ensemble(classifier.members, views=[pool[0].plan.view])


@pytest.mark.technique("T158")
def test_val_chooses_among_members_each_in_its_own_view(pool, seen, tmp_path):
    made = make_ensemble(pool, how="greedy", folder=tmp_path / "greedy", say=quiet)
    found = made.membership
    said = [alone(run, seen, "center", "val")[0] for run in pool]
    losses = [float(nn.functional.nll_loss(log_probabilities(own), seen.dataset.labels("val"))) for own in said]
    assert found.val_log_losses[0] == pytest.approx(min(losses), rel=1e-6)
    rows = seen.dataset.indices("val")
    chosen = predict_probabilities(load_ensemble(made), seen.dataset.store, rows, made.plan, "center")
    loss = float(nn.functional.nll_loss(log_probabilities(chosen), seen.dataset.labels("val")))
    assert loss == pytest.approx(found.val_log_losses[-1], rel=1e-5)
    assert len(score_members(made, look(ft.load_recipe(made.file("recipe.yaml"))).dataset).test) >= len(found.members)


@pytest.mark.slow
def test_it_predicts_is_compared_reported_and_judged_again_like_any_run(pool, joined, photographs):
    with np.load(joined.file("predictions.npz")) as stored:
        names, rows = stored["test_names"], stored["test_probabilities"]
    answers = predict(joined, [photographs / name for name in names])
    found = [[answer.probabilities[name] for name in joined.plan.classes] for answer in answers]
    np.testing.assert_allclose(found, rows, atol=1e-5)
    one = next(predict_stream(joined, [photographs / "test"], coverage=0.9)) if _has_sets(joined) else answers[0]
    assert one.label in joined.plan.classes
    assert compare([joined, pool[0]]).pairs[0].n == len(names)
    assert evaluate_elsewhere(joined, photographs).scores.top1 == joined.scores.test.top1
    scores = ft.evaluate(joined.path, views="ten", say=quiet)
    assert len(scores.views_table) == 11 and scores.views_table[0].name == "top-left"
    assert "ensemble of 3" in ft.report(joined.path, say=quiet).read_text()
    ft.evaluate(joined.path, views="center", say=quiet)


def _has_sets(run):
    return (run.read_json("scores.json").get("conformal") or {}).get("threshold") is not None


def test_views_that_a_member_cannot_cut_are_refused_before_anything_is_written(pool, tmp_path):
    from made_runs import altered

    plan = pool[0].plan
    first = altered(pool[0], tmp_path, evaluate=plan.evaluate.model_copy(update={"views": "center@40"}))
    for how in ("average", "greedy"):
        with pytest.raises(RunError, match=r"48 px: .*'40 px center' cuts 48 x 48 px .* make that at least 48"):
            make_ensemble([first, pool[1]], how=how, folder=tmp_path / "made", say=quiet)
    assert not (tmp_path / "made").exists()
    with pytest.raises(RunError, match="Average the predictions instead"):
        make_ensemble(pool[:2], how="soup", folder=tmp_path / "made", say=quiet)


def test_an_average_of_different_views_is_refused_as_a_teacher(joined):
    with pytest.raises(RunError, match=r"train\.distillation\.teacher: .*look at images in different views"):
        read_teacher(str(joined.path))
