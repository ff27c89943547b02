"""Images that a program holds in memory, as the files that they would be."""

import hashlib
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

_ORIENTATION_TAG = 0x0112


class Held(NamedTuple):
    """An image that a program holds in memory, as the file that it would be."""

    name: str
    data: bytes


def hold(image: Image.Image | np.ndarray | torch.Tensor, name: str) -> Held:
    """An image in memory as the file that it would be, none of its values changed.

    Raises:
        TypeError: if it is no image.
        ValueError: as `as_picture`.
    """
    image = as_picture(image, name)
    format = "PNG" if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    file = io.BytesIO()
    image.save(file, format=format, exif=image.getexif(), **({"compress_level": 1} if format == "PNG" else {}))
    return Held(name, file.getvalue())


def as_picture(image: object, name: str) -> Image.Image:
    """A Pillow image as it is, an array (H, W, 3) or (H, W), or a tensor (3, H, W), (1, H, W) or (H, W) as one.

    Raises:
        TypeError: if it is none of these.
        ValueError: if an array or tensor is of another shape, or not of uint8.
    """
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3)):
            raise ValueError(
                f"{name} is a tensor of shape {tuple(image.shape)} and type {str(image.dtype).removeprefix('torch.')}; "
                "give (3, H, W) in RGB, (1, H, W) or (H, W), of uint8, neither scaled nor normalised."
            )
        array = image.detach().cpu().numpy()
        if array.ndim == 3:
            array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(array))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"{name} is an array of shape {image.shape} and type {image.dtype}; give (H, W, 3) in RGB, or (H, W), "
                "of uint8. A batch is given as a list of its images."
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} is a {type(image).__name__}; give a path, a Pillow image, or an array of uint8.")
    return image


def digest_picture(image: Image.Image) -> str:
    """32 hex digits that change with any pixel, the mode, the palette or the orientation, however it was stored."""
    told = (image.mode, image.size, image.getpalette(), image.info.get("transparency"))
    head = repr((*told, image.getexif().get(_ORIENTATION_TAG, 1))).encode()
    return hashlib.blake2b(head + image.tobytes(), digest_size=16).hexdigest()
