"""Photographs that are free to use, and any picture as input for a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import not_installed
from ..images import is_transparent
from .weights import package_folder

if TYPE_CHECKING:
    from PIL.Image import Image


PHOTOS: Mapping[str, str] = {
    "astronaut": "astronaut.png: Eileen Collins, NASA, public domain",
    "camera": "camera.png: photograph by Lav Varshney, CC0",
    "chelsea": "chelsea.png: Chelsea the cat, photograph by Stefan van der Walt, CC0",
    "coffee": "coffee.png: photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0",
    "rocket": "rocket.jpg: SpaceX, public domain",
}
"""The photographs that ``photo`` finds: by name, the file and who made it. All are free to copy and change."""


def photo(name: str) -> Path:
    """The path of an example photograph: one of ``PHOTOS``, inside the installed scikit-image.

    >>> photo("chelsea").name
    'chelsea.png'

    Raises:
        ValueError: no such name in ``PHOTOS``.
        ImportError: scikit-image is not installed.
        FileNotFoundError: this scikit-image has no such file; the wheels on PyPI have all five.
    """
    if name not in PHOTOS:
        raise ValueError(f"no photograph called {name!r}; there are {', '.join(PHOTOS)}")
    path = package_folder("skimage", "scikit-image") / "data" / PHOTOS[name].partition(":")[0]
    if not path.exists():
        raise FileNotFoundError(f"this scikit-image came without {path}; a picture of your own does as well")
    return path


def prepare(
    picture: "Image | npt.ArrayLike | str | os.PathLike[str]",
    *,
    size: int | tuple[int, int] = 448,
    patch: int = 14,
    mean: float | tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: float | tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """A picture as a batch of one for the model, and the exact pixels that its patches cover.

    >>> images, pixels = prepare(np.zeros((300, 451, 3), np.uint8), size=(224, 448))
    >>> images.shape, pixels.shape, pixels.dtype
    (torch.Size([1, 3, 224, 448]), (224, 448, 3), dtype('uint8'))

    The picture is cropped around its centre, as large as the wanted shape allows, and resampled.
    Photographs are turned upright, grey and palette pictures become RGB, transparent pixels become white.

    Args:
        picture: a PIL image, a file's path, or an array (height, width), (height, width, 3) or
            (height, width, 4), of uint8 or of floats from 0 to 1.
        size: the side of a square in pixels, or (height, width); multiples of ``patch``.
        patch: side of the model's patches in pixels.
        mean: the mean of the model's training pictures, on a scale from 0 to 1, for all channels or for red, green
            and blue; ImageNet's by default.
        std: standard deviation, likewise.

    Returns:
        The batch, normalised, float32 (1, 3, height, width) on the CPU; the pixels, uint8 (height, width, 3).

    Raises:
        ImportError: Pillow is not installed.
        OSError: the file is missing or no picture.
        TypeError: the array has another dtype, so the value of white is not known.
        ValueError: the size is not a multiple of the patch, an array has another shape or values outside 0 to
            1, or the picture has more than 8 bits a channel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"a size of {height} x {width} pixels is not a whole number of {patch}-pixel patches")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise not_installed("pillow") from error
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as file:
            image = ImageOps.exif_transpose(file)
    elif isinstance(picture, Image.Image):
        image = ImageOps.exif_transpose(picture)
    else:
        image = Image.fromarray(_as_bytes(np.asarray(picture)))
    if image.mode.startswith(("I", "F")):  # PIL would clip these to 0..255 and return a white picture
        raise ValueError(f"the picture's mode is {image.mode!r}; convert it to 8 bits a channel first")
    if is_transparent(image):
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), method=Image.Resampling.BICUBIC)
    pixels = np.array(fitted)  # (height, width, 3)
    images = torch.from_numpy(pixels).float() / 255  # (height, width, 3)
    images = (images - torch.tensor(mean)) / torch.tensor(std)  # (height, width, 3)
    return images.permute(2, 0, 1).unsqueeze(0).contiguous(), pixels  # (1, 3, height, width)


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The array as uint8, which PIL reads as a picture."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
        raise ValueError(f"a picture is (height, width) or (height, width, 3 or 4), not {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a picture is an array of uint8, or of floats from 0 to 1, not of {array.dtype}")
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:  # false for NaN too
        raise ValueError(f"a picture of floats goes from 0 to 1, this one from {low} to {high}")
    return (array * 255).round().astype(np.uint8)
