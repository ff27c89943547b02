"""The Python interface: one walk for every caller, runs by any of their names, and types that a user's checker sees."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.errors import RecipeError, RunError
from finetune.inference.predict import predict_probabilities

ROOT = Path(__file__).parent.parent
SMALL = ["data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("api") / "runs"


@pytest.fixture(scope="module")
def pair(shapes, runs):
    """Two probes that differ in their seed."""
    return [ft.train(shapes, [*SMALL, f"seed={seed}", "name=alike"], runs=runs, say=quiet) for seed in (0, 1)]


def test_a_run_gives_its_model_scores_classes_and_page(pair, shapes):
    run = pair[0]
    assert isinstance(run, ft.Run) and isinstance(run.model, torch.nn.Module) and not run.model.training
    assert run.classes == ("disc", "square", "stripes") and run.report.is_file()
    assert run.scores.model_dump(mode="json") == run.read_json("scores.json") and run.facts.classes == run.classes
    dataset = ft.open_dataset(run.file("recipe.yaml"))
    dataset.see(run.plan.view)
    rows = dataset.indices("test")
    said = predict_probabilities(run.model, dataset.store, rows, run.plan, "center")
    right = (said.argmax(1) == dataset.labels("test")).double().mean()
    assert float(right) == pytest.approx(run.scores.test.top1.value)


@pytest.mark.parametrize("what", ["path", "text", "name", "the run", "latest"])
def test_every_function_takes_a_run_by_any_of_its_names(pair, runs, monkeypatch, shapes, what):
    monkeypatch.setenv("FINETUNE_RUNS", str(runs))
    run = pair[1]
    os.utime(run.file("plan.yaml"))
    named = {"path": run.path, "text": str(run.path), "name": run.path.name, "the run": run, "latest": "latest"}[what]
    assert ft.load_run(named).path.resolve() == run.path.resolve()
    image = next(shapes.rglob("*.png"))
    assert ft.predict(named, image)[0].label in run.classes
    assert ft.evaluate(named, say=quiet).test == run.scores.test
    assert ft.report(named, say=quiet).resolve() == run.report.resolve()
    assert ft.resume(named, say=quiet).path.resolve() == run.path.resolve()


def test_the_beginning_of_a_name_is_enough_where_it_is_that_of_one_run(pair, runs, shapes, monkeypatch):
    monkeypatch.setenv("FINETUNE_RUNS", str(runs))
    with pytest.raises(RunError, match=r"2 runs in .* begin with alike: .*Name one, or say latest"):
        ft.load_run("alike")
    other = ft.train(shapes, [*SMALL, "name=other"], runs=runs, say=quiet)
    assert ft.load_run("other").path.resolve() == other.path.resolve()
    monkeypatch.chdir(shapes.parent)
    (shapes.parent / "other").mkdir(exist_ok=True)  # such as the data: it is no run, so it does not hide one
    assert ft.load_run("other").path.resolve() == other.path.resolve()
    (shapes.parent / "other").rmdir()
    shutil.rmtree(other.path)
    with pytest.raises(RunError, match="is no folder"):
        ft.load_run("nothing")


def test_runs_are_compared_and_joined_from_python(pair, runs, tmp_path):
    found = ft.compare([pair[0], str(pair[1].path)])
    assert len(found.runs) == 2
    with pytest.raises(RunError, match="named twice"):
        ft.compare([pair[0], pair[0].path])
    with pytest.raises(RunError, match="test image"):  # of another seed, and so of another split
        ft.ensemble(pair, runs=tmp_path, say=quiet)
    with pytest.raises(RunError, match="is a probe, and no trained run would be averaged with it"):
        ft.ensemble([pair[0], str(pair[0].path)], runs=tmp_path, say=quiet)


@pytest.mark.shared
def test_what_is_surveyed_and_planned_is_what_is_trained(shapes, shared, runs, monkeypatch):
    """Among several backbones the survey chooses as the training does, and nothing is looked at twice."""
    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    wish = ft.load_recipe(shapes, ["data.image_size=64", "train.strategy=probe", "tracking.enabled=false"])
    facts = ft.survey(wish, say=quiet)
    plan = ft.make_plan(wish, facts)
    assert facts.ranking is not None and facts.backbone.name == facts.ranking.chosen == plan.backbone
    run = ft.train(wish, runs=runs, say=quiet)
    assert run.plan == plan
    assert run.facts.features["misses"] == 0
    assert ft.plan(wish, say=quiet)[1] == plan


def test_a_data_set_is_opened_as_a_run_divides_it(pair, shapes, tmp_path):
    dataset = ft.open_dataset(shapes, ["seed=1"])
    assert dataset.split.digest == pair[1].plan.split_digest != pair[0].plan.split_digest
    with pytest.raises(RecipeError, match="no images are named"):
        ft.open_dataset(ft.load_recipe(None, []))
    with pytest.raises(RecipeError, match="neither a file, a folder, nor a shipped recipe"):
        ft.open_dataset(tmp_path / "nowhere")


def python_blocks():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        pytest.param(code, id=f"{page.name}-{number}")
        for page in pages
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S), 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("code", python_blocks())
def test_python_in_the_docs_runs(code, shapes, tmp_path, monkeypatch):
    shutil.copytree(shapes, tmp_path / "path" / "to" / "images")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs", "exec"), {})


def type_errors(script, cache):
    """What `mypy --strict` says of one file; `.ci/run` asks it about the built wheel, where it believes `py.typed`."""
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), str(script)],
        capture_output=True, text=True, check=False, cwd=cache, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    return [line for line in found.stdout.splitlines() if re.search(rf"{script.name}:\d+: error", line)]


@pytest.mark.slow
def test_a_users_script_is_type_checked(tmp_path):
    assert (ROOT / "finetune" / "py.typed").is_file()
    assert type_errors(ROOT / "tests" / "typed_script.py", tmp_path) == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import finetune as ft\nft.train(3)\nft.load_run('latest').classes + 1\n")
    assert len(type_errors(wrong, tmp_path)) == 2


def test_a_run_says_which_version_made_it(pair):
    assert pair[0].read_json("environment.json")["versions"]["finetune"] == ft.__version__
