"""Augmentation: random by seed, label-safe by declaration, and nothing else."""

import subprocess
import sys

import numpy as np
import pytest

from finetune.data.augmentation import COLOUR, CROP_AREA, PRESETS, Augmentation
from finetune.data.decoding import center_crop

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)


def make(preset, *invariances, size=32, interpolation="bilinear"):
    return Augmentation(preset, size_pixels=size, interpolation=interpolation, invariances=invariances)


def gradient(height, width):
    """Red tells the row and green the column, so a view tells where it was cut."""
    rows, columns = np.mgrid[:height, :width]
    red, green = np.rint(255 * rows / (height - 1)), np.rint(255 * columns / (width - 1))
    return np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8)


def slopes(view):
    """Mean change of red down the rows and of green along the columns: their signs tell flips."""
    values = view.astype(float)
    return np.diff(values[..., 0], axis=0).mean(), np.diff(values[..., 1], axis=1).mean()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_seed_fixes_the_pixels_whatever_came_before(preset, interpolation):
    augment, other = (make(preset, "hflip", "vflip", "rot90", interpolation=interpolation) for _ in range(2))
    first = [augment(IMAGE, seed).copy() for seed in range(20)]
    for seed in reversed(range(20)):
        np.testing.assert_array_equal(other(IMAGE, seed), first[seed])
    assert len({view.tobytes() for view in first}) == (1 if preset == "none" else 20)
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in first)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(50, 64), (32, 32), (20, 90), (9, 7), (1, 1), (31, 33)])
def test_any_size_works_and_the_input_stays(preset, shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    before, augment = image.copy(), make(preset, "hflip", "rot90")
    image.flags.writeable = False  # writing would raise
    for seed in range(30):
        assert augment(image, seed).shape == (32, 32, 3)
    np.testing.assert_array_equal(image, before)


def test_none_is_the_centre_crop_and_ignores_invariances():
    np.testing.assert_array_equal(make("none", "hflip")(IMAGE, 3), center_crop(IMAGE, 32))


@pytest.mark.technique("T142")
def test_flips_happen_half_of_the_time():
    augment, image = make("light", "hflip", "vflip"), gradient(64, 64)
    signs = np.array([slopes(augment(image, seed)) for seed in range(2000)]) < 0
    assert np.abs(signs.mean(axis=0) - 0.5).max() < 0.04
    # Both flips draw for themselves: seeding every transform alike would tie them together.
    assert abs((signs[:, 0] == signs[:, 1]).mean() - 0.5) < 0.04


@pytest.mark.technique("T142")
def test_a_flip_is_exact():
    augment, plain = make("light", "hflip"), make("light")
    pairs = [(augment(IMAGE, seed), plain(IMAGE, seed)) for seed in range(40)]
    flipped = [(view == base[:, ::-1]).all() for view, base in pairs]
    assert all(was or (view == base).all() for was, (view, base) in zip(flipped, pairs, strict=True))
    assert 5 < sum(flipped) < 35


@pytest.mark.technique("T147")
@pytest.mark.parametrize("preset", ["light", "medium", "heavy"])
def test_nothing_is_flipped_that_was_not_declared(preset):
    image = gradient(64, 64)
    for declared in ((), ("hflip",), ("vflip",)):
        augment = make(preset, *declared)
        signs = np.array([slopes(augment(image, seed)) for seed in range(200)]) < 0
        assert signs.any(axis=0).tolist() == ["vflip" in declared, "hflip" in declared]
        assert any("horizontal flip" in line for line in augment.describe()) == ("hflip" in declared)


@pytest.mark.technique("T146")
def test_rotations_are_the_four_exact_ones():
    augment, plain = make("light", "rot90"), make("light")
    turns = []
    for seed in range(200):
        view, base = augment(IMAGE, seed), plain(IMAGE, seed)
        turns.append(next(k for k in range(4) if (np.rot90(base, k) == view).all()))
    assert np.bincount(turns, minlength=4).min() > 25


@pytest.mark.technique("T143")
@pytest.mark.parametrize("preset", ["light", "medium", "heavy"])
def test_crops_keep_to_their_area_and_aspect(preset):
    augment = make(preset, size=64)
    chain = augment._chain.transforms[0]  # the crop, with its draws
    image, areas, aspects, places = gradient(400, 400), [], [], []
    for seed in range(600):
        augment(image, seed)
        left, top, right, bottom = chain.params["crop_coords"]
        areas.append((right - left) * (bottom - top) / 400**2)
        aspects.append((right - left) / (bottom - top))
        places.append(left / max(400 - (right - left), 1))
    low, high = CROP_AREA[preset]
    assert low - 0.01 <= min(areas) < low + 0.1 and high - 0.1 < max(areas) <= high
    assert 0.74 <= min(aspects) < 0.8 and 1.25 < max(aspects) <= 1.35
    assert 0.4 < np.mean(places) < 0.6 and np.std(places) > 0.2


@pytest.mark.technique("T143")
def test_what_is_cut_is_a_part_of_the_image_at_its_scale():
    view = make("light", size=64)(gradient(256, 256), 5).astype(float)
    height, width = np.ptp(view[..., 0]) / 255, np.ptp(view[..., 1]) / 255
    assert 0.4 < height * width <= 1.0 and 0.7 < width / height < 1.4


def test_shrinking_averages_so_that_noise_vanishes():
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    assert make("light", size=64, interpolation="bicubic")(noise, 0).std() < 20  # 74 without antialiasing


@pytest.mark.technique("T144")
def test_colours_move_as_much_as_the_preset_says():
    grey = np.full((32, 32, 3), 100, np.uint8)
    means = np.array([make_mean("medium", grey, seed) for seed in range(300)])
    assert 100 * (1 - COLOUR["medium"]["brightness"]) - 1 <= means.min() < 85
    assert 115 < means.max() <= 100 * (1 + COLOUR["medium"]["brightness"]) + 1
    assert {make_mean("light", grey, seed) for seed in range(50)} == {100.0}
    colourful = np.full((32, 32, 3), (200, 60, 60), np.uint8)
    spread = np.array([cached("heavy")(colourful, seed).reshape(-1, 3).max(axis=0) for seed in range(100)], float)
    assert np.std(spread[:, 0] - spread[:, 1]) > 5  # saturation, too


_CACHE: dict[str, Augmentation] = {}


def cached(preset):
    return _CACHE.setdefault(preset, make(preset))


def make_mean(preset, image, seed):
    return float(cached(preset)(image, seed).mean())


def test_heavy_cuts_one_grey_rectangle_half_of_the_time():
    augment = make("heavy")
    black = np.zeros((64, 64, 3), np.uint8)
    shares = np.array([(augment(black, seed) == 127).all(axis=-1).mean() for seed in range(400)])
    assert 0.4 < (shares > 0).mean() < 0.6
    assert shares[shares > 0].min() > 0.02 and shares.max() <= 0.26


@pytest.mark.parametrize("preset", PRESETS)
def test_description_has_a_line_per_transform(preset):
    augment = make(preset, "hflip", "rot90")
    expected = 1 if augment._chain is None else len(augment._chain.transforms)
    assert len(augment.describe()) == expected and all(augment.describe())


@pytest.mark.parametrize(
    "wrong", [{"preset": "wild"}, {"invariances": ["diagonal"]}, {"interpolation": "lanczos", "preset": "light"}]
)
def test_unknown_names_are_our_bug(wrong):
    with pytest.raises(ValueError, match=r"one of|may be"):
        Augmentation(**({"preset": "none", "size_pixels": 8, "interpolation": "bilinear", "invariances": []} | wrong))


def test_importing_the_module_leaves_albumentations_alone():
    code = "import sys, finetune.data.augmentation; assert not {'albumentations', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
