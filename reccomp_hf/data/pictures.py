"""Decoding image files of any mode and size into upright RGB images."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

_SMALLEST_SIDE = 8  # pixels; transformers mistakes an array of 3 rows for one of 3 channels


def open_picture(file: Any, formats: tuple[str, ...] | None = None, most_pixels: int | None = None) -> Image.Image:
    """Decode an image file.

    Args:
        file: A path or an open file.
        formats: Formats that Pillow may detect, for example `("PNG", "JPEG")`; by default all that it knows.
        most_pixels: Largest number of pixels; a larger image is refused before decoding. By default Pillow's limit.

    Returns:
        An RGB image, rotated by its EXIF orientation, with sides of at least 8 pixels.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: The file cannot be read as an image; the message contains the reason alone.
    """
    try:
        with Image.open(file, formats=formats) as opened:
            if most_pixels is not None and opened.width * opened.height > most_pixels:
                size = f"{opened.width} x {opened.height} pixels"
                raise OSError(f"it has {size}, the largest that is read has {most_pixels:,}")
            # A palette may hold transparency, which Pillow drops with a warning unless converted to RGBA.
            upright = ImageOps.exif_transpose(opened.convert("RGBA" if opened.mode == "P" else "RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(" ".join(str(error).split())) from error
    image = upright.convert("RGB")
    if min(image.size) < _SMALLEST_SIDE:
        image = image.resize((max(image.width, _SMALLEST_SIDE), max(image.height, _SMALLEST_SIDE)))
    return image


__all__ = ["open_picture"]
