"""Files as cameras, scanners and browsers write them, made with PIL and read back."""

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torchvision.transforms as T
from PIL import Image

from finetune.data import decoding
from finetune.data.decoding import BadImage, Scaling, decode, decode_sizes

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def smooth(height, width):
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, 127 + 100 * np.sin(rows / 9 + columns / 7)], axis=-1).astype(np.uint8)


def packed(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data, shorter=None, interpolation="bilinear"):
    return decode(data, shorter_pixels=shorter, interpolation=interpolation)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_files_come_back_to_the_bit(kind):
    pixels, facts = read(packed(Image.fromarray(NOISE), kind))
    np.testing.assert_array_equal(pixels, NOISE)
    assert (facts.width, facts.height, facts.kind, facts.is_rotated) == (80, 60, "rgb", False)
    assert pixels.flags.writeable and pixels.dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_files_come_back_nearly(kind):
    image = smooth(60, 80)
    pixels, _ = read(packed(Image.fromarray(image), kind))
    assert np.abs(pixels.astype(int) - image).mean() < 12


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        pixels, _ = read(packed(frames[0], kind, save_all=True, append_images=frames[1:], **lossless))
        assert pixels[0, 0].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32], upright[24:, :32], upright[:24, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = packed(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    for shorter in (None, 24, 12):  # a JPEG is drafted at 12
        pixels, facts = read(data, shorter)
        assert (facts.width, facts.height, facts.is_rotated) == (64, 48, orientation != 1)
        size = shorter or 48
        assert pixels.shape == (size, size * 4 // 3, 3)
        for at, colour in {(0.25, 0.25): (255, 0, 0), (0.75, 0.25): (0, 255, 0), (0.25, 0.75): (0, 0, 255)}.items():
            found = pixels[int(at[0] * size), int(at[1] * size * 4 / 3)].astype(int)
            assert np.abs(found - colour).max() < 25, (shorter, at, found)


def test_damaged_exif_leaves_the_pixels():
    whole = packed(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\xff\xff")
    assert read(whole)[0].shape == (60, 80, 3)


def test_transparency_shows_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2] = (200, 0, 0, 255)
    image[2] = (0, 0, 0, 128)
    pixels, facts = read(packed(Image.fromarray(image), "PNG"))
    assert facts.kind == "alpha"
    assert pixels[:, 0].tolist() == [[200, 0, 0], [200, 0, 0], [127, 127, 127], [255, 255, 255]]


def test_transparent_pixels_do_not_bleed_when_resized():
    image = np.zeros((64, 64, 4), np.uint8)  # transparent black everywhere
    pixels, _ = read(packed(Image.fromarray(image), "PNG"), 16, "bicubic")
    assert (pixels == 255).all()


@pytest.mark.parametrize("mode", ["P", "LA", "L", "1", "RGB"])
def test_every_way_of_being_transparent_is_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("LA") if mode == "LA" else Image.new(mode, (4, 4), 0)
    options = {"LA": {}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {"transparency": 0})
    pixels, facts = read(packed(image, "PNG", **options))
    assert (pixels == 255).all()
    assert facts.kind == ("palette" if mode == "P" else "alpha")


def test_a_palette_with_graded_transparency_is_read_without_a_warning():
    image = Image.fromarray(NOISE).quantize(256)
    pixels, facts = read(packed(image, "PNG", transparency=bytes([255] * 128 + [0] * 128)))
    assert facts.kind == "palette"
    clear = np.asarray(image) >= 128
    assert (pixels[clear] == 255).all() and not (pixels[~clear] == 255).all()


def test_grey_is_three_equal_channels():
    image = NOISE[..., 0]
    pixels, facts = read(packed(Image.fromarray(image), "PNG"))
    assert facts.kind == "grey"
    np.testing.assert_array_equal(pixels, np.repeat(image[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colours(kind):
    image = Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK")
    pixels, facts = read(packed(image, kind))
    assert facts.kind == "cmyk"
    assert np.abs(pixels[8, 8].astype(int) - (250, 20, 30)).max() < 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256 * 8).reshape(32, 64).astype(np.uint16)
    pixels, facts = read(packed(Image.fromarray(ramp), kind))
    assert facts.kind == "16-bit"
    np.testing.assert_array_equal(pixels[..., 0], np.rint(ramp / 257.0))


def test_wide_integers_and_floats_are_scaled_too():
    ramp = np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)
    expected = np.rint(ramp * 255)
    wide = [(ramp, (0, 1)), ((ramp * 65535).astype(np.int32), (0, 65535)), (ramp * 1e6 - 10, (-10, 1e6 - 10))]
    for image, value_range in wide:
        data = packed(Image.fromarray(image), "TIFF")
        pixels, facts = decode(data, shorter_pixels=None, interpolation="bilinear", value_range=value_range)
        assert facts.kind == "16-bit"
        assert np.abs(pixels[..., 0].astype(float) - expected).max() <= 1


def _sixteen_bit_rgb_png():
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 0, 257, 65535)
    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def test_sixteen_bits_per_colour_are_recognised():
    pixels, facts = read(_sixteen_bit_rgb_png())
    assert facts.kind == "16-bit"
    assert pixels.tolist() == [[[255, 128, 0], [0, 1, 255]]]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "shorter"), [(60, 80, 33), (80, 61, 47), (57, 57, 20), (31, 90, 64)])
def test_resizing_equals_torchvision_to_the_bit(interpolation, height, width, shorter):
    image = Image.fromarray(smooth(height, width))
    mode = T.InterpolationMode(interpolation)
    pixels, _ = read(packed(image, "PNG"), shorter, interpolation)
    np.testing.assert_array_equal(pixels, np.asarray(T.Resize(shorter, interpolation=mode)(image)))
    assert min(pixels.shape[:2]) == shorter


@pytest.mark.parametrize("size", [(601, 803), (1203, 640), (480, 480)])
def test_drafted_jpegs_are_neither_blurred_nor_shifted(size):
    data = packed(Image.fromarray(smooth(*size)), "JPEG", quality=95)
    full = T.Resize(64)(Image.open(io.BytesIO(data)))
    pixels, facts = read(data, 64)
    assert (facts.height, facts.width) == size
    assert pixels.shape[:2] == (full.height, full.width)
    assert np.abs(pixels.astype(int) - np.asarray(full)).mean() < 1.0


def test_a_draft_never_falls_below_the_answer(monkeypatch):
    from PIL import JpegImagePlugin

    drafts = []
    original = JpegImagePlugin.JpegImageFile.draft

    def watched(self, mode, size):
        answer = original(self, mode, size)
        drafts.append(self.size)
        return answer

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", watched)
    for side in (40, 63, 64, 127, 128, 129, 512, 1000):
        pixels, _ = read(packed(Image.fromarray(smooth(side, side + 7)), "JPEG"), 64)
        width, height = drafts[-1]
        assert pixels.shape[0] == 64
        assert min(width, height) >= min(64, side)
    assert len(drafts) == 8 and drafts[-1][1] < 300  # it does draft


SIZES = [
    Scaling(*one) for one in [(32, "bilinear"), (48, "bicubic"), (80, "nearest"), (None, "bilinear"), (32, "bicubic")]
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_several_sizes_of_one_image_are_those_it_has_alone_to_the_bit(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = packed(Image.fromarray(smooth(400, 603)), kind, exif=exif)
    images, facts = decode_sizes(data, SIZES)
    for pixels, (shorter, interpolation, *_) in zip(images, SIZES, strict=True):
        alone, told = read(data, shorter, interpolation)
        np.testing.assert_array_equal(pixels, alone)
        assert facts == told


@pytest.mark.parametrize(("kind", "times"), [("PNG", 1), ("WEBP", 1), ("JPEG", 3)])
def test_an_image_is_decoded_once_for_all_sizes_and_a_jpeg_once_for_each_reduction(monkeypatch, kind, times):
    data = packed(Image.fromarray(smooth(400, 600)), kind)
    loads, flatten = [], decoding._flatten
    monkeypatch.setattr(decoding, "_flatten", lambda image: loads.append(image.size) or flatten(image))
    decode_sizes(data, SIZES)
    assert len(loads) == times, loads
    loads.clear()
    decode_sizes(data, [Scaling(96, "bilinear"), Scaling(100, "bicubic")])  # both are made of half the size
    assert len(loads) == 1


def test_no_sizes_and_a_broken_file_are_refused():
    with pytest.raises(ValueError, match="sizes is empty"):
        decode_sizes(b"", [])
    with pytest.raises(BadImage, match="truncated"):
        decode_sizes(packed(Image.fromarray(NOISE), "JPEG")[:900], SIZES)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"\0" * 500, "not an image"),
        (packed(Image.fromarray(NOISE), "PNG")[:40], "damaged .PNG by its first bytes"),
        (packed(Image.fromarray(NOISE), "BMP")[:-5000], "truncated"),
        (packed(Image.fromarray(NOISE), "WEBP")[:-2000], "damaged|truncated"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(BadImage, match=reason) as fault:
        read(data, 32)
    assert len(str(fault.value)) < 100


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_truncated_file_says_how_far_it_came(kind):
    data = packed(Image.fromarray(np.random.default_rng(0).integers(1, 256, (640, 640, 3), dtype=np.uint8)), kind)
    with pytest.raises(BadImage, match=r"truncated after \d+ %") as fault:
        read(data[: int(0.6 * len(data))])
    assert abs(int(str(fault.value).split()[-2]) - 60) < 15


def test_damage_anywhere_is_a_bad_image_or_none():
    rng = np.random.default_rng(0)
    files = [packed(Image.fromarray(NOISE), kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP")]
    files.append(packed(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"))
    num_bad = 0
    for trial in range(600):
        data = bytearray(files[trial % len(files)])
        for at in rng.integers(0, min(len(data), 400), 4):
            data[at] = rng.integers(256)
        try:
            read(bytes(data), 16)
        except BadImage:
            num_bad += 1
    assert 100 < num_bad < 600


def test_a_decompression_bomb_is_refused(monkeypatch):
    bomb = packed(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(BadImage, match="too many pixels"):
        read(bomb, 32)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1_000)
    with pytest.raises(BadImage, match="too many pixels"):
        read(packed(Image.fromarray(NOISE), "PNG"))


def test_a_large_image_below_the_limit_passes_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000)  # PIL warns from here on, and refuses at twice
    assert read(packed(Image.fromarray(NOISE), "PNG"))[0].shape == (60, 80, 3)


def test_a_thread_of_pixels_is_not_blown_up_into_a_bomb():
    with pytest.raises(BadImage, match="too narrow to resize"):
        read(packed(Image.new("L", (60_000, 1)), "PNG"), 224)


def test_an_unknown_interpolation_is_our_bug():
    with pytest.raises(ValueError, match="interpolation must be one of"):
        read(packed(Image.fromarray(NOISE), "PNG"), 32, "lanczos")


def test_decoding_in_threads_leaves_the_warning_filters_as_they_were():
    data, before = packed(Image.fromarray(NOISE), "PNG"), list(warnings.filters)

    def work():
        for _ in range(50):
            read(data, 32)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_middle_or_any_can_be_had_and_that_there_are_several_is_told(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = packed(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    for frame, colour in (("first", (255, 0, 0)), ("middle", (0, 255, 0)), (2, (0, 0, 255))):
        pixels, facts = decode(data, shorter_pixels=None, interpolation="nearest", frame=frame)
        assert tuple(pixels[0, 0]) == colour and facts.has_frames
    assert not read(packed(frames[0], kind, **options))[1].has_frames
