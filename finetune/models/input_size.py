"""The size at which a backbone looks at images here: its own, or the nearest that it takes."""

from finetune.errors import BackboneError
from finetune.models.backbones import Backbone
from finetune.models.image_sizes import nearest_size, size_unit, takes_size

LARGE_PIXELS = 512
"""Transformers pretrained at this size or above, such as DINOv2's 518, cost more than people can train at."""
TRAINABLE_PIXELS = 224
"""What these take instead, to the nearest multiple of their patches."""


def fit_size(backbone: Backbone, wish: int | None) -> tuple[int, str]:
    """The size at which a backbone looks, for which it is changed in place, and a word on it where there is one to say.

    Transformers take multiples of their patches and windows; position embeddings are resampled by timm. At the size
    of pretraining nothing is changed.

    Args:
        backbone: in evaluation mode.
        wish: pixels; None leaves it to us: the size of pretraining, or of large transformers one people can train at.

    Raises:
        BackboneError: if it does not take images of this size.
    """
    name, own = backbone.card.name, backbone.card.input_size[1]
    unit = size_unit(backbone.model, own)
    if wish is None and (unit == 1 or own < LARGE_PIXELS):
        return own, ""
    size = nearest_size(TRAINABLE_PIXELS if wish is None else wish, unit)
    told = [f"{own} px, the size of pretraining, makes each step of {name} cost too much"] if wish is None else []
    if wish not in (None, size):
        told.append(f"{name} takes multiples of {unit} px, so {wish} px became {size}")
    if size != own and (fault := takes_size(backbone, size)) is not None:
        fault = _resized(backbone, size, fault)
        if fault is not None:
            said = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise BackboneError(
                f"{name} does not take images of {size} px ({said}). "
                f"Set data.image_size to {own}, the size it was pretrained at, or leave it null."
            ) from fault
        told.append(f"what {name} knows of positions was resampled from {own} px")
    return size, "; ".join(told)


def _resized(backbone: Backbone, size: int, fault: Exception) -> Exception | None:
    """What the backbone still raises once timm has set it to `size`; `fault` where timm cannot."""
    if not hasattr(backbone.model, "set_input_size"):
        return fault
    try:
        backbone.set_image_size(size)
    except (AssertionError, RuntimeError, ValueError, TypeError) as other:
        return other
    return takes_size(backbone, size)
