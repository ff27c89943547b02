"""Dropout left on at test: what the mean of draws gains, how far they disagree, and where it is refused."""

import math
import re

import pytest
import torch
from made_facts import make_facts

import finetune as ft
from finetune.config.measures import Measure
from finetune.config.scores import AgainstOrdinary
from finetune.ensembling import ensemble
from finetune.errors import RecipeError
from finetune.evaluation import mc_dropout
from finetune.evaluation.mc_dropout import compare_draws, draw, draws_sentence, entropy
from finetune.features.survey import look
from finetune.inference.loading import load_final
from finetune.inference.predict import draw_in_batches
from finetune.inference.tta_views import Viewer
from finetune.metrics.classification import log_loss
from finetune.models.regularization import sample_predictions
from finetune.planning.planner import make_plan

WISHES = [
    "data.image_size=32",
    "data.crop_pct=0.8",
    "train.batch_size=16",
    "train.epochs=1",
    "tracking.enabled=false",
    "data.split.refit=false",
]


def predict_draws(classifier, store, indices, plan, draws=20, seed=0):
    """Probabilities (N, S, K)."""
    drawn = draw_in_batches(classifier, store, indices, plan, draws, seed)
    return torch.cat([some.transpose(0, 1) for some in drawn])


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    wishes = [*WISHES, "seed=3", "train.strategy=full", "head.dropout=0.5", "evaluate.mc_samples=6"]
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *wishes])
    return ft.train(recipe, runs=tmp_path_factory.mktemp("runs"), say=quiet)


@pytest.fixture(scope="module")
def seen(run):
    return look(ft.load_recipe(run.file("recipe.yaml")))


def drawn_from(rows, monkeypatch):
    """`draw` of a head that says `rows` (S, B, K)."""
    monkeypatch.setattr(mc_dropout, "draw_in_batches", lambda *rest: iter([rows]))
    facts = make_facts()
    plan = make_plan(ft.load_recipe(None, ["train.strategy=full"]), facts)
    return draw(None, None, [], plan)


def test_entropy_is_log_k_of_ignorance_and_0_of_certainty():
    assert entropy(torch.full((2, 5), 0.2).double()).tolist() == pytest.approx([math.log(5)] * 2)
    assert entropy(torch.tensor([[1.0, 0.0]])).tolist() == [0.0]


def test_draws_that_agree_share_all_they_say_and_draws_that_contradict_each_other_nothing(monkeypatch):
    sure, unsure = torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0.5, 0])
    other = torch.tensor([0.0, 1, 0])
    rows = torch.stack([torch.stack([sure, unsure, sure]), torch.stack([sure, unsure, other])])  # (S, B, K)
    found = drawn_from(rows, monkeypatch)
    assert found.entropy.tolist() == pytest.approx([0, math.log(2), math.log(2)])
    assert found.mutual_information.tolist() == pytest.approx([0, 0, math.log(2)])
    torch.testing.assert_close(found.mean, rows.mean(0))


def test_the_information_is_never_negative_nor_above_the_entropy(monkeypatch):
    rows = (4 * torch.randn(9, 50, 3, generator=torch.Generator().manual_seed(0))).softmax(2)
    found = drawn_from(rows, monkeypatch)
    assert (found.mutual_information >= 0).all() and (found.mutual_information <= found.entropy).all()
    torch.testing.assert_close(found.entropy - found.mutual_information, entropy(rows.double()).mean(0))


@pytest.mark.technique("T125")
def test_scores_tell_the_mean_of_the_draws_beside_the_ordinary_answer(run, seen):
    scores = run.read_json("scores.json")
    told, labels = scores["draws"], seen.dataset.labels("test")
    rows = predict_draws(
        load_final(run), seen.dataset.store, seen.dataset.indices("test"), run.plan, draws=6, seed=run.plan.seed
    )
    assert rows.shape == (len(labels), 6, 3) and rows.std(1).max() > 0
    mean = rows.double().mean(1).float()
    assert told["n"] == 6 and told["temperature"] is None
    assert told["test"]["log_loss"]["value"] == pytest.approx(log_loss(mean, labels), rel=1e-6)
    assert told["test"]["top1"]["value"] == pytest.approx(float((mean.argmax(1) == labels).double().mean()))
    pair = told["paired"]["test"]
    assert pair["difference"] == pytest.approx(told["test"]["top1"]["value"] - scores["test"]["top1"]["value"])
    gap = told["test"]["log_loss"]["value"] - scores["test"]["log_loss"]["value"]
    assert pair["log_loss_difference"]["value"] == pytest.approx(gap, abs=1e-9)
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert told["entropy"]["test"]["value"] == pytest.approx(float(entropy(mean.double()).mean()), rel=1e-5)
    assert 0 < told["mutual_information"]["test"]["value"] < told["entropy"]["test"]["value"]
    assert "draws of the head minus the ordinary answer on test" in told["sentence"]
    assert "Dropout left on: the mean of 6 draws" in run.file("report.html").read_text()


