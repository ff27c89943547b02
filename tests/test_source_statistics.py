"""Statistics of a source: measured once, kept beside the weights, and what distances say with them."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import finetune as ft
from finetune.config.backbone_names import default_backbone, shipped
from finetune.config.card import read_card
from finetune.config.reading import load_recipe
from finetune.errors import BackboneError, DataError
from finetune.features.similarity import measure_distances
from finetune.features.source_statistics import SourceStatistics, measure_statistics
from finetune.metrics.distances import class_prototypes, fit_gaussian
from finetune.model_selection import zoo
from finetune.model_selection.ranking import rank_backbones
from finetune.reporting.ranking_text import ranking_text

QUIET = {"say": lambda text: None}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A zoo of one's own, with a copy of the bundled card called `mine`."""
    folder = tmp_path / "zoo" / "mine"
    copy_card(folder)
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path / "zoo"))
    return folder


def copy_card(folder):
    source = shipped("zoo") / default_backbone()
    folder.mkdir(parents=True)
    for name in ("weights.safetensors", "classes.txt"):
        shutil.copyfile(source / name, folder / name)
    text = (source / "card.yaml").read_text().replace(f"name: {default_backbone()}", f"name: {folder.name}")
    text = text.replace("- 64\n- 64", "- 32\n- 32")
    (folder / "card.yaml").write_text("# my own card\n" + text)
    return folder


def stored(features, labels, path):
    """Statistics of given features, as a file."""
    whole = fit_gaussian(features)
    means, weights = class_prototypes(features, labels, num_classes=int(labels.max()) + 1)
    SourceStatistics(
        mean=whole.mean, covariance=whole.covariance, class_means=means, class_weights=weights,
        classes=tuple("abc"[: len(means)]), num_images=len(features), num_bad=0,
    ).save(path)  # fmt: skip
    return path


