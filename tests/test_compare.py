"""Comparing finished runs: by the names of test images, to the letter, and with no word that images do not carry."""

import shutil

import numpy as np
import pytest
import torch

import finetune as ft
from finetune.config.plan import Reason
from finetune.config.recipe import ScheduleSpec
from finetune.errors import RunError
from finetune.evaluation.compare import compare, selection_flags
from finetune.metrics.intervals import paired_difference
from finetune.metrics.significance import aggregate_seeds, images_needed, mcnemar
from finetune.reporting.comparison_text import comparison_text
from finetune.runs.folder import RunFolder

CLASSES = ("disc", "square", "stripes")


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A real run, for the tests that change copies of it."""
    wishes = [f"data.root={shapes}", "data.image_size=32", "train.batch_size=16", "train.epochs=1"]
    wishes += ["tracking.enabled=false", "data.split.refit=false", "train.strategy=full", "train.checkpoint=best"]
    return ft.train(ft.load_recipe(None, wishes), runs=tmp_path_factory.mktemp("runs"), say=lambda text: None)


@pytest.fixture
def judged(finished, tmp_path):
    """A function that gives a run with a chosen plan, and with chosen images right, out of 60."""

    def make(name, right, *, names=None, classes=CLASSES, **changes):
        run = RunFolder(tmp_path / name)
        shutil.copytree(finished.path, run.path)
        plan = finished.plan.model_copy(update={"classes": classes, **changes})
        run.write_text("plan.yaml", plan.to_yaml())
        names = [f"{number:03}.png" for number in range(60)] if names is None else names
        truth = np.array([int(name[:3]) % 3 for name in names], dtype=int)  # by place among CLASSES
        called = np.where(np.isin(np.arange(len(names)), list(right)), truth, (truth + 1) % 3)
        column = [classes.index(name) for name in CLASSES]
        probabilities = np.full((len(names), 3), 0.1, dtype=np.float32)
        probabilities[np.arange(len(names)), np.array(column)[called]] = 0.8
        labels = np.array(column)[truth]
        arrays = {"test_names": np.array(names, dtype=str), "test_probabilities": probabilities, "test_labels": labels}
        np.savez(run.file("predictions.npz"), **arrays)
        return run

    return make


@pytest.mark.technique("T163")
def test_a_pair_is_compared_on_test_as_the_theory_says(judged):
    good, poor = judged("good", range(50)), judged("poor", [*range(8, 50), 58])
    found = compare([poor, good])
    assert [row.run for row in found.runs] == ["good", "poor"]  # by test, whatever the order given
    (pair,) = found.pairs
    assert (pair.only_first_right, pair.only_second_right, pair.n) == (8, 1, 60)
    assert pair.difference == paired_difference(8, 1, 60)
    assert pair.p == pair.p_adjusted == mcnemar(8, 1) < 0.05
    assert pair.sentence == "the first is better by 11.7 points on 60 images" and pair.is_told_apart
    loss = (np.log(0.8) - np.log(0.1)) * (8 - 1) / 60
    assert pair.log_loss_difference.value == pytest.approx(-loss, abs=1e-6)
    assert found.runs[0].top1.value == pytest.approx(50 / 60)


def test_runs_that_images_cannot_tell_apart_are_not_told_apart(judged):
    found = compare([judged("a", range(50)), judged("b", range(2, 50))])
    (pair,) = found.pairs
    assert not pair.is_told_apart and pair.images_needed == images_needed(2, 0, 60)
    assert pair.sentence == "cannot be told apart on 60 images; about 2,600 would be needed to see 1 point"
    assert pair.difference.low < 0 < pair.difference.high


def test_a_run_against_a_copy_of_itself_differs_in_nothing(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "again")
    found = compare([finished, RunFolder(tmp_path / "again")])
    (pair,) = found.pairs
    assert pair.difference.value == pair.log_loss_difference.value == 0 and pair.p == 1
    scores = finished.scores.test
    assert found.runs[0].top1 == scores.top1 and found.runs[0].log_loss == scores.log_loss
    assert found.seed_groups == ()  # one seed, twice


@pytest.mark.technique("T163")
def test_nothing_said_depends_on_val(judged):
    runs = [judged("a", range(50)), judged("b", range(20))]
    before = compare(runs)
    for run, scores in zip(runs, (0.0, 1.0), strict=True):
        known = run.read_json("scores.json")
        known["val"]["top1"] |= {"value": scores}
        run.write_json("scores.json", known)
    assert compare(runs) == before


def test_images_and_classes_are_matched_by_name_and_not_by_place(judged):
    names = [f"{number:03}.png" for number in range(60)]
    turned = judged("turned", range(60), names=names[::-1], classes=("stripes", "disc", "square"))
    found = compare([judged("straight", range(60)), turned])
    (pair,) = found.pairs
    assert pair.only_first_right == pair.only_second_right == 0
    assert found.runs[1].top1.value == 1.0


def test_images_that_only_one_run_was_tested_on_are_left_out_and_counted(judged):
    fewer = judged("fewer", range(30), names=[f"{number:03}.png" for number in range(20, 60)])
    found = compare([judged("more", range(60)), fewer])
    (pair,) = found.pairs
    assert (pair.n, pair.only_in_first, pair.only_in_second) == (40, 20, 0)
    assert pair.only_first_right == 10
    assert "20 test images of more are no test images of fewer: left out" in found.notes


def test_an_image_that_is_listed_twice_counts_once(judged):
    names = [f"{number:03}.png" for number in [*range(60), 0, 1]]
    found = compare([judged("twice", range(62), names=names), judged("once", range(60))])
    assert [row.n for row in found.runs] == [60, 60] and found.pairs[0].n == 60


def test_runs_without_a_shared_test_image_are_refused(judged):
    other = judged("other", range(9), names=[f"{number:03}.png" for number in range(100, 160)], stages=())
    with pytest.raises(RunError, match="share no test image"):
        compare([judged("one", range(50)), other])


def test_other_classes_are_refused_by_name(judged):
    other = judged("other", range(9))
    other.write_text("plan.yaml", other.plan.model_copy(update={"classes": ("disc", "square", "rings")}).to_yaml())
    with pytest.raises(RunError, match="only in the former rings; only in the latter stripes"):
        compare([judged("one", range(50)), other])


def test_an_image_that_was_sorted_anew_is_refused_by_name(judged):
    changed = judged("changed", range(9))
    with np.load(changed.file("predictions.npz")) as stored:
        arrays = dict(stored)
    arrays["test_labels"] = np.where(arrays["test_names"] == "007.png", 0, arrays["test_labels"])
    np.savez(changed.file("predictions.npz"), **arrays)
    with pytest.raises(RunError, match=r"1 test images have one class in \w+ and another in \w+, such as 007\.png"):
        compare([judged("one", range(50)), changed])


def test_runs_that_cannot_be_compared_are_named(judged, finished):
    run = judged("one", range(9))
    with pytest.raises(RunError, match="two runs or more, got 1"):
        compare([run])
    with pytest.raises(RunError, match="named twice"):
        compare([run, RunFolder(run.path)])
    with pytest.raises(RunError, match="no test images to compare on"):
        compare([run, judged("empty", [], names=[])])
    run.file("predictions.npz").unlink()
    with pytest.raises(RunError, match=r"has no predictions\.npz. `finetune evaluate"):
        compare([finished, run])


def test_runs_that_differ_in_the_seed_alone_become_a_mean_and_a_spread(judged):
    right = {0: 50, 1: 53, 2: 47}
    runs = [judged(f"s{seed}", range(count), seed=seed) for seed, count in right.items()]
    found = compare([*runs, judged("other", range(40), seed=3, backbone="another")])
    (group,) = found.seed_groups
    expected = aggregate_seeds([count / 60 for count in right.values()])
    assert group.runs == ("s0", "s1", "s2") and group.seeds == (0, 1, 2) and group.same_images
    assert group.top1.mean == pytest.approx(expected.mean)
    assert group.top1.spread == pytest.approx(expected.spread) == pytest.approx(0.05)
    assert group.top1.high == pytest.approx(min(1, expected.high))
    assert found.group_pairs == ()


def test_seeds_that_cut_other_test_images_are_no_pair_but_still_a_group(judged):
    names = [f"{number:03}.png" for number in range(60, 120)]
    runs = [judged("s0", range(50), seed=0), judged("s1", range(40), names=names, seed=1, split_digest="other")]
    found = compare(runs)
    assert found.pairs == () and [(one.first, one.second) for one in found.apart] == [("s0", "s1")]
    assert not found.seed_groups[0].same_images and found.seed_groups[0].seeds == (0, 1)


def test_two_recipes_are_compared_seed_by_seed(judged):
    first = [judged(f"a{seed}", range(50 + seed), seed=seed) for seed in range(3)]
    second = [judged(f"b{seed}", range(40 + 2 * seed), seed=seed, backbone="another") for seed in range(3)]
    found = compare([*second, *first])
    (pair,) = found.group_pairs
    assert pair.seeds == (0, 1, 2)
    expected = aggregate_seeds([10 / 60, 9 / 60, 8 / 60])
    assert pair.difference.mean == pytest.approx(expected.mean)
    each = np.repeat([1, 2 / 3, 1 / 3, 0], [6, 3, 3, 48])  # by image, the mean over seeds
    half = np.hypot(expected.high - expected.mean, 1.96 * each.std() / np.sqrt(60))
    assert pair.difference.high - expected.mean == pytest.approx(half, rel=1e-4)
    assert pair.sentence == "the first is better by 15.0 points on average"
    fewer = compare([*second[:2], *first[:2]]).group_pairs[0]
    assert fewer.sentence == "2 seeds are too few to tell which is better"


def test_many_pairs_are_judged_together(judged):
    runs = [judged("a", range(50)), judged("b", range(6, 50)), judged("c", [*range(6, 50), 50])]
    found = compare(runs)
    pair = next(pair for pair in found.pairs if {pair.first, pair.second} == {"a", "b"})
    assert pair.p == 0.03125 and pair.p_adjusted > 0.05 and not pair.is_told_apart
    assert any("Holm" in note for note in found.notes) and any("luckiest" in note for note in found.notes)


def test_the_text_fits_a_plain_terminal(judged):
    long = "a-long-name-of-images-" * 3 + "mobilenetv2_100.imagenet_keras-20260101-120000"
    first = [judged(f"{long}-{seed}", range(50 + seed), seed=seed) for seed in range(3)]
    second = [judged(f"b{seed}", range(40 + seed), seed=seed, backbone="another") for seed in range(3)]
    text = comparison_text(compare([*first, *second]))
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    for said in (
        "top-1 86.7 % [",
        "cannot be told apart on 60",
        "S1  runs 3, 2, 1: top-1 85.0 %, spread 1.7",
        "S1 - S2",
    ):
        assert said in text, text
    assert "1 is better by 20.0 points on 60 images" in " ".join(text.split())


@pytest.mark.technique("T163")
def test_what_looked_at_val_is_named(finished):
    flags = selection_flags(finished.plan)
    assert [flag.partition(":")[0] for flag in flags] == ["probe", "train.checkpoint", "train.patience"]
    assert "lowest loss on val" in flags[1]
    assert not any(
        flag.startswith("probe") for flag in selection_flags(finished.plan, probe_chosen_by="cross-validation")
    )


@pytest.mark.technique("T163")
def test_every_look_at_val_has_a_flag_and_test_is_never_one(finished):
    plan = finished.plan

    def flags(reasons=(), **train):
        reasons = tuple(Reason(key=key, value="x", why=why) for key, why in reasons)
        return selection_flags(
            plan.model_copy(update={"reasons": reasons, "train": plan.train.model_copy(update=train)})
        )

    advised = flags([("train.strategy", "700 training images; expected above the probe [small, similar]")])
    piloted = flags([("train.strategy", "a pilot on 90 val images: full 91 % after 20 s [small, similar]")])
    lowest = "all but the lowest quarter of 13 stages and all above the best depth; the first layers stay"
    deep = flags([("train.depth", lowest)])
    mirrored = flags([("data.invariances", "mirroring shows: 80 % of 300 originals are told from their mirror images")])
    last = flags(checkpoint="last")
    falling = plan.stages[0].model_copy(update={"schedule": ScheduleSpec(name="plateau")})
    plateau = selection_flags(plan.model_copy(update={"stages": (falling,)}))
    assert advised[0].startswith("train.strategy: the advice") and piloted[0].startswith("train.strategy: short")
    assert deep[0].startswith("train.depth") and mirrored[0].startswith("data.invariances")
    assert "clearly worse on val" in last[-1] and not any(flag.startswith("train.patience") for flag in last)
    assert plateau[-1].startswith("train.schedule")
    every = [*advised, *piloted, *deep, *mirrored, *last, *plateau, *selection_flags(plan)]
    assert all("val" in flag and "test" not in flag for flag in every)


def test_a_probe_run_chose_nothing_but_its_penalty(finished):
    probe = finished.plan.model_copy(update={"stages": ()})
    assert [flag.partition(":")[0] for flag in selection_flags(probe)] == ["probe"]
    random = probe.model_copy(update={"pretrained": False})
    assert selection_flags(random) == []


def test_the_draws_of_the_caller_stay_as_they_were(judged):
    runs = [judged("a", range(50)), judged("b", range(40))]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    compare(runs)
    assert torch.equal(torch.rand(1), expected)
