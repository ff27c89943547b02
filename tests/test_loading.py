"""Batches: the same for any number of workers, other ones each epoch, normalised as the view says."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from finetune.config.card import View
from finetune.data.augmentation import Augmentation
from finetune.data.decoding import center_crop
from finetune.data.loading import Batches, ImageStore, normalize, num_batches
from finetune.data.sources import open_source
from finetune.errors import DataError

VIEW = View(
    size_pixels=16, shorter_pixels=20, interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
PLENTY = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(22):
        file = root / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)).save(file)
    return open_source(root)


def batches(source, *, preset="heavy", limit=PLENTY, view=VIEW, **options):
    store = ImageStore(source.items, view, limit)
    augment = preset and Augmentation(preset, size_pixels=16, interpolation="bilinear", invariances=["hflip"])
    chosen = list(range(3, len(source.items)))
    labels = [source.items[i].label for i in chosen]
    return Batches(
        store, chosen, labels, **({"batch_size": 4, "augmentation": augment, "shuffle": True, "seed": 7} | options)
    )


def epoch(loader, number):
    loader.set_epoch(number)
    images, labels, indices = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels), torch.cat(indices)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 30, 40])
def test_centre_crops_equal_torchvision(size):
    rng = np.random.default_rng(0)
    for shape in [(16, 16), (17, 16), (18, 21), (31, 24), (15, 40), (9, 9), (23, 14)]:
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = F.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [size, size]).permute(1, 2, 0)
        np.testing.assert_array_equal(center_crop(pixels, size), expected.numpy())


@pytest.mark.parametrize(("mean", "std"), [(VIEW.mean, VIEW.std), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)])
def test_normalising_is_the_formula(mean, std):
    view = View(size_pixels=16, shorter_pixels=16, interpolation="bilinear", mean=mean, std=std)
    batch = torch.arange(256, dtype=torch.uint8).repeat(6).reshape(2, 16, 16, 3)
    kept = batch.clone()
    images = normalize(batch, view)
    expected = (batch.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(images.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, kept)


def test_normalising_takes_batches_of_any_shape_and_stride():
    batch = torch.randint(0, 256, (3, 9, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = batch[:, 1:6, 2:9]
    assert torch.equal(normalize(part, VIEW), normalize(part.contiguous(), VIEW))
    assert normalize(batch[:0], VIEW).shape == (0, 3, 9, 12)


def test_the_store_keeps_images_up_to_its_bound(source, monkeypatch):
    from finetune.data import loading

    reads = []
    original = loading.read_bytes
    monkeypatch.setattr(loading, "read_bytes", lambda item: reads.append(item.name) or original(item))
    store = ImageStore(source.items, VIEW, limit_bytes=3 * 20 * 40 * 3)
    first = [store.get(i).copy() for i in range(10)]
    assert min(min(p.shape[:2]) for p in first) == 20 == max(min(p.shape[:2]) for p in first)
    assert 0 < store.held_bytes <= store.limit_bytes and len(reads) == 10
    again = [store.get(i) for i in range(10)]
    assert 10 < len(reads) < 20
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_what_is_put_is_what_one_gets(source):
    store, pixels = ImageStore(source.items, VIEW, PLENTY), np.zeros((20, 20, 3), np.uint8)
    store.put(0, pixels)
    store.put(0, pixels)
    assert store.get(0) is pixels and store.held_bytes == pixels.nbytes


def test_every_image_comes_once_with_its_label(source):
    for even, sizes in ((False, [4, 4, 4, 4, 3]), (True, [4, 4, 4, 4, 3])):
        loader = batches(source, even=even)
        images, labels, indices = epoch(loader, 0)
        assert len(loader) == len(sizes) and len(set(indices.tolist())) == len(indices) == 19
        assert images.shape == (19, 3, 16, 16) and labels.dtype == indices.dtype == torch.int64
        assert labels.tolist() == [source.items[i].label for i in indices.tolist()]
        assert set(indices.tolist()) <= set(range(3, 22))


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(4, [4, 4, 4, 4, 3]), (8, [7, 6, 6]), (12, [10, 9]), (18, [10, 9]), (19, [19]), (64, [19])],
)
def test_even_batches_leave_no_image_out_and_no_rest_behind(source, batch_size, sizes):
    loader = batches(source, even=True, batch_size=batch_size)
    assert [len(labels) for _, labels, _ in loader] == sizes and len(loader) == len(sizes)
    assert sorted(epoch(loader, 3)[2].tolist()) == list(range(3, 22))


def test_even_batches_hold_two_images_where_there_are_two():
    for images in range(1, 40):
        for size in range(1, 20):
            count = num_batches(images, size, even=True)
            assert count >= 1 and -(-images // count) <= size + 1
            assert images // count >= min(2, size, images)


def test_unshuffled_batches_keep_their_order_and_equal_the_plain_view(source):
    loader = batches(source, preset=None, shuffle=False)
    images, _, indices = epoch(loader, 5)
    assert indices.tolist() == list(range(3, 22))
    crops = torch.stack([torch.from_numpy(center_crop(loader.store.get(i), 16)) for i in range(3, 22)])
    assert torch.equal(images, normalize(crops, VIEW))


def test_batches_are_channels_last(source):
    for images, _, _ in batches(source):
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


@pytest.mark.technique("T149")
def test_augmentation_changes_pixels_in_training_only_and_never_labels(source):
    trained, plain = batches(source), batches(source, preset=None, shuffle=False)
    first, second = epoch(trained, 0), epoch(trained, 1)
    assert {i: y for y, i in zip(*(t.tolist() for t in first[1:]), strict=True)} == {
        i: y for y, i in zip(*(t.tolist() for t in second[1:]), strict=True)
    }
    by_index = [dict(zip(e[2].tolist(), e[0], strict=True)) for e in (first, second)]
    assert not any(torch.equal(by_index[0][i], by_index[1][i]) for i in by_index[0])
    assert same(epoch(plain, 0), epoch(plain, 1))


def test_two_runs_are_equal_and_epochs_are_not(source):
    one, other = batches(source), batches(source)
    early = epoch(one, 0)
    assert same(epoch(one, 3), epoch(other, 3))  # whatever was drawn before
    assert same(early, epoch(other, 0))
    assert epoch(one, 0)[2].tolist() != epoch(one, 1)[2].tolist()
    assert epoch(one, 0)[2].tolist() != epoch(batches(source, seed=8), 0)[2].tolist()


def test_an_augmentation_depends_on_the_image_not_on_its_place(source):
    shuffled, straight = epoch(batches(source), 2), epoch(batches(source, shuffle=False, batch_size=19), 2)
    lookup = dict(zip(straight[2].tolist(), straight[0], strict=True))
    assert all(torch.equal(lookup[i], image) for i, image in zip(shuffled[2].tolist(), shuffled[0], strict=True))


def test_every_image_draws_for_itself(source):
    loader = batches(source)
    for i in range(22):
        loader.store.put(i, np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    images, _, _ = epoch(loader, 0)
    assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("limit", [0, PLENTY])
def test_workers_change_nothing(source, limit):
    alone, helped = batches(source, limit=limit), batches(source, limit=limit, workers=2)
    for number in (0, 1):
        assert same(epoch(alone, number), epoch(helped, number))


def test_workers_keep_no_images(source, monkeypatch):
    def put(store, index, pixels):
        assert store.limit_bytes == 0

    monkeypatch.setattr(ImageStore, "put", put)
    epoch(batches(source, workers=1), 0)  # a failed assertion in the worker surfaces here


def test_the_generators_of_the_caller_stay_where_they_are(source):
    for workers in (0, 2):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        epoch(batches(source, workers=workers), 0)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()


def test_an_epoch_left_early_can_be_followed_by_another(source):
    for workers in (0, 2):
        loader = batches(source, workers=workers)
        next(iter(loader))
        assert same(epoch(loader, 1), epoch(batches(source), 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_has_gone_bad_is_named(tmp_path, workers):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    found = open_source(tmp_path)
    (tmp_path / "b" / "1.png").write_bytes(b"")
    loader = Batches(
        ImageStore(found.items, VIEW, PLENTY),
        [0, 1],
        [0, 1],
        batch_size=2,
        augmentation=None,
        shuffle=False,
        seed=0,
        workers=workers,
    )
    with pytest.raises(DataError, match=r"b/1.png cannot be read \(empty file\)"):
        list(loader)


def test_impossible_wishes_are_our_bug(source):
    store = ImageStore(source.items, VIEW, PLENTY)
    plain = {"batch_size": 4, "augmentation": None, "shuffle": False, "seed": 0}
    with pytest.raises(ValueError, match="2 indices but 1 labels"):
        Batches(store, [0, 1], [0], **plain)
    with pytest.raises(ValueError, match="batch_size"):
        Batches(store, [0], [0], **(plain | {"batch_size": 0}))
    other = Augmentation("none", size_pixels=8, interpolation="bilinear", invariances=[])
    with pytest.raises(ValueError, match="augmentation gives 8 px, the view 16"):
        Batches(store, [0], [0], **(plain | {"augmentation": other}))
