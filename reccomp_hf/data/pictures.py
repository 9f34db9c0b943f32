"""Decoding image files of any mode and size into upright RGB images."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.greyscale import SMALLEST_SIDE, check_proportions, eight_bits, is_deep

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FORMATS = (*WEB_FORMATS, "TIFF")
"""Formats that are read; Pillow reads some others with external programs."""


def open_picture(file: Any, formats: tuple[str, ...] = FORMATS, most_pixels: int | None = None) -> Image.Image:
    """Decode an image file, see [`upright_rgb`] for the result and the limit of its proportions.

    Args:
        file: A path or an open file.
        formats: Formats that Pillow may detect.
        most_pixels: Largest number of pixels; a larger image is refused before decoding. By default Pillow's limit.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: The file cannot be read as an image; the message contains the reason alone.
    """
    _check_regular(file)
    try:
        with Image.open(file, formats=formats) as opened:
            if most_pixels is not None and opened.width * opened.height > most_pixels:
                raise ValueError(f"it has {_pixels(opened)}, the largest that is read has {most_pixels:,}")
            return upright_rgb(opened)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise OSError(f"cannot identify image file, the formats that are read are {', '.join(formats)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)  # without the file's absolute path
        raise OSError(" ".join(reason.split())) from error


def picture_size(file: Any) -> tuple[int, int]:
    """Width and height in pixels from the header of an image file that [`open_picture`] would read.

    Raises:
        ValueError: The proportions exceed the limit.
        OSError: The header cannot be read.
    """
    _check_regular(file)
    with Image.open(file, formats=FORMATS) as image:
        check_proportions(*image.size)
        return image.size


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as models read it: RGB, rotated by its EXIF orientation, with sides of at least 8 pixels.

    Greyscale of more than 8 bits is scaled by its own depth, see [`reccomp_hf.core.greyscale.eight_bits`].

    Raises:
        ValueError: A pixel is NaN or infinite, or a side is more than 100 times as long as the other (where sides
            below 8 pixels count as 8): processors would enlarge it to gigabytes before they crop it.
        OSError: The pixels cannot be decoded.
    """
    check_proportions(*image.size)  # before anything is decoded
    upright = eight_bits(image) if is_deep(image) else ImageOps.exif_transpose(image)
    if upright.mode == "P":  # a palette may hold transparency, which Pillow drops with a warning otherwise
        upright = upright.convert("RGBA")
    rgb = upright.convert("RGB")
    if min(rgb.size) < SMALLEST_SIDE:  # transformers mistakes an array of 3 rows for one of 3 channels
        rgb = rgb.resize((max(rgb.width, SMALLEST_SIDE), max(rgb.height, SMALLEST_SIDE)))
    return rgb


def _check_regular(file: Any) -> None:
    """Refuse folders, and pipes and devices, from which reading might never end."""
    if isinstance(file, str | os.PathLike) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("it is a folder" if os.path.isdir(file) else "it is not a regular file")


def _pixels(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"


__all__ = ["FORMATS", "WEB_FORMATS", "open_picture", "picture_size", "upright_rgb"]
