"""Pictures as arrays: read from whatever holds one, the part of one that a model saw, frames side by side."""

from __future__ import annotations

import math
import os
from typing import Any, TypeAlias

import numpy as np

from .reading import Array, as_numbers, is_array

Thumbnail: TypeAlias = tuple[int, ...]
"""A picture as `THUMBNAIL` x `THUMBNAIL` shades of grey, row by row."""

THUMBNAIL = 24
FRAMES_ACROSS = 4
"""How many frames of a video stand side by side."""
_LIKENESS = 0.9  # with this correlation or more, a picture counts as the one that was seen


def picture_of(image: Any) -> Array | None:
    """The picture as `read_image` reads it, or the frames of a video, (frames, height, width, 3); None where there is
    none."""
    if image is None:
        return None
    is_list = isinstance(image, (list, tuple)) and len(image) and not isinstance(image[0], (int, float, list, tuple))
    if is_list or (len(getattr(image, "shape", ())) == 4 and len(image) > 1):
        return np.stack([read_image(frame) for frame in image])
    return read_image(image)


def greys_of(image: Any) -> Array:
    """The numbers of a PIL image of one channel of more than 8 bits, (height, width) from 0 to 1.

    PIL itself would cut them off at 255, which makes the picture white. White is the largest number of the smallest
    usual type that holds them.
    """
    grey = np.asarray(image, np.float64)
    tops = (255, 65535) if image.mode != "F" else (1, 255, 65535)
    white = next((top for top in tops if grey.max() <= top), grey.max())
    return np.asarray(np.clip(grey / white, 0, 1))


def opened(path: str | os.PathLike[str]) -> Any:
    """The picture in a file as a PIL image, upright, with 8 bits a channel; raises whatever Pillow raises."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if not picture.mode.startswith(("I", "F")):
        return picture
    return Image.fromarray((255 * greys_of(picture)).round().astype(np.uint8))


def is_transparent(image: Any) -> bool:
    """Whether a PIL image has transparent pixels. The A of LAB is a colour, and PIL gives its pixels any opacity."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def read_image(image: Any) -> Array:
    """The picture as (height, width, 3) floats from 0 to 1, from an array, a tensor, a PIL image or a file's path.

    >>> read_image(np.full((2, 3), 255, np.uint8)).shape
    (2, 3, 3)

    Takes (height, width), (height, width, channels) and, as torch has it, (channels, height, width); 1, 3 or 4
    channels, integers to 255 or floats to 1. Transparent pixels become white. A file's picture is turned upright, as
    its EXIF says; a PIL image stays as it is, because models get it so. Raises OSError for a file that is missing or
    no picture, TypeError or ValueError for anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        image = opened(image)
    if hasattr(image, "convert"):
        is_wide = image.mode.startswith(("I", "F"))
        # A palette's indices are not colours.
        image = greys_of(image) if is_wide else image.convert("RGBA" if is_transparent(image) else "RGB")
    if not (is_array(image) or hasattr(image, "__array__") or hasattr(image, "__array_interface__")):
        raise TypeError(f"image is a {type(image).__name__}: pass an array, a tensor, a PIL image or a file's path")
    is_tensor = hasattr(image, "detach")
    is_whole = not image.is_floating_point() if is_tensor else np.asarray(image).dtype.kind in "iu"
    pixels = as_numbers(image, "image")
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"image has shape {shape}; expected one picture: (height, width), (height, width, 3) or (3, height, width)"
            + ("; pass image[0] for the first of a batch" if len(shape) == 4 else "")
        )
    low, high = float(pixels.min()), float(pixels.max())
    top = 255 if is_whole else 1
    if not (-0.01 * top <= low and high <= 1.01 * top):  # NaN fails; the slight overshoot of a resize passes
        raise ValueError(
            f"image has values from {low:.3g} to {high:.3g}; expected integers from 0 to 255 or floats from 0 to 1. "
            "Undo the model's normalisation first (image * std + mean), or divide by 255"
        )
    pixels = np.clip(pixels / top, 0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[:, :, :3] * pixels[:, :, 3:] + 1 - pixels[:, :, 3:]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def as_pil(picture: Any) -> Any:
    """A picture in a file, or whatever `read_image` reads, as an upright PIL image in RGB.

    Raises what `read_image` and Pillow raise; ImportError without Pillow.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, (str, os.PathLike)):
        picture = opened(picture)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if not is_transparent(picture) and not picture.mode.startswith(("I", "F")):
            return picture.convert("RGB")
    return Image.fromarray((255 * read_image(picture)).round().astype(np.uint8))


def part_seen(picture: Array, seen: Thumbnail, size: tuple[int, int]) -> Array | None:
    """The part of a picture that a model saw as one of this (height, width): its middle or all of it, by a small copy.

    >>> photo = np.random.default_rng(0).random((60, 90, 3))
    >>> squares = photo[:48, 21:69].mean(-1).reshape(24, 2, 24, 2).mean((1, 3))
    >>> part_seen(photo[:48], tuple(squares.ravel()), (224, 224)).shape
    (48, 48, 3)

    None where no part looks like that. Models' preparations squeeze a picture, or cut out the middle of the largest
    rectangle of their proportions: all of it, or 0.875 to 0.96 of each side.
    """
    high, wide = picture.shape[:2]
    if min(high, wide) < THUMBNAIL or len(seen) != THUMBNAIL**2 or min(seen) == max(seen):
        return None
    ratio = size[0] / size[1]
    across, down = min(wide, high / ratio), min(high, wide * ratio)
    shades, best, found = picture.mean(-1), 0.0, None
    for share in (None, 1.0, 0.96, 0.95, 0.9, 0.875):
        rows, columns = (high, wide) if share is None else (round(share * down), round(share * across))
        top, left = (high - rows) // 2, (wide - columns) // 2
        part = np.s_[top : top + rows, left : left + columns]
        if min(rows, columns) >= THUMBNAIL:
            edges = [np.arange(THUMBNAIL) * side // THUMBNAIL for side in (rows, columns)]
            grey = np.add.reduceat(np.add.reduceat(shades[part], edges[0], axis=0), edges[1], axis=1)
            areas = np.outer(*(np.diff([*edge, side]) for edge, side in zip(edges, (rows, columns), strict=True)))
            grey = (grey / areas).ravel()
            likeness = float(np.corrcoef(grey, seen)[0, 1]) if np.ptp(grey) > 0 else 0.0
            if likeness > best + 1e-4:  # of those that are as good the first: all of the picture
                best, found = likeness, part
    return picture[found] if found is not None and best > _LIKENESS else None


def side_by_side(frames: Any, empty: Any, most: int = FRAMES_ACROSS) -> Any:
    """(frames, rows, columns, ...) as one sheet, a few frames in a row; what has no frame is `empty`. (rows, columns)
    stays as it is.

    >>> side_by_side(np.arange(4).reshape(2, 2, 1), -1)
    array([[0, 2],
           [1, 3]])
    """
    if frames.ndim == 2:
        return frames
    count, high, wide = frames.shape[:3]
    across = math.ceil(count / math.ceil(count / most))
    down = math.ceil(count / across)
    padding = np.full((down * across - count, *frames.shape[1:]), empty, frames.dtype)
    whole = np.concatenate([frames, padding]).reshape(down, across, *frames.shape[1:]).swapaxes(1, 2)
    return whole.reshape(down * high, across * wide, *frames.shape[3:])