def draw(n, seed, *, move=0.0, scale=1.0):
    """Three classes of 64 correlated features."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(99)) / 8
    labels = torch.arange(n) % 3
    centres = torch.randn(3, 64, generator=torch.Generator().manual_seed(98))
    features = torch.randn(n, 64, generator=generator) @ mix + centres[labels] + move
    return scale * features, labels


def test_more_of_the_source_is_near_and_other_features_are_further(tmp_path):
    path = stored(*draw(4000, 0), tmp_path / "s.safetensors")
    near, same = measure_distances(*draw(400, 1), path, 3)
    some, less = measure_distances(*draw(400, 1, move=0.3), path, 3)
    far, least = measure_distances(*draw(400, 1, move=1.0), path, 3)
    assert abs(near) < 0.05 * some < 0.3 * far
    assert same > 0.95
    assert same > less > least


def test_neither_distance_depends_on_the_scale_of_features(tmp_path):
    plain = stored(*draw(1000, 0), tmp_path / "a.safetensors")
    scaled = stored(*draw(1000, 0, scale=20.0), tmp_path / "b.safetensors")
    expected = measure_distances(*draw(200, 1, move=0.5), plain, 3)
    assert measure_distances(*draw(200, 1, move=0.5, scale=20.0), scaled, 3) == pytest.approx(expected, rel=1e-3)


def test_what_cannot_be_measured_is_none(tmp_path):
    features, labels = draw(100, 0)
    path = stored(features, labels, tmp_path / "s.safetensors")
    assert measure_distances(features[:3], labels[:3], path, 3)[0] is None
    whole = fit_gaussian(features)
    SourceStatistics(
        mean=whole.mean, covariance=whole.covariance, class_means=torch.empty(0, 64), class_weights=torch.empty(0),
        classes=(), num_images=100, num_bad=0,
    ).save(path)  # fmt: skip
    distance, similarity = measure_distances(features, labels, path, 3)
    assert distance < 1
    assert similarity is None


def test_a_wrong_file_is_refused(tmp_path):
    features, labels = draw(100, 0)
    path = stored(features, labels, tmp_path / "s.safetensors")
    with pytest.raises(BackboneError, match="is of 64 features, the backbone gives 8"):
        measure_distances(features[:, :8], labels, path, 3)
    with pytest.raises(BackboneError, match="is not the file it should be"):
        measure_distances(features, labels, path, 3, sha256="0" * 64)
    path.write_bytes(b"nothing")
    with pytest.raises(BackboneError, match="holds no statistics of a source"):
        measure_distances(features, labels, path, 3)
    with pytest.raises(BackboneError, match="holds no statistics of a source"):
        measure_distances(features, labels, tmp_path / "gone", 3, sha256="0" * 64)


def test_a_card_in_the_zoo_gets_statistics_where_it_lies(own, shapes):
    before = yaml.safe_load((own / "card.yaml").read_text())
    card = zoo.add_card(own, statistics=shapes, **QUIET)
    path = own / "statistics.safetensors"
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (128,), "covariance": (128, 128), "class_means": (3, 128), "class_weights": (3,), "images": (1,),
    }  # fmt: skip
    assert tensors["mean"].dtype == tensors["covariance"].dtype == torch.float32
    assert tensors["class_weights"].tolist() == pytest.approx([1 / 3] * 3)
    raw = yaml.safe_load((own / "card.yaml").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert raw.pop("statistics") == {"file": path.name, "sha256": digest, "images": 72}
    assert raw == before
    assert (own / "card.yaml").read_text().startswith("# my own card\n")
    assert (card.statistics, card.statistics_sha256) == (path, digest)
    assert [file.name for file in own.iterdir() if "tmp" in file.name] == []
    assert zoo.verify_cards()["mine"] == ""


def test_statistics_are_measured_again_and_named_once(own, shapes, tmp_path):
    zoo.add_card(own, statistics=shapes, **QUIET)
    first = (own / "card.yaml").read_text()
    zoo.add_card(own / "card.yaml", statistics=flat_copy(shapes, tmp_path / "flat"), **QUIET)
    again = (own / "card.yaml").read_text()
    assert again.count("statistics:") == 1
    assert again != first
    zoo.add_card(own, statistics=shapes, **QUIET)
    assert (own / "card.yaml").read_text() == first


def flat_copy(shapes, folder):
    folder.mkdir()
    for path in shapes.rglob("*.png"):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


def test_a_flat_folder_gives_the_same_mean_and_no_classes(own, shapes, tmp_path):
    card = read_card(own / "card.yaml")
    flat = measure_statistics(card, flat_copy(shapes, tmp_path / "flat"))
    classed = measure_statistics(card, shapes)
    assert flat.class_means.shape == (0, 128)
    assert (flat.classes, classed.classes) == ((), ("disc", "square", "stripes"))
    torch.testing.assert_close(flat.mean, classed.mean)
    torch.testing.assert_close(flat.covariance, classed.covariance)
    torch.testing.assert_close((classed.class_weights[:, None] * classed.class_means).sum(0), classed.mean)


def test_a_new_card_comes_with_its_statistics(own, shapes, tmp_path):
    card = zoo.add_card(copy_card(tmp_path / "elsewhere" / "theirs"), statistics=shapes, **QUIET)
    assert card.statistics == own.parent / "theirs" / "statistics.safetensors"
    assert zoo.verify_cards() == {"mine": "", "theirs": "", default_backbone(): ""}
    assert not (tmp_path / "elsewhere" / "theirs" / "statistics.safetensors").exists()


def test_a_card_may_be_given_by_name(own, shapes):
    assert zoo.add_card(Path("mine"), statistics=shapes, **QUIET).statistics == own / "statistics.safetensors"
    with pytest.raises(BackboneError, match="Nearest: mine"):
        zoo.add_card(Path("mime"), statistics=shapes, **QUIET)


def test_verify_finds_changed_and_missing_statistics(own, shapes):
    path = zoo.add_card(own, statistics=shapes, **QUIET).statistics
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert "measure them again with `finetune zoo add --statistics`" in zoo.verify_cards()["mine"]
    path.unlink()
    assert "are not there" in zoo.verify_cards()["mine"]
    assert zoo.add_card(own, statistics=shapes, **QUIET).statistics.exists()  # which is how it is mended


def test_a_zoo_that_may_not_be_written_is_left_alone(own, shapes):
    modes = {path: path.stat().st_mode for path in (own / "card.yaml", own)}
    before = sorted(own.iterdir())
    for path in modes:
        path.chmod(0o555)
    try:
        with pytest.raises(BackboneError, match="is read-only, so no statistics can be added to it"):
            zoo.add_card(own, statistics=shapes, **QUIET)
        assert sorted(own.iterdir()) == before
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_too_few_images_or_none_are_refused(own, shapes, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for number in range(60):  # one image, sixty times
        shutil.copy(shapes / "disc" / "00.png", few / f"{number}.png")
    before = (own / "card.yaml").read_text()
    with pytest.raises(DataError, match=r"holds 1 different images that can be read; .* at least 50"):
        zoo.add_card(own, statistics=few, **QUIET)
    with pytest.raises(DataError, match="does not exist"):
        zoo.add_card(own, statistics=tmp_path / "gone", **QUIET)
    assert (own / "card.yaml").read_text() == before


def test_broken_images_are_left_out(own, shapes, tmp_path):
    flat = flat_copy(shapes, tmp_path / "flat")
    (flat / "broken.png").write_bytes(b"\x89PNG")
    found = measure_statistics(read_card(own / "card.yaml"), flat)
    assert (found.num_images, found.num_bad) == (72, 1)


@pytest.mark.slow
def test_a_survey_and_a_ranking_tell_the_distance(own, shapes, tmp_path):
    strange = tmp_path / "strange"
    generator = np.random.default_rng(0)
    for label in ("dark", "light"):
        (strange / label).mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 128, (40, 40, 3), dtype=np.uint8) + (128 if label == "light" else 0)
            Image.fromarray(pixels).save(strange / label / f"{number}.png")

    def wish(root):
        return load_recipe(None, [f"data.root={root}", "backbone=mine", "data.image_size=32"])

    without = ft.survey(wish(shapes)).similarity
    assert (without.frechet, without.emd) == (None, None)
    card = zoo.add_card(own, statistics=shapes, **QUIET)
    near, far = (ft.survey(wish(root)).similarity for root in (shapes, strange))
    assert abs(near.frechet) < 0.2 * far.frechet
    assert 1 >= near.emd > 0.9
    assert near.emd > far.emd
    found = rank_backbones(wish(shapes), {"mine": card})
    assert (found.rows[0].frechet, found.rows[0].emd) == pytest.approx((near.frechet, near.emd), abs=1e-4)
    said = " ".join(ranking_text(found).split())
    assert "(earth mover, 1 is the same)" in said
    assert "the change of size counts" not in said
    larger = rank_backbones(load_recipe(None, [f"data.root={shapes}", "data.image_size=48"]), {"mine": card})
    assert "its source was seen at 32 px, and the change of size counts, too" in " ".join(ranking_text(larger).split())
