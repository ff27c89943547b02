"""Augmentation: random by seed, label-safe by declaration, and nothing else."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from finetune.config.card import View
from finetune.data.augmentation import PRESETS, Augmentation
from finetune.data.changes import ColorShift
from finetune.data.decoding import center_crop
from finetune.data.domains import COLOUR, CROP_AREA, DOMAINS
from finetune.data.items import Item
from finetune.data.loading import Batches, ImageStore
from finetune.data.normalization import fit_color_basis

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)


SHIFT = ColorShift(
    eigenvalues=(0.2, 0.05, 0.01), eigenvectors=((0.6, -0.8, 0.0), (0.8, 0.6, 0.0), (0.0, 0.0, 1.0)), deviation=0.1
)


def make(preset, *invariances, size=32, interpolation="bilinear", **options):
    return Augmentation(preset, size_pixels=size, interpolation=interpolation, invariances=invariances, **options)


def flat(*colour, side=32):
    return np.full((side, side, 3), colour, np.uint8)


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
    for seed in range(12):
        assert augment(image, seed).shape == (32, 32, 3)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("domain", DOMAINS)
def test_any_size_works_in_every_domain(domain):
    options = {"rotate_degrees": 20.0, "policy": "trivial", "pca_color": SHIFT, "cutout": 0.9}
    for crop, preset in (("area", "heavy"), ("scale", "medium"), ("area", "none")):
        augment = make(preset, "rot90", domain=domain, crop=crop, **options)
        for height, width in [(50, 64), (32, 32), (20, 90), (9, 7), (1, 1), (31, 33)]:
            for seed in range(3):
                assert augment(gradient(height + 1, width + 1)[:-1, :-1], seed).shape == (32, 32, 3)


def test_none_is_the_centre_crop_and_ignores_invariances():
    np.testing.assert_array_equal(make("none", "hflip")(IMAGE, 3), center_crop(IMAGE, 32))


@pytest.mark.technique("T142")
def test_flips_happen_half_of_the_time():
    augment, image = make("light", "hflip", "vflip"), gradient(64, 64)
    signs = np.array([slopes(augment(image, seed)) for seed in range(1200)]) < 0
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
        signs = np.array([slopes(augment(image, seed)) for seed in range(80)]) < 0
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
    image, areas, aspects, places = gradient(200, 200), [], [], []
    for seed in range(250):
        augment(image, seed)
        left, top, right, bottom = chain.params["crop_coords"]
        areas.append((right - left) * (bottom - top) / 200**2)
        aspects.append((right - left) / (bottom - top))
        places.append(left / max(200 - (right - left), 1))
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
    means = np.array([make_mean("medium", grey, seed) for seed in range(200)])
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
    shares = np.array([(augment(black, seed) == 127).all(axis=-1).mean() for seed in range(200)])
    assert 0.4 < (shares > 0).mean() < 0.6
    assert shares[shares > 0].min() > 0.02 and shares.max() <= 0.26


@pytest.mark.parametrize("preset", PRESETS)
def test_description_has_a_line_per_transform(preset):
    augment = make(preset, "hflip", "rot90")
    expected = 1 if augment._chain is None else len(augment._chain.transforms) + (preset == "heavy")
    assert len(augment.describe()) == expected and all(augment.describe())


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "wild"},
        {"invariances": ["diagonal"]},
        {"interpolation": "lanczos"},
        {"domain": "sea"},
        {"crop": "none"},
        {"policy": "auto"},
        {"cutout": 1.0},
        {"rotate_degrees": float("nan")},
    ],
)
def test_what_is_unknown_or_out_of_range_is_our_bug(wrong):
    with pytest.raises(ValueError, match=r"one of|may be|must lie in"):
        Augmentation(**({"preset": "none", "size_pixels": 8, "interpolation": "bilinear", "invariances": []} | wrong))


@pytest.mark.technique("T147")
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("options", [{}, {"policy": "trivial"}, {"policy": "rand"}], ids=["", "trivial", "rand"])
def test_no_domain_and_no_policy_flips_undeclared(domain, options, monkeypatch):
    # Solarize turns slopes over without moving a pixel.
    monkeypatch.setitem(DOMAINS, domain, dataclasses.replace(DOMAINS[domain], recolours=False, hides_parts=False))
    augment, flipping, image = make("heavy", domain=domain, **options), None, gradient(48, 48)
    signs = np.array([slopes(augment(image, seed)) for seed in range(60)]) < 0
    assert not signs.any() and not any("flip" in line for line in augment.describe())
    flipping = make("heavy", "vflip", domain=domain, **options)
    signs = np.array([slopes(flipping(image, seed)) for seed in range(30)]) < 0
    assert signs.any(axis=0).tolist() == [True, False]


def hue_of(view):
    """Where the middle channel lies between the outer ones; brightness and contrast leave it."""
    low, middle, high = sorted(view.reshape(-1, 3).astype(float).mean(axis=0))
    return (middle - low) / (high - low)


@pytest.mark.technique("T144")
@pytest.mark.parametrize("domain", DOMAINS)
def test_hues_move_only_where_colour_does_not_make_the_class(domain):
    image = flat(140, 100, 60)
    for options in ({}, {"policy": "trivial"}):
        augment = make("heavy", domain=domain, **options)
        hues = [hue_of(view) for view in (augment(image, seed) for seed in range(40)) if np.ptp(view.mean((0, 1))) > 12]
        assert len(hues) > 25
        moves = max(abs(hue - 0.5) for hue in hues)
        assert (moves > 0.1) == (domain in ("natural", "tiny") and not options) or (options and moves > 0.1)
        if domain in ("document", "medical", "fine"):
            assert moves < 0.05


@pytest.mark.technique("T144")
def test_stains_change_less_than_photographs():
    spread = {}
    for domain in ("natural", "medical"):
        augment = make("heavy", domain=domain)
        spread[domain] = np.std([np.median(augment(flat(90, 90, 90), seed)) for seed in range(150)])
    assert spread["medical"] < 0.5 * spread["natural"]


@pytest.mark.technique("T143")
@pytest.mark.parametrize(("domain", "floor"), [("fine", 0.6), ("medical", 0.6), ("document", 0.7)])
def test_details_stay_in_the_crop(domain, floor):
    for crop in ("area", "scale"):
        augment, image, areas = make("light", size=64, domain=domain, crop=crop), gradient(128, 128), []
        for seed in range(80):
            view = augment(image, seed).astype(float)
            areas.append(np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / 255**2)
        assert floor - 0.04 < min(areas) < floor + 0.1  # a view of n pixels spans n - 1 steps


@pytest.mark.technique("T143")
def test_a_crop_at_a_random_scale_has_sides_uniform_in_the_range_of_the_paper():
    augment = make("light", size=56, crop="scale")
    image, sides, places = gradient(90, 90), [], []
    for seed in range(300):
        columns = augment(image, seed)[..., 1].astype(float) / 255
        sides.append(round(90 * augment._chain.transforms[0].transforms[0].params["scale"]))
        assert np.ptp(columns) == pytest.approx(56 / sides[-1], rel=0.1)  # pixels, not only draws
        places.append(columns.min() / (1 - np.ptp(columns)))
    assert 64 <= min(sides) < 67 and 117 < max(sides) <= 120
    assert abs(np.mean(sides) - 92) < 3 * (57 / 12**0.5) / 300**0.5
    assert np.histogram(sides, bins=4)[0].min() > 50
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 45


@pytest.mark.technique("T143")
def test_tiny_images_are_moved_by_whole_pixels_and_never_resized():
    augment = make("light", domain="tiny")
    image = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    places = [windows[augment(image, seed).tobytes()] for seed in range(400)]
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))


def test_tiny_images_are_never_blurred():
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:] = 120  # sharper edges leave the dark side dark

    def is_blurred(view):
        return view[16, 0, 0] < view[16, 15, 0] < view[16, 31, 0]

    for domain, expected in (("natural", True), ("tiny", False)):
        augment = make("none", domain=domain, policy="trivial", interpolation="nearest")
        assert any(is_blurred(augment(step, seed)) for seed in range(150)) is expected


def angle_of(view):
    part = view[12:-12, 12:-12].astype(float)
    down, right = (np.diff(part[..., 0], axis=axis).mean() for axis in (0, 1))
    return np.degrees(np.arctan2(right, down))


@pytest.mark.technique("T146")
def test_rotations_are_uniform_up_to_the_degrees_asked_for():
    augment = make("none", size=48, rotate_degrees=30.0)
    angles = [angle_of(augment(gradient(48, 48), seed)) for seed in range(200)]
    assert -31 < min(angles) < -27 and 27 < max(angles) < 31
    assert np.std(angles) == pytest.approx(60 / 12**0.5, rel=0.12)


@pytest.mark.technique("T146")
@pytest.mark.parametrize(
    "options", [{"rotate_degrees": 180.0}, {"policy": "trivial"}, {"domain": "document", "preset": "heavy"}]
)
def test_no_black_corner_tells_of_a_rotation(options):
    options = {"preset": "light", **options}
    augment = make(options.pop("preset"), **options)
    for seed in range(60):
        assert np.ptp(augment(flat(200, 200, 200, side=40), seed).astype(int)) == 0


@pytest.mark.technique("T146")
def test_pages_stay_nearly_upright():
    augment = make("heavy", size=48, domain="document", policy="trivial")
    angles = [angle_of(augment(gradient(64, 64), seed)) for seed in range(100)]
    assert 2 < max(np.abs(angles)) < 12


@pytest.fixture(scope="module")
def colourful(tmp_path_factory):
    """Thirty images whose red and green vary together, and a file that holds no image."""
    folder, random, items = tmp_path_factory.mktemp("colours"), np.random.default_rng(0), []
    for number in range(31):
        both, noise = random.normal(0, 40, (16, 20, 1)), random.normal(0, 8, (16, 20, 3))
        pixels = np.clip(np.array([128, 110, 90]) + both * np.array([1, 0.8, 0.1]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        items.append(Item(name=f"{number}.png", label=number % 3, role=None, file=folder / f"{number}.png"))
    (folder / "30.png").write_bytes(b"no image")
    view = View(size_pixels=16, shorter_pixels=16, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
    return ImageStore(items, view, 10**8)


@pytest.mark.technique("T145")
def test_principal_colours_are_those_of_all_training_pixels_together(colourful):
    found = fit_color_basis(colourful, range(20), size_pixels=16, seed=0)
    pixels = np.concatenate([center_crop(colourful.get(i), 16).reshape(-1, 3) / 255 for i in range(20)])
    covariance = np.cov(pixels.T, bias=True)
    vectors = np.array(found.eigenvectors)
    np.testing.assert_allclose(vectors @ np.diag(found.eigenvalues) @ vectors.T, covariance, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert list(found.eigenvalues) == sorted(found.eigenvalues, reverse=True)
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()
    assert found.num_images == 20
    assert fit_color_basis(colourful, range(31), size_pixels=16, seed=0).num_images == 30
    part = fit_color_basis(colourful, range(30), size_pixels=16, seed=0, limit=10)
    assert part.num_images == 10
    assert part == fit_color_basis(colourful, range(30), size_pixels=16, seed=0, limit=10)
    assert part != fit_color_basis(colourful, range(30), size_pixels=16, seed=1, limit=10)
    with pytest.raises(ValueError, match="no training image"):
        fit_color_basis(colourful, [30], size_pixels=16, seed=0)


@pytest.mark.technique("T145")
def test_a_colour_shift_has_the_covariance_of_the_formula(colourful):
    for shift in (SHIFT, fit_color_basis(colourful, range(20), size_pixels=16, seed=0).shifts(0.1)):
        numbers = np.random.default_rng(0)
        drawn = np.stack([shift.draw(numbers) for _ in range(15_000)])
        vectors, values = np.array(shift.eigenvectors), np.array(shift.eigenvalues)
        expected = 0.01 * vectors @ np.diag(values**2) @ vectors.T
        assert np.abs(np.cov(drawn.T) - expected).max() < 0.05 * np.abs(expected).max()
        assert np.abs(drawn.mean(0)).max() < 4 * np.sqrt(expected.max() / 15_000)


@pytest.mark.technique("T145")
def test_one_shift_is_added_to_all_pixels_whatever_the_image_looks_like():
    strong = dataclasses.replace(SHIFT, deviation=1.0)
    augment, image = make("none", pca_color=strong), np.random.default_rng(0).integers(100, 150, (32, 32, 3), np.uint8)
    moves = []
    for seed in range(300):
        moved = augment(image, seed).astype(int) - image
        assert (moved == moved[0, 0]).all() or (augment(image, seed) % 255 == 0).any()  # values end at 0 and 255
        np.testing.assert_array_equal(augment(flat(120, 120, 120), seed)[0, 0], np.clip(120 + moved[0, 0], 0, 255))
        moves.append(moved[0, 0])
    moves = np.array(moves)
    assert len(np.unique(moves, axis=0)) > 250
    # the second colour moves blue not at all, the first moves green more than red
    vectors, values = np.array(SHIFT.eigenvectors), np.array(SHIFT.eigenvalues)
    expected = 255 * np.sqrt((vectors**2 * values**2).sum(axis=1))
    np.testing.assert_allclose(moves.std(0), expected, rtol=0.15)


@pytest.mark.technique("T134")
def test_a_cutout_covers_its_share_less_what_the_border_clips():
    augment, side = make("none", cutout=0.5), 32
    masks = np.array([(augment(flat(0, 0, 0), seed) == 127).all(axis=-1) for seed in range(800)])
    along = np.mean([min(at + 8, side) - max(at - 8, 0) for at in range(side)]) / side
    assert masks.mean() == pytest.approx(along**2, rel=0.04)
    assert along**2 == pytest.approx(0.19, abs=0.005) and masks.mean() < 0.21  # and not 0.25
    assert masks[:, 0, 0].any() and masks[:, -1, -1].any()  # every place can be hidden
    for mask in masks[:50]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert 8 <= rows.sum() <= 16 and mask.sum() == rows.sum() * columns.sum()


@pytest.mark.technique("T134")
def test_a_cutout_leaves_the_rest_of_the_view_and_takes_the_place_of_the_heavy_one():
    for preset in ("light", "heavy"):
        plain, cut = make(preset, "hflip", domain="fine"), make(preset, "hflip", domain="fine", cutout=0.25)
        for seed in range(20):
            view, base = cut(IMAGE, seed), plain(IMAGE, seed)
            hidden = (view == 127).all(axis=-1)
            assert 16 <= hidden.sum() <= 64 + 3
            np.testing.assert_array_equal(view[~hidden], base[~hidden])
    assert sum("cutout" in line for line in make("heavy", cutout=0.25).describe()) == 1


@pytest.mark.technique("T148")
def test_rand_augment_applies_two_operations_of_one_magnitude():
    augment, grey = make("none", policy="rand"), flat(100, 100, 100)
    means = np.array([augment(grey, seed).mean() for seed in range(400)])
    factors = [1 + 0.27 * one for one in (-1, 0, 1)]
    allowed = np.array([100 * a * b for a, b in itertools.product(factors, factors)])
    assert np.abs(means[:, None] - allowed).min(axis=1).max() < 1.5
    found = {int(np.abs(mean - allowed).argmin()) for mean in means}
    assert {1, 5} <= found and {0, 2, 6, 8} & found  # one factor, and two
    assert 0.80 < (np.abs(means - 100) < 1).mean() < 0.92  # brightness is one of 14: (13/14)^2 = 0.86


@pytest.mark.technique("T148")
def test_trivial_augment_draws_one_operation_at_any_strength():
    augment, grey = make("none", policy="trivial"), flat(100, 100, 100)
    means = np.array([augment(grey, seed).mean() for seed in range(700)])
    bright = np.array([mean for mean in means if abs(mean - 100) > 0.5 and abs(mean - 155) > 0.5])  # 155: solarized
    assert 0.04 < len(bright) / 700 < 0.11  # 1 / 14 = 0.071
    assert 9 <= bright.min() < 25 and 175 < bright.max() <= 191
    assert 0.3 < (bright > 100).mean() < 0.7


@pytest.mark.technique("T148")
def test_a_policy_takes_the_place_of_the_presets_colours():
    assert any("colour jitter" in line for line in make("heavy").describe())
    for policy in ("trivial", "rand"):
        assert not any("colour jitter" in line for line in make("heavy", policy=policy).describe())


def test_sharpening_is_that_of_pil():
    kit_line = make("none", policy="trivial", domain="tiny")._chain.transforms[1].transforms
    sharpen = next(step for step in kit_line if type(step).__name__ == "Sharpen")
    smooth = np.asarray(Image.fromarray(IMAGE).resize((64, 64), Image.Resampling.BICUBIC, box=(0, 0, 8, 8)))
    sharpen.alpha = (0.9 / 13, 0.9 / 13)
    found = sharpen(image=smooth)["image"].astype(int)
    expected = np.asarray(ImageEnhance.Sharpness(Image.fromarray(smooth)).enhance(1.9)).astype(int)
    assert np.abs(found - expected)[1:-1, 1:-1].max() <= 1


def speckle(view, numbers):
    """An own change: a white pixel somewhere."""
    view[tuple(numbers.integers(0, len(view), 2))] = 255
    return view


@pytest.mark.technique("T148")
def test_an_own_change_is_a_view_like_any_other():
    augment, plain = make("heavy", "hflip", custom=speckle, domain="fine"), make("heavy", "hflip", domain="fine")
    kept, spots = IMAGE.copy(), set()
    for seed in range(30):
        view, base = augment(IMAGE, seed), plain(IMAGE, seed)
        np.testing.assert_array_equal(view, make("heavy", "hflip", custom=speckle, domain="fine")(IMAGE, seed))
        changed = np.argwhere((view != base).any(axis=-1))
        assert len(changed) <= 1
        spots |= {tuple(at) for at in changed}
    make("none", custom=speckle)(IMAGE, 0)
    np.testing.assert_array_equal(IMAGE, kept)  # it wrote into a copy
    assert len(spots) > 20
    assert "own change speckle" in augment.describe()


@pytest.mark.technique("T148")
def test_what_we_add_moves_no_other_draw():
    extras = {"custom": lambda view, numbers: view + numbers.integers(1, 3, dtype=np.uint8), "pca_color": SHIFT}
    for preset, options in (("none", {"cutout": 0.3}), ("heavy", {})):
        augment, plain = make(preset, **options, **extras), make(preset, **options)
        for seed in range(20):
            hidden = (plain(flat(0, 0, 0), seed) == 127).all(axis=-1)
            np.testing.assert_array_equal((augment(flat(0, 0, 0), seed) == 127).all(axis=-1), hidden)


@pytest.mark.technique("T148")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda view, numbers: None, "returns NoneType; return an array"),
        (lambda view, numbers: view[1:], r"turns shape \(32, 32, 3\) into \(31, 32, 3\); keep the shape"),
        (lambda view, numbers: view / 255, "returns float64 from 0.0 to 1.0 instead of uint8 .* clip"),
        (lambda view, numbers: view.astype(int) + 300, "returns int64 from 300 to 555"),
        (lambda view, numbers: (view > 99).astype(np.uint8), "turns values up to 255 into 0 and 1; multiply by 255"),
        (lambda view, numbers: view + np.random.default_rng().integers(1, 99, dtype=np.uint8), "gives two answers"),
    ],
    ids=["nothing", "shape", "scale", "type", "range", "random"],
)
def test_an_own_change_that_breaks_its_contract_is_named(change, message):
    with pytest.raises(ValueError, match=f"own change <lambda>: it {message}"):
        make("none", custom=change)(IMAGE, 0)


@pytest.fixture(scope="module")
def twins():
    """Twelve items of one and the same image."""
    view = View(size_pixels=32, shorter_pixels=40, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
    items = [Item(name=f"{i}.png", label=i % 3, role=None, file=None) for i in range(12)]
    store = ImageStore(items, view, 10**8)
    for index in range(12):
        store.put(index, np.random.default_rng(4).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    return store


def epoch_of(store, augmentation, number, workers):
    labels = [item.label for item in store.items]
    batches = Batches(
        store, range(12), labels, batch_size=4, augmentation=augmentation, shuffle=False, seed=3, workers=workers
    )
    batches.set_epoch(number)
    images, given, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, given


EVERYTHING = {
    "domain": "natural", "crop": "scale", "rotate_degrees": 15.0, "pca_color": SHIFT, "policy": "rand", "cutout": 0.3,
    "custom": speckle,
}  # fmt: skip


@pytest.mark.technique("T148")
@pytest.mark.technique("T149")
def test_views_follow_from_seed_epoch_and_image_whoever_draws_them(twins):
    augment = make("heavy", "hflip", "rot90", **EVERYTHING)
    epochs = []
    for number in (0, 1):
        images, _ = epoch_of(twins, augment, number, workers=0)
        torch.testing.assert_close(epoch_of(twins, augment, number, workers=2)[0], images, rtol=0, atol=0)
        epochs.append(images)
    assert len({image.numpy().tobytes() for image in torch.cat(epochs)}) == 24


@pytest.mark.technique("T149")
@pytest.mark.technique("T134")
def test_labels_stay_and_evaluation_sees_no_augmentation(twins):
    given = [item.label for item in twins.items]
    _, labels = epoch_of(twins, make("heavy", "hflip", **EVERYTHING), 0, workers=0)
    assert labels.tolist() == given
    for number in (0, 1):
        images, labels = epoch_of(twins, None, number, workers=0)
        plain = torch.from_numpy(center_crop(twins.get(0), 32).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(images, plain.expand(12, -1, -1, -1), rtol=0, atol=1e-6)
        assert labels.tolist() == given


def test_importing_the_module_leaves_albumentations_alone():
    code = "import sys, finetune.data.augmentation; assert not {'albumentations', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
