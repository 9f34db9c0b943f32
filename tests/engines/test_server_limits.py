"""Hostile clients: what they send is bounded, and others are answered meanwhile."""

import concurrent.futures
import http.client
import http.server
import json
import socket
import threading
import time

import conftest
import demo_model
import openai
import pytest
from chat_client import ask, chat, client_of, data_url, running
from test_server_batches import talkative

from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.server import app as app_module
from reccomp_hf.engines.server import images, listening, requests
from reccomp_hf.engines.server.answering import Service
from reccomp_hf.engines.server.guard import allowed_hosts

SCENE = data_url(draw_scene(1_000_000).image)
QUESTION = "What letter is on the cyan sign?"
MESSAGES = chat(QUESTION, SCENE)


def send(server, body, path="/v1/chat/completions", method="POST", **headers):
    """Status, headers and parsed body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, json.dumps(body) if body is not None else None, given)
    response = connection.getresponse()
    found = response.status, dict(response.headers), json.loads(response.read())
    connection.close()
    return found


def is_answered(server):
    with client_of(server) as client:
        return ask(client, MESSAGES)[0].choices[0].message.content.strip() == "N"


@pytest.fixture
def service():
    return Service("demo", *demo_model.demo_model())


# ---- what a request holds ------------------------------------------------------------------------------------------


def test_a_long_text_is_refused_before_it_is_tokenized(service, monkeypatch):
    monkeypatch.setattr(service.processor, "apply_chat_template", None)
    with running(service) as server:
        began = time.monotonic()
        status, _, body = send(server, {"messages": chat("a " * 4_000_000)})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["x"] * 5}, "up to four"),
        ({"stop": "x" * 201}, "A stop string may have 200 characters, got 201"),
        ({"stop": ["a", "x" * 10_000]}, "A stop string may have 200 characters, got 10000"),
    ],
)
def test_stop_strings_are_few_and_short(service, fields, message):
    with running(service) as server:
        status, _, body = send(server, {"messages": MESSAGES, **fields})
        assert status == 400 and message in body["error"]["message"]


def test_the_pixels_of_all_images_are_bounded(service, monkeypatch):
    monkeypatch.setattr(requests, "_MAX_PIXELS", 3 * 96 * 96)
    with running(service) as server:
        assert send(server, {"messages": chat(QUESTION, *[SCENE] * 3)})[0] == 200
        status, _, body = send(server, {"messages": chat(QUESTION, *[SCENE] * 4)})
        assert status == 400 and "27,648 pixels together" in body["error"]["message"]


def test_a_body_of_very_many_values_is_not_parsed(service, monkeypatch):
    monkeypatch.setattr(app_module, "_MAX_COMMAS", 50)
    with running(service) as server:
        status, _, body = send(server, {"messages": [1] * 60})
        assert status == 413 and "too many values" in body["error"]["message"]


# ---- headers -------------------------------------------------------------------------------------------------------


def test_hosts_by_address():
    assert allowed_hosts("127.0.0.1", []) == {"localhost", "127.0.0.1", "::1"}
    assert "fe80::1%eth0" not in (allowed_hosts("fe80::1%eth0", []) or ())
    assert allowed_hosts("0.0.0.0", []) is None
    assert allowed_hosts("10.0.0.2", ["Models.Example"]) >= {"models.example", "10.0.0.2", "localhost"}


def test_other_hosts_and_pages_are_refused(service):
    with running(service, hosts=allowed_hosts("127.0.0.1", ["models.example"])) as server:
        body = {"messages": MESSAGES}
        for host in ("rebound.example", "rebound.example:8000", "", "[", "127.0.0.1.rebound.example"):
            status, _, answer = send(server, body, Host=host)
            assert status == 403 and "--allow-host" in answer["error"]["message"]
        for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "MODELS.example"):
            assert send(server, body, Host=host)[0] == 200
        assert send(server, body, Origin="https://rebound.example")[0] == 403
        assert send(server, body, Origin="null")[0] == 403
        assert send(server, body, Origin="http://localhost:3000")[0] == 200
        assert send(server, None, "/v1/models", "GET", Host="rebound.example")[0] == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_other_content_types_are_refused(service, kind):
    with running(service) as server:
        assert send(server, {"messages": MESSAGES}, Content_Type=kind)[0] == 415
        assert send(server, {"messages": chat("?")}, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_a_key_is_required_if_there_is_one(service):
    with running(service, key="s\u00e9cret") as server:
        for given in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret"}):
            status, headers, _ = send(server, None, "/v1/models", "GET", **given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert send(server, None, "/health", "GET")[0] == 200
    with running(service, key="secret") as server:
        with client_of(server, api_key="secret") as client:
            assert ask(client, MESSAGES)[0].choices[0].message.content.strip() == "N"
        with client_of(server, api_key="other") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            ask(client, MESSAGES)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_too_many_requests_are_asked_to_come_back():
    service = talkative(seconds_per_step=0.01, waiting=2)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, client, MESSAGES, max_tokens=60) for _ in range(2)]
        while len(service._open) < 2:
            time.sleep(0.01)
        status, headers, body = send(server, {"messages": MESSAGES})
        assert (status, headers["retry-after"], body["error"]["code"]) == (429, "5", "rate_limit_exceeded")
        assert all(answer.result()[0].usage.completion_tokens == 60 for answer in waiting)
        assert send(server, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_an_answer_that_takes_too_long_is_given_up(streams):
    service = talkative(seconds_per_step=0.02, seconds=0.5)
    with running(service) as server, client_of(server) as client:
        with pytest.raises(openai.APIError) as caught:
            list(ask(client, MESSAGES, max_tokens=400, stream=streams)[0])
        assert "took longer than 0.5 seconds" in str(caught.value.body)
        assert streams or caught.value.status_code == 504
        assert ask(client, MESSAGES, max_tokens=2)[0].usage.completion_tokens == 2


def test_a_body_that_does_not_arrive_ends(service, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.4)
    with running(service) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99"
        connection.sendall(f"{head}\r\n\r\n{{".encode())
        assert is_answered(server)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_connections_without_a_request_are_closed(service, monkeypatch):
    monkeypatch.setattr(listening, "IDLE_SECONDS", 0.4)
    with running(service) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(20)]
        for one in silent[10:]:
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert is_answered(server)
        assert [one.recv(100) for one in silent] == [b""] * 20
        assert is_answered(server)


class _Dripping(http.server.BaseHTTPRequestHandler):
    """Sends a byte of its headers now and then, without an end."""

    def do_GET(self):
        try:
            while True:
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.server.ended.set()

    def log_message(self, *args):
        pass


def test_a_host_that_drips_is_cut_off_and_blocks_nobody(service, monkeypatch):
    monkeypatch.setattr(images, "_SECONDS", 1.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dripping) as host:
        host.daemon_threads, host.ended = True, threading.Event()
        conftest.OPEN_PORTS.add(host.server_port)
        threading.Thread(target=host.serve_forever, daemon=True).start()
        slow = {"messages": chat(QUESTION, f"http://127.0.0.1:{host.server_port}/picture.png")}
        with running(service, "127.0.0.1") as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(send, server, slow) for _ in range(12)]
            time.sleep(0.2)
            assert is_answered(server) and not any(one.done() for one in waiting)
            for one in waiting:
                status, _, body = one.result()
                assert status == 400 and "does not answer within 1 seconds" in body["error"]["message"]
            assert host.ended.wait(5)
        host.shutdown()
        conftest.OPEN_PORTS.discard(host.server_port)


@pytest.mark.parametrize("piece", ["\r\nX: y", "\n", " ", "\t", "\x7f"])
def test_a_url_cannot_end_the_line_of_its_request(service, piece):
    with running(service, "127.0.0.1") as server:
        status, _, body = send(server, {"messages": chat(QUESTION, f"http://127.0.0.1:9/a{piece}b")})
        assert status == 400 and "a space or a control character" in body["error"]["message"]
