"""Requests that wait: which are batched, and which are given up before their turn."""

import concurrent.futures
import time

import demo_model
import openai
import pytest
from chat_client import ask, chat, client_of, data_url, running, send
from test_server_batches import talkative

from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.server import answering
from reccomp_hf.engines.server.answering import Service
from reccomp_hf.engines.server.answers import Answer
from reccomp_hf.engines.server.images import ImageReader
from reccomp_hf.engines.server.requests import read_request

SCENE = data_url(draw_scene(1_000_000).image)
MESSAGES = chat("What letter is on the cyan sign?", SCENE)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_before_its_turn_frees_its_place():
    service = talkative(seconds_per_step=0.01, waiting=2, batch_size=1)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, MESSAGES, max_tokens=200)
        wait_for(lambda: service.open == 1)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(model="demo", messages=MESSAGES)
        second = pool.submit(ask, client, MESSAGES, max_tokens=1)  # the place of the one that has left
        wait_for(lambda: [answer.request.max_tokens for answer in service._waiting] == [1])
        assert send(server, {"messages": MESSAGES})[0] == 429
        assert not first.done()
        assert [one.result()[0].usage.completion_tokens for one in (first, second)] == [200, 1]
    assert service.batches == [1, 1]  # nothing was computed for it


def test_an_answer_is_given_up_in_time_before_its_turn(monkeypatch):
    service = talkative(seconds_per_step=0.01, batch_size=1)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, MESSAGES, max_tokens=200)
        wait_for(lambda: service.batches)
        monkeypatch.setattr(service, "seconds", 0.3)
        status, _, body = send(server, {"messages": MESSAGES})
        assert status == 504 and "longer than 0.3 seconds" in body["error"]["message"]
        assert not first.done() and first.result()[0].usage.completion_tokens == 200


def test_pixels_that_wait_are_bounded(monkeypatch):
    service = talkative(seconds_per_step=0.01, batch_size=1)
    monkeypatch.setattr(answering, "_MAX_PIXELS", 3 * 96 * 96)
    monkeypatch.setattr(answering, "_SMALL", 96 * 96)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, client, MESSAGES, max_tokens=150)
        wait_for(lambda: service.batches)
        two = {"messages": chat("What letter is on the cyan sign?", SCENE, SCENE), "max_tokens": 1}
        second = pool.submit(send, server, two)
        wait_for(lambda: len(service._waiting) == 1)
        status, headers, body = send(server, two)
        assert (status, headers["retry-after"]) == (429, "5") and "36,864 pixels wait" in body["error"]["message"]
        small = pool.submit(send, server, {"messages": MESSAGES, "max_tokens": 1})
        assert first.result()[0].usage.completion_tokens == 150
        assert second.result()[0] == small.result()[0] == 200


def request_of(images=1, **fields):
    messages = chat("What?", *[SCENE] * images)
    return read_request({"messages": messages, **fields}, ("demo",), ImageReader())


@pytest.fixture
def companions(monkeypatch):
    """The number of requests of each batch, of requests that wait together."""
    monkeypatch.setattr(answering.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(answering.asyncio, "get_running_loop", lambda: None)
    service = Service("demo", *demo_model.demo_model(), batch_size=4)

    def run(*requests):
        service._waiting = [Answer(request, 9, service._batch_key(request)) for request in requests]
        batches = []
        while service._waiting:
            batches.append([requests.index(answer.request) for answer in service._next_batch()])
        return batches

    run.service = service
    return run


def test_a_batch_holds_requests_of_one_kind_in_their_order(companions):
    plain = [request_of(max_tokens=n) for n in range(1, 7)]
    assert companions(*plain) == [[0, 1, 2, 3], [4, 5]]
    other = request_of(token_recovery={"budget": 3})
    assert companions(plain[0], other, plain[1], request_of(0), other) == [[0, 2], [1, 1], [3]]
    assert companions(*[request_of(temperature=1, seed=n) for n in range(3)]) == [[0], [1], [2]]


def test_a_batch_holds_few_images(companions):
    sizes = (3, 2, 1, 9, 2, 2)
    assert companions(*[request_of(n, max_tokens=n + 9 * i) for i, n in enumerate(sizes, 1)]) == [
        [0, 2],
        [1, 4],
        [3],
        [5],
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"min_length": 9},
        {"num_beams": 2},
        {"bad_words_ids": [[3]]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_that_read_other_rows_or_padding_are_answered_alone(companions, fields, monkeypatch):
    config = answering.copy.deepcopy(companions.service.model.generation_config)
    config.update(**fields)
    monkeypatch.setattr(companions.service.model, "generation_config", config)
    assert companions(request_of(max_tokens=1), request_of(max_tokens=2)) == [[0], [1]]
