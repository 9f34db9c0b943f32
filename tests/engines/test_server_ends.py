"""Answers that end early: clients that leave, a server that is stopped, a model that fails."""

import concurrent.futures
import copy
import json
import signal
import time

import demo_model
import openai
import pytest
from chat_client import ask, chat, client_of, data_url, raw_events, running

from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.server import listening
from reccomp_hf.engines.server.answering import Service

SCENE = draw_scene(1_000_000).image
QUESTION = "What letter is on the cyan sign?"


class _Talkative(Service):
    """A model that never ends by itself; it counts its steps, each of them slow."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model = copy.copy(self.model)
        self.model.generation_config = copy.deepcopy(self.model.generation_config)
        self.model.generation_config.eos_token_id = None
        self.steps = 0

    def check_wanted(self, answer):
        self.steps += 1
        time.sleep(0.01)
        super().check_wanted(answer)

    def settled(self, seconds=10):
        """The number of steps, once it stays the same."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = self.steps
            time.sleep(0.2)
            if self.steps == before:
                return before
        raise AssertionError("the generation continues")


STEPS = 400  # at .01 s and more each


def test_a_client_that_leaves_ends_its_answer():
    service = _Talkative("demo", *demo_model.demo_model())
    messages = chat(QUESTION, data_url(SCENE))
    with running(service) as server, client_of(server) as client:
        with client.chat.completions.create(model="demo", messages=messages, max_tokens=STEPS, stream=True) as stream:
            for _, _ in zip(range(3), stream, strict=False):
                pass
        assert 0 < service.settled() < STEPS / 2
        service.steps = 0
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(model="demo", messages=messages, max_tokens=STEPS)
        assert 0 < service.settled() < STEPS / 2
        service.steps = 0
        assert ask(client, messages, max_tokens=5)[0].usage.completion_tokens == 5
        assert service.steps == 5 + 1  # one before


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_an_answer_and_is_part_of_it(streams):
    service = _Talkative("demo", *demo_model.demo_model())
    service.model.generation_config.suppress_tokens = [service.processor.tokenizer.eos_token_id]
    messages = chat(QUESTION, data_url(SCENE))
    with running(service) as server, client_of(server) as client:
        whole = ask(client, messages, max_tokens=12)[0].choices[0].message.content
        stop = " ".join(whole.split()[1:3])
        answer, _ = ask(client, messages, max_tokens=12, stop=stop, stream=streams)
        chunks = list(answer) if streams else [answer]
    texts = [chunk.choices[0].delta.content for chunk in chunks] if streams else [answer.choices[0].message.content]
    assert "".join(text or "" for text in texts) == whole[: whole.index(stop) + len(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens < 12


def test_a_server_that_is_stopped_ends_its_answers(monkeypatch):
    monkeypatch.setattr(listening, "SECONDS_TO_FINISH", 0.2)
    service = _Talkative("demo", *demo_model.demo_model())
    messages = chat(QUESTION, data_url(SCENE))
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, client, messages, max_tokens=STEPS)
        while not service.steps:
            time.sleep(0.01)
        began = time.monotonic()
        server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.InternalServerError, match="The server is being stopped"):
            whole.result()
        server.thread.join(20)
        assert not server.thread.is_alive() and time.monotonic() - began < 5
        assert service.steps < STEPS / 2


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_failure_is_reported_and_the_next_request_answered(caplog, streams):
    service = Service("demo", *demo_model.demo_model())
    service.model = copy.copy(service.model)
    works = service.model.generate

    def fails(**kwargs):
        raise RuntimeError('out of "memory"\n\\ here')

    with running(service) as server, client_of(server) as client:
        service.model.generate = fails
        message = "An error occurred during streaming" if streams else "The server failed: RuntimeError"
        with pytest.raises(openai.APIError, match=message) as caught:
            list(ask(client, chat(QUESTION, data_url(SCENE)), stream=streams)[0])
        assert not streams or caught.value.body == 'out of "memory" \\ here'
        if streams:
            *_, last = raw_events(server, chat(QUESTION, data_url(SCENE)))
            assert json.loads(last.removeprefix("data: ")) == {"error": 'out of "memory" \\ here'}
        service.model.generate = works
        assert ask(client, chat(QUESTION, data_url(SCENE)))[0].choices[0].message.content.strip() == "N"
    assert 'RuntimeError: out of "memory"' in caplog.text  # whole, once the server is down
