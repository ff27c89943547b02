"""The data set of a run: faulty files are named and never divided, and it opens again as it was."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.config.card import View
from finetune.config.recipe import DataSpec
from finetune.data.dataset import Dataset
from finetune.data.sources import open_source
from finetune.ensembles.members import open_again, refuse_other_images
from finetune.errors import DataError, RunError
from finetune.features.survey import look

VIEW = View(size_pixels=32, shorter_pixels=32, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def images(shapes, tmp_path):
    """The shapes, one of them empty and one whose header alone is right."""
    root = shutil.copytree(shapes, tmp_path / "images")
    (root / "disc" / "03.png").write_bytes(b"")
    whole = (root / "square" / "05.png").read_bytes()
    (root / "square" / "05.png").write_bytes(whole[: len(whole) // 2])
    return root


def of(root, **more):
    return Dataset.open(DataSpec(root=str(root), **more), 0)


def names(dataset, rows):
    return {dataset.items.name(index) for index in rows}


def test_a_faulty_file_is_named_and_has_no_part_in_the_split(images):
    dataset = of(images)
    dataset.see(VIEW)
    faults = dataset.find_faults(range(len(dataset.items)))
    assert names(dataset, faults) == {"disc/03.png", "square/05.png"} and all(faults.values())
    dataset.drop(faults)
    split = dataset.divide()
    assert names(dataset, dataset.indices("bad")) == {"disc/03.png", "square/05.png"}
    assert sum(map(sum, split.counts.values())) == 72 - 2
    for path in ("disc/03.png", "square/05.png"):
        (images / path).unlink()
    assert of(images).divide().digest == split.digest  # as if they had never been there


def test_roles_labels_and_rows_belong_together(shapes):
    dataset = of(shapes)
    dataset.divide()
    roles = ("train", "val", "calibration", "test")
    rows = [dataset.indices(role) for role in roles]
    assert sorted(index for own in rows for index in own) == list(range(72))
    for role, own in zip(roles, rows, strict=True):
        assert [dataset.classes[label] for label in dataset.labels(role)] == [
            dataset.items.name(index).partition("/")[0] for index in own
        ]
        assert dataset.labels(role).dtype == torch.int64
    assert dataset.labelled() == sorted(index for own in rows[:3] for index in own)


def test_faulty_files_stop_where_the_recipe_says_so(images):
    dataset = of(images, on_bad_image="fail")
    dataset.see(VIEW)
    dataset.drop(dataset.find_faults(range(72)))
    with pytest.raises(DataError, match=r"2 images cannot be read: disc/03.png .*data.on_bad_image to skip"):
        dataset.divide()


def test_what_was_decoded_with_another_value_range_is_forgotten(tmp_path):
    for name, high in (("a", 4095), ("b", 3000)):
        (tmp_path / name).mkdir()
        for number in range(8):
            values = np.random.default_rng(number).integers(0, high + 1, (32, 32)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    dataset = of(tmp_path)
    store = dataset.see(VIEW, 10**9)
    dark = store.get(0).max()  # as if 65,535 were white
    dataset.divide()
    assert dataset.value_range.why == "12 bits" and dataset.store is not store
    assert dataset.store.get(0).max() > 200 > 20 > dark
    again = dataset.store
    dataset.divide()
    assert dataset.store is again  # the same range: nothing is decoded twice


def test_images_of_one_role_can_be_opened_alone(tmp_path, shapes):
    for role in ("train", "test"):
        shutil.copytree(shapes, tmp_path / role)
    source = open_source(tmp_path)
    alone = Dataset(source.of_role("test"), DataSpec(root=str(tmp_path)), 0)
    assert len(alone.items) == 72 and all(item.role == "test" for item in alone.items)
    assert [alone.items[3], len(alone.items.labels)] == [next(i for i in source.items if i == alone.items[3]), 72]


def test_a_run_opens_its_images_again_as_they_were_without_its_backbone(images, tmp_path, monkeypatch):
    small = ["data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]
    run = ft.train(ft.load_recipe(None, [f"data.root={images}", *small]), runs=tmp_path, say=lambda _: None)
    seen = look(ft.load_recipe(run.file("recipe.yaml")))
    monkeypatch.setattr("finetune.models.backbones.load_backbone", None)
    dataset = open_again(run)
    refuse_other_images(run, dataset)
    assert dataset.roles == seen.dataset.roles and dataset.store.view == run.plan.view
    index = dataset.indices("val")[0]
    assert np.array_equal(dataset.store.get(index), seen.dataset.store.get(index))
    (images / "disc" / "07.png").unlink()
    with pytest.raises(RunError, match="the images have changed since"):
        refuse_other_images(run, open_again(run))
