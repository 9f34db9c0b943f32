"""Images of a request: sent in the request itself or fetched from allowed hosts, never read from local files."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import http.client
import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from ...data.pictures import WEB_FORMATS, open_picture
from .errors import RequestError, too_busy

_MAX_PIXELS = 50_000_000
_MAX_BYTES = 20_000_000  # per download
_SECONDS = 10.0  # for all downloads of a request
PLACES = 16
"""Most downloads from one host at a time."""
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
        self._places = {host: threading.BoundedSemaphore(PLACES) for host in self.hosts}

    def for_request(self) -> Callable[[str, str], Image.Image]:
        """The reader of one request, whose downloads end together: its time begins now."""
        return functools.partial(self, ends_at=time.monotonic() + _SECONDS)

    def __call__(self, url: str, where: str, ends_at: float | None = None) -> Image.Image:
        """Open an image given as a data URL, as plain base64, or as a URL of an allowed host.

        Args:
            url: The image.
            where: The place in the request, for errors.
            ends_at: The `time.monotonic` at which a download is given up; `None` for ten seconds from now.

        Raises:
            RequestError: It is none of these, or not an image; with status 429, the host is busy.
        """
        scheme = _SCHEME.match(url)
        name = scheme[1].lower() if scheme else ""
        if name in ("http", "https"):
            data = self._fetch(url, where, time.monotonic() + _SECONDS if ends_at is None else ends_at)
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

    def _fetch(self, url: str, where: str, ends_at: float) -> bytes:
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
        if not self._places[host].acquire(blocking=False):
            raise too_busy(f"{where}: {PLACES} downloads from {host} are under way")
        try:
            status, data = _download(parts, ends_at)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RequestError(f"{where}: {host} does not answer within {_SECONDS:g} seconds.") from error
        finally:
            self._places[host].release()
        if status != 200:  # redirects are not followed: they may lead to another host
            raise RequestError(f"{where}: {host} answers {status}.")
        if len(data) > _MAX_BYTES:
            raise RequestError(f"{where}: the image is larger than {_MAX_BYTES:,} bytes.")
        return data


def _download(url: SplitResult, ends_at: float) -> tuple[int, bytes]:
    """Status and body of a URL. A host that sends a byte now and then is cut off when the time is over."""
    secure, host = url.scheme.lower() == "https", url.hostname or ""
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, url.port)
    opened = socket.create_connection((host, connection.port), _left(ends_at))
    if secure:  # the handshake is part of what may be cut off
        opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
    timer = threading.Timer(_left(ends_at), _cut_off, [opened])
    timer.daemon = True
    timer.start()
    try:
        if isinstance(opened, ssl.SSLSocket):
            opened.do_handshake()
        connection.sock = opened
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("GET", target, headers={"User-Agent": "reccomp_hf", "Accept": "image/*"})
        response = connection.getresponse()
        return response.status, response.read(_MAX_BYTES + 1)
    finally:
        timer.cancel()
        opened.close()


def _left(ends_at: float) -> float:
    """Seconds that are left, at least a thousandth."""
    return max(ends_at - time.monotonic(), 0.001)


def _cut_off(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not that of TLS, which changes the object


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


__all__ = ["PLACES", "ImageReader"]
