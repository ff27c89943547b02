"""A refit: on which images, from which weights, who answers for what, how it goes on, and where it is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import draw_shapes
from safetensors.torch import load_file

import finetune as ft
from finetune.config.plan import read_plan
from finetune.ensembles.soups import load_start
from finetune.ensembling import ensemble
from finetune.errors import DataError, RecipeError, RunError
from finetune.features import refitting
from finetune.features.probing import fit_probe
from finetune.features.refitting import cross_fit
from finetune.features.survey import look
from finetune.inference.loading import load_final, load_held_out
from finetune.inference.predict import predict_probabilities
from finetune.inference.teacher import load_teacher
from finetune.metrics.calibration import fit_temperature
from finetune.metrics.conformal import fit_threshold
from finetune.models.heads import PROBE_SOFTENING
from finetune.planning.refit import LEAST_VAL, is_worth_refitting
from finetune.reporting.text import plan_text, scores_text
from finetune.runs.folder import RunFolder
from finetune.runs.resume import another_wish
from finetune.training import staged
from finetune.training.setup import training_batches
from finetune.training.staged import Kept, read_kept

SMALL = ["data.image_size=32", "train.batch_size=16", "train.epochs=2", "tracking.enabled=false"]
FULL = ["train.strategy=full", "train.checkpoint=best"]


def quiet(text):
    """Nobody listens."""


def recipe_of(images, *wishes):
    return ft.load_recipe(None, [f"data.root={images}", *SMALL, *wishes])


def start(images, runs, *wishes, say=quiet):
    return ft.train(recipe_of(images, *wishes), runs=runs, say=say)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs of these tests are."""
    return tmp_path_factory.mktemp("refit") / "runs"


@pytest.fixture(scope="module")
def full(shapes, runs):
    """A full fine-tuning with 12 val images, so that it is refit."""
    return start(shapes, runs, *FULL)


