"""Requests that come at the same time are answered in one batch, each as it would be alone."""

import concurrent.futures
import copy
import itertools
import time

import demo_model
import openai
import pytest
from chat_client import ask, chat, client_of, data_url, running

from reccomp_hf.demo import draw_scene, questions
from reccomp_hf.engines.server import answering
from reccomp_hf.engines.server.answering import Service

SEEDS = range(1_000_000, 1_000_010)
QUESTION = "What letter is on the cyan sign?"
SCENE = data_url(draw_scene(SEEDS[0]).image)


class _Watched(Service):
    """A service that records the numbers of requests of its batches, and that may be slow."""

    def __init__(self, *arguments, seconds_per_step=0.0, **options):
        super().__init__(*arguments, **options)
        self.batches, self.seconds_per_step = [], seconds_per_step

    def _answer(self, batch):
        self.batches.append(len(batch))
        super()._answer(batch)

    def check_wanted(self, answer):
        time.sleep(self.seconds_per_step)
        super().check_wanted(answer)


def watched(**options):
    return _Watched("demo", *demo_model.demo_model(), **options)


def talkative(**options):
    """A service whose model never ends by itself."""
    service = watched(**options)
    service.model = copy.copy(service.model)
    service.model.generation_config = copy.deepcopy(service.model.generation_config)
    service.model.generation_config.eos_token_id = None
    service.model.generation_config.suppress_tokens = [service.processor.tokenizer.eos_token_id]
    return service


@pytest.fixture(autouse=True)
def wait(monkeypatch):
    """Wait long enough for requests of threads that start at the same time."""
    monkeypatch.setattr(answering, "_WINDOW", 0.25)


def text_of(answer, stream):
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


def mixed_requests(count):
    """Scenes, questions and lengths of all kinds; every fifth has a budget of its own, every third is a stream."""
    asked = [(seed, question.text) for seed in SEEDS for question in questions(draw_scene(seed), seed)]
    for number, (seed, question) in enumerate(itertools.islice(asked, count)):
        settings = {"max_tokens": (1, 3, 12)[number % 3], "stream": number % 3 == 1}
        if number % 5 == 0:
            settings["extra_body"] = {"token_recovery": {"budget": 36}}
        if number % 4 == 0:
            settings["stop"] = ["e", "w"]
        image = [data_url(draw_scene(seed).image)] if number % 7 else []
        yield chat(question, *image), settings


def test_a_crowd_gets_the_answers_of_single_requests():
    service, alone = watched(), watched(batch_size=1)
    jobs = list(mixed_requests(48))

    def answer(client, job):
        messages, settings = job
        response, headers = ask(client, messages, **settings)
        return text_of(response, settings["stream"]), headers["x-visual-tokens"]

    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: answer(client, job), jobs))
    with running(alone) as server, client_of(server) as client:
        single = [answer(client, job) for job in jobs]
    assert together == single and len(set(single)) > 12
    assert sum(service.batches) == len(jobs) and max(service.batches) > 3 and len(service.batches) < len(jobs) / 2
    assert set(alone.batches) == {1}


def test_usage_and_reasons_are_each_rows_own():
    service = talkative()
    lengths = (1, 4, 9)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda n: ask(client, chat(QUESTION, SCENE), max_tokens=n)[0], lengths))
        whole = answers[-1].choices[0].message.content
    assert service.batches == [3]
    assert [answer.usage.completion_tokens for answer in answers] == list(lengths)
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert all(whole.startswith(answer.choices[0].message.content) for answer in answers)


def test_a_short_answer_does_not_wait_for_a_long_one():
    service = talkative(seconds_per_step=0.01)
    ends = {}

    def answer(count):
        ask(client, chat(QUESTION, SCENE), max_tokens=count)
        ends[count] = time.monotonic()

    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(answer, (2, 150)))
    assert service.batches == [2] and ends[150] - ends[2] > 1  # at .01 s for each row and step


def test_an_error_of_one_request_leaves_the_others(caplog):
    service = watched()
    bad = [
        {"token_recovery": {"budget": 145}},
        {"token_recovery": {"budgt": 3}},
    ]
    jobs = [(chat(QUESTION, SCENE), {}), (chat(" ", SCENE), {}), (chat("word " * 600), {})]
    jobs += [(chat(QUESTION, SCENE), {"extra_body": fields}) for fields in bad] + [(chat(QUESTION, SCENE), {})] * 3

    def answer(job):
        try:
            return ask(client, job[0], **job[1])[0].choices[0].message.content.strip()
        except openai.BadRequestError as error:
            return error.status_code

    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, jobs))
    assert answers == ["N", 400, 400, 400, 400, "N", "N", "N"]


def test_an_error_that_shows_in_the_batch_is_found_by_single_requests(monkeypatch):
    service = watched()
    works, calls = service.model.compress_inputs, []

    def fails(**inputs):
        calls.append(len(inputs["input_ids"]))
        if (inputs["attention_mask"].sum(-1) > 160).any():
            raise ValueError("too long for this test")
        return works(**inputs)

    service.model = copy.copy(service.model)
    service.model.compress_inputs = fails
    jobs = [chat(QUESTION, SCENE), chat("Is there a red circle " * 8, SCENE), chat(QUESTION, SCENE)]

    def answer(messages):
        try:
            return ask(client, messages)[0].choices[0].message.content.strip()
        except openai.BadRequestError as error:
            return "too long for this test" in str(error)

    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, jobs)) == ["N", True, "N"]
    assert sorted(calls) == [1, 1, 1, 3]


def test_a_client_that_leaves_a_batch_leaves_the_others():
    service = talkative(seconds_per_step=0.01)

    def leave():
        with client.chat.completions.create(
            model="demo", messages=chat(QUESTION, SCENE), max_tokens=400, stream=True
        ) as stream:
            next(iter(stream))

    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        stays = pool.submit(ask, client, chat(QUESTION, SCENE), max_tokens=40)
        pool.submit(leave).result()
        began = time.monotonic()
        assert stays.result()[0].usage.completion_tokens == 40
        assert time.monotonic() - began < 3  # not the 400 steps of the one that left
    assert service.batches == [2]


def test_sampled_requests_are_answered_alone():
    service = watched()
    hot = {"temperature": 2.0, "extra_body": {"token_recovery": {"budget": 1, "coverage_share": 1.0}}}
    messages = chat("How many objects are there?", SCENE)
    with running(service) as server, client_of(server) as client, concurrent.futures.ThreadPoolExecutor(6) as pool:
        seeds = [1, 2, 3, 1, 2, 3]
        texts = list(pool.map(lambda seed: text_of(ask(client, messages, seed=seed, **hot)[0], False), seeds))
    assert texts[:3] == texts[3:] and len(set(texts)) > 1
    assert service.batches == [1] * 6
