"""A server of vLLM: clients at once, budgets, embeddings, and requests that are meant to end it."""

import contextlib
import functools
import json
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
import vllm_engines
from conftest import OPEN_PORTS
from hostile_requests import chunked, hostile, misplaced, post, statuses
from vllm_engines import server
from vllm_scenes import (  # noqa: F401
    COMPACT,
    DEMO,
    PAIRS,
    PAPER,
    QUESTIONS,
    SCENES,
    embeddings,
    environment,
    loaded,
    scene,
    user,
    wanted,
)

import reccomp_hf

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    port = vllm_engines.free_port()
    options = ["--hf-overrides", json.dumps({"token_recovery": COMPACT}), "--served-model-name", "demo"]
    options += ["--trust-request-mm-kwargs", "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 2}']
    options += ["--middleware", "reccomp_hf.engines.vllm.middleware.FieldCheck", "--api-key", "key"]
    OPEN_PORTS.add(port)
    with server(DEMO, port, root / "log", *options) as url:
        yield url
    OPEN_PORTS.discard(port)


def body_of(question, pictures, **fields):
    """The body of a chat request about pictures, as OpenAI's clients write it.

    A picture is the number of a scene, or its tokens (K, D). The template does not write the token that begins a
    sequence, which the processor puts in front.
    """
    parts = []
    for picture in pictures:
        if isinstance(picture, torch.Tensor):
            parts.append(reccomp_hf.image_embeds_part(picture))
            continue
        file = BytesIO()
        scene(picture).save(file, "PNG")
        url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    options = {"temperature": 0, "max_tokens": vllm_engines.NEW_TOKENS, "add_special_tokens": True}
    return {"model": "demo", "messages": [message], **options, **fields}


def send(address, body, route="/v1/chat/completions", key="key"):
    """The parsed answer to a body, the lines of a stream, or the status and text of an error."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{address}{route}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read().decode().splitlines() if body.get("stream") else json.load(response)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            return error.code, error.read().decode()


def chat(address, question, pictures, **fields):
    """The answer's text, or the status and text of an error."""
    answer = send(address, body_of(question, pictures, **fields))
    return answer if isinstance(answer, tuple) else answer["choices"][0]["message"]["content"].strip()


def texts(demo, ids):
    return [demo[1].decode(row, skip_special_tokens=True).strip() for row in ids]


def test_several_clients_at_once(address, demo):
    pairs, barrier = [*PAIRS, *PAIRS[::-1]], threading.Barrier(8)

    def client(number):
        barrier.wait()
        return [chat(address, question, (scene_,)) for scene_, question in pairs[number::8]]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client, range(8)))
    right = texts(demo, wanted(demo, pairs, **COMPACT))
    assert answers == [right[number::8] for number in range(8)]


def test_the_prompt_over_http_is_the_processors(address, demo):
    model, processor = demo
    number, question = PAIRS[0]
    inputs = processor(images=scene(number), text=user(question), return_tensors="pt")
    short, _ = model.compress_inputs(**inputs, token_recovery=COMPACT)
    answer = send(address, body_of(question, (number,)))
    assert answer["usage"]["prompt_tokens"] == short["input_ids"].shape[1]


def test_a_request_over_http_may_say_its_budget(address, demo):
    smaller = {"mm_processor_kwargs": {"token_recovery": {"budget": 4}}}
    answers = [chat(address, question, (number,), **smaller) for number, question in PAIRS[:8]]
    assert answers == texts(demo, wanted(demo, PAIRS[:8], budget=4, **COMPACT))
    larger = {"mm_processor_kwargs": {"token_recovery": {"budget": 17}}}
    status, message = chat(address, QUESTIONS[0], SCENES[:1], **larger)
    assert status == 400
    assert "budget of 17 is 17 tokens of an image, more than the 16" in message
    assert chat(address, QUESTIONS[0], SCENES[:1]) == "N"


HOSTILE = [
    *({"token_recovery": {"budget": budget}} for budget in (True, 0, "8", [8], {"budget": 8})),
    *({"token_recovery": {"budget": budget}} for budget in (float("inf"), 10**400, -1, 1.5)),
    *({"token_recovery": section} for section in (True, "x" * 10**7, {"budget": 4, "a": {"b": 1}})),
    *({name: 1} for name in ("size", "crop_size", "return_tensors", "budget", "token_recovry")),
    *({"recovery_text": text} for text in (5, {"a": {"a": [1]}}, [None], "", "x" * 10**6)),
    *({"recovery_turns": turns} for turns in ("first", ["all"], 1)),
    ["token_recovery"],
]


def test_hostile_requests_end_nothing(address, demo):
    """Each is a 400, also among others that are answered rightly."""
    right = texts(demo, wanted(demo, PAIRS, **COMPACT))
    with ThreadPoolExecutor(8) as pool:
        one = functools.partial(chat, address, QUESTIONS[0], SCENES[:1])
        refused = [pool.submit(one, mm_processor_kwargs=arguments) for arguments in HOSTILE]
        answers = [pool.submit(chat, address, question, (number,)) for number, question in PAIRS]
        assert [future.result() for future in answers] == right
    for arguments, future in zip(HOSTILE, refused, strict=True):
        status, message = future.result()
        assert (status, len(message) < 2000) == (400, True), (str(arguments)[:99], message[:999])
    assert one() == right[0]


