"""A channel beyond the colours is laid over white only where it is transparency; anything else is refused in words."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import finetune as ft
from finetune.data.decoding import BadImage, decode
from finetune.errors import DataError

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (24, 24, 3), dtype=np.uint8)
BAND = RANDOM.integers(20, 240, (24, 24, 1), dtype=np.uint8)
FOUR = np.concatenate([COLOURS, BAND], axis=2)


def file_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values, *, extra, photometric=2, bits=8):
    """A TIFF of any bands (H, W, C), written by hand; `extra` are the kinds of the additional ones."""
    height, width, samples = values.shape
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[259], tags[262], tags[277], tags[278], tags[284] = (
        width, height, 1, photometric, samples, height, 1,
    )  # fmt: skip
    tags[258] = (bits,) * samples
    if extra:
        tags[338] = extra
    tags[279] = (values.nbytes,)
    tags[273] = (0,)  # PIL counts strips from the end of the tags
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + values.tobytes()


def read(data):
    return decode(data, shorter_pixels=None, interpolation="bilinear")


def test_our_tiffs_are_read_where_they_hold_red_green_and_blue():
    np.testing.assert_array_equal(read(tiff(COLOURS, extra=()))[0], COLOURS)


@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
def test_a_fourth_band_of_a_tiff_is_refused_whatever_it_is_called(extra):
    with pytest.raises(BadImage, match=r"4 bands, .*convert it to RGB"):
        read(tiff(FOUR, extra=extra))


def test_more_bands_are_refused():
    five = np.concatenate([FOUR, BAND], axis=2)
    with pytest.raises(BadImage, match=r"5 bands, .*convert it to RGB"):
        read(tiff(five, extra=(0, 0)))
    with pytest.raises(BadImage, match=r"7 bands, .*convert it to RGB"):
        read(tiff(np.repeat(BAND, 7, axis=2), extra=(0,) * 6, photometric=1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_band_that_a_file_calls_alpha_is_not_laid_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    with pytest.raises(BadImage, match=r"4 bands, and the last is no transparency \(\d+ % .*convert it to RGB"):
        read(file_of(Image.fromarray(FOUR), kind, **options))


def test_a_second_band_beside_grey_is_refused_too():
    pair = np.concatenate([COLOURS[..., :1], BAND], axis=2)
    with pytest.raises(BadImage, match="2 bands"):
        read(file_of(Image.fromarray(pair, "LA"), "PNG"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_with_soft_edges_is_laid_over_white(kind):
    alpha = np.zeros((24, 24, 1), np.uint8)
    alpha[:, 12:] = 255
    alpha[:, 8:12, 0] = RANDOM.integers(1, 255, (24, 4))
    pixels, facts = read(file_of(Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)), kind))
    assert facts.kind == "alpha"
    assert (pixels[:, :8] == 255).all()
    np.testing.assert_array_equal(pixels[:, 12:], COLOURS[:, 12:])


def test_glass_of_one_shade_is_transparency():
    glass = np.full((24, 24, 1), 100, np.uint8)
    pixels, _ = read(file_of(Image.fromarray(np.concatenate([COLOURS, glass], axis=2)), "PNG"))
    assert pixels.min() >= 154  # white shines through


def test_a_set_of_four_bands_is_refused_with_the_reason(tmp_path):
    for name in ("fields", "woods"):
        (tmp_path / name).mkdir()
        for number in range(6):
            values = RANDOM.integers(20, 240, (24, 24, 4), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    with pytest.raises(DataError, match=r"none of the 12 images .* can be read: 4 bands, and the last is no transp"):
        ft.survey(ft.load_recipe(str(tmp_path), ["data.image_size=32"]))
