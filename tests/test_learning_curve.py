"""The learning curve: parts that nest, a law that is weighed, and a forecast that holds what it promises."""

import math

import pytest
import torch
from markupsafe import Markup

import finetune as ft
from finetune.config.measures import LearningCurveFacts
from finetune.features import learning_curve
from finetune.features.layer_profile import cross_validate
from finetune.features.learning_curve import measure_curve, nested_parts, weigh_laws
from finetune.features.probing import fit_probe, guess_near
from finetune.reporting.curve import curve_figure, curve_sentence

PENALTY = 0.1


def draw(per_class, generator, *, num_classes=4, width=30):
    """Features of classes that overlap, 12 of which tell them apart, and labels; the means are always the same."""
    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(1)) * (torch.arange(width) < 12)
    labels = torch.arange(per_class * num_classes) % num_classes
    return means[labels] + 1.7 * torch.randn(len(labels), width, generator=generator), labels


def measured(features, labels, *, l2=PENALTY, num_classes=4, seed=0):
    found = cross_validate(features, labels, num_classes=num_classes, seed=seed, grid=(l2,))
    right = found.predictions == labels
    return measure_curve(features, labels, num_classes=num_classes, l2=l2, seed=seed, right=right, folds=5)


@pytest.mark.parametrize("counts", [(8, 8), (40, 8, 9)])
def test_parts_nest_are_disjoint_and_spread_every_class(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    smallest = nested_parts(labels, seed=0, halvings=3)
    assert smallest.unique().tolist() == list(range(8))
    for halvings in (1, 2, 3):
        part = smallest // 2 ** (3 - halvings)
        table = torch.stack([labels[part == number].bincount(minlength=len(counts)) for number in part.unique()])
        assert int((table.amax(0) - table.amin(0)).max()) <= 2 ** (3 - halvings)
        assert table.sum(0).tolist() == list(counts)


@pytest.mark.technique("T188")
def test_the_forecast_for_twice_the_images_holds_the_truth_and_follows_it():
    """Features of which any number can be drawn: what twice as many give is known."""
    generator = torch.Generator().manual_seed(0)
    judges, truth = draw(2000, generator)
    curves, then, now = [], [], []
    for seed in range(20):
        features, labels = draw(30, generator)
        half = torch.arange(len(labels)) < len(labels) // 2
        curves.append(measured(features[half], labels[half], seed=seed))
        for rows, kept in ((half, now), (half | True, then)):
            l2 = PENALTY * int(half.sum()) / int(rows.sum())
            guessed = guess_near(features[rows], labels[rows], judges, num_classes=4, l2=l2)
            kept.append(float((guessed == truth).double().mean()))
    covered = [curve.twice.low <= right <= curve.twice.high for curve, right in zip(curves, then, strict=True)]
    assert sum(covered) >= 0.9 * len(covered)
    gain = sum(then) / len(then) - sum(now) / len(now)
    foretold = sum(curve.twice.value - curve.now.value for curve in curves) / len(curves)
    assert gain > 0.02  # or there would be nothing to foretell
    assert foretold == pytest.approx(gain, abs=0.5 * gain)
    assert sum(curve.twice.value for curve in curves) / len(curves) == pytest.approx(sum(then) / len(then), abs=0.015)
    for curve in curves:
        assert curve.twice.value >= curve.now.value
        assert [point.images for point in curve.points] == [15, 30, 48]
        assert [point.probes for point in curve.points] == [4, 2, 5]


@pytest.mark.parametrize("exponent", [0.0, 0.15, 0.5])
def test_a_law_that_is_seen_without_noise_is_found(exponent):
    sizes = [125.0, 250.0, 500.0, 1000.0]
    errors = torch.tensor([0.2 * (size / 1000) ** -exponent for size in sizes]).double()
    law = weigh_laws(sizes, errors, 1e-7 * torch.eye(4).double(), images=1000)
    expected = 1 - 0.2 * 2**-exponent
    twice = law.accuracy(2000, 100)
    assert twice.value == pytest.approx(expected, abs=0.015)  # a little is expected before anything is seen
    assert twice.low - 1e-3 <= expected <= twice.high + 1e-3
    assert law.accuracy(1000, 100).value == pytest.approx(0.8, abs=2e-3)


def test_errors_that_rise_with_more_images_foretell_no_loss():
    law = weigh_laws([50, 100, 200], torch.tensor([0.1, 0.15, 0.2]).double(), 1e-4 * torch.eye(3).double(), images=200)
    assert law.exponents.min() == 0
    assert law.accuracy(400, 100).value >= law.accuracy(200, 100).value


def test_fewer_judged_images_and_more_luck_make_wider_intervals():
    errors = torch.tensor([0.4, 0.3, 0.22]).double()

    def width(variance, luck=0.0):
        law = weigh_laws([50, 100, 200], errors, variance * torch.eye(3).double(), images=200, luck=luck)
        return [found.high - found.low for found in (law.accuracy(400, 100), law.exponent(100))]

    exact, vague, lucky = width(4e-4), width(1.6e-3), width(1.6e-3, luck=8e-3)
    assert exact[0] < vague[0] < lucky[0]
    assert exact[1] < vague[1] < lucky[1]


def test_no_mistake_seen_is_no_certainty():
    features = torch.eye(2).repeat(20, 1) + 1e-3 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    curve = measured(features, torch.arange(40) % 2, num_classes=2)
    assert [point.accuracy.value for point in curve.points] == [1] * 4
    assert 0.8 < curve.twice.low < 0.99
    assert curve.twice.high <= 1


def test_too_few_images_are_said_to_tell_nothing():
    features, labels = draw(3, torch.Generator().manual_seed(0))
    curve = measured(features, labels)
    assert (curve.twice, curve.exponent, curve.is_told) == (None, None, False)
    assert "cannot be told from 12 images" in curve_sentence(curve)
    assert curve_figure(curve) == ""
    features, labels = draw(6, torch.Generator().manual_seed(0))
    few = measured(features, labels)
    assert few.twice is not None
    assert not few.is_told
    assert "cannot be told from 24 images" in curve_sentence(few)


def test_val_judges_where_it_is_given():
    generator = torch.Generator().manual_seed(0)
    (features, labels), val = draw(40, generator), draw(50, generator)
    probe = fit_probe(features, labels, num_classes=4, l2=PENALTY)
    right = probe.logits(val[0]).argmax(1) == val[1]
    curve = measure_curve(features, labels, num_classes=4, l2=PENALTY, seed=0, right=right, val=val)
    assert curve.judged == "val"
    assert [point.images for point in curve.points] == [20, 40, 80, 160]
    assert {point.accuracy.n for point in curve.points} == {200}
    assert curve.points[-1].accuracy.value == pytest.approx(float(right.double().mean()))


def test_uneven_classes_count_alike():
    generator = torch.Generator().manual_seed(0)
    features, labels = draw(60, generator)
    kept = (labels > 0) | (torch.arange(len(labels)) < 24)  # six of the first class
    features, labels = features[kept], labels[kept]
    found = cross_validate(features, labels, num_classes=4, seed=0, grid=(PENALTY,))
    right = found.predictions == labels
    curve = measure_curve(features, labels, num_classes=4, l2=PENALTY, seed=0, right=right, folds=5)
    recalls = [float(right[labels == label].double().mean()) for label in range(4)]
    assert curve.is_balanced
    assert curve.points[-1].accuracy.value == pytest.approx(sum(recalls) / 4)
    assert "balanced accuracy" in curve_sentence(curve.model_copy(update={"is_told": True}))


def test_many_images_and_classes_get_fewer_and_smaller_parts(monkeypatch):
    features, labels = draw(64, torch.Generator().manual_seed(0))
    whole = 256 * 30 * 4
    monkeypatch.setattr(learning_curve, "CHEAP", whole - 1)
    monkeypatch.setattr(learning_curve, "MOST", whole // 4)
    curve = measured(features, labels)
    assert [(point.images, point.probes) for point in curve.points] == [(16, 1), (32, 1), (64, 1), (205, 5)]
    assert math.isfinite(curve.twice.value)


def test_the_penalty_is_that_of_all_images(monkeypatch):
    asked = []

    def ask(features, labels, judges, *, num_classes, l2):
        asked.append((len(labels), l2))
        return guess_near(features, labels, judges, num_classes=num_classes, l2=l2)

    monkeypatch.setattr(learning_curve, "guess_near", ask)
    features, labels = draw(32, torch.Generator().manual_seed(0))
    measured(features, labels)
    assert [num * l2 for num, l2 in asked] == pytest.approx([128 * PENALTY] * 14)


CURVE = LearningCurveFacts.model_validate({
    "points": [
        {"images": n, "probes": 1, "accuracy": {"value": v, "low": v - 0.03, "high": v + 0.03, "n": 500}}
        for n, v in ((125, 0.7), (250, 0.76), (500, 0.8), (1000, 0.842))
    ],
    "judged": "val", "is_balanced": False, "num_images": 1000, "is_told": True,
    "exponent": {"value": 0.3, "low": 0.2, "high": 0.4, "n": 500},
    "now": {"value": 0.841, "low": 0.82, "high": 0.86, "n": 500},
    "twice": {"value": 0.87, "low": 0.85, "high": 0.89, "n": 500},
})  # fmt: skip


def test_one_line_tells_it():
    assert curve_sentence(CURVE) == "twice the labels: probe 84.1 -> about 87 % [85, 89]"
    assert curve_sentence(None) == ""


def test_the_figure_shows_every_point_with_its_interval_and_the_foretold_one_hollow():
    drawn = curve_figure(CURVE)
    assert isinstance(drawn, Markup)
    assert drawn.count('class="f0"') == 4
    assert drawn.count('class="hollow s0"') == 1
    assert drawn.count('class="whisker s0"') == 5
    assert "2,000" in drawn
    assert "foretold for 2,000: 87.0 % (85.0–89.0)" in drawn


@pytest.mark.technique("T188")
def test_plan_and_report_hold_it(shapes, tmp_path, capsys):
    from typer.testing import CliRunner

    from finetune.cli import app
    from finetune.reporting.text import facts_text

    wishes = [str(shapes), "data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]
    planned = CliRunner().invoke(app, ["plan", *wishes, "--json"])
    assert '"learning_curve"' in planned.stdout
    told = []
    run = ft.train(wishes[0], wishes[1:], runs=tmp_path, say=told.append)
    curve = run.facts.learning_curve
    said = curve_sentence(curve)
    assert said.startswith("twice the labels: probe ")
    assert said in "\n".join(told)
    assert said in facts_text(ft.survey(wishes[0], wishes[1:]))
    page = run.file("report.html").read_text()
    assert said.replace("->", "→")[1:].replace(" %", "\u00a0%") in page
    assert 'class="hollow s0"' in page
