"""Cards, shelves and the cache: files that others wrote."""

import os

import pytest
import torch

from finetune.data.decoding import ImageFacts
from finetune.errors import BackboneError
from finetune.features.cache import FeatureCache, evict
from finetune.recipe.cards import read_card
from finetune.recipe.runs import RunFolder, write_whole
from finetune.recipe.shelf import default_backbone, read_zoo, shipped

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


def test_cached_features_come_back_to_the_last_bit():
    cache, row = FeatureCache("w" * 64, "v", "32"), torch.randn(7)
    cache.put("d1", row, FACTS)
    cache.flush()
    again = FeatureCache("w" * 64, "v", "32")
    assert "d1" in again
    assert torch.equal(again.features("d1"), row)
    assert again.facts("d1") == FACTS


def test_another_weight_view_or_precision_is_another_cache():
    cache = FeatureCache("w" * 64, "v", "32")
    cache.put("d1", torch.zeros(2), FACTS)
    cache.flush()
    for key in (("x" * 64, "v", "32"), ("w" * 64, "u", "32"), ("w" * 64, "v", "bf16")):
        assert "d1" not in FeatureCache(*key)


def test_two_writers_do_not_disturb_each_other():
    one, two = FeatureCache("w" * 64, "v", "32"), FeatureCache("w" * 64, "v", "32")
    one.put("d1", torch.ones(2), FACTS)
    two.put("d2", torch.ones(2), FACTS)
    one.flush()
    two.flush()
    both = FeatureCache("w" * 64, "v", "32")
    assert "d1" in both
    assert "d2" in both


def test_the_folder_used_longest_ago_goes_first(tmp_path):
    for age, name in enumerate(("new", "old", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    evict(tmp_path, keep=tmp_path / "mine", limit_bytes=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]


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
