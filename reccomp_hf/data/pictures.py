"""Reading a picture that somebody else made: any mode and size, upright, in RGB."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

_SMALLEST_SIDE = 8  # pixels; transformers takes an array of 3 rows for one of 3 channels


def open_picture(file: Any, formats: tuple[str, ...] | None = None, most_pixels: int | None = None) -> Image.Image:
    """Decode a picture.

    Args:
        file: A path or an open file.
        formats: What Pillow may take it for, for example `("PNG", "JPEG")`; by default all that it knows.
        most_pixels: Refuse a larger one before it is decoded; by default Pillow's own limit.

    Returns:
        An RGB picture, turned as its EXIF data say, with sides of 8 pixels or more.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read as a picture; the message is the reason alone.
    """
    try:
        with Image.open(file, formats=formats) as opened:
            if most_pixels is not None and opened.width * opened.height > most_pixels:
                size = f"{opened.width} x {opened.height} pixels"
                raise OSError(f"it has {size}, the largest that is read has {most_pixels:,}")
            # Palettes may hold transparency, which Pillow drops with a warning unless told so.
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
