"""The whole walk on real files: what it leaves, that it repeats, and that it survives being killed."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_shapes
from PIL import Image
from safetensors.torch import load_file

import finetune as ft
from finetune import pipeline
from finetune.errors import BackboneError, DataError, RecipeError, RunError
from finetune.metrics.calibration import fit_temperature, log_probabilities
from finetune.models.heads import PROBE_SOFTENING
from finetune.pipeline import summarize
from finetune.preparing import extract, plan
from finetune.reporting.svg import percent
from finetune.runs.folder import FILES, RunFolder

TINY = ["data.image_size=32", "train.batch_size=16"]
SMALL = [*TINY, "train.epochs=3", "tracking.enabled=false", "data.split.refit=false"]


def quiet(text):
    """Nobody listens."""


def start(shapes, tmp_path, *wishes):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes])
    return ft.train(recipe, runs=tmp_path / "runs", say=quiet)


@pytest.fixture(scope="module")
def full(shapes, tmp_path_factory):
    """One full fine-tuning, for the tests that only look."""
    return start(shapes, tmp_path_factory.mktemp("full"), "train.strategy=full", "train.checkpoint=best")


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files_of(run):
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())


def test_layers_that_are_not_there_are_refused_before_a_plan_is_written(shapes, tmp_path):
    wishes = ["train.strategy=partial", "train.layers=[layer9]"]
    with pytest.raises(RecipeError, match=r"'layer9' is neither. Nearest: layer4"):
        plan(ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes]), say=quiet)
    with pytest.raises(RecipeError, match=r"'layer9' is neither"):
        start(shapes, tmp_path, *wishes)
    assert not list((tmp_path / "runs").glob("*/plan.yaml"))


def test_a_run_folder_holds_what_is_documented_to_the_letter(full):
    stage = ["stages/1-full/last.ckpt", "stages/1-full/weights.safetensors"]
    assert files_of(full) == sorted([name for name in FILES if name != "tracking.json"] + stage)


def test_a_probe_run_has_no_stage_and_the_probe_is_the_model(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=probe")
    assert files_of(run) == sorted(name for name in FILES if name != "tracking.json")
    scores = run.read_json("scores.json")
    assert scores["test"] == scores["probe"]["test"]
    assert scores["test"]["top1"]["value"] > 0.6  # of three classes


def test_scores_say_what_the_stored_predictions_say(full):
    scores, stored = full.read_json("scores.json"), np.load(full.file("predictions.npz"))
    right = stored["test_probabilities"].argmax(1) == stored["test_labels"]
    assert scores["test"]["top1"]["value"] == pytest.approx(right.mean())
    assert scores["test"]["top1"]["n"] == len(right)
    assert scores["test"]["top1"]["low"] < right.mean() < scores["test"]["top1"]["high"] or right.all()
    probe = stored["probe_test_probabilities"].argmax(1) == stored["test_labels"]
    assert scores["paired"]["test"]["difference"] == pytest.approx(right.mean() - probe.mean())


@pytest.mark.technique("T006")
@pytest.mark.technique("T005")
def test_the_temperature_is_fitted_to_calibration_images_and_to_no_others(tmp_path):
    drawn = draw_shapes(tmp_path / "drawn", per_class=70)
    wishes = ["train.strategy=probe", "data.split.calibration=0.5", "data.split.val=0.15", "data.split.test=0.15"]
    run = start(drawn, tmp_path, *wishes)
    arrays, found = np.load(run.file("predictions.npz")), run.read_json("scores.json")["temperature"]
    assert len(arrays["calibration_labels"]) >= 100 and abs(found["value"] - 1) > 0.02
    left = {}
    for role in ("val", "calibration"):
        probabilities, labels = (torch.from_numpy(arrays[f"{role}_{part}"]) for part in ("probabilities", "labels"))
        left[role] = fit_temperature(log_probabilities(probabilities), labels).value
    assert left["calibration"] == pytest.approx(1, abs=1e-3)  # nothing more is to be had there
    assert abs(left["val"] - 1) > 0.02


def test_fine_tuning_starts_where_the_probe_ended(full):
    rows = [line.split(",") for line in full.file("curves.csv").read_text().splitlines()[1:]]
    start = {row[3]: float(row[4]) for row in rows if row[1] == "-1"}
    found = full.read_json("facts.json")["probe"]
    assert start["val/top1"] == found["val"]["value"]
    probe, stored = load_file(full.file("probe.safetensors")), np.load(full.file("predictions.npz"))
    assert probe["weight"].shape[0] == stored["probe_val_probabilities"].shape[1]
    logits, labels = torch.from_numpy(stored["probe_val_probabilities"]).log(), torch.from_numpy(stored["val_labels"])
    softened = torch.nn.functional.cross_entropy(PROBE_SOFTENING * logits, labels)
    assert start["val/loss"] == pytest.approx(float(softened), abs=1e-4)


@pytest.mark.technique("T180")
def test_the_kept_weights_are_those_of_the_best_epoch(full):
    rows = [line.split(",") for line in full.file("curves.csv").read_text().splitlines()[1:]]
    best = min(float(row[4]) for row in rows if row[3] == "val/tempered_loss")
    kept = torch.load(full.file("stages/1-full/last.ckpt"), weights_only=True)["keeper"]
    assert kept["best_loss"] == best
    weights = load_file(full.final_weights())
    assert all(torch.equal(weights[name], value) for name, value in kept["best_state"].items())


def test_the_same_recipe_gives_the_same_weights(shapes, tmp_path, full):
    again = start(shapes, tmp_path, "train.strategy=full", "train.checkpoint=best")
    assert sha(again.final_weights()) == sha(full.final_weights())
    other = start(shapes, tmp_path, "train.strategy=full", "train.checkpoint=best", "seed=1")
    assert sha(other.final_weights()) != sha(full.final_weights())


@pytest.mark.technique("T072")
def test_a_partial_run_leaves_the_lower_stages_bit_identical(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=partial", "train.depth=1", "train.batch_norm=train")
    from finetune.config.backbone_names import read_zoo
    from finetune.models.backbones import load_backbone

    backbone = load_backbone(run.plan.backbone, zoo=read_zoo())
    top, kept = len(backbone.stages) - 1, torch.load(run.file("stages/1-partial/last.ckpt"), weights_only=True)
    last = {name.removeprefix("classifier."): value for name, value in kept["state_dict"].items()}
    moved = set()
    for name, value in backbone.state_dict().items():
        if backbone.stage_of[name] < top:
            assert torch.equal(last[f"backbone.{name}"], value), name
        elif not torch.equal(last[f"backbone.{name}"], value):
            moved.add(name)
    assert any("running_mean" in name for name in moved)
    assert any("weight" in name for name in moved)


def run_in_process(words, env):
    """The tool as a process of its own, in which Ctrl-C works even where our parent ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - nothing else runs here
    )


