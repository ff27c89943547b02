"""Channel constants: right, measured on training images alone, once, and the same for every image after."""

import shutil

import numpy as np
import pytest
from PIL import Image

import finetune as ft
from finetune.config.card import View
from finetune.data.items import Item
from finetune.data.loading import ImageStore
from finetune.data.normalization import measure_constants
from finetune.errors import RecipeError

VIEW = View(size_pixels=16, shorter_pixels=16, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Forty pictures of noise around colours of their own."""
    folder, random, items = tmp_path_factory.mktemp("noise"), np.random.default_rng(0), []
    for number in range(40):
        colour = random.integers(40, 200, 3)
        pixels = np.clip(colour + random.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        items.append(Item(name=f"{number}.png", label=0, role=None, file=folder / f"{number}.png"))
    return ImageStore(items, VIEW, 10**8)


def pixels_of(store, indices):
    return np.stack([store.get(index) for index in indices]).reshape(-1, 3) / 255


@pytest.mark.technique("T023")
def test_the_streamed_constants_equal_those_of_all_pixels_at_once(store):
    found = measure_constants(store, range(40), size_pixels=16, kind="channel_mean_std", seed=0)
    pixels = pixels_of(store, range(40))
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(0), atol=1e-12)
    changed = (pixels - found.mean) / found.std
    np.testing.assert_allclose(changed.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(changed.std(0), 1, atol=1e-9)


@pytest.mark.technique("T022")
def test_the_mean_alone_leaves_the_scale(store):
    found = measure_constants(store, range(40), size_pixels=16, kind="channel_mean", seed=0)
    assert found.std == (1.0, 1.0, 1.0)
    np.testing.assert_allclose((pixels_of(store, range(40)) - found.mean).mean(0), 0, atol=1e-12)


@pytest.mark.technique("T026")
def test_a_sample_is_within_three_standard_errors_and_seeded(store):
    whole = measure_constants(store, range(40), size_pixels=16, kind="channel_mean_std", seed=0)
    part = measure_constants(store, range(40), size_pixels=16, kind="channel_mean_std", seed=0, limit=20)
    assert part.num_images == 20
    assert max(abs(np.subtract(part.mean, whole.mean))) < 3 * part.standard_error
    assert part == measure_constants(store, range(40), size_pixels=16, kind="channel_mean_std", seed=0, limit=20)
    assert part != measure_constants(store, range(40), size_pixels=16, kind="channel_mean_std", seed=1, limit=20)


@pytest.mark.slow
@pytest.mark.technique("T024")
def test_noise_in_val_and_test_leaves_the_constants_as_they_were(shapes, tmp_path):
    recipe = ft.load_recipe(
        None, ["data.root=" + str(tmp_path / "a"), "data.image_size=32", "data.normalize=channel_mean_std"]
    )
    for role, names in (("train", range(12)), ("val", range(12, 18)), ("test", range(18, 24))):
        for label in ("disc", "square"):
            (tmp_path / "a" / role / label).mkdir(parents=True)
            for number in names:
                shutil.copy(shapes / label / f"{number:02}.png", tmp_path / "a" / role / label)
    before = ft.survey(recipe)
    random = np.random.default_rng(0)
    for path in [*(tmp_path / "a" / "val").rglob("*.png"), *(tmp_path / "a" / "test").rglob("*.png")]:
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    after = ft.survey(recipe)
    assert after.split_digest != before.split_digest
    assert (after.view.mean, after.view.std) == (before.view.mean, before.view.std)
    for path in (tmp_path / "a" / "train").rglob("*.png"):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    assert ft.survey(recipe).view.mean != before.view.mean


@pytest.mark.technique("T025")
def test_the_plan_fixes_the_constants_for_every_later_step(shapes):
    wishes = ["data.image_size=32", "tracking.enabled=false", "data.normalize=channel_mean_std"]
    facts = ft.survey(ft.load_recipe(str(shapes), wishes))
    plan = ft.make_plan(ft.load_recipe(str(shapes), wishes), facts)
    assert (plan.view.mean, plan.view.std) == (facts.view.mean, facts.view.std)
    assert facts.normalized_images == sum(facts.counts["train"])


@pytest.mark.slow
def test_pretrained_weights_keep_their_own_constants_and_random_ones_get_some(shapes):
    own = ft.survey(ft.load_recipe(str(shapes), ["data.image_size=32"]))
    assert (own.normalize, own.normalized_images) == ("weights", 0)
    random = ft.survey(ft.load_recipe(str(shapes), ["data.image_size=32", "pretrained=false"]))
    assert random.normalize == "channel_mean_std"
    assert random.view.mean != own.view.mean


def test_constants_that_are_given_twice_are_refused(shapes):
    with pytest.raises(RecipeError, match="keep one"):
        ft.survey(ft.load_recipe(str(shapes), ["data.mean=[0.5,0.5,0.5]", "data.normalize=channel_mean"]))
    given = ft.survey(ft.load_recipe(str(shapes), ["data.mean=[0.5,0.5,0.5]", "data.image_size=32"]))
    assert (given.normalize, given.view.mean) == ("recipe", (0.5, 0.5, 0.5))
    assert "mean" in given.overridden
