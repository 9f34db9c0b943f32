"""Limits of what a visitor may send, and reading a picture within them."""

from __future__ import annotations

import os

from PIL import Image

from ...data.pictures import WEB_FORMATS, open_picture

MAX_BYTES = 10 * 2**20
"""Bytes of a picture's file."""
MAX_PIXELS = 50_000_000
LONGEST_SIDE = 2048
"""Pixels to which a larger picture is reduced before it is kept; models see at most 1,344."""
MAX_CHARACTERS = 500
"""Characters of a question."""
MAX_QUESTIONS = 8
"""Questions of a conversation."""
MAX_VISITORS = 50
"""Visitors whose pictures are kept; the one who was away longest is forgotten first."""
MAX_WAITING = 32
"""Visitors who may wait for an answer at the same time."""


class Refused(ValueError):
    """A sentence for the visitor."""


def read_picture(path: str) -> Image.Image:
    """Decode an uploaded file as an upright RGB image with sides of at most `LONGEST_SIDE` pixels.

    Raises:
        Refused: It is too large, or not a picture.
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise Refused(f"This file has {size / 2**20:.1f} MB; a picture may have {MAX_BYTES >> 20} MB.")
    try:
        image = open_picture(path, WEB_FORMATS, MAX_PIXELS)
    except OSError as error:
        raise Refused(f"This file cannot be read as a picture: {error}.") from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def check_question(text: str) -> str:
    """The question without surrounding white space.

    Raises:
        Refused: It is empty or too long.
    """
    text = text.strip()
    if not text:
        raise Refused("Write a question first.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"The question has {len(text)} characters; it may have {MAX_CHARACTERS}.")
    return text


__all__ = [
    "LONGEST_SIDE",
    "MAX_BYTES",
    "MAX_CHARACTERS",
    "MAX_PIXELS",
    "MAX_QUESTIONS",
    "MAX_VISITORS",
    "MAX_WAITING",
    "Refused",
    "check_question",
    "read_picture",
]
