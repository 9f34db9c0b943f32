"""Hosts that images are fetched from: slow ones are cut off, and block only themselves."""

import concurrent.futures
import http.server
import socket
import threading
import time

import conftest
import demo_model
import pytest
from chat_client import chat, data_url, running, send

from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.server import images
from reccomp_hf.engines.server.answering import Service

IMAGE = draw_scene(1_000_000).image


def asking(*urls):
    return {"messages": chat("What letter is on the cyan sign?", *urls)}


def text_of(response):
    status, _, body = response
    assert status == 200, body
    return body["choices"][0]["message"]["content"].strip()


class _Host(http.server.BaseHTTPRequestHandler):
    """`/drip` sends a byte of its headers now and then, without an end; `/late` sends an image after .4 s."""

    def do_GET(self):
        try:
            while self.path == "/drip":
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.server.ended.set()
            return
        time.sleep(0.4 if self.path == "/late" else 0)
        self.send_response(200)
        self.end_headers()
        IMAGE.save(self.wfile, "PNG")

    def log_message(self, *args):
        pass


@pytest.fixture
def host():
    """The port of a host."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host) as opened:
        opened.daemon_threads, opened.ended = True, threading.Event()
        conftest.OPEN_PORTS.add(opened.server_port)
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield opened
        opened.shutdown()
        conftest.OPEN_PORTS.discard(opened.server_port)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(images, "_SECONDS", 1.5)
    with running(Service("demo", *demo_model.demo_model()), "127.0.0.1", "localhost") as opened:
        yield opened


def test_a_host_that_drips_is_cut_off_and_blocks_only_itself(server, host):
    slow, good = (f"http://{name}:{host.server_port}/" for name in ("127.0.0.1", "localhost"))
    with concurrent.futures.ThreadPoolExecutor(images.PLACES) as pool:
        waiting = [pool.submit(send, server, asking(slow + "drip")) for _ in range(images.PLACES)]
        time.sleep(0.5)
        status, headers, body = send(server, asking(slow))
        assert (status, headers["retry-after"]) == (429, "5")
        assert "16 downloads from 127.0.0.1 are under way" in body["error"]["message"]
        assert text_of(send(server, asking(data_url(IMAGE)))) == text_of(send(server, asking(good))) == "N"
        assert not any(one.done() for one in waiting)
        for one in waiting:
            status, _, body = one.result()
            assert status == 400 and "127.0.0.1 does not answer within 1.5 seconds" in body["error"]["message"]
        assert host.ended.wait(5)
    assert text_of(send(server, asking(slow))) == "N"


def test_all_downloads_of_a_request_end_together(server, host):
    late = f"http://127.0.0.1:{host.server_port}/late"
    assert send(server, asking(*[late] * 2))[0] == 200
    began = time.monotonic()
    status, _, body = send(server, asking(*[late] * 20))
    assert status == 400 and "does not answer within 1.5 seconds" in body["error"]["message"]
    assert time.monotonic() - began < 4  # not 20 times .4 s


def test_a_handshake_that_drips_is_cut_off(server):
    ended = threading.Event()

    def drip():
        opened, _ = listener.accept()
        with opened:
            try:
                opened.sendall(b"\x16\x03\x03\x20\x00")  # the head of a record of TLS, which is long
                while True:
                    opened.sendall(b"\x02")
                    time.sleep(0.05)
            except OSError:
                ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        conftest.OPEN_PORTS.add(port)
        threading.Thread(target=drip, daemon=True).start()
        status, _, body = send(server, asking(f"https://127.0.0.1:{port}/"))
        assert status == 400 and "does not answer within 1.5 seconds" in body["error"]["message"]
        assert ended.wait(5)
        conftest.OPEN_PORTS.discard(port)


@pytest.mark.parametrize("piece", ["\r\nX: y", "\n", " ", "\t", "\x7f"])
def test_a_url_cannot_end_the_line_of_its_request(server, piece):
    status, _, body = send(server, asking(f"http://127.0.0.1:9/a{piece}b"))
    assert status == 400 and "a space or a control character" in body["error"]["message"]