def test_judged_again_the_draws_are_the_same_whatever_the_views(run):
    before = run.scores.draws
    assert ft.evaluate(run.path, views="five", say=quiet).draws == before  # centre against centre
    assert ft.evaluate(run.path, views="center", say=quiet).draws == before


def test_the_backbone_looks_once_and_the_draws_are_those_of_whole_passes_bit_for_bit(run, seen):
    classifier, rows = load_final(run), seen.dataset.indices("test")
    viewer, looks = Viewer(classifier, run.plan, "center"), []
    hook = classifier.backbone.register_forward_hook(lambda *rest: looks.append(1))
    found = predict_draws(classifier, seen.dataset.store, rows, run.plan, draws=4, seed=1)
    hook.remove()
    assert len(looks) == 1
    crops = torch.stack([torch.from_numpy(viewer.read(seen.dataset.store, row)[0]) for row in rows])
    assert torch.equal(found, sample_predictions(classifier, viewer.images(crops.numpy()), 4, 1).transpose(0, 1))


def test_an_average_of_networks_is_judged_without_draws_and_says_so(run, tmp_path):
    told = ensemble([run.path], runs=tmp_path, say=quiet).read_json("scores.json")["draws"]
    assert told["n"] == 0 and "several networks" in told["sentence"]


@pytest.mark.parametrize(
    ("low", "high", "loss", "said"),
    [
        (0.01, 0.03, (-0.2, -0.1), r"\+2\.0 % \[\+1\.0, \+3\.0\] of 100: better; .*: lower"),
        (-0.03, -0.01, (0.1, 0.2), ": worse; .*: higher"),
        (-0.01, 0.01, (-0.1, 0.1), ": no difference that these images could show; .*: not told apart"),
    ],
)
def test_the_sentence_says_no_more_than_the_intervals(low, high, loss, said):
    losses = Measure(value=sum(loss) / 2, low=loss[0], high=loss[1], n=100)
    ends = {"difference": (low + high) / 2, "low": low, "high": high}
    pair = AgainstOrdinary(**ends, n=100, only_draws_right=3, only_ordinary_right=2, log_loss_difference=losses)
    assert re.search(said, draws_sentence(20, pair, "test"))


def test_without_images_nothing_is_compared():
    none = torch.empty(0, dtype=torch.long)
    assert compare_draws(3, {}, {}, {}, {"val": none, "test": none}).sentence is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["train.strategy=full"], r"evaluate\.mc_samples is 20, but the head drops nothing.*set head\.dropout"),
        (["train.strategy=probe", "head.dropout=0.5"], r"the model is the probe \(the recipe says so\)"),
        (["head.dropout=0.5"], r"the model is the probe \(the advice is: .*\)"),
    ],
    ids=["no dropout", "probe by wish", "probe by advice"],
)
def test_draws_that_would_all_be_the_same_are_refused_before_training(wishes, message):
    facts = make_facts(per_class=5, probe=0.99, low=0.98)
    with pytest.raises(RecipeError, match=message):
        make_plan(ft.load_recipe(None, [*wishes, "evaluate.mc_samples=20"]), facts)


@pytest.mark.parametrize("wish", ["head.dropout=0.5", "head.drop_connect=0.3"])
def test_draws_are_planned_where_the_head_drops_something_and_off_otherwise(wish):
    recipe = ft.load_recipe(None, ["train.strategy=full", wish, "evaluate.mc_samples=20"])
    assert make_plan(recipe, make_facts()).evaluate.mc_samples == 20
    assert make_plan(ft.load_recipe(None, []), make_facts()).evaluate.mc_samples == 0
    with pytest.raises(RecipeError, match="200"):
        ft.load_recipe(None, ["evaluate.mc_samples=201"])