@pytest.fixture(scope="module")
def held(shapes, runs):
    """The same without a refit."""
    return start(shapes, runs, *FULL, "data.split.refit=false")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough images for a temperature, too few for val to choose the penalty."""
    return draw_shapes(tmp_path_factory.mktemp("many") / "drawn", per_class=60)


@pytest.fixture(scope="module")
def probe(many, runs):
    """A probe on them, cross-fitted."""
    return start(many, runs, "train.strategy=probe")


def seen_by(run):
    return look(ft.load_recipe(run.file("recipe.yaml")))


def stored(run):
    with np.load(run.file("predictions.npz")) as found:
        return {name: found[name] for name in found.files}


def answers(classifier, run, seen, role):
    return predict_probabilities(classifier, seen.dataset.store, seen.dataset.indices(role), run.plan, "center").numpy()


def curves(run, stage):
    rows = [line.split(",") for line in run.file("curves.csv").read_text().splitlines()[1:]]
    return [(int(row[1]), row[3], float(row[4])) for row in rows if row[0] == stage]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "probe"])
def test_the_probe_ends_on_all_labelled_images_with_the_penalty_that_was_chosen_before(name, request):
    run = request.getfixturevalue(name)
    seen, found = seen_by(run), load_file(run.file("probe.safetensors"))
    assert set(found) == {"weight", "bias", "held_out.weight", "held_out.bias"}
    rows = [index for role in ("train", "val", "calibration") for index in seen.dataset.indices(role)]
    features = seen.cache.features([seen.dataset.digests[row] for row in rows])
    labels = torch.from_numpy(seen.dataset.items.labels[rows]).long()
    solved = fit_probe(features, labels, num_classes=3, l2=seen.facts.probe.l2)
    torch.testing.assert_close(found["weight"], solved.weight.float(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found["held_out.weight"], seen.probe.weight.float())
    assert not torch.allclose(found["weight"], found["held_out.weight"], rtol=1e-2)
    if name == "probe":
        head = load_file(run.file("model.safetensors"))["head.linear.weight"]
        assert torch.equal(head, found["weight"])


def test_test_is_answered_by_the_refit_weights_and_val_by_those_before(full):
    seen, said, scores = seen_by(full), stored(full), full.read_json("scores.json")
    assert scores["temperature"] is None
    refit, before = load_final(full), load_held_out(full)
    files = {"1-full": "held_out.safetensors", "2-refit": "weights.safetensors"}
    weights = {on: load_file(full.file(f"stages/{on}/{name}")) for on, name in files.items()}
    assert [path.parent.name for path in full.path.glob("stages/*/weights.safetensors")] == ["2-refit"]  # one to find
    assert all(torch.equal(tensor, weights["2-refit"][name]) for name, tensor in refit.state_dict().items())
    assert all(torch.equal(tensor, weights["1-full"][name]) for name, tensor in before.state_dict().items())
    for role, classifier, other in (("test", refit, before), ("val", before, refit), ("calibration", before, refit)):
        np.testing.assert_allclose(said[f"{role}_probabilities"], answers(classifier, full, seen, role), atol=1e-6)
        assert np.abs(said[f"{role}_probabilities"] - answers(other, full, seen, role)).max() > 1e-4
    for role, probe in (("test", seen.refit.probe), ("val", seen.probe)):
        wanted = probe.logits(seen.features(role)).softmax(1).numpy()
        np.testing.assert_allclose(said[f"probe_{role}_probabilities"], wanted, atol=1e-6)


def test_without_a_refit_a_run_is_what_it_was(full, held):
    assert held.plan.stages == full.plan.stages[:1]
    assert held.final_weights().read_bytes() == full.held_out_weights().read_bytes()
    probe, both = (load_file(run.file("probe.safetensors")) for run in (held, full))
    assert set(probe) == {"weight", "bias"}
    assert all(torch.equal(tensor, both[f"held_out.{name}"]) for name, tensor in probe.items())
    assert curves(held, "1-full")[0] == curves(full, "1-full")[0]
    for name, array in stored(held).items():
        if not name.startswith(("test_prob", "probe_test")):
            np.testing.assert_array_equal(array, stored(full)[name])
    assert "held_out" not in held.file("scores.json").read_text()
    assert "refit" not in held.read_json("scores.json")
    with np.load(held.file("seen.npz")) as seen:
        assert set(seen.files) == {"train", "val"}


def test_the_folder_of_a_refit_run_holds_a_stage_more_and_no_file_more(full, held):
    files = {run: {str(file.relative_to(run.path)) for file in run.path.rglob("*")} for run in (full, held)}
    more = {"stages/2-refit", "stages/2-refit/last.ckpt", "stages/2-refit/weights.safetensors"}
    assert files[full] - files[held] == more | {"stages/1-full/held_out.safetensors"}
    assert files[held] - files[full] == {"stages/1-full/weights.safetensors"}


def test_no_val_watches_a_refit_and_its_curves_hold_what_training_says(full):
    found = curves(full, "2-refit")
    assert {name for _, name, _ in found} >= {"train/loss", "train/top1", "gradient_norm", "lr/head"}
    assert not [name for _, name, _ in found if name.startswith("val/")]
    kept = read_kept(full, 0)
    assert max(epoch for epoch, _, _ in found) + 1 == kept.epochs
    assert f"{kept.epochs} epochs on 60 labelled images, to the end" in full.file("log.txt").read_text()


@pytest.mark.slow
def test_a_refit_begins_from_the_pretrained_weights_and_the_probe_of_all_labelled_images(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "read_kept", lambda run, index: Kept(epochs=0, slowdown=1.0))
    run = start(shapes, tmp_path, *FULL, "train.epochs=1")
    seen, weights = seen_by(run), load_file(run.final_weights())
    for name, tensor in seen.backbone.state_dict().items():
        assert torch.equal(weights[f"backbone.{name}"], tensor), name
    probe = load_file(run.file("probe.safetensors"))["weight"]
    torch.testing.assert_close(weights["head.linear.weight"], PROBE_SOFTENING * probe)


@pytest.mark.slow
def test_a_refit_runs_as_many_epochs_as_were_kept_at_the_rates_that_were_left(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "read_kept", lambda run, index: Kept(epochs=1, slowdown=0.3))
    run = start(shapes, tmp_path, *FULL)
    assert {epoch for epoch, _, _ in curves(run, "2-refit")} == {0}
    rates = {stage: max(v for _, name, v in curves(run, stage) if name == "lr/head") for stage in ("1-full", "2-refit")}
    assert rates["2-refit"] < 0.4 * rates["1-full"]


def test_who_answered_is_said_in_scores_terminal_and_page(full, probe):
    for run, what in ((full, "model"), (probe, "probe")):
        scores, page = run.read_json("scores.json"), run.file("report.html").read_text(encoding="utf-8")
        assert scores["val"]["held_out"] == f"held out: by the {what} before refit"
        assert scores["probe"]["val"]["held_out"] == "held out: by the probe before refit"
        assert "held_out" not in scores["test"]
        assert f"answered by the {what} trained again on all" in scores["refit"]["note"]
        assert scores["refit"]["note"].split(" (")[0] in " ".join(scores_text(run.scores).split())
        assert scores["refit"]["note"] in page
    assert "out-of-fold: each labelled image" in scores_text(probe.scores)
    num = scores["temperature"]["n"]
    assert f"fitted on {num} images (out-of-fold: each labelled image" in page
    assert "stage 2, refit: stage 1 again, on all labelled images" in plan_text(full.plan)
    (why,) = [reason.why for reason in full.plan.reasons if reason.key == "data.split.refit"]
    assert "12 val images (< 100) decide little" in why and "all 60 labelled images (42 train, 12 val, 6" in why


@pytest.mark.slow
def test_a_second_look_solves_nothing_and_a_damaged_memory_is_solved_again(shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    solved = []
    monkeypatch.setattr(refitting, "fit_probe", lambda *rest, **more: solved.append(more) or fit_probe(*rest, **more))
    first, again = (look(recipe_of(shapes, "train.strategy=probe")) for _ in range(2))
    assert len(solved) == 1 + 5  # on all, and by folds
    assert again.refit.judged == first.refit.judged
    assert torch.equal(again.refit.logits, first.refit.logits)
    assert torch.equal(again.refit.probe.weight, first.refit.probe.weight)
    for path in (tmp_path / "findings").glob("*"):
        path.write_bytes(path.read_bytes()[:-8])
    damaged = look(recipe_of(shapes, "train.strategy=probe"))
    assert len(solved) == 2 * (1 + 5)
    assert torch.equal(damaged.refit.logits, first.refit.logits)
    assert look(recipe_of(shapes, "data.split.refit=false")).refit is None


@pytest.mark.technique("T005")
def test_the_temperature_and_the_threshold_of_a_refit_probe_are_cross_fitted(probe):
    seen, found, scores = seen_by(probe), stored(probe), probe.read_json("scores.json")
    rows = list(seen.refit.judged)
    labels = torch.from_numpy(seen.dataset.items.labels[rows]).long()
    assert sorted(rows) == seen.dataset.labelled()
    fitted = fit_temperature(seen.refit.logits, labels)
    assert scores["temperature"]["value"] == pytest.approx(fitted.value, rel=1e-3)
    assert (scores["temperature"]["n"], scores["conformal"]["num_calibration"]) == (len(rows), len(rows))
    threshold = fit_threshold(seen.refit.logits.softmax(1), labels, 0.9)
    assert scores["conformal"]["threshold"] == pytest.approx(threshold, rel=1e-4)
    assert fit_temperature(torch.from_numpy(found["out_of_fold_probabilities"]).log(), labels).value == pytest.approx(
        1, abs=0.01
    )
    features = seen.cache.features([seen.dataset.digests[row] for row in rows])
    own = seen.refit.probe.logits(features)  # in-sample: surer of every label, and no judge of itself
    assert fit_temperature(own, labels).value is None or fit_temperature(own, labels).value < 0.7 * fitted.value
    assert list(found["out_of_fold_names"]) == [seen.dataset.items[row].name for row in rows]


def noise(num, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator), torch.randint(0, 2, (num,), generator=generator)


def test_answers_of_folds_know_nothing_of_labels_that_are_noise():
    features, labels = noise(200, 300)  # separable: a probe has all of its own images right
    files = [str(number) for number in range(200)]
    judged, logits = cross_fit(features, labels, files, num_classes=2, l2=1e-2, seed=0)
    assert judged.tolist() == list(range(200))
    share = float((logits.argmax(1) == labels).double().mean())
    assert 0.35 < share < 0.65
    assert float(logits.std(0).min()) > 0.5  # and yet they are sure
    assert fit_temperature(logits, labels).log_loss_before > 0.69


def test_copies_and_frames_of_a_file_fall_into_one_fold():
    features, labels = noise(100, 300)
    twice, both = features.repeat(2, 1), labels.repeat(2)
    files = [str(number % 100) for number in range(200)]
    apart = [str(number) for number in range(200)]
    shares = []
    for named in (files, apart):
        _, logits = cross_fit(twice, both, named, num_classes=2, l2=1e-2, seed=0)
        shares.append(float((logits.argmax(1) == both).double().mean()))
    assert shares[0] < 0.65
    assert shares[1] > 0.8  # where the copy of an image is in another fold, it answers


def test_an_image_whose_class_no_other_fold_knows_is_not_answered(monkeypatch):
    features, labels = noise(40, 5)
    labels[7] = 2
    files = [str(number) for number in range(40)]
    judged, _ = cross_fit(features, labels, files, num_classes=3, l2=1e-2, seed=0)
    assert judged.tolist() == [number for number in range(40) if number != 7]
    files[8], labels[8] = files[7], 2  # its copy knows it no better
    judged, _ = cross_fit(features, labels, files, num_classes=3, l2=1e-2, seed=0)
    assert judged.tolist() == [number for number in range(40) if number not in (7, 8)]
    monkeypatch.setattr(refitting, "MOST_ANSWERS", 5)
    judged, logits = cross_fit(features, labels, files, num_classes=3, l2=1e-2, seed=0)
    assert (judged.tolist(), logits.shape) == ([0, 1, 2, 3, 4], (5, 3))
    assert cross_fit(features[:1], labels[:1], ["0"], num_classes=3, l2=1e-2, seed=0)[1].shape == (0, 3)


@pytest.fixture(scope="module")
def divided(shapes, tmp_path_factory):
    """Splits that the data name, with two val images and a calibration image whose very bytes are also in test."""
    root = tmp_path_factory.mktemp("divided") / "shapes"
    roles = ["train"] * 10 + ["val"] * 5 + ["calibration"] * 3 + ["test"] * 6
    for folder in sorted(shapes.iterdir()):
        for role, file in zip(roles, sorted(folder.iterdir()), strict=True):
            (root / role / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / role / folder.name)
    for role, name, copy in (("val", "disc", "a"), ("val", "square", "b"), ("calibration", "disc", "c")):
        tested = sorted((root / "test" / name).iterdir())[0]
        shutil.copy(tested, root / role / name / f"{copy}.png")
    return root


@pytest.fixture
def leaky(divided):
    """What is seen of them, and the plan."""
    recipe = recipe_of(divided, *FULL)
    seen = look(recipe)
    return seen, ft.make_plan(recipe, seen.facts)


def test_a_refit_takes_given_val_images_and_never_a_test_image(leaky):
    seen, plan = leaky
    batches = training_batches(plan, seen.dataset, "labelled")
    met = {int(index) for _, _, rows in batches for index in rows} | set(batches.indices.tolist())
    tested = {seen.dataset.digests[index] for index in seen.dataset.indices("test")}
    assert not tested & {seen.dataset.digests[index] for index in met}
    assert not tested & {seen.dataset.digests[row] for row in seen.refit.rows}
    assert len(batches.indices) == sum(seen.facts.labelled) == 3 * 18
    assert {seen.dataset.roles[index] for index in met} == {"train", "val", "calibration"}
    assert seen.facts.labelled == (18, 18, 18)
    (why,) = [reason.why for reason in plan.reasons if reason.key == "data.split.refit"]
    assert "17 val, 10 calibration, val and calibration as the data name them; 3 whose bytes are also in test" in why


def test_training_images_that_are_also_in_test_stay_as_the_data_say(divided, tmp_path):
    root = shutil.copytree(divided, tmp_path / "all")
    for role in ("val", "calibration"):
        shutil.rmtree(root / role)
        shutil.copytree(root / "test", root / role)
    facts = ft.survey(recipe_of(root, "train.strategy=probe"))
    assert facts.labelled == facts.counts["train"]
    assert not ft.make_plan(recipe_of(root, "train.strategy=probe"), facts).data.split.refit
    with pytest.raises(RecipeError, match=r"refit is true, but no val or calibration image is there"):
        ft.make_plan(recipe_of(root, "train.strategy=probe", "data.split.refit=true"), facts)


@pytest.fixture(scope="module")
def facts(shapes):
    """What is known of 72 images."""
    return ft.survey(recipe_of(shapes, "train.strategy=full"))


def planned(facts, *wishes):
    plan = ft.make_plan(ft.load_recipe(None, [*SMALL, *wishes]), facts)
    (reason,) = [reason for reason in plan.reasons if reason.key == "data.split.refit"]
    return plan, reason.why


OBSTACLES = [
    "train.schedule.name=plateau",
    "train.averaging.snapshots=2",
    "train.averaging.keep_last=1",
    "train.optimizer.name=lbfgs",
]
STILL = {"train.optimizer.name=lbfgs": ["train.batch_size=64", "augment.preset=none"]}


@pytest.mark.parametrize("wish", OBSTACLES)
def test_what_cannot_be_repeated_without_val_is_not_refit_and_refused_where_both_are_asked_for(facts, wish):
    wishes = ["train.strategy=full", wish, *STILL.get(wish, [])]
    plan, why = planned(facts, *wishes)
    assert (plan.data.split.refit, plan.probe_on, plan.is_refit) == (False, "labelled", False)
    key = wish.partition("=")[0]
    assert why.startswith(key) and "the probe alone ends on all 60 labelled images" in why
    with pytest.raises(RecipeError, match=rf"data.split.refit is true, but {key}"):
        planned(facts, *wishes, "data.split.refit=true")


def test_where_val_is_large_only_the_probe_is_refit_unless_the_recipe_says_so(facts):
    large = facts.model_copy(update={"counts": {**facts.counts, "val": (40, 40, 40)}, "labelled": (56, 56, 56)})
    plan, why = planned(large, "train.strategy=full")
    assert (plan.is_refit, plan.probe_on, len(plan.stages)) == (False, "labelled", 1)
    assert why.startswith("120 val images tell epochs apart")
    plan, _ = planned(large, "train.strategy=full", "data.split.refit=true")
    assert [(stage.name, stage.images) for stage in plan.stages] == [("full", "train"), ("refit", "labelled")]
    plan, _ = planned(large, "train.strategy=probe")
    assert (plan.data.split.refit, plan.probe_on, plan.is_refit) == (True, "labelled", True)
    plan, _ = planned(large, "train.strategy=probe", "data.split.refit=false")
    assert (plan.data.split.refit, plan.probe_on, plan.is_refit) == (False, "train", False)
    assert is_worth_refitting(LEAST_VAL - 1)
    assert not is_worth_refitting(LEAST_VAL)


def test_a_stage_is_repeated_with_all_its_rates(facts):
    plan, _ = planned(facts, "train.strategy=gradual", "train.epochs=5")
    half = len(plan.stages) // 2
    assert [plan.repeated(index) for index in range(2 * half)] == [*range(half), *range(half)]
    for one, again in zip(plan.stages[:half], plan.stages[half:], strict=True):
        assert again == one.model_copy(update={"name": "refit", "images": "labelled"})


def test_a_refit_costs_time_that_is_foretold(facts):
    timed = {"timing": [{"trains": str(n), "images_per_second": 10.0, "memory_mb": 1.0} for n in (4, 5)]}
    slow = type(facts).model_validate({**facts.model_dump(), **timed, "forward_images_per_second": 100.0})
    seconds = {}
    for wish in ("true", "false"):
        plan, _ = planned(slow, "train.strategy=full", f"data.split.refit={wish}")
        (seconds[wish],) = [row.seconds for row in plan.advice.forecasts if row.strategy == "full"]
    assert seconds["true"] - seconds["false"] == pytest.approx(2 * (60 / 10 + 0.15))


def test_a_plan_of_before_refits_is_read_as_one_without(held, tmp_path):
    plain = yaml.safe_load(held.file("plan.yaml").read_text())
    del plain["data"]["split"]["refit"], plain["probe_on"]
    for stage in plain["stages"]:
        del stage["images"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plain))
    assert read_plan(tmp_path / "plan.yaml") == held.plan


def test_a_run_stopped_in_the_refit_goes_on_to_the_same_weights(shapes, tmp_path, full):
    def stop(text):
        if text.startswith("2-refit  epoch 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(shapes, tmp_path, *FULL, say=stop)
    (folder,) = tmp_path.iterdir()
    run = RunFolder(folder)
    assert run.held_out_weights().exists()
    assert not run.final_weights().exists()
    ft.resume(run, say=quiet)
    assert run.final_weights().read_bytes() == full.final_weights().read_bytes()
    assert run.read_json("scores.json") == full.read_json("scores.json")


@pytest.mark.parametrize("file", ["last.ckpt", "weights.safetensors"])
@pytest.mark.slow
def test_a_run_killed_in_the_refit_goes_on_to_the_same_weights(shapes, tmp_path, full, file):
    words = [sys.executable, "-m", "finetune", "train", f"data.root={shapes}", *SMALL, *FULL]
    env, silent = {**os.environ, "FINETUNE_RUNS": str(tmp_path)}, subprocess.DEVNULL
    process = subprocess.Popen(words, env=env, stdout=silent, stderr=silent)
    while not list(tmp_path.glob(f"*/stages/2-refit/{file}")):
        assert process.poll() is None, "the run was faster"
        time.sleep(0.002)
    process.kill()
    process.wait()
    (folder,) = tmp_path.iterdir()
    run = ft.resume(folder, say=quiet)
    assert run.final_weights().read_bytes() == full.final_weights().read_bytes()
    assert run.read_json("scores.json") == full.read_json("scores.json")


@pytest.mark.slow
def test_a_refit_run_is_judged_again_and_predicts_by_the_refit(full, shapes, tmp_path):
    run = RunFolder(shutil.copytree(full.path, tmp_path / "run"))
    before, said = run.scores, stored(run)
    assert ft.evaluate(run, say=quiet) == before
    name = str(said["test_names"][0])
    (answer,) = ft.predict(run, [shapes / name])
    np.testing.assert_allclose(list(answer.probabilities.values()), said["test_probabilities"][0], atol=1e-5)
    five = ft.evaluate(run, views="five", say=quiet)
    assert five.val.held_out == five.center.val.held_out == "held out: by the model before refit"
    run.held_out_weights().unlink()
    with pytest.raises(RunError, match=r"is gone, the weights before the refit, and only these can judge val"):
        ft.evaluate(run, say=quiet)


def test_in_other_views_a_refit_probe_is_judged_on_val_by_the_one_before(probe, tmp_path):
    run = RunFolder(shutil.copytree(probe.path, tmp_path / "run"))
    scores = ft.evaluate(run, views="five", say=quiet)
    assert scores.temperature is None  # of 15 calibration images, for folds looked at the centre alone
    seen = seen_by(run)
    for classifier, wanted in ((load_held_out(run), seen.probe), (load_final(run), seen.refit.probe)):
        torch.testing.assert_close(classifier.head.linear.weight, wanted.weight.float())
    assert scores.center.test.top1 == probe.scores.test.top1


@pytest.mark.slow
def test_another_run_begins_from_the_weights_before_the_refit_which_have_not_seen_val(full, shapes):
    wish = another_wish(full, ["train.epochs=3"])
    assert wish.backbone == str(full.path / "stages" / "1-full")
    facts = ft.survey(wish)
    assert not [line for line in facts.warnings if "were seen" in line]
    found = ft.survey(recipe_of(shapes, "train.strategy=probe", f"backbone={full.path}"))
    (line,) = [line for line in found.warnings if "were seen" in line]
    assert "12 of 12 val images" in line and "before the refit" in line
    assert facts.backbone.weights_digest != found.backbone.weights_digest


def test_a_teacher_that_was_refit_teaches_by_the_weights_that_have_not_seen_val(full, shapes):
    distillation = SimpleNamespace(teacher=str(full.path))
    plan = SimpleNamespace(train=SimpleNamespace(distillation=distillation), view=full.plan.view)
    for on, run in (("train", load_held_out(full)), ("labelled", load_final(full))):
        taught = load_teacher(plan, on).network.state_dict()
        assert all(torch.equal(tensor, taught[name]) for name, tensor in run.state_dict().items())


@pytest.fixture(scope="module")
def pair(shapes, runs, full):
    """The refit run, and another of a different rate."""
    return full, start(shapes, runs, *FULL, "train.optimizer.lr=0.001")


@pytest.mark.parametrize("how", ["average", pytest.param("greedy", marks=pytest.mark.slow)])
def test_an_average_of_refit_runs_is_judged_on_val_by_members_before_their_refit(pair, tmp_path, how):
    made = ensemble([run.path for run in pair], how=how, runs=tmp_path, say=quiet)
    said, seen = stored(made), seen_by(pair[0])
    members = json.loads(made.file("ensemble.json").read_text())["members"]
    for role, load in (("val", load_held_out), ("test", load_final)):
        parts = [row["weight"] * answers(load(RunFolder(Path(row["run"]))), pair[0], seen, role) for row in members]
        np.testing.assert_allclose(said[f"{role}_probabilities"], sum(parts), atol=1e-5)
    assert made.read_json("scores.json")["val"]["held_out"] == "held out: by the model before refit"


@pytest.mark.parametrize(
    "how", ["soup", *(pytest.param(how, marks=pytest.mark.slow) for how in ("greedy_soup", "wise"))]
)
def test_a_mixture_of_refit_runs_is_chosen_before_and_made_after_the_refit(pair, tmp_path, how):
    parents = pair[:1] if how == "wise" else pair
    made = ensemble([run.path for run in parents], how=how, runs=tmp_path, say=quiet)
    record = made.read_json("soup.json")
    shares = {row["run"]: row["weight"] for row in record["members"]}
    for kind, weights in (("held_out", made.held_out_weights()), ("final", made.final_weights())):
        states = {str(run.path): load_file(getattr(run, f"{kind}_weights")()) for run in parents}
        mixed = load_file(weights)
        for name, tensor in mixed.items():
            wanted = sum(share * states[run][name].double() for run, share in shares.items())
            if how == "wise":
                begun = load_start(pair[0], is_held_out=kind == "held_out").state_dict()[name]
                wanted = wanted + (1 - record["alpha"]) * begun.double()
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)


def test_weights_before_and_after_a_refit_are_not_mixed(full, held, tmp_path):
    with pytest.raises(RunError, match=r"has another end than .*on the training images, and not trained on all"):
        ensemble([full.path, held.path], how="soup", runs=tmp_path, say=quiet)


def test_without_val_there_is_nothing_that_could_choose(shapes):
    with pytest.raises(DataError, match="no images play the role val"):
        ft.survey(recipe_of(shapes, "data.split.val=0", "data.split.refit=true"))


@pytest.mark.parametrize(
    "wishes",
    [
        ["train.strategy=full", "train.averaging.kind=ema", "train.batch_norm=train"],
        ["train.strategy=gradual", "train.epochs=4", "train.averaging.kind=swa", "train.imbalance.kind=sampler"],
        ["train.strategy=surgical", "train.imbalance.kind=logit_adjustment", "regularization.l2_sp=0.1"],
        ["train.strategy=norm_only", "train.schedule.name=cyclic", "train.schedule.cycles=2", "train.epochs=4"],
        ["pretrained=false"],
    ],
    ids=lambda wishes: wishes[0],
)
@pytest.mark.slow
def test_every_strategy_is_refit_to_its_end_and_repeats(shapes, tmp_path, wishes):
    once, again = (start(shapes, tmp_path / name, *wishes) for name in ("once", "again"))
    assert once.plan.is_refit
    assert once.final_weights().read_bytes() == again.final_weights().read_bytes()
    assert once.final_weights().read_bytes() != once.held_out_weights().read_bytes()
    assert once.read_json("scores.json")["test"]["top1"]["n"] == 12
