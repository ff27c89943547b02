"""A run as plain timm loads it: the same answers, checked before anything is handed over."""

import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch

import finetune as ft
from finetune.errors import RunError
from finetune.export import timm_folder
from finetune.export.timm_folder import export_timm
from finetune.inference.loading import load_final

SMALL = ["data.image_size=32", "train.batch_size=16", "train.epochs=1", "tracking.enabled=false"]


def start(shapes, runs, *wishes):
    return ft.train(ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes]), runs=runs, say=lambda text: None)


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    return start(shapes, tmp_path_factory.mktemp("runs"), "train.strategy=partial")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "exported"
    return folder, export_timm(run, folder)


def test_it_was_asked_about_images_of_the_run_and_answers_alike(exported):
    folder, made = exported
    assert made.are_real and made.images >= 16 and made.difference < 1e-4
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "classes.txt", "config.json", "model.safetensors"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_python_of_its_card_needs_nothing_of_ours_and_says_what_the_run_says(exported, run, shapes):
    folder, _ = exported
    image = next(shapes.rglob("*.png"))
    shutil.copyfile(image, folder / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code += "import sys; assert not any(name.startswith('finetune') for name in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (answer,) = ft.predict(run, image)
    label, share = done.stdout.split()
    assert label == answer.label and float(share) == pytest.approx(answer.probability, abs=1e-3)


def test_the_loader_of_timms_hub_reads_the_folder(exported, run):
    model = timm.create_model(f"local-dir:{exported[0]}", pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), load_final(run)(images), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_probe_is_exported_with_its_backbone_and_without_the_images_on_noise(shapes, tmp_path):
    own = shutil.copytree(shapes, tmp_path / "own")
    probe = start(own, tmp_path / "runs", "train.strategy=probe")
    shutil.rmtree(own)
    made = export_timm(probe, tmp_path / "exported")
    assert not made.are_real and made.difference < 1e-4


@pytest.mark.slow
def test_what_timm_has_no_place_for_is_said(shapes, tmp_path):
    other = start(shapes, tmp_path / "runs", "train.strategy=full", "head.kind=mlp", "head.hidden=8")
    with pytest.raises(RunError, match="head of kind mlp"):
        export_timm(other, tmp_path / "exported")


def test_another_answer_hands_nothing_over(run, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_folder, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="nothing was exported"):
        export_timm(run, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_to(run, tmp_path):
    with pytest.raises(RunError, match="is there already"):
        export_timm(run, tmp_path)