def test_misplaced_fields_are_an_error_and_others_are_not(address, demo):
    """vLLM by itself ignores the fields of a body that it does not know."""
    number, question = PAIRS[0]
    (right,) = texts(demo, wanted(demo, PAIRS[:1], **COMPACT))
    good = body_of(question, (number,))
    for body in misplaced(good):
        status, text = send(address, body)
        error = json.loads(text)["error"]
        assert (status, error["code"], error["type"]) == (400, 400, "Bad Request")
        assert error["message"].startswith("Unknown field '"), error
        assert len(text) < 1000
    assert chat(address, question, (number,), unknown=1, metadata={"budget": "4"}) == right
    assert send(address, {**good, "budget": 4}, key="another")[0] == 401  # before the body is read


def test_answers_are_streamed_through_the_check(address, demo):
    number, question = PAIRS[0]
    (ids,) = wanted(demo, PAIRS[:1], **COMPACT)
    good = body_of(question, (number,), stream=True)
    events = [line.removeprefix("data: ") for line in send(address, good) if line]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert len(deltas) >= 2  # the role, and the words; on a busy machine all of them at once
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == texts(demo, [ids])[0]
    assert send(address, {**good, "budget": 4})[0] == 400


def test_other_routes_are_checked_too(address):
    """A completion has no images, and so nothing of token recovery."""
    question, picture = QUESTIONS[0], SCENES[:1]
    (message,) = body_of(question, picture)["messages"]
    url = message["content"][0]["image_url"]["url"]
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": question}]
    batch = {**body_of(question, picture), "messages": [[message], [message]]}
    response = {"model": "demo", "input": [{"role": "user", "content": parts}], "max_output_tokens": 4}
    completion = {"model": "demo", "prompt": "USER: A", "max_tokens": 4}
    smaller = {"mm_processor_kwargs": {"token_recovery": {"budget": 4}}}
    bodies = {"/v1/chat/completions/batch": batch, "/v1/responses": response, "/v1/completions": completion}
    for route, body in bodies.items():
        assert isinstance(send(address, body, route), dict), route
        for wrong in ({"budget": 4}, {"extra_body": smaller}):
            status, text = send(address, {**body, **wrong}, route)
            assert (status, "Unknown field" in text) == (400, True), route
    for route in ("/v1/chat/completions/batch", "/v1/responses"):
        assert isinstance(send(address, {**bodies[route], **smaller}, route), dict), route
    assert "these requests have no images" in send(address, {**completion, **smaller}, "/v1/completions")[1]


def test_hostile_bodies_and_connections_end_nothing(address, demo):
    """Among requests that are answered rightly. Good ones are answered afterwards, between refused ones too."""
    port, (number, question) = int(address.rpartition(":")[2]), PAIRS[0]
    good, right = body_of(question, (number,)), texts(demo, wanted(demo, PAIRS, **COMPACT))
    everything = hostile(good)
    assert len(everything) > 100
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(chat, address, question, (number,)) for number, question in PAIRS]
        got = [pool.submit(statuses, port, sent, count) for _, sent, count in everything]
        assert [future.result() for future in answers] == right
        got = [future.result() for future in got]
    expected = {"too large": {413}, "of another type": {400, 405}, "broken": {400}}
    for (kind, sent, count), found in zip(everything, got, strict=True):
        assert len(found) == count, (kind, sent[:200], sent[-60:])
        assert {*found} <= expected.get(kind, {400}), (kind, found, sent[:300])
    body = json.dumps(good).encode()
    assert statuses(port, chunked(body, 100), 1) == [200]
    refused = post({**good, "budget": 4})
    assert statuses(port, post(body) + refused + post(body) + refused, 4) == [200, 400, 200, 400]  # pipelined
    assert chat(address, question, (number,)) == right[0]


def test_embeddings_over_http(address, demo):
    """With the paper's dynamic counts, along with images of the server's own budget; one prompt has two lengths."""
    cases = [(SCENES[:1], QUESTIONS[0]), (SCENES[1:2], QUESTIONS[0]), (SCENES[1:3], QUESTIONS[1])]
    made = [embeddings(demo, user(question, len(numbers)), numbers, **PAPER, **COMPACT) for numbers, question in cases]
    assert len({len(tokens) for embeds, _ in made for tokens in embeds}) > 2
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(chat, address, case[1], embeds) for case, (embeds, _) in zip(cases, made, strict=True)]
        plain = [pool.submit(chat, address, question, (number,)) for number, question in PAIRS[:3]]
    assert [future.result() for future in sent] == texts(demo, [ids for _, ids in made])
    assert [future.result() for future in plain] == texts(demo, wanted(demo, PAIRS[:3], **COMPACT))
