"""Requests for a chat that are meant to end or confuse an HTTP server, as the bytes of a connection."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

ROUTE = "/v1/chat/completions"
MEGABYTES = 10**7
JSON_TYPE = "application/json"


def head(length: int | None, route: str = ROUTE, method: str = "POST", kind: str = JSON_TYPE, **headers: str) -> bytes:
    """The lines before a body; underscores in names of headers are hyphens."""
    lines = {"Host": "localhost", "Authorization": "Bearer key", "Content-Type": kind}
    lines |= {} if length is None else {"Content-Length": str(length)}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    written = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {route} HTTP/1.1\r\n{written}\r\n".encode()


def post(body: Any, **options: Any) -> bytes:
    """A whole request with a body of bytes, or of a value written as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(body), **options) + body


def chunked(body: bytes, size: int, end: bytes = b"0\r\n\r\n") -> bytes:
    """A whole request whose body arrives in chunks."""
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return head(None, Transfer_Encoding="chunked") + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + end


def statuses(port: int, sent: bytes, answers: int, timeout: float = 60.0) -> list[int]:
    """The statuses of the answers on one connection, up to some number, or until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        with contextlib.suppress(ConnectionError):  # a server may answer and close before it has read everything
            connection.sendall(sent)
        if answers == 0:
            return []
        received, found = b"", []
        with contextlib.suppress(ConnectionError):
            while len(found) < answers and (part := connection.recv(1 << 16)):
                received += part
                found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
    return found


def misplaced(good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bodies with a field of token recovery where vLLM would ignore it."""
    section = {"token_recovery": {"budget": 4}}
    for name in (
        "token_recovery",
        "recovery_text",
        "recovery_turns",
        "token_recovry",
        "budget",
        "Budget",
        "text_share",
    ):
        yield {**good, name: 4}
        (message,) = good["messages"]
        yield {**good, "messages": [{**message, name: 4}]}
        yield {**good, "messages": [{**message, "content": [{**part, name: 4} for part in message["content"]]}]}
    for name in ("mm_processor_kwarg", "mm_proccessor_kwargs", "mmProcessorKwargs", "MM_PROCESSOR_KWARGS"):
        yield {**good, name: section}
    yield {**good, "extra_body": {"mm_processor_kwargs": section}}
    yield {**good, "extra-body": section}
    yield {**good, **{f"n{number}": number for number in range(10**5)}, "budget": 4}
    yield {**good, "budget": "x" * MEGABYTES}


def unreadable(good: bytes) -> Iterator[bytes]:
    """Bodies that are not the JSON of a request."""
    yield from (b"", b" ", b"{", good[:-1], good + b"}", good.replace(b'"', b"'"), b"// a\n" + good)
    yield from (b"null", b"true", b"5", b'"budget"', b"[]", b"[" + good + b"]", b"NaN", b'{"budget": NaN}')
    yield from (b"[" * 10**3 + b"]" * 10**3, b"[" * 10**5, b"[" * MEGABYTES, b'{"a":' * 10**5 + b"1" + b"}" * 10**5)
    yield from (b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}", b'{"messages": ' + b'[{"content": ' * 400 + b"1")
    yield from (b'{"messages": [' + b"[]," * 10**5 + b"[]]}", b'{"messages": ' + b"9" * 5000 + b"}")
    yield from (b"\xff\xfe" + b"\x00" * 99, good.replace(b"demo", b"\xff\xfe"), b"\xef\xbb\xbf" + b"{}", good[::-1])
    yield from (b'"' + b"a" * MEGABYTES, b" " * MEGABYTES, b"9" * MEGABYTES, b"\x00" * MEGABYTES)
    yield json.dumps({"messages": "x" * MEGABYTES}).encode()
    yield good.decode().encode("utf-32")[:-2]


def of_other_types(good: bytes) -> Iterator[bytes]:
    """Whole requests whose headers say that the body is something else."""
    kinds = ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml", "json")
    kinds += ("multipart/form-data; boundary=b", "application/jsonp", "a/b; c=" + "d" * 1000)
    yield from (post(good, kind=kind) for kind in kinds)
    yield post(good, Content_Encoding="gzip").replace(good, good[:50].ljust(len(good), b"\x1f"))
    for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE"):
        yield post(good, method=method)


def broken(good: bytes) -> Iterator[bytes]:
    """Connections that are not HTTP, or end within a request."""
    whole = post(good)
    yield from (b"\x00" * 999, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" * 99, whole[: len(whole) // 2], whole[:30])
    yield from (head(10), head(-5), head(10**18), head(None, Content_Length="5, 6"), head(5, Content_Length="x"))
    yield from (chunked(good, 9, end=b"zz\r\n"), chunked(good, 9, end=b""), head(None, Transfer_Encoding="chunked"))
    yield head(None, Transfer_Encoding="chunked") + b"ffffffffffffffffff\r\na"
    yield head(4, Transfer_Encoding="chunked") + b"0\r\n\r\n" + whole
    yield whole.replace(b"HTTP/1.1", b"HTTP/9.9")
    yield head(len(good), **{f"X{number}": "y" * 900 for number in range(200)}) + good


def hostile(good: dict[str, Any]) -> list[tuple[str, bytes, int]]:
    """Kind, bytes and number of answers of all of them; 0 where the client does not wait for an answer."""
    body = json.dumps(good).encode()
    twice = body[:-1] + b', "mm_processor_kwargs": {}, "mm_processor_kwargs": {"budget": 4}}'
    kinds = {
        "misplaced": [(post(one), 1) for one in misplaced(good)],
        "misplaced, in chunks": [
            (chunked(json.dumps(one).encode(), 5), 1) for one in itertools.islice(misplaced(good), 3)
        ],
        "twice": [(post(twice), 1), (post(body[:-1] + b', "budget": 1, "budget": 2}'), 1)],
        "unreadable": [(post(one), 1) for one in unreadable(body)],
        "of another type": [(one, 1) for one in of_other_types(body)],
        "too large": [(post(b" " * (65 << 20) + body), 1), (chunked(b" " * (65 << 20), 1 << 20), 1)],
        "broken": [(one, 0) for one in broken(body)],
    }
    return [(kind, sent, answers) for kind, all_ in kinds.items() for sent, answers in all_]
