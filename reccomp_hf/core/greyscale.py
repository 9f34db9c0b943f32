"""Images that stock processors misread.

Pillow cuts greyscale of more than 8 bits to white or black when it converts it, and processors enlarge a long and
narrow image to gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # tags of TIFF
_UNSIGNED = 1  # a sample format
_OVERSHOOT = 0.05  # share of the white value by which resampled floats may leave the range
_IMAGE_KEYS = ("image", "path", "url")  # of a chat message's part
_LARGEST_RATIO = 100  # longer to shorter side; processors enlarge the shorter side to the model's before they crop
SMALLEST_SIDE = 8
"""Shorter sides of an image, in pixels, count as so long."""
_CHANNELS = (1, 3, 4)


def is_deep(image: Image.Image) -> bool:
    """Whether a greyscale image has integers of more than 8 bits, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image, upright: bool = True) -> Image.Image:
    """A greyscale image of more than 8 bits as one of 8 bits, scaled by its own depth.

    Black stays black and white stays white:

    - Unsigned integers of up to 16 bits: 0 is black and the largest value of the file's bits per sample is white.
    - Signed integers of 16 bits: 0 is black and 32,767 is white.
    - Integers of 32 bits, where few files use the whole range: 0 is black, and white is the largest value of the
      narrowest of 8, 16 and 32 bits that holds all values of the image.
    - Floats: 0 is black and white is 1, or 255, 65,535 or 4,294,967,295, whichever is the first that no value exceeds.
      Values that leave the range by up to 5 %, as resampling gives them, are clipped.
    - Integers and floats below 0 have no such range: the smallest value is black and the largest is white.

    Args:
        image: An image for which [`is_deep`] holds.
        upright: Whether to rotate it by its EXIF orientation.

    Raises:
        ValueError: A pixel is NaN or infinite.
        OSError: The pixels cannot be decoded.
    """
    bits, signed = _sample_type(image)
    image = ImageOps.exif_transpose(image) if upright else image
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


def check_proportions(width: int, height: int) -> None:
    """Refuse an image that a processor would enlarge to gigabytes before it crops it.

    Raises:
        ValueError: A side is more than 100 times as long as the other, where sides below 8 pixels count as 8.
    """
    shorter, longer = sorted(max(side, SMALLEST_SIDE) for side in (width, height))
    if longer > _LARGEST_RATIO * shorter:
        raise ValueError(
            f"it has {width} x {height} pixels; the longer side may be {_LARGEST_RATIO} times the shorter one"
        )


def check_image_count(images: Any, placeholders: int) -> None:
    """Refuse another number of images than of their placeholders, which transformers 4.57 takes or fails at.

    Args:
        images: An image, lists of them, or an array or tensor of several.
        placeholders: Number of placeholders in all prompts.

    Raises:
        ValueError: The numbers differ.
    """
    if (found := _count(images)) != placeholders:
        raise ValueError(
            f"Every image needs a placeholder in a prompt: got {found} images and {placeholders} placeholders."
        )


def _count(images: Any) -> int:
    if isinstance(images, list | tuple):
        return sum(map(_count, images))
    shape: Sequence[int] = getattr(images, "shape", ())
    return shape[0] if len(shape) == 4 else 1


def readable_images(images: Any) -> Any:
    """Images for a stock processor, those of [`is_deep`] with 8 bits: Pillow images, local files, and lists of them.

    Raises:
        ValueError: A list of no image, or an image that [`eight_bits`] or [`check_proportions`] refuses.
    """
    if isinstance(images, list | tuple) and all(isinstance(row, list | tuple) and not row for row in images):
        raise ValueError(f"images must hold at least one image, got {images!r}: pass images=None for prompts without.")
    return _readable(images)


def readable_chat(conversation: Any) -> Any:
    """Chat messages, or lists of them, with the images in their parts as in [`readable_images`]."""
    if isinstance(conversation, list | tuple):
        return [readable_chat(message) for message in conversation]
    content = conversation.get("content") if isinstance(conversation, Mapping) else None
    if not isinstance(content, list | tuple):
        return conversation
    return {**conversation, "content": [_readable_part(part) for part in content]}


def _readable_part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    for key in _IMAGE_KEYS:
        image = part.get(key)
        if image is not None and (readable := _readable(image)) is not image:
            return {**{name: value for name, value in part.items() if name != key}, "image": readable}
    return part


def _readable(images: Any) -> Any:
    """`images` themselves where nothing is to be scaled; files are turned as their EXIF says, which stock does too."""
    if isinstance(images, list | tuple):
        return [_readable(image) for image in images]
    if isinstance(images, str) and os.path.isfile(images):
        with Image.open(images) as opened:
            _check_sides(opened.size)
            return _scaled(opened, upright=True) if is_deep(opened) else images
    shape: Sequence[int] = images.size if isinstance(images, Image.Image) else getattr(images, "shape", ())
    if 0 in shape:
        raise ValueError(f"images must have pixels, got shape {tuple(shape)}.")
    if len(shape) >= 2:
        last = len(shape) == 2 or shape[-1] not in _CHANNELS
        _check_sides(shape[-2:] if last else shape[-3:-1])
    return _scaled(images, upright=False) if isinstance(images, Image.Image) and is_deep(images) else images


def _check_sides(sides: Sequence[int]) -> None:
    try:
        check_proportions(*sides)
    except ValueError as error:
        raise ValueError(f"An image cannot be read: {error}.") from error


def _scaled(image: Image.Image, upright: bool) -> Image.Image:
    try:
        return eight_bits(image, upright)
    except ValueError as error:
        raise ValueError(f"An image of {image.width} x {image.height} pixels cannot be read: {error}.") from error


def _sample_type(image: Image.Image) -> tuple[int, bool]:
    """Bits per sample of a greyscale image's file, and whether its integers have a sign."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return tags.get(_BITS_PER_SAMPLE, (8,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] != _UNSIGNED
    sixteen = image.mode.startswith("I;16") or image.format == "PNG"  # older versions of Pillow open those in mode I
    return (16, False) if sixteen else (32, True)


def _range(low: float, high: float, mode: str, bits: int) -> tuple[float, float]:
    """The values that stand for black and white, see [`eight_bits`]."""
    slack, whites = 0.0, [2**bits - 1]
    if mode == "F":
        slack, whites = _OVERSHOOT, [1, 2**8 - 1, 2**16 - 1, 2**32 - 1]
    elif bits > 16:
        whites = [2**8 - 1, 2**16 - 1, *whites]
    fitting = [white for white in whites if high <= white * (1 + slack)]
    if fitting and low >= -slack * high:
        return 0.0, float(fitting[0])
    return low, high if high > low else low + 1.0


__all__ = [
    "SMALLEST_SIDE",
    "check_image_count",
    "check_proportions",
    "eight_bits",
    "is_deep",
    "readable_chat",
    "readable_images",
]
