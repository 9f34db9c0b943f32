"""Images of a request: sent in the request itself or fetched from allowed hosts, never read from local files."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import re
import socket
import threading
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from ...data.pictures import WEB_FORMATS, open_picture
from .errors import RequestError

_MAX_PIXELS = 50_000_000
_MAX_BYTES = 20_000_000  # per download
_SECONDS = 10.0  # per download, in all
_UNFIT = re.compile(r"[\x00-\x20\x7f]")  # in a URL: it would end the request's line
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class ImageReader:
    """Opens the images that `image_url` parts hold.

    Args:
        hosts: Hosts whose `http` and `https` URLs are fetched. By default none: a server that fetches any URL gives
            its clients access to whatever it can reach.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)

    def __call__(self, url: str, where: str) -> Image.Image:
        """Open an image given as a data URL, as plain base64, or as a URL of an allowed host.

        Args:
            url: The image.
            where: The place in the request, for errors.

        Raises:
            RequestError: It is none of these, or not an image.
        """
        scheme = _SCHEME.match(url)
        name = scheme[1].lower() if scheme else ""
        if name in ("http", "https"):
            data = self._fetch(url, where)
        elif name == "data":
            data = _decode(_base64_of(url, where), where)
        elif name:
            raise RequestError(
                f"{where}: expected a data URL (data:image/png;base64,...), got one that starts with {name + ':'!r}; "
                "local files are never read."
            )
        else:
            data = _decode(url, where)
        try:
            return open_picture(io.BytesIO(data), WEB_FORMATS, _MAX_PIXELS)
        except OSError as error:
            raise RequestError(f"{where}: the data are not an image that can be read: {error}.") from error

    def _fetch(self, url: str, where: str) -> bytes:
        """Download a URL of an allowed host."""
        if not self.hosts:
            raise RequestError(
                f"{where}: this server fetches no URLs (it was started without --allow-urls HOST): send the image "
                "itself, as data:image/png;base64,..."
            )
        if _UNFIT.search(url):
            raise RequestError(f"{where}: the URL contains a space or a control character: encode it, as in %20.")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise RequestError(f"{where}: the URL is not valid: {error}.") from error
        if host is None or host not in self.hosts or re.search(r"[@\\\s]", parts.netloc):
            raise RequestError(f"{where}: this server fetches only from {', '.join(sorted(self.hosts))}.")
        try:
            status, data = _download(parts)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RequestError(f"{where}: {host} does not answer within {_SECONDS:g} seconds.") from error
        if status != 200:  # redirects are not followed: they may lead to another host
            raise RequestError(f"{where}: {host} answers {status}.")
        if len(data) > _MAX_BYTES:
            raise RequestError(f"{where}: the image is larger than {_MAX_BYTES:,} bytes.")
        return data


def _download(url: SplitResult) -> tuple[int, bytes]:
    """Status and body of a URL. A host that sends a byte now and then is cut off when the time is over."""
    kind = http.client.HTTPSConnection if url.scheme.lower() == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=_SECONDS)
    timer = threading.Timer(_SECONDS, _cut_off, [connection])
    timer.daemon = True
    timer.start()
    try:
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("GET", target, headers={"User-Agent": "reccomp_hf", "Accept": "image/*"})
        response = connection.getresponse()
        return response.status, response.read(_MAX_BYTES + 1)
    finally:
        timer.cancel()
        connection.close()


def _cut_off(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)


def _base64_of(url: str, where: str) -> str:
    """The base64 part of a data URL."""
    head, comma, data = url.partition(",")
    media_type, *parameters = head[len("data:") :].split(";")
    if not comma or "base64" not in parameters or not media_type.startswith("image/"):
        raise RequestError(
            f"{where}: expected data:image/png;base64,... (or jpeg, webp, gif, bmp), got {head[:60]!r}."
        )
    return data


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{where}: expected a data URL or base64, got {text[:40]!r}, which is not valid base64; local files are "
            "never read."
        ) from error


__all__ = ["ImageReader"]
