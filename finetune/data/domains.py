"""What may be changed in which kind of images: the bounds within which presets and policies vary.

No rule mentions flips: those follow from what the data declare, in every domain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CROP_AREA = {"light": (0.5, 1.0), "medium": (0.25, 1.0), "heavy": (0.08, 1.0)}
"""Share of the image that a random crop covers; torchvision's default is that of `heavy`."""
COLOUR = {
    "medium": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.0, "hue": 0.0},
    "heavy": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.05},
}
"""Half-widths of the factors around 1; hue in turns of the colour circle."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be changed in one kind of images. Tables go by preset; a preset that is absent changes nothing."""

    floor: float = 0.0
    """Least share of the image that a random crop covers, whatever the preset."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    padding: float = 0.0
    """Share of the crop's side that is mirrored outwards on each side; a crop of unchanged scale is then cut."""
    tilt: Mapping[str, float] = field(default_factory=dict)
    """Largest rotation, in degrees."""
    warp: Mapping[str, float] = field(default_factory=dict)
    """How far corners move in perspective: deviation, as a share of the side."""
    colour: Mapping[str, Mapping[str, float]]
    hides_parts: bool = True
    """The heavy preset may cut out a rectangle: what makes the class is large."""
    reach: float = 1.0
    """Share of a policy's full scale for shapes."""
    tone: float = 0.9
    """Half-width of a policy's factors of brightness, contrast, saturation and sharpness."""
    recolours: bool = True
    """A policy may change colours for others: saturation, posterize, solarize, autocontrast, equalize."""
    blurs: bool = True


def _tones(medium: float, heavy: float) -> dict[str, dict[str, float]]:
    still = {"saturation": 0.0, "hue": 0.0}
    return {
        "medium": {"brightness": medium, "contrast": medium, **still},
        "heavy": {"brightness": heavy, "contrast": heavy, **still},
    }


DOMAINS = {
    "natural": Rules(colour=COLOUR),
    # A page has an up and a reading direction, and lies nearly straight under the camera; ink has no hue to vary.
    "document": Rules(
        floor=0.7,
        aspect=(0.9, 1 / 0.9),
        tilt={"medium": 2.0, "heavy": 4.0},
        warp={"medium": 0.02, "heavy": 0.04},
        colour=_tones(0.2, 0.4),
        hides_parts=False,
        reach=0.1,
        tone=0.5,
        recolours=False,
    ),
    # Stains carry the diagnosis, and a finding may be small.
    "medical": Rules(floor=0.6, colour=_tones(0.1, 0.15), hides_parts=False, reach=0.5, tone=0.2, recolours=False),
    # The class is a detail: a beak, a finger. A rectangle that covers it leaves a wrong label.
    "fine": Rules(floor=0.6, colour=_tones(0.1, 0.2), hides_parts=False, reach=0.5, tone=0.4, recolours=False),
    # Every pixel counts: no zoom into a few of them, and nothing blurred.
    "tiny": Rules(floor=0.7, padding=1 / 8, colour=COLOUR, blurs=False),
}
