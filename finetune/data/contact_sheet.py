"""Contact sheets: what training will see of a few images, beside what evaluation sees.

Numbers say little about an augmentation. One look tells whether a class can still be told from another.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.config.card import View
from finetune.data.augmentation import Augmentation
from finetune.data.decoding import center_crop
from finetune.runs.folder import write_whole

SMALLEST_TILE, LARGEST_TILE = 128, 256
"""Pixels; smaller views are shown in whole multiples, so that every pixel is a square, larger ones reduced."""

_MARGIN, _GAP, _AISLE, _NARROWEST = 36, 8, 33, 640
_PAPER, _INK, _MUTED, _RULE, _ACCENT = "#fcfcfa", "#1c1e21", "#73777d", "#d9dadc", "#0b6e6e"
_TITLE, _CAPTION, _SMALL = 23, 15, 13
_LINE = 20
_ROW = 27
"""Height of the caption above a row of tiles."""


def draw_contact_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    augmentation: Augmentation,
    *,
    view: View,
    draws: int = 5,
    seed: int,
) -> Image.Image:
    """One row per image: the view that evaluation sees, then `draws` views as training draws them.

    Args:
        images: pixels (H, W, 3) uint8 as an `ImageStore` of `view` gives them, shorter side `view.shorter_pixels`.
        captions: as long as `images`; the first line (the class) stands out, the others (the file) follow it.
        augmentation: what draws the training views; its preset, domain and steps head the sheet.
        view: how evaluation cuts the images.
        draws: training views of each image.
        seed: not negative; it fixes the sheet.

    Raises:
        ValueError: if there is nothing to draw, or lengths or sizes do not agree.
    """
    _check(images, captions, augmentation, view, draws)
    rows = [_views(image, augmentation, view, draws, seed, row) for row, image in enumerate(images)]
    side = rows[0][0].width
    width = max(_NARROWEST, 2 * _MARGIN + (draws + 1) * side + (draws - 1) * _GAP + _AISLE)
    letters = round((width - 2 * _MARGIN) / (0.53 * _SMALL))
    lines = [part for step in _steps(augmentation) for part in wrap(step, letters, subsequent_indent="     ")]
    top = _MARGIN + _TITLE + 16 + len(lines) * _LINE + 26
    height = top + _LINE + len(rows) * (_ROW + side + 14) + _MARGIN - 14
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _draw_header(pen, augmentation, lines)
    _draw_headings(pen, top, side, draws, height)
    for row, (tiles, caption) in enumerate(zip(rows, captions, strict=True)):
        at = top + _LINE + row * (_ROW + side + 14)
        _draw_caption(pen, caption, at, width)
        for column, tile in enumerate(tiles):
            corner = (_left(column, side), at + _ROW)
            sheet.paste(tile, corner)
            frame = (corner[0] - 1, corner[1] - 1, corner[0] + side, corner[1] + side)
            pen.rectangle(frame, outline=_RULE if column else _ACCENT, width=1)
    return sheet


def write_contact_sheet(
    path: Path,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    augmentation: Augmentation,
    *,
    view: View,
    draws: int = 5,
    seed: int,
) -> None:
    """Write the sheet of `draw_contact_sheet` to `path`, a whole PNG file or none.

    Raises:
        ValueError: if there is nothing to draw, or lengths or sizes do not agree.
        OSError: if the file cannot be written.
    """
    sheet = draw_contact_sheet(images, captions, augmentation, view=view, draws=draws, seed=seed)
    write_whole(path, partial(sheet.save, format="PNG", optimize=True))


def _check(
    images: Sequence[np.ndarray], captions: Sequence[str], augmentation: Augmentation, view: View, draws: int
) -> None:
    if not images:
        raise ValueError("a contact sheet needs an image, got none.")
    if len(images) != len(captions):
        raise ValueError(f"there are {len(images)} images but {len(captions)} captions; they must match.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    if augmentation.size_pixels != view.size_pixels:
        raise ValueError(f"augmentation gives {augmentation.size_pixels} px, the view {view.size_pixels}.")
    for row, image in enumerate(images):
        if (shorter := min(image.shape[:2])) != view.shorter_pixels:
            raise ValueError(
                f"image {row} has a shorter side of {shorter} px, the view {view.shorter_pixels}; "
                "take it from an ImageStore of this view."
            )


def _views(
    image: np.ndarray, augmentation: Augmentation, view: View, draws: int, seed: int, row: int
) -> list[Image.Image]:
    seeds = np.random.SeedSequence([seed, row]).generate_state(draws)
    views = [center_crop(image, view.size_pixels), *(augmentation(image, int(number)) for number in seeds)]
    return [_tile(pixels) for pixels in views]


def _tile(pixels: np.ndarray) -> Image.Image:
    side = len(pixels)
    if side > LARGEST_TILE:
        return Image.fromarray(pixels).resize((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
    times = -(-SMALLEST_TILE // side)
    return Image.fromarray(pixels.repeat(times, axis=0).repeat(times, axis=1))


def _steps(augmentation: Augmentation) -> list[str]:
    return [f"{number}.  {line}" for number, line in enumerate(augmentation.describe(), start=1)]


def _left(column: int, side: int) -> int:
    return _MARGIN + column * (side + _GAP) + (_AISLE - _GAP if column else 0)


def _draw_header(pen: ImageDraw.ImageDraw, augmentation: Augmentation, lines: Sequence[str]) -> None:
    title = f"Augmentation: {augmentation.preset}"
    pen.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(_TITLE, bold=True), anchor="lt")
    after = _MARGIN + pen.textlength(title, font=_font(_TITLE, bold=True)) + 14
    domain = f"domain {augmentation.domain}, views of {augmentation.size_pixels} px"
    pen.text((after, _MARGIN + 19), domain, fill=_MUTED, font=_font(_CAPTION), anchor="ls")
    for number, line in enumerate(lines):
        at = _MARGIN + _TITLE + 16 + number * _LINE
        pen.text((_MARGIN, at), line, fill=_INK, font=_font(_SMALL), anchor="lt")


def _draw_headings(pen: ImageDraw.ImageDraw, top: int, side: int, draws: int, height: int) -> None:
    first, last = _left(1, side), _left(draws, side) + side
    trained = "seen in training" if draws > 1 else "in training"
    for left, right, text, colour in (
        (_MARGIN, _MARGIN + side, "as evaluated", _ACCENT),
        (first, last, trained, _MUTED),
    ):
        pen.text((left, top), text, fill=colour, font=_font(_SMALL, bold=True), anchor="ls")
        pen.line((left, top + 7, right, top + 7), fill=colour if colour == _ACCENT else _RULE, width=1)


def _draw_caption(pen: ImageDraw.ImageDraw, caption: str, top: int, width: int) -> None:
    name, *rest = [" ".join(line.split()) for line in caption.split("\n")]
    room = width - 2 * _MARGIN
    name = _shorten(pen, name, _font(_CAPTION, bold=True), room)
    pen.text((_MARGIN, top + _ROW - 9), name, fill=_INK, font=_font(_CAPTION, bold=True), anchor="ls")
    used = pen.textlength(name, font=_font(_CAPTION, bold=True)) + 12
    place = _shorten(pen, "  ".join(rest), _font(_SMALL), room - used)
    pen.text((_MARGIN + used, top + _ROW - 9), place, fill=_MUTED, font=_font(_SMALL), anchor="ls")


def _shorten(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """`text`, its middle left out where it is too wide: both ends of a path tell something."""
    if pen.textlength(text, font=font) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if pen.textlength(short, font=font) <= room:
            return short
    return ""


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which we ship: Pillow's own font knows English letters alone."""
    folder = Path(__file__).parents[1] / "assets"
    return ImageFont.truetype(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)
