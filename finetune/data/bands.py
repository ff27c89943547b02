"""Bands: whether what a file holds beyond its colours is transparency, or something that nobody may paint white.

A TIFF says how many bands it has and what the additional ones are. A fourth channel of a PNG is called alpha whatever
it holds, so its values are asked: transparency is clear or opaque nearly everywhere, and near-infrared is not.
"""

import io

from PIL import Image, TiffImagePlugin

OPAQUE_OR_CLEAR = 0.5
"""Share of pixels that are wholly opaque or wholly clear, from which on a channel is taken for transparency."""
FEW_VALUES = 16
"""A channel of no more values than this is transparency too: shades of glass, or one value everywhere."""
_SAMPLES, _PHOTOMETRIC, _EXTRA = 277, 262, 338
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # by TIFF's photometric interpretation
_ALPHA = (1, 2)  # of TIFF's kinds of additional samples: with colours multiplied by it, and not
_DO = "until more channels are supported, convert it to RGB"


def band_fault(image: Image.Image) -> str | None:
    """What is wrong with the bands of an image whose header alone was read; None where nothing is."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return None
    samples, extra = int(tags.get(_SAMPLES, 1)), tuple(tags.get(_EXTRA, ()))
    colours = _COLOURS.get(int(tags.get(_PHOTOMETRIC, 1)), 3)
    if samples <= colours or (samples == colours + 1 and extra[:1] and extra[0] in _ALPHA):
        return None
    return f"{samples} bands, of which {colours} {'are' if colours > 1 else 'is'} colour and none transparency; {_DO}"


def alpha_fault(image: Image.Image) -> str | None:
    """What is wrong with the channel that a loaded image calls alpha; None where it behaves like transparency."""
    if "A" not in image.getbands():
        return None
    counts = image.getchannel("A").histogram()
    plain, values = (counts[0] + counts[255]) / max(1, sum(counts)), sum(count > 0 for count in counts)
    if plain >= OPAQUE_OR_CLEAR or values <= FEW_VALUES:
        return None
    bands = len(image.getbands())
    return (
        f"{bands} bands, and the last is no transparency ({100 * plain:.0f} % of its pixels are opaque or clear); "
        f"{_DO}, or flatten it if it is transparency"
    )


def unknown_tiff(data: bytes) -> str | None:
    """What a TIFF holds that PIL cannot read; None where `data` is no TIFF, or tells nothing."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        samples, bits = int(tags.get(_SAMPLES, 1)), tags.get(258, (1,))
    except (SyntaxError, OSError, ValueError, TypeError, LookupError, RuntimeError):
        return None
    if samples > 1:
        return f"a TIFF of {samples} bands, which are not red, green and blue; {_DO}"
    return f"a TIFF of {'/'.join(str(bit) for bit in dict.fromkeys(bits))} bits in a layout that is not read; {_DO}"
