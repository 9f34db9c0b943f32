"""Loads `reccomp-hf serve demo` and prints what was measured: `python tests/support/server_load.py [--seconds N]`.

One client asks alone, then twenty at a time, then one among hostile ones. Every answer is compared with the one that
the same request got alone.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reccomp_hf.demo import draw_scene, questions

CLIENTS = 20
SEEDS = range(1_000_000, 1_000_010)
PATH, TYPE = "/v1/chat/completions", {"Content-Type": "application/json"}


def main() -> None:
    """Run the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="length of the part with twenty clients")
    arguments = parser.parse_args()
    jobs = list(_jobs())
    with _dripping_host() as drip, _server() as (process, port):
        expected = [ask(port, job)[1] for job in jobs]  # each alone
        start = _resident(process)
        one = Crowd(port, jobs, expected, 1, arguments.seconds / 3)
        before = _resident(process)
        crowd = Crowd(port, jobs, expected, CLIENTS, arguments.seconds)
        after = _resident(process)
        with hostile_clients(port, drip) as statuses:
            honest = Crowd(port, jobs, expected, 1, arguments.seconds / 3)
        time.sleep(2)
        last = Crowd(port, jobs, expected, 1, 5)
        times = crowd.rate / one.rate
        lines = [
            f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {len(set(expected))} different answers",
            f"one client: {one}",
            f"{CLIENTS} clients: {crowd}, {times:.2f} times as many answers",
            f"one among hostile clients: {honest}",
            f"one afterwards: {last}",
            *(f"  {name}: {dict(count)}" for name, count in sorted(statuses.items())),
            f"memory: {start} MB, {before} MB before the crowd, {after} MB after it, {_resident(process)} MB last",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.exit(any(part.mismatches for part in (one, crowd, honest, last)))


def _jobs() -> Iterator[dict[str, Any]]:
    """Requests of all kinds, most of them with one image."""
    asked = [(seed, question.text) for seed in SEEDS for question in questions(draw_scene(seed), seed)]
    urls = {seed: _data_url(seed) for seed in SEEDS}
    for number, (seed, text) in enumerate(asked):
        job: dict[str, Any] = {"max_tokens": (16, 2, 8)[number % 3], "stream": number % 3 == 1}
        if number % 5 == 0:
            job["token_recovery"] = {"budget": 36}
        if number % 4 == 0:
            job["stop"] = ["e", "w"]
        images = [urls[seed]] * (number % 11 != 0)
        content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        yield {**job, "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]}


def _data_url(seed: int) -> str:
    file = io.BytesIO()
    draw_scene(seed).image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(port: int, job: Any, **headers: str) -> tuple[int, Any]:
    """Status of a response, and the text, the reason of its end and the number of tokens of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", PATH, job if isinstance(job, bytes) else json.dumps(job), {**TYPE, **headers})
        response = connection.getresponse()
        body = response.read().decode()
    if response.status != 200:
        return response.status, body
    if not response.headers["content-type"].startswith("text/event-stream"):
        answer = json.loads(body)
        choice = answer["choices"][0]
        return 200, (choice["message"]["content"], choice["finish_reason"], answer["usage"]["total_tokens"])
    *events, done = [event.removeprefix("data: ") for event in body.strip().split("\n\n")]
    chunks = [json.loads(event) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    ended = done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"]
    return 200, (text, ended, chunks[-1]["usage"]["total_tokens"])


class Crowd:
    """Clients that ask one request after the other for a time.

    Attributes:
        rate: Answers per second.
        mismatches: Number of answers that differ from those of single requests, errors included.
    """

    def __init__(self, port: int, jobs: list[Any], expected: list[Any], clients: int, seconds: float) -> None:
        self.mismatches, self._times = 0, [0.0][:0]
        numbers, began = itertools.count(), time.monotonic()

        def run() -> None:
            while time.monotonic() < began + seconds:
                number, start = next(numbers) % len(jobs), time.monotonic()
                try:
                    same = ask(port, jobs[number]) == (200, expected[number])
                except (OSError, ValueError, http.client.HTTPException):
                    same = False
                self.mismatches += not same
                self._times.append(time.monotonic() - start)

        _join([threading.Thread(target=run) for _ in range(clients)])
        self.rate = len(self._times) / (time.monotonic() - began)

    def __str__(self) -> str:
        """What was measured."""
        median, worst = statistics.median(self._times), max(self._times)
        return (
            f"{len(self._times)} answers, {self.rate:.2f} per second, {median:.2f} s each (worst {worst:.2f} s), "
            f"{self.mismatches} mismatches"
        )


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- hostile clients -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hostile_clients(port: int, drip: int) -> Iterator[dict[str, collections.Counter[Any]]]:
    """Clients that attack until the block ends; yields the statuses that each kind gets."""
    ended, statuses = threading.Event(), collections.defaultdict(collections.Counter)  # type: ignore[var-annotated]
    scene = _data_url(SEEDS[0])

    def chat(text: str, url: str = scene) -> list[Any]:
        image = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

    deep = b'{"messages": [{"role": "user", "content": "?"}], "token_recovery": {"budget": ' + b"[" * 975 + b"]" * 975
    bodies: dict[str, tuple[bytes, dict[str, str]]] = {
        "8 MB of text": (_bytes(messages=chat("a " * 4_000_000)), {}),
        "1,000 stop strings": (_bytes(messages=chat("?"), stop=["x"] * 1000), {}),
        "another host": (_bytes(messages=chat("?")), {"Host": "rebound.example"}),
        "another page": (_bytes(messages=chat("?")), {"Origin": "https://rebound.example"}),
        "a form": (_bytes(messages=chat("?")), {"Content-Type": "text/plain"}),
        "a line in a URL": (_bytes(messages=chat("?", f"http://127.0.0.1:{drip}/a\r\nX: y")), {}),
        "deep settings": (deep + b"}}", {}),
        "many messages": (_bytes(messages=[{"role": "user", "content": ""}] * 40_000), {}),
        **{f"a host that drips {n}": (_bytes(messages=chat("?", f"http://127.0.0.1:{drip}/")), {}) for n in range(40)},
    }

    def sends(name: str, body: bytes, headers: dict[str, str]) -> None:
        while not ended.wait(0.25):
            statuses[re.sub(r" \d+$", "", name)][_attempt(lambda: ask(port, body, **headers)[0])] += 1

    def leaves() -> None:
        body = _bytes(messages=chat("What letter is on the cyan sign?"), max_tokens=400)
        while not ended.wait(0.25):
            _leave(port, body)
            statuses["leaves"]["left"] += 1

    def waits(head: str, rest: bytes) -> Callable[[], None]:
        def run() -> None:
            while not ended.is_set():
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.settimeout(1)
                    connection.sendall(head.encode())
                    while not ended.is_set():
                        with contextlib.suppress(TimeoutError):
                            try:
                                first = connection.recv(12)
                            except ConnectionError:
                                first = b""
                            statuses["slow body" if rest else "half-open"][first.decode() or "closed"] += 1
                            break
                        with contextlib.suppress(OSError):
                            connection.sendall(rest)

        return run

    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 9999\r\n\r\n{"
    threads = [threading.Thread(target=sends, args=(name, *body)) for name, body in bodies.items()]
    threads += [threading.Thread(target=leaves) for _ in range(4)]
    threads += [threading.Thread(target=waits(head, b" ")) for _ in range(20)]
    threads += [threading.Thread(target=waits("POST ", b"")) for _ in range(60)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _bytes(**body: Any) -> bytes:
    return json.dumps(body).encode()


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def _leave(port: int, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", PATH, body, TYPE)
    time.sleep(0.02)
    connection.close()


@contextlib.contextmanager
def _dripping_host() -> Iterator[int]:
    """The port of a host that sends a byte now and then, without an end."""

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                connection.sendall(b"H")
                time.sleep(0.2)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


@contextlib.contextmanager
def _server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "reccomp_hf", "serve", "demo", "--port", "0", "--allow-urls", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        try:
            if found is None:
                raise RuntimeError("reccomp-hf serve does not start.")
            yield process, int(found[1])
        finally:
            process.kill()


def _resident(process: subprocess.Popen[str]) -> int:
    """Resident memory in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
