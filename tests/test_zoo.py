"""Cards, shelves and the cache: files that others wrote."""

import os

import pytest

from finetune.config.backbone_names import default_backbone, read_zoo, shipped
from finetune.config.card import read_card
from finetune.data.decoding import ImageFacts
from finetune.errors import BackboneError
from finetune.runs.folder import RunFolder, write_whole

FACTS = ImageFacts(width=3, height=4, kind="rgb", is_rotated=False)


def test_the_bundled_backbone_is_small_and_good():
    card = read_zoo()[default_backbone()]
    assert card.params_m <= 1.0
    assert card.weights.stat().st_size <= 2_000_000
    assert card.top1 >= 80


@pytest.mark.parametrize(
    ("line", "message"),
    [("interpolation: bilinear", "interpolation is 'lanczos'"), ("arch: resnet18", "is not a card we can read")],
)
def test_a_wrong_card_is_refused_by_name(tmp_path, line, message):
    text = (shipped("zoo") / default_backbone() / "card.yaml").read_text()
    assert line in text
    (tmp_path / "card.yaml").write_text(text.replace(line, "interpolation: lanczos" if "lanczos" in message else ""))
    with pytest.raises(BackboneError, match=message):
        read_card(tmp_path / "card.yaml")


def test_a_view_keeps_the_share_of_the_crop():
    card = read_zoo()[default_backbone()]
    from dataclasses import replace

    view = replace(card, crop_pct=0.875).view(size_pixels=128)
    assert (view.size_pixels, view.shorter_pixels) == (128, 146)
    assert view.digest != card.view(size_pixels=128).digest


def test_a_missing_zoo_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path / "gone"))
    with pytest.raises(BackboneError, match="gone, which is no folder"):
        read_zoo()


def test_the_first_folder_of_two_wins(monkeypatch, tmp_path):
    text = (shipped("zoo") / default_backbone() / "card.yaml").read_text()
    for name, source in (("a", "first"), ("b", "second")):
        (tmp_path / name / "x").mkdir(parents=True)
        lines = [f"pretrained_on: {source}" if line.startswith("pretrained_on") else line for line in text.splitlines()]
        (tmp_path / name / "x" / "card.yaml").write_text("\n".join(lines))
    monkeypatch.setenv("FINETUNE_ZOO", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert read_zoo()[default_backbone()].pretrained_on == "first"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, lambda temporary: temporary.write_text("whole"))

    def fail(temporary):
        temporary.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "whole"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    folders = {RunFolder.create(tmp_path, name="x/y z", backbone="resnet18").path for _ in range(3)}
    assert len(folders) == 3
    assert all(path.name.startswith("x_y_z-resnet18-") for path in folders)
