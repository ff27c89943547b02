"""What a run folder gives back: its recipe as it was wished, its checkpoints beside their target, its backbone."""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

import finetune as ft
from finetune.config.backbone_names import shipped
from finetune.preparing import plan
from finetune.runs.folder import RunFolder

SMALL = ["data.image_size=32", "train.batch_size=16", "tracking.enabled=false"]
FULL = "train.strategy=full"


def quiet(text):
    """Nobody listens."""


def stop_at(words):
    """Press Ctrl-C as soon as that is said."""

    def say(text):
        if words in text:
            raise KeyboardInterrupt

    return say


def start(shapes, tmp_path, *wishes, say=quiet):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes])
    return ft.train(recipe, runs=tmp_path / "runs", say=say)


def stopped(shapes, tmp_path, words, *wishes):
    with pytest.raises(KeyboardInterrupt):
        start(shapes, tmp_path, *wishes, say=stop_at(words))
    (folder,) = (tmp_path / "runs").iterdir()
    return RunFolder(folder)


@pytest.mark.slow
def test_checkpoints_are_written_beside_their_target_and_need_no_temporary_folder(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    run = start(shapes, tmp_path, FULL, "train.epochs=1")
    assert run.file("stages/1-full/last.ckpt").stat().st_size > 100_000


def test_a_recipe_holds_what_was_set_and_nothing_more(shapes, tmp_path):
    run = stopped(shapes, tmp_path, "run folder", FULL, "seed=0", "backbone=null")
    assert yaml.safe_load(run.file("recipe.yaml").read_text()) == {
        "backbone": None,
        "data": {"root": str(shapes), "image_size": 32},
        "train": {"strategy": "full", "batch_size": 16},
        "tracking": {"enabled": False},
        "seed": 0,
    }


KINDS = {
    "snapshots": [FULL, "train.epochs=4", "train.averaging.snapshots=2"],
    "ema": [FULL, "train.averaging.kind=ema"],
    "swa": [FULL, "train.averaging.kind=swa", "train.epochs=4"],
    "gradual": ["train.strategy=gradual", "train.epochs=6"],
    "probe": ["train.strategy=probe", "train.epochs=9", "head.dropout=0.5"],
    "mlp": [FULL, "head.kind=mlp", "head.hidden=16", "head.dropout=0.1"],
    "mixup": [FULL, "augment.mixup=0.2", "data.invariances=[hflip]", "train.imbalance.gamma=1"],
    "random": ["pretrained=false", "train.epochs=2"],
    "advised": ["seed=3"],
}


@pytest.mark.parametrize("wishes", KINDS.values(), ids=KINDS)
@pytest.mark.slow
def test_the_recipe_of_a_run_makes_its_plan_again(shapes, tmp_path, wishes):
    run = stopped(shapes, tmp_path, "  classes", *wishes)  # the plan is there; its training is not the point
    _, again = plan(ft.load_recipe(run.file("recipe.yaml")), say=quiet)
    leave = {"advice": {"forecasts"}}  # seconds are measured
    assert again.model_dump(exclude=leave) == run.plan.model_dump(exclude=leave)


@pytest.mark.slow
def test_a_run_with_snapshots_stopped_before_its_plan_is_resumed(shapes, tmp_path):
    run = stopped(shapes, tmp_path, "run folder", *KINDS["snapshots"])
    assert not run.file("plan.yaml").exists()
    ft.resume(run.path, say=quiet)
    assert sorted(path.name for path in run.file("snapshots").iterdir()) == [
        "cycle-1.safetensors",
        "cycle-2.safetensors",
    ]


def test_keys_that_nobody_set_are_not_called_inactive_when_a_run_is_planned_again(shapes, tmp_path):
    run = stopped(shapes, tmp_path, "run folder", *KINDS["ema"], "train.averaging.swa_lr=0.5")
    _, again = plan(ft.load_recipe(run.file("recipe.yaml")), say=quiet)
    assert [one.key for one in again.reasons if one.why.startswith("inactive")] == ["train.averaging.swa_lr"]


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    """A second card at hand, so that a recipe without a backbone has a choice."""
    (own,) = shipped("zoo").glob("*/card.yaml")
    twin = Path(shutil.copytree(own.parent, tmp_path / "zoo" / "twin")) / "card.yaml"
    twin.write_text(twin.read_text().replace(f"name: {own.parent.name}", "name: twin"))
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path / "zoo"))


@pytest.mark.slow
def test_a_backbone_that_was_chosen_is_not_chosen_again(shapes, tmp_path, two_cards):
    run = start(shapes, tmp_path, "train.strategy=probe")
    assert "backbone" not in yaml.safe_load(run.file("recipe.yaml").read_text())
    lines = []
    ft.resume(run.path, say=lines.append)
    assert not [line for line in lines if line.startswith("backbone:")]
    assert ft.evaluate(run.path, say=quiet).test.top1.n > 0


@pytest.mark.slow
def test_a_backbone_is_chosen_again_where_there_was_no_plan_yet(shapes, tmp_path, two_cards):
    run = stopped(shapes, tmp_path, "run folder", "train.strategy=probe")
    lines = []
    ft.resume(run.path, say=lines.append)
    assert [line for line in lines if line.startswith("backbone:")]
    assert run.plan.backbone in ("twin", "tiny_resnet18.cifar10")


def test_a_plan_that_was_made_before_ranges_were_measured_still_predicts_and_resumes(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=probe")
    before = run.file("predictions.npz").read_bytes()
    plan_file = run.file("plan.yaml")
    older = yaml.safe_load(plan_file.read_text())
    del older["data"]["value_range"], older["data"]["frame"], older["arch"], older["arch_kwargs"]
    plan_file.write_text(yaml.safe_dump(older))
    image = next(shapes.rglob("*.png"))
    (answer,) = ft.predict(run.path, image)
    assert answer.fault is None
    ft.resume(run.path, say=quiet)
    assert run.file("predictions.npz").read_bytes() == before
