"""Uneven classes: when they count as such, what is decided, and batches that draw them evenly."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config.card import View
from finetune.config.imbalance import KIND, decide_imbalance, hides_classes, uneven
from finetune.data.augmentation import Augmentation
from finetune.data.loading import Batches, ImageStore, draw_evenly
from finetune.data.sources import open_source

VIEW = View(size_pixels=8, shorter_pixels=10, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
SIZES = [20, 7, 2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in zip("abc", SIZES, strict=True):
        (root / name).mkdir()
        for i in range(size):
            Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(root / name / f"{i:02}.png")
    return open_source(root)


def batches(source, **options):
    labels = [item.label for item in source.items]
    augment = Augmentation("heavy", size_pixels=8, interpolation="bilinear", invariances=[])
    plain = {"batch_size": 4, "augmentation": augment, "shuffle": True, "seed": 7, "balanced": True}
    return Batches(ImageStore(source.items, VIEW, 10**9), range(len(labels)), labels, **(plain | options))


def epoch(loader, number):
    loader.set_epoch(number)
    return tuple(torch.cat(part) for part in zip(*loader, strict=True))


def labels_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(
    ("counts", "kind"),
    [([50, 50], "none"), ([299, 100], "none"), ([300, 100], KIND), ([9, 0, 8], "none"), ([9, 0, 3], KIND),
     ([4], "none"), ([0, 0], "none"), ([], "none")],
)  # fmt: skip
def test_classes_are_uneven_from_threefold_on(counts, kind):
    decided, why = decide_imbalance(counts)
    assert decided == kind and uneven(counts) == (kind != "none")
    assert "times the images of the smallest" in why


@pytest.mark.parametrize(
    ("counts", "hides"), [([31, 2], True), ([31, 0], True), ([5, 5, 0], True), ([5, 4, 2], False), ([2, 0, 1], False)]
)
def test_a_share_of_all_images_hides_classes_that_are_small_or_have_none(counts, hides):
    assert hides_classes(counts) is hides


def test_the_reason_names_the_ratio_and_what_it_costs():
    assert "10.0 times" in decide_imbalance([100, 10])[1] and "choose none if" in decide_imbalance([100, 10])[1]


@pytest.mark.parametrize("sizes", [SIZES, [5, 5, 5], [1, 1, 40], [3], [100, 1, 1, 1, 1, 1, 1]])
def test_every_class_is_drawn_equally_often_in_each_epoch_and_over_all(sizes):
    labels, total = labels_of(sizes), Counter()
    for number in range(12):
        drawn = draw_evenly(labels, seed=3, epoch=number)
        counts = np.bincount(labels[drawn], minlength=len(sizes))
        assert counts.sum() == len(labels) and counts.max() - counts.min() <= 1
        total.update(labels[drawn].tolist())
    assert max(total.values()) - min(total.values()) <= 1 and len(total) == len(sizes)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_comes_again_before_all_of_its_class_came(seed):
    labels, times = labels_of(SIZES), np.zeros(sum(SIZES), dtype=int)
    for number in range(9):
        for position in draw_evenly(labels, seed=seed, epoch=number):
            same_class = times[labels == labels[position]]
            assert times[position] == same_class.min()
            times[position] += 1
    assert times.min() >= 4  # 29 images of 3 classes in 9 epochs: even the common ones all came


def test_draws_follow_seed_and_epoch_alone():
    labels = labels_of(SIZES)
    first = draw_evenly(labels, seed=0, epoch=4)
    assert (first == draw_evenly(labels, seed=0, epoch=4)).all()
    assert (first != draw_evenly(labels, seed=1, epoch=4)).any()
    assert (first != draw_evenly(labels, seed=0, epoch=5)).any()
    alone = [draw_evenly(labels_of([30]), seed=seed, epoch=0).tolist() for seed in (0, 1)]
    assert alone[0] != alone[1]  # not only whose turn it is, but also who comes


def test_balanced_batches_give_images_with_their_labels_evenly_and_well_mixed(source):
    images, labels, indices = epoch(batches(source), 0)
    assert len(images) == len(source.items) == 29
    assert labels.tolist() == [source.items[i].label for i in indices.tolist()]
    assert sorted(labels.bincount().tolist()) == [9, 10, 10]
    assert int((labels.diff() != 0).sum()) > 10
    assert epoch(batches(source), 0)[2].tolist() != epoch(batches(source), 1)[2].tolist()


def test_workers_change_nothing_in_balanced_batches(source):
    alone, helped = batches(source), batches(source, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(epoch(alone, 3), epoch(helped, 3), strict=True))


def test_an_image_that_comes_again_is_varied_anew(source):
    images, labels, indices = epoch(batches(source), 0)
    rare = [image.numpy().tobytes() for image in images[labels == 2]]
    assert len(set(indices[labels == 2].tolist())) == 2 and len(rare) >= 9
    assert len(set(rare)) == len(rare)


def test_the_first_view_in_an_epoch_is_that_of_plain_batches(source):
    plain = epoch(batches(source, balanced=False), 2)
    views = dict(zip(plain[2].tolist(), plain[0], strict=True))
    met = set()
    for image, _, index in zip(*epoch(batches(source), 2), strict=True):
        if int(index) not in met:
            assert torch.equal(image, views[int(index)])
        met.add(int(index))


def test_balanced_batches_without_shuffling_are_refused(source):
    with pytest.raises(ValueError, match="shuffle must be True"):
        batches(source, shuffle=False)
