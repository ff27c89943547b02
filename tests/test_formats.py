"""Formats by content: what is read, what is named, and what a survey makes of a class of which nothing can be read."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

import finetune as ft
from finetune.data import formats
from finetune.data.decoding import BadImage, decode
from finetune.data.formats import SUFFIXES, format_of, readable_formats, why_unreadable
from finetune.errors import DataError
from finetune.model_selection.ranking import _Images

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def packed(name):
    stream = io.BytesIO()
    NOISE.save(stream, format=name)
    return stream.getvalue()


@pytest.mark.parametrize("name", [name for name in SUFFIXES if name != "HEIF"])
def test_the_first_bytes_tell_the_format_and_it_is_read(name):
    data = packed(name)
    assert format_of(data[:64]) == name
    pixels, _ = decode(data, shorter_pixels=None, interpolation="bilinear")
    assert pixels.shape == (24, 32, 3)


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF", "PPM"])
def test_formats_without_loss_give_the_very_pixels(name):
    pixels, _ = decode(packed(name), shorter_pixels=None, interpolation="bilinear")
    assert np.array_equal(pixels, np.asarray(NOISE))


def test_heic_is_read_with_the_plug_in_alone(monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = packed("HEIF")
    assert format_of(data) == "HEIF"
    pixels, _ = decode(data, shorter_pixels=None, interpolation="bilinear")
    assert pixels.shape == (24, 32, 3)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    formats._has_heif.cache_clear()
    with pytest.raises(BadImage, match=r"HEIC, which takes a plug-in: pip install 'finetune-vision\[heic\]'"):
        decode(data, shorter_pixels=None, interpolation="bilinear")
    formats._has_heif.cache_clear()


def test_the_plug_in_is_not_loaded_for_other_files(monkeypatch):
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    assert "HEIF" not in readable_formats(packed("JPEG"))
    assert "pillow_heif" not in sys.modules


def test_avif_without_its_reader_is_named(monkeypatch):
    monkeypatch.setattr(formats, "_built_in", lambda: ("JPEG", "PNG"))
    with pytest.raises(BadImage, match=r"an AVIF, which takes Pillow 11\.3"):
        decode(packed("AVIF"), shorter_pixels=None, interpolation="bilinear")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.7", "not an image but a PDF"),
        (b"<svg xmlns=", "not an image but an SVG"),
        (b"8BPS\0\1", "not an image but a Photoshop"),
        (b"PK\3\4", "not an image but a ZIP"),
        (b"hello", "not an image"),
    ],
)
def test_what_is_not_read_is_called_by_its_kind(data, reason):
    assert why_unreadable(data) == reason


@pytest.fixture
def marred(shapes, tmp_path):
    """Three classes, one of them all PDFs under `.png`."""
    for name in ("disc", "square", "stripes"):
        (tmp_path / name).mkdir()
        for number, file in enumerate(sorted((shapes / name).iterdir())[:8]):
            data = b"%PDF-1.7 " + bytes([number]) if name == "square" else file.read_bytes()
            (tmp_path / name / file.name).write_bytes(data)
    return tmp_path


def wish(root, *more):
    return ft.load_recipe(None, [f"data.root={root}", "train.strategy=probe", *more])


def test_a_class_of_which_nothing_can_be_read_stops_survey_and_ranking(marred):
    message = r"left of class square \(8 x not an image but a PDF\)"
    with pytest.raises(DataError, match=message):
        ft.survey(wish(marred))
    images = _Images(wish(marred))
    images.dataset.drop({index: "gone" for index, item in enumerate(images.dataset.items) if item.label == 1})
    with pytest.raises(DataError, match=r"left of class square \(8 x gone\)"):
        images.draw(10)


@pytest.mark.slow
def test_a_survey_tells_of_formats_and_of_files_under_wrong_names(marred):
    for number, file in enumerate((marred / "square").iterdir()):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(file, format="WEBP")
    warnings = "\n".join(ft.survey(wish(marred)).warnings)
    assert "class square: 8 x .png read as WEBP" in warnings and "8 x WEBP, all in class square" in warnings
