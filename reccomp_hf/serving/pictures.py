"""The pictures of a request: what it holds itself, and what allowed hosts give; never files of this machine."""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..data.pictures import open_picture
from .errors import RequestError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others Pillow reads by programs or libraries of little use here
_MOST_PIXELS = 50_000_000
_MOST_BYTES = 20_000_000  # of a download
_SECONDS = 10.0
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An allowed host must not send us to another one."""

    def redirect_request(self, *args: Any) -> None:
        """Refuse."""


class PictureReader:
    """Makes pictures of what `image_url` parts hold.

    Args:
        hosts: Names of the hosts whose `http` and `https` URLs are fetched; by default none, since a server that
            fetches whatever it is told to can be used to reach what only it can reach.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)

    def __call__(self, url: str, where: str) -> Image.Image:
        """A picture from a data URL, plain base64, or a URL of an allowed host; `where` names it in errors.

        Raises:
            RequestError: It is none of these, or no picture.
        """
        scheme = _SCHEME.match(url)
        name = scheme[1].lower() if scheme else ""
        if name in ("http", "https"):
            data = self._fetched(url, where)
        elif name == "data":
            data = _decoded(_base64_of(url, where), where)
        elif name:
            raise RequestError(
                f"{where}: expected a data URL (data:image/png;base64,...), got one that starts with {name + ':'!r}; "
                "this machine's files are never read."
            )
        else:
            data = _decoded(url, where)
        try:
            return open_picture(io.BytesIO(data), _FORMATS, _MOST_PIXELS)
        except OSError as error:
            formats = ", ".join(_FORMATS)
            raise RequestError(f"{where}: the data are no picture that can be read ({formats}).") from error

    def _fetched(self, url: str, where: str) -> bytes:
        """What an allowed host answers."""
        if not self.hosts:
            raise RequestError(
                f"{where}: this server fetches no URLs (it was started without --allow-urls HOST): send the picture "
                "itself, as data:image/png;base64,..."
            )
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise RequestError(f"{where}: the URL cannot be read: {error}.") from error
        if host is None or host not in self.hosts or re.search(r"[@\\\s]", parts.netloc):
            raise RequestError(f"{where}: this server fetches from {', '.join(sorted(self.hosts))} alone.")
        try:
            with urllib.request.build_opener(_NoRedirects).open(url, timeout=_SECONDS) as response:
                data: bytes = response.read(_MOST_BYTES + 1)
        except (OSError, ValueError, urllib.error.URLError) as error:
            reason = f"answers {error.code}" if isinstance(error, urllib.error.HTTPError) else "does not answer"
            raise RequestError(f"{where}: {host} {reason}.") from error
        if len(data) > _MOST_BYTES:
            raise RequestError(f"{where}: the picture is larger than {_MOST_BYTES:,} bytes.")
        return data


def _base64_of(url: str, where: str) -> str:
    """The base64 of a data URL."""
    head, comma, data = url.partition(",")
    media_type, *parameters = head[len("data:") :].split(";")
    if not comma or "base64" not in parameters or not media_type.startswith("image/"):
        raise RequestError(
            f"{where}: expected data:image/png;base64,... (or jpeg, webp, gif, bmp), got {head[:60]!r}."
        )
    return data


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{where}: expected a data URL or base64, got {text[:40]!r}, which is no base64; this machine's files are "
            "never read."
        ) from error


__all__ = ["PictureReader"]
