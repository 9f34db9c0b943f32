"""Hostile clients: what they send is bounded, and others are answered meanwhile."""

import concurrent.futures
import http.client
import socket
import time

import demo_model
import openai
import pytest
from chat_client import ask, chat, client_of, data_url, running, send
from test_server_batches import talkative

from reccomp_hf.core.tokenizing import token_ids
from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.server import answering, listening, requests
from reccomp_hf.engines.server import app as app_module
from reccomp_hf.engines.server.answering import Service
from reccomp_hf.engines.server.errors import RequestError
from reccomp_hf.engines.server.guard import allowed_hosts
from reccomp_hf.engines.server.images import ImageReader
from reccomp_hf.engines.server.requests import read_request

SCENE = data_url(draw_scene(1_000_000).image)
QUESTION = "What letter is on the cyan sign?"
MESSAGES = chat(QUESTION, SCENE)


def is_answered(server):
    with client_of(server) as client:
        return ask(client, MESSAGES)[0].choices[0].message.content.strip() == "N"


@pytest.fixture
def service():
    return Service("demo", *demo_model.demo_model())


@pytest.fixture(scope="module")
def server():
    with running(Service("demo", *demo_model.demo_model())) as opened:
        yield opened


# ---- what a request holds ------------------------------------------------------------------------------------------


def test_a_long_text_is_refused_before_it_is_tokenized(service, monkeypatch):
    monkeypatch.setattr(service.processor, "apply_chat_template", None)
    with running(service) as server:
        began = time.monotonic()
        status, _, body = send(server, {"messages": chat("a " * 4_000_000)})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert time.monotonic() - began < 10


@pytest.fixture
def lengths(monkeypatch):
    """The characters of every text that is tokenized by a check."""
    found = []

    def spy(tokenizer, texts, *args, **kwargs):
        found.extend(map(len, texts))
        return token_ids(tokenizer, texts, *args, **kwargs)

    monkeypatch.setattr(answering, "token_ids", spy)
    return found


def test_of_a_long_text_only_what_fits_is_tokenized(service, lengths):
    service._positions, service._longest_token = 50_000, 20
    request = read_request({"messages": chat("a " * 450_000)}, ("demo",), ImageReader())
    with pytest.raises(RequestError, match="leaves none for an answer"):
        service.check(request)
    assert 100_000 <= sum(lengths) < 110_000  # of 900,000 characters: each token takes two


def test_only_a_prompt_that_may_be_too_long_is_tokenized_before_its_images_are_read(service, lengths):
    for words in (1, 200):
        service.check(read_request({"messages": chat("a " * words)}, ("demo",), ImageReader()))
    assert service._positions == 512 and not lengths
    service.check(read_request({"messages": chat("a " * 255)}, ("demo",), ImageReader()))
    (length,) = lengths
    assert length >= 512


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


def test_large_bodies_together_are_bounded(service, monkeypatch):
    monkeypatch.setattr(app_module, "_MAX_BYTES_TOGETHER", 40_000)
    monkeypatch.setattr(app_module, "_SMALL", 20_000)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999"
    with running(service) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(f"{head}\r\n\r\n{'x' * 39_000}".encode())
        time.sleep(0.3)
        status, headers, body = send(server, {"messages": chat("x" * 30_000)})
        assert (status, headers["retry-after"]) == (429, "5") and "large requests" in body["error"]["message"]
        assert send(server, {"messages": chat("What?"), "max_tokens": 1})[0] == 200  # a small one
        slow.close()
        time.sleep(0.3)
        assert send(server, {"messages": chat("x" * 30_000)})[1].get("retry-after") is None


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 9), 3000])
def test_deep_settings_leave_the_server_running(server, depth):
    deep = (
        b'{"messages": [{"role": "user", "content": "?"}], "token_recovery": {"budget": ' + b"[" * depth + b"]" * depth
    )
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", deep + b"}}", {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400
    connection.close()
    assert send(server, {"messages": chat("?"), "max_tokens": 1})[0] == 200


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
        while service.open < 2:
            time.sleep(0.01)
        status, headers, body = send(server, {"messages": MESSAGES})
        assert (status, headers["retry-after"], body["error"]["code"]) == (429, "5", "rate_limit_exceeded")
        assert all(answer.result()[0].usage.completion_tokens == 60 for answer in waiting)
        assert send(server, {"messages": MESSAGES, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_an_answer_that_takes_too_long_is_given_up(streams):
    service = talkative(seconds_per_step=0.02, seconds=1.5)
    with running(service) as server, client_of(server) as client:
        with pytest.raises(openai.APIError) as caught:
            list(ask(client, MESSAGES, max_tokens=400, stream=streams)[0])
        assert "took longer than 1.5 seconds" in str(caught.value.body)
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
