"""More than 8 bits per channel: one range for a data set, from its training images, for whoever decodes."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

import finetune as ft
from finetune.config.backbone_names import read_zoo
from finetune.data.decoding import decode, read_levels
from finetune.data.sources import open_source
from finetune.data.value_range import FULL_RANGE, Levels, choose_range, levels_of, to_eight_bits
from finetune.ensembles.members import open_again
from finetune.errors import RecipeError
from finetune.evaluation.other_data import _read_images, evaluate_elsewhere
from finetune.features.survey import look
from finetune.inference.batch_predict import predict
from finetune.model_selection.ranking import _Images
from finetune.models.backbones import load_backbone
from finetune.preparing import plan

SMALL = ["data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def quiet(text):
    """Nobody listens."""


def file_of(values, kind):
    """Bytes of a PNG or TIFF with these values, colours in the order red, green, blue."""
    if values.ndim == 3:
        turned = values[..., [2, 1, 0, 3][: values.shape[2]]]
        return cv2.imencode(f".{kind.lower()}", turned)[1].tobytes()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(data, value_range):
    return decode(data, shorter_pixels=None, interpolation="bilinear", value_range=value_range)[0]


def levels(values):
    return levels_of(np.asarray(values))


def range_of(*images):
    found = choose_range([levels(image) for image in images])
    return found.low, found.high


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_colours_of_any_depth_come_back_as_the_eight_bits_they_were_made_of(kind, bits):
    top = 2**bits - 1
    values = np.rint(COLOURS / 255 * top).astype(np.uint16)
    np.testing.assert_array_equal(pixels_of(file_of(values, kind), (0, top)), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_values_of_twelve_bits_come_back_as_the_eight_bits_they_were_made_of(kind):
    grey = COLOURS[..., 0]
    values = np.rint(grey / 255 * 4095).astype(np.uint16)
    np.testing.assert_array_equal(pixels_of(file_of(values, kind), (0, 4095))[..., 1], grey)


def test_transparency_of_sixteen_bits_is_no_value_and_shows_white():
    values = np.full((4, 4, 4), 1000, np.uint16)
    values[..., 3] = 65535
    values[:2, :, 3] = 0
    pixels = pixels_of(file_of(values, "PNG"), (0, 2000))
    assert (pixels[:2] == 255).all() and (pixels[2:] == 128).all()


def test_what_lies_outside_the_range_is_clipped_and_told():
    values = np.array([[-5.0, 0.0, 5.0, 10.0, 99.0, np.nan]])
    pixels, share = to_eight_bits(values, (0, 10))
    assert pixels.tolist() == [[0, 0, 128, 255, 255, 0]]
    assert share == pytest.approx(2 / 6)
    _, facts = decode(file_of(np.full((4, 4), 300, np.uint16), "PNG"), shorter_pixels=None, interpolation="nearest",
                      value_range=(0, 255))  # fmt: skip
    assert facts.is_clipped


def test_eight_bits_have_no_levels_and_are_never_mapped():
    data = file_of(COLOURS, "PNG")
    assert read_levels(data) is None
    np.testing.assert_array_equal(pixels_of(data, (0, 10)), COLOURS)


RAMP = np.linspace(0, 1, 4000).reshape(40, 100)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_values_that_fill_a_bit_depth_have_its_range(bits):
    assert range_of((RAMP * (2**bits - 1) * 0.8).astype(np.uint16)) == (0, 2**bits - 1)


def test_floats_up_to_one_are_mapped_from_one():
    assert range_of(RAMP.astype(np.float32)) == (0, 1)


@pytest.mark.parametrize("top", [40, 300])
def test_faint_values_are_mapped_from_what_they_fill(top):
    assert range_of((RAMP * top).astype(np.uint16)) == (0, top)


def test_a_few_hot_pixels_do_not_darken_all_others():
    image = (RAMP * 300).astype(np.uint16)
    image[0, 0] = 65535
    low, high = range_of(image)
    assert low == 0 and 295 <= high <= 300


def test_one_image_too_bright_does_not_darken_all_others():
    images = [(RAMP * 300).astype(np.uint16)] * 99 + [(RAMP * 60_000).astype(np.uint16)]
    assert 295 <= range_of(*images)[1] <= 300


def test_values_below_zero_and_far_above_it_are_mapped_from_what_they_fill():
    assert range_of((RAMP * 4000 - 1024).astype(np.int32)) == (-1024, 2976)
    assert range_of((RAMP * 300 + 5000).astype(np.uint16)) == (5000, 5300)


def test_a_constant_image_still_has_a_range():
    assert range_of(np.full((4, 4), 7, np.uint16)) == (7, 8)
    assert range_of(np.full((4, 4), -7, np.int32)) == (-7, -6)


def test_what_is_no_number_has_no_levels():
    assert levels(np.full((2, 2), np.nan, np.float32)) is None
    with pytest.raises(ValueError, match="no image"):
        choose_range([])
    assert levels(np.array([[np.nan, 1.0, np.inf]])) == Levels(lowest=1, low=1, high=1, highest=1)


def grey_set(folder, write, *, role="", count=12, factor=1.0):
    """Two classes of smooth grey images: bright above, bright at the left."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[:40, :40] / 39
    for name, shade in (("above", 1 - rows), ("left", 1 - columns)):
        (folder / role / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            grey = np.clip(255 * shade * random.uniform(0.8, 1) + random.normal(0, 6, (40, 40)), 0, 255) * factor
            write(np.rint(grey), folder / role / name / f"{number:02}.png")
    return folder


def eight(grey, path):
    Image.fromarray(grey.astype(np.uint8)).save(path)


def sixteen(grey, path):
    Image.fromarray(grey.astype(np.uint16)).save(path)


def recipe_of(folder, *wishes):
    return ft.load_recipe(str(folder), [*SMALL, *wishes])


@pytest.mark.slow
def test_a_faint_set_is_seen_as_its_eight_bit_twin_and_the_range_is_told(tmp_path):
    plain = grey_set(tmp_path / "plain", eight)
    faint = grey_set(tmp_path / "faint", lambda grey, path: sixteen(grey * 12, path))  # 0 to 3060: twelve bits
    seen, twin = look(recipe_of(faint)), look(recipe_of(plain))
    for index in range(len(twin.dataset.items)):
        expected = twin.dataset.store.get(index).astype(float) * 12 * 255 / 4095
        assert np.abs(seen.dataset.store.get(index) - expected).max() <= 2
    facts, decided = plan(recipe_of(faint), say=quiet)
    assert facts.value_range is not None and facts.value_range.why == "12 bits"
    assert decided.data.value_range == (0, 4095) == decided.view.value_range == facts.view.value_range
    (reason,) = [reason for reason in decided.reasons if reason.key == "data.value_range"]
    assert "12 bits" in reason.why and "training images" in reason.why
    assert facts.view.digest != look(recipe_of(faint, "data.value_range=[0,5000]")).facts.view.digest


@pytest.mark.slow
def test_the_range_is_measured_on_training_images_alone_and_what_others_hold_beyond_it_is_said(tmp_path):
    folder = grey_set(tmp_path / "set", sixteen, role="train")
    grey_set(folder, lambda grey, path: sixteen(grey * 200, path), role="test", count=4)
    seen = look(recipe_of(folder))
    assert seen.facts.view.value_range == (0, 255)
    test = seen.dataset.indices("test")[0]
    assert (seen.dataset.store.get(test) == 255).mean() > 0.5
    assert any("outside 0 to 255" in warning and "8 images" in warning for warning in seen.facts.warnings)


@pytest.mark.slow
def test_files_of_eight_bits_beside_wider_ones_stay_as_they_are(tmp_path):
    folder = grey_set(tmp_path / "set", eight)
    for path in sorted((folder / "left").iterdir()):
        sixteen(np.asarray(Image.open(path)).astype(float) * 16, path)
    seen = look(recipe_of(folder))
    assert seen.facts.view.value_range == (0, 4095)
    index = next(i for i, item in enumerate(seen.dataset.items) if item.name == "above/00.png")
    other = look(recipe_of(folder, "data.value_range=[0,9]"))
    np.testing.assert_array_equal(other.dataset.store.get(index), seen.dataset.store.get(index))


@pytest.mark.slow
def test_wide_images_of_a_set_that_is_learned_from_eight_bits_are_warned_of(tmp_path):
    folder = grey_set(tmp_path / "set", eight, role="train")
    grey_set(folder, sixteen, role="test", count=4)
    facts = look(recipe_of(folder)).facts
    assert facts.view.value_range == FULL_RANGE and facts.value_range is None
    assert any("more than 8 bits" in warning and "data.value_range" in warning for warning in facts.warnings)


@pytest.mark.slow
def test_a_run_decodes_new_images_with_its_own_range(tmp_path):
    folder = grey_set(tmp_path / "set", lambda grey, path: sixteen(grey + 1000, path))
    run = ft.train(recipe_of(folder), runs=tmp_path / "runs", say=quiet)
    low, high = run.plan.view.value_range
    assert 900 <= low <= 1010 and 1200 <= high <= 1300
    paths = sorted(folder.rglob("*.png"))
    answers = list(predict(run, paths))
    right = sum(answer.label == path.parent.name for answer, path in zip(answers, paths, strict=True))
    assert right == len(paths)  # with the full range all would be nearly black, and alike


def test_candidates_of_a_ranking_see_the_measured_range(tmp_path):
    folder = grey_set(tmp_path / "set", lambda grey, path: sixteen(grey + 1000, path))
    recipe = recipe_of(folder)
    images = _Images(recipe)
    rows = images.draw(100)
    store = images.see(load_backbone("tiny_resnet18.cifar10", zoo=read_zoo()).eval(), rows)
    assert store.view.value_range == look(recipe).facts.view.value_range != FULL_RANGE
    assert images.dataset.store is store and store.get(rows[0]).mean() > 20


def test_other_images_are_judged_with_the_range_of_the_run(tmp_path):
    folder = grey_set(tmp_path / "set", lambda grey, path: sixteen(grey + 1000, path))
    run = ft.train(recipe_of(folder, "train.strategy=probe"), runs=tmp_path / "runs", say=quiet)
    found = evaluate_elsewhere(run, folder)
    assert found.scores.top1.value == 1 and found.scores.log_loss.value < 0.5
    source = open_source(folder, is_learned=False)
    dataset, role = _read_images(source, run.plan.view, run.plan.data)
    again = open_again(run)
    names = {again.items.name(index): index for index in range(len(again.items))}
    for index in dataset.indices(role)[:4]:
        own = again.store.get(names[dataset.items.name(index)])
        np.testing.assert_array_equal(dataset.store.get(index), own)
        assert own.max() - own.min() >= 1 and own.mean() > 20  # with the full range all would be nearly black


def test_a_range_that_does_not_rise_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"value_range is \[9.0, 9.0\]"):
        recipe_of(tmp_path, "data.value_range=[9,9]")
