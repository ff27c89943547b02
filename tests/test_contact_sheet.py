"""Contact sheets: true views in their places, readable words, whole files."""

import numpy as np
import pytest
from PIL import Image

from finetune.config.card import View
from finetune.data import contact_sheet
from finetune.data.augmentation import Augmentation
from finetune.data.contact_sheet import draw_contact_sheet, write_contact_sheet
from finetune.data.decoding import center_crop

VIEW = View(size_pixels=128, shorter_pixels=140, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
IMAGES = [np.random.default_rng(seed).integers(0, 256, (140, 160 + seed, 3), dtype=np.uint8) for seed in range(3)]
CAPTIONS = ["daisy\ntrain/daisy/1.jpg", "rose", "Löwenzahn\n" + "long/" * 60 + "end.jpg"]


def augmentation(preset="light", size=128):
    return Augmentation(preset, size_pixels=size, interpolation="bilinear", invariances=["hflip"])


def sheet(images=IMAGES, captions=CAPTIONS, preset="light", view=VIEW, **options):
    augment = augmentation(preset, view.size_pixels)
    return draw_contact_sheet(images, captions, augment, view=view, **({"draws": 4, "seed": 5} | options))


def places_of(drawn, tile):
    """Corners (top, left) at which `tile` (S, S, 3) stands in the sheet."""
    pixels, side = np.asarray(drawn), len(tile)
    starts = np.argwhere((pixels[: -side + 1, : -side + 1] == tile[0, 0]).all(axis=-1))
    return [tuple(at) for at in starts if (pixels[at[0] : at[0] + side, at[1] : at[1] + side] == tile).all()]


@pytest.mark.technique("T149")
def test_the_first_column_is_what_evaluation_sees_and_the_others_are_augmented():
    drawn, augment = sheet(), augmentation()
    corners = [places_of(drawn, center_crop(image, 128)) for image in IMAGES]
    assert [len(found) for found in corners] == [1, 1, 1]
    (top, left), (second, _), _ = (found[0] for found in corners)
    assert {found[0][1] for found in corners} == {left}
    assert second - top > 128
    pixels = np.asarray(drawn)
    step = 128 + contact_sheet._GAP
    for column in range(4):
        at = left + 128 + contact_sheet._AISLE + column * step
        tile = pixels[top : top + 128, at : at + 128]
        drawings = [int(n) for n in np.random.SeedSequence([5, 0]).generate_state(4)]
        np.testing.assert_array_equal(tile, augment(IMAGES[0], drawings[column]))


def test_a_seed_fixes_the_sheet_and_rows_draw_for_themselves():
    assert sheet().tobytes() == sheet().tobytes()
    assert sheet().tobytes() != sheet(seed=6).tobytes()
    twice = np.asarray(sheet([IMAGES[0]] * 2, ["same", "same"]))
    first, second = (places_of(Image.fromarray(twice), center_crop(IMAGES[0], 128))[row][0] for row in (0, 1))
    rows = [twice[top : top + 128, 36 + 128 + 20 :] for top in (first, second)]
    assert (rows[0] != rows[1]).any()


def words_of(monkeypatch, **options):
    """Every text on the sheet, with its left and right end."""
    found, draw = [], contact_sheet.ImageDraw.ImageDraw.text

    def note(pen, at, text, *args, **words):
        found.append((text, at[0], at[0] + pen.textlength(text, font=words["font"])))
        return draw(pen, at, text, *args, **words)

    monkeypatch.setattr(contact_sheet.ImageDraw.ImageDraw, "text", note)
    return sheet(**options), found


def test_the_header_names_the_preset_the_domain_and_every_step(monkeypatch):
    drawn, words = words_of(monkeypatch, preset="heavy")
    said = " ".join(" ".join(text.split()) for text, _, _ in words)
    assert "Augmentation: heavy" in said and "natural" in said and "128 px" in said
    for line in augmentation("heavy").describe():
        assert line in said
    assert "as evaluated" in said and "seen in training" in said
    assert all(left >= 36 and right <= drawn.width - 36 for _, left, right in words)


@pytest.mark.parametrize("draws", [1, 6])
def test_captions_are_all_there_and_long_ones_keep_both_ends(monkeypatch, draws):
    drawn, words = words_of(monkeypatch, draws=draws)
    texts = [text for text, _, _ in words]
    assert {"daisy", "train/daisy/1.jpg", "rose", "Löwenzahn"} <= set(texts)
    (long,) = (text for text in texts if text.startswith("long/"))
    assert long.endswith("end.jpg") and "…" in long and len(long) > 30
    assert all(right <= drawn.width - 36 for _, _, right in words)


@pytest.mark.parametrize(("size", "shown"), [(16, 128), (48, 144), (128, 128), (256, 256), (300, 256)])
def test_small_views_are_shown_in_whole_multiples_and_large_ones_reduced(size, shown):
    view = View(size_pixels=size, shorter_pixels=size, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    drawn = sheet([image], ["one"], view=view, draws=2)
    times = shown // size
    if times:
        assert len(places_of(drawn, image.repeat(times, axis=0).repeat(times, axis=1))) == 1
    else:
        assert drawn.width == max(640, 2 * 36 + 3 * shown + 33 + 8)


def test_every_letter_of_a_european_file_name_can_be_drawn():
    blank = contact_sheet._font(15).getmask("\uffff").getbbox(), bytes(contact_sheet._font(15).getmask("\uffff"))
    for letter in "ßéçñøžłдΩ…–":
        mask = contact_sheet._font(15).getmask(letter)
        assert (mask.getbbox(), bytes(mask)) != blank


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": [], "captions": []}, "needs an image"),
        ({"captions": ["one"]}, "3 images but 1 captions"),
        ({"draws": 0}, "at least 1, got 0"),
        ({"images": [IMAGES[0], IMAGES[1], IMAGES[2][:99]]}, "image 2 has a shorter side of 99 px, the view 140"),
    ],
)
def test_what_does_not_fit_together_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        sheet(**wrong)
    with pytest.raises(ValueError, match="gives 64 px, the view 128"):
        draw_contact_sheet(IMAGES, CAPTIONS, augmentation(size=64), view=VIEW, seed=0)


def test_the_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(path, IMAGES, CAPTIONS, augmentation(), view=VIEW, draws=4, seed=5)
    with Image.open(path) as kept:
        assert kept.format == "PNG" and kept.tobytes() == sheet().tobytes()
    before = path.read_bytes()

    def fail(image, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_contact_sheet(path, IMAGES, CAPTIONS, augmentation(), view=VIEW, seed=9)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["sheet.png"]