def kill_when(process, condition):
    """`kill -9` as soon as `condition` holds; False where the run was faster."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("plan.yaml", marks=pytest.mark.slow),
        pytest.param("curves.csv", marks=pytest.mark.slow),
        "stages/1-full/last.ckpt",
        pytest.param("stages/1-full/weights.safetensors", marks=pytest.mark.slow),
        pytest.param("scores.json", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_in_the_same_weights(shapes, tmp_path, full, moment):
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    words = ["train", f"data.root={shapes}", *SMALL, "train.strategy=full", "train.checkpoint=best"]
    process = run_in_process(words, env)
    assert kill_when(process, lambda: any((tmp_path / "runs").glob(f"*/{moment}")))
    (folder,) = (tmp_path / "runs").iterdir()
    done = run_in_process(["resume", str(folder), "--json"], env)
    answer, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    run = RunFolder.open(json.loads(answer)["run"])
    assert sha(run.final_weights()) == sha(full.final_weights())
    assert run.read_json("scores.json") == full.read_json("scores.json")
    values = [line for line in run.file("curves.csv").read_text().splitlines() if "images_per_second" not in line]
    assert values == [
        line for line in full.file("curves.csv").read_text().splitlines() if "images_per_second" not in line
    ]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_killed_run_of_micro_batches_ends_in_the_same_weights_though_each_piece_draws_its_dropout(shapes, tmp_path):
    wishes = [
        "train.strategy=full",
        "hardware.micro_batch=5",
        "head.dropout=0.5",
        "regularization.stochastic_depth=0.2",
    ]
    wishes += ["augment.mixup=0.4"]
    undisturbed = start(shapes, tmp_path / "undisturbed", *wishes)
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    process = run_in_process(["train", f"data.root={shapes}", *SMALL, *wishes], env)
    assert kill_when(process, lambda: any((tmp_path / "runs").glob("*/stages/1-full/last.ckpt")))
    (folder,) = (tmp_path / "runs").iterdir()
    assert not list(folder.glob("stages/1-full/weights.safetensors"))
    ft.resume(folder, say=quiet)
    assert sha(RunFolder.open(folder).final_weights()) == sha(undisturbed.final_weights())
    whole = start(shapes, tmp_path / "whole", *wishes, "hardware.micro_batch=0")
    assert sha(whole.final_weights()) != sha(undisturbed.final_weights())


def test_memory_is_given_back_after_the_survey_and_after_training(shapes, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline, "give_back_memory", lambda: calls.append("given back"))
    for name in ("look", "_train_stages", "evaluate_run"):
        own = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, lambda *a, own=own, name=name, **b: calls.append(name) or own(*a, **b))
    start(shapes, tmp_path, "train.strategy=probe")
    assert calls == ["look", "given back", "_train_stages", "given back", "evaluate_run"]


def test_halves_of_files_that_a_kill_left_are_swept_by_the_resume(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=probe")
    left = [run.file(".environment.json.591.tmp"), run.path / "stages" / ".weights.safetensors.7.tmp"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    ft.resume(run.path, say=quiet)
    assert not any(path.exists() for path in left)


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run_and_says_how(shapes, tmp_path):
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    words = [
        "train",
        f"data.root={shapes}",
        *TINY,
        "train.strategy=full",
        "train.epochs=300",
        "train.patience=300",
        "tracking.enabled=false",
    ]
    process = run_in_process(words, env)
    while process.poll() is None and not list((tmp_path / "runs").glob("*/stages/1-full/last.ckpt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    (folder,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 130
    assert f"finetune resume {folder}` goes on from here" in said
    assert "Traceback" not in said


def test_resuming_a_finished_run_changes_nothing(full):
    before = {name: sha(full.file(name)) for name in ("plan.yaml", "scores.json", "stages/1-full/weights.safetensors")}
    ft.resume(full.path, say=quiet)
    assert before == {name: sha(full.file(name)) for name in before}


def test_a_run_goes_on_from_any_working_directory(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes.parent)
    run = start(shapes.name, tmp_path, "train.strategy=probe")
    run.file("scores.json").unlink()
    monkeypatch.chdir(tmp_path)
    ft.resume(run.path, say=quiet)
    assert run.read_json("scores.json")["test"]["top1"]["n"] > 0


def test_changed_images_stop_a_resume(shapes, tmp_path):
    images = shutil.copytree(shapes, tmp_path / "images")
    run = start(images, tmp_path, "train.strategy=probe")
    (images / "disc" / "00.png").unlink()
    with pytest.raises(RunError, match="the images have changed since the plan was made"):
        ft.resume(run.path, say=quiet)


def test_one_run_is_one_process_at_a_time(full):
    with full.lock(), pytest.raises(RunError, match="another process is working on"):
        ft.resume(full.path, say=quiet)


def test_broken_files_are_named_counted_and_left_out(shapes, tmp_path):
    images = shutil.copytree(shapes, tmp_path / "images")
    (images / "disc" / "empty.png").write_bytes(b"")
    (images / "square" / "words.jpg").write_text("not an image")
    whole = (images / "disc" / "01.png").read_bytes()
    (images / "disc" / "cut.png").write_bytes(whole[: len(whole) // 2])
    facts = ft.survey(ft.load_recipe(str(images), SMALL))
    assert {bad.name for bad in facts.bad_images} == {"disc/empty.png", "square/words.jpg", "disc/cut.png"}
    assert facts.num_images == 72
    with pytest.raises(DataError, match=r"3 images cannot be read: .*set data\.on_bad_image to skip"):
        ft.survey(ft.load_recipe(str(images), [*SMALL, "data.on_bad_image=fail"]))


@pytest.mark.technique("T018")
def test_random_weights_are_a_control_without_a_probe(shapes, tmp_path):
    run = start(shapes, tmp_path, "pretrained=false")
    assert run.plan.train.strategy == "full"
    assert run.plan.stages[0].lr_backbone == run.plan.stages[0].lr_head
    scores = run.read_json("scores.json")
    assert "probe" not in scores
    assert scores["test"]["top1"]["n"] == sum(run.read_json("facts.json")["counts"]["test"]) > 0


@pytest.mark.parametrize("wish", ["pretrained=true", "pretrained=false", "data.normalize=channel_mean"])
@pytest.mark.slow
def test_val_is_judged_by_the_pixels_it_was_watched_with(shapes, tmp_path, wish):
    run = start(shapes, tmp_path, "train.strategy=full", wish)
    rows = [line.split(",") for line in run.file("curves.csv").read_text().splitlines()[1:]]
    watched = [float(row[4]) for row in rows if row[3] == "val/loss"][-1]  # with so few val images the last is kept
    assert run.read_json("scores.json")["temperature"] is None
    assert run.read_json("scores.json")["val"]["log_loss"]["value"] == pytest.approx(watched, abs=1e-4)


def test_no_images_to_choose_by_is_said(shapes, tmp_path):
    for wish in ("pretrained=false", "pretrained=true"):
        with pytest.raises(DataError, match="no images play the role val"):
            start(shapes, tmp_path, wish, "data.split.val=0")


def test_a_network_of_one_size_says_which(shapes, tmp_path):
    with pytest.raises(BackboneError, match=r"does not take images of 96 px(.|\n)*data\.image_size to 224"):
        start(shapes, tmp_path, "backbone=mixer_s32_224", "pretrained=false", "data.image_size=96")


def test_nothing_is_made_where_there_are_no_images(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        start(tmp_path / "nowhere", tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_page_is_written_again_without_its_images(shapes, tmp_path):
    images = shutil.copytree(shapes, tmp_path / "images")
    run = start(images, tmp_path, "train.strategy=probe")
    shutil.rmtree(images)
    run.file("report.html").unlink()
    assert ft.report(run.path, say=quiet).stat().st_size > 10_000


def test_a_mirror_is_not_used_in_judging_unless_it_is_declared(full, tmp_path):
    run = RunFolder(shutil.copytree(full.path, tmp_path / "run"))
    scores = ft.evaluate(run.path, views="ten", say=quiet)
    assert scores.views == "five"
    assert "hflip" in scores.views_note


def test_ten_crops_are_reported_beside_the_centre(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=full", "data.invariances=[hflip]")
    scores = ft.evaluate(run.path, views="ten", say=quiet)
    assert scores.views == "ten"
    assert scores.center.test.top1.n == scores.test.top1.n
    assert scores.test.log_loss != scores.center.test.log_loss
    page = run.file("report.html").read_text()
    assert f"the centre alone has {percent(scores.center.test.top1.value)}".replace(" %", "\u00a0%") in page
    gain = run.read_json("scores.json")["views_gain"]["test"]
    assert {"only_final_right", "only_center_right"} < gain.keys()


def test_predictions_of_new_images_equal_those_of_the_evaluation(full, shapes):
    stored = np.load(full.file("predictions.npz"))
    name = str(stored["test_names"][0])
    (answer,) = ft.predict(full, [shapes / name])
    np.testing.assert_allclose(list(answer.probabilities.values()), stored["test_probabilities"][0], atol=1e-5)
    assert answer.label == full.plan.classes[stored["test_probabilities"][0].argmax()]


def test_a_broken_new_image_is_told_and_the_others_are_predicted(full, shapes, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "b.png")
    broken, whole = ft.predict(full, [tmp_path])
    assert broken.fault == "empty file"
    assert broken.label is None
    assert whole.label in full.plan.classes


def test_the_page_and_the_summary_are_made_of_the_run(full):
    assert full.plan.name in full.file("report.html").read_text(encoding="utf-8")
    found = summarize(full)
    assert list(found.model_dump()) == ["run", "plan", "scores", "seconds", "report"]
    assert found.model_dump(mode="json")["scores"] == full.read_json("scores.json")
    assert found.plan == full.plan and found.seconds["total"] > 0


def test_planning_leaves_nothing_behind(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, decided = plan(ft.load_recipe(str(shapes), SMALL), say=quiet)
    assert decided.train.strategy in ("probe", "partial", "full")
    assert not list(tmp_path.iterdir())


@pytest.mark.technique("T015")
@pytest.mark.slow
def test_sixteen_bit_grey_pictures_unlike_any_photograph_are_learned(tmp_path):
    random = np.random.default_rng(0)
    for label, waves in (("dense", 9), ("sparse", 3)):
        (tmp_path / label).mkdir()
        for number in range(20):
            rows = np.sin(np.linspace(0, waves * np.pi, 48) + random.uniform(0, 3))
            pixels = 20_000 + 9_000 * rows[:, None] + random.normal(0, 900, (48, 48))
            Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / label / f"{number:02}.png")
    facts = ft.survey(ft.load_recipe(str(tmp_path), ["data.image_size=32"]))
    assert facts.image_kinds == {"16-bit": 40}
    assert facts.probe.val.value == 1.0


@pytest.mark.slow
def test_memory_stays_flat_as_epochs_go_by(shapes, tmp_path):
    kilobytes = []

    def listen(text):
        if "epoch" in text:
            status = Path("/proc/self/status").read_text()
            kilobytes.append(int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]))

    wishes = [*SMALL, "train.strategy=full", "train.epochs=60", "train.patience=60"]
    ft.train(ft.load_recipe(str(shapes), wishes), runs=tmp_path, say=listen)
    assert len(kilobytes) >= 60
    assert kilobytes[-1] - kilobytes[15] < 20_000


@pytest.mark.parametrize(
    "wishes",
    [
        ["hardware.precision=bf16"],
        ["train.optimizer.name=sgd", "head.dropout=0.3", "train.batch_norm=train"],
        ["head.init=small", "hardware.workers=2", "augment.preset=heavy", "data.invariances=[hflip, rot90]"],
        ["head.init=model", "backbone=torchvision/resnet18", "pretrained=false", "train.batch_size=1000"],
        ["head.init=zero", "train.schedule.name=constant", "hardware.image_cache_gb=0", "evaluate.views=five"],
    ],
    ids=lambda wishes: wishes[0],
)
@pytest.mark.slow
def test_every_other_choice_runs_to_its_end(shapes, tmp_path, wishes):
    run = start(shapes, tmp_path, "train.strategy=full", "train.epochs=2", *wishes)
    scores = run.read_json("scores.json")
    assert 0 <= scores["test"]["top1"]["low"] <= scores["test"]["top1"]["high"] <= 1
    assert run.file("report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_bf16_is_not_32_bits(shapes, tmp_path):
    # A zero head owes nothing to the features, so only the training itself can make the weights differ.
    wishes = ["train.strategy=full", "head.init=zero", "train.epochs=1", "train.patience=1"]
    runs = [start(shapes, tmp_path, *wishes, f"hardware.precision={name}") for name in ("32", "bf16")]
    last = [torch.load(run.file("stages/1-full/last.ckpt"), weights_only=True)["state_dict"] for run in runs]
    assert not torch.equal(*(state["classifier.head.linear.weight"] for state in last))


@pytest.mark.slow
def test_a_run_is_tracked_in_the_store_beside_it(shapes, tmp_path):
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs")}
    words = ["train", "--json", f"data.root={shapes}", *TINY, "train.epochs=3", "train.strategy=full"]
    process = run_in_process(words, env)  # a process of its own: MLflow warns, and warnings are errors here
    answer, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    state = RunFolder.open(json.loads(answer)["run"]).read_json("tracking.json")
    assert state["finished"]
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as store:
        (status,) = store.execute("select status from runs where run_uuid = ?", [state["mlflow_run_id"]]).fetchone()
        names = {name for (name,) in store.execute("select distinct key from metrics")}
        params = dict(store.execute("select key, value from params"))
    store.close()
    assert status == "FINISHED"
    assert {"train/loss", "val/top1", "lr/head", "lr/backbone", "gradient_norm", "test/top1", "best/val_loss"} <= names
    assert params["train.strategy"] == "full"
    assert set(state["artifacts_sent"]) >= {"report.html", "plan.yaml", "scores.json"}


@pytest.mark.slow
def test_a_dead_tracking_server_costs_one_warning_and_no_score(shapes, tmp_path):
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs")}
    words = ["train", "--json", f"data.root={shapes}", *TINY, "train.strategy=probe"]
    process = run_in_process([*words, "tracking.uri=http://127.0.0.1:9"], env)
    answer, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    run = RunFolder.open(json.loads(answer)["run"])
    assert run.read_json("scores.json")["test"]["top1"]["n"] > 0
    assert said.count("MLflow did not get everything") == 1
    assert f"finetune report {run.path}" in said
    assert not run.read_json("tracking.json")["finished"]


@pytest.mark.slow
def test_parts_of_the_images_looked_at_by_two_processes_make_a_plan_that_looks_at_none(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    wishes = [f"data.root={shapes}", "data.image_size=32", "backbone=tiny_resnet18.cifar10"]
    words = [sys.executable, "-m", "finetune", "plan", *wishes, "--json"]
    both = [subprocess.Popen([*words, "--part", f"{k}/2"], stdout=subprocess.PIPE, text=True) for k in (1, 2)]
    seen = [json.loads(process.communicate(timeout=120)[0])["misses"] for process in both]
    assert sum(seen) == 72
    assert seen[0] == seen[1] == 36
    facts, shared = plan(ft.load_recipe(None, wishes), say=quiet)
    assert facts.features["misses"] == 0
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "own"))
    facts, alone = plan(ft.load_recipe(None, wishes), say=quiet)
    assert facts.features["misses"] > 0
    assert alone.stages == shared.stages
    assert alone.advice.similarity == shared.advice.similarity


@pytest.mark.parametrize("part", ["0/2", "3/2", "half", "1"])
def test_a_part_that_is_none_is_refused(shapes, part):
    with pytest.raises(RecipeError, match="give which one of how many"):
        extract(ft.load_recipe(None, [f"data.root={shapes}"]), part, say=quiet)
