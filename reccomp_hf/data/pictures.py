"""Decoding image files of any mode and size into upright RGB images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FORMATS = (*WEB_FORMATS, "TIFF")
"""Formats that are read; Pillow reads some others with external programs."""
_SMALLEST_SIDE = 8  # pixels; transformers mistakes an array of 3 rows for one of 3 channels
_LARGEST_RATIO = 100  # longer to shorter side; processors enlarge the shorter side to the model's before they crop
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # tags of TIFF
_UNSIGNED = 1  # a sample format
_OVERSHOOT = 0.05  # share of the white value by which resampled floats may leave the range


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
        raise OSError(" ".join(str(error).split())) from error


def picture_size(file: Any) -> tuple[int, int]:
    """Width and height in pixels from the header of an image file that [`open_picture`] would read.

    Raises:
        ValueError: The proportions exceed the limit.
        OSError: The header cannot be read.
    """
    with Image.open(file, formats=FORMATS) as image:
        _check_proportions(image)
        return image.size


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as models read it: RGB, rotated by its EXIF orientation, with sides of at least 8 pixels.

    Greyscale of more than 8 bits is scaled to 8 bits by its own depth, so that black stays black and white stays
    white:

    - Unsigned integers of up to 16 bits: 0 is black and the largest value of the file's bits per sample is white.
    - Signed integers of 16 bits: 0 is black and 32,767 is white.
    - Integers of 32 bits, where few files use the whole range: 0 is black, and white is the largest value of the
      narrowest of 8, 16 and 32 bits that holds all values of the image.
    - Floats: 0 is black and white is 1, or 255, 65,535 or 4,294,967,295, whichever is the first that no value exceeds.
      Values that leave the range by up to 5 %, as resampling gives them, are clipped.
    - Integers and floats below 0 have no such range: the smallest value is black and the largest is white.

    Raises:
        ValueError: A pixel is NaN or infinite, or a side is more than 100 times as long as the other (where sides
            below 8 pixels count as 8): processors would enlarge it to gigabytes before they crop it.
        OSError: The pixels cannot be decoded.
    """
    _check_proportions(image)  # before anything is decoded
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        upright = _eight_bits(upright, *_sample_type(image))
    elif upright.mode == "P":  # a palette may hold transparency, which Pillow drops with a warning otherwise
        upright = upright.convert("RGBA")
    rgb = upright.convert("RGB")
    if min(rgb.size) < _SMALLEST_SIDE:
        rgb = rgb.resize((max(rgb.width, _SMALLEST_SIDE), max(rgb.height, _SMALLEST_SIDE)))
    return rgb


def _check_proportions(image: Image.Image) -> None:
    shorter, longer = sorted(max(side, _SMALLEST_SIDE) for side in image.size)
    if longer > _LARGEST_RATIO * shorter:
        raise ValueError(f"it has {_pixels(image)}; the longer side may be {_LARGEST_RATIO} times the shorter one")


def _pixels(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"


def _sample_type(image: Image.Image) -> tuple[int, bool]:
    """Bits per sample of a greyscale image's file, and whether its integers have a sign."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return tags.get(_BITS_PER_SAMPLE, (8,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] != _UNSIGNED
    sixteen = image.mode.startswith("I;16") or image.format == "PNG"  # older versions of Pillow open those in mode I
    return (16, False) if sixteen else (32, True)


def _eight_bits(image: Image.Image, bits: int, signed: bool) -> Image.Image:
    """A greyscale image of more than 8 bits as one of 8 bits."""
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and not signed:
        values = values.view(np.uint32)  # Pillow's mode is signed
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are NaN or infinite")
    black, white = _range(float(values.min()), float(values.max()), image.mode, bits - signed)
    scaled = values.astype(np.float32)
    scaled -= black
    scaled *= 255 / (white - black)
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def _range(low: float, high: float, mode: str, bits: int) -> tuple[float, float]:
    """The values that stand for black and white, see [`upright_rgb`]."""
    slack, whites = 0.0, [2**bits - 1]
    if mode == "F":
        slack, whites = _OVERSHOOT, [1, 2**8 - 1, 2**16 - 1, 2**32 - 1]
    elif bits > 16:
        whites = [2**8 - 1, 2**16 - 1, *whites]
    fitting = [white for white in whites if high <= white * (1 + slack)]
    if fitting and low >= -slack * high:
        return 0.0, float(fitting[0])
    return low, high if high > low else low + 1.0


__all__ = ["FORMATS", "WEB_FORMATS", "open_picture", "picture_size", "upright_rgb"]
