"""The check of bodies between a client and vLLM's own handlers, without an engine."""

import asyncio
import inspect
import json
import types
import typing

import pytest

from reccomp_hf.engines.vllm.checks import check_body

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

GOOD = {"model": "demo", "messages": [{"role": "user", "content": "budget"}], "stream": True, "unknown": 1}
BAD = {**GOOD, "budget": 4}
NOT_JSON = {
    "nothing": b"",
    "half": b'{"a":',
    "depth": b"[" * 10**5,
    "UTF-16": b"\xff\xfe\x00",
    "Latin-1": b'{"a": \xff}',
    "a long number": b"1" * 5000,
    "a long string": b'"' + b"a" * 10**6,
}
KEY = [(b"authorization", b"Bearer key")]


def build(*middleware):
    """Routes with vLLM's types, errors and check of keys; `app.state.seen` are the requests that arrived."""
    from fastapi import FastAPI
    from starlette.responses import StreamingResponse
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    app = FastAPI()
    app.state.args, app.state.seen = types.SimpleNamespace(log_error_stack=False), []
    init_exception_handler(app)

    @app.post("/v1/chat/completions")
    async def answer(request: ChatCompletionRequest):
        app.state.seen.append(request)
        return StreamingResponse(iter(["a", "b", "c"]))

    @app.post("/v1/load_lora_adapter")
    async def load(request: dict[str, typing.Any]):
        app.state.seen.append(request)

    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    for one in middleware:
        app.add_middleware(one)  # as vLLM adds it, in front
    return app


@pytest.fixture
def app():
    from reccomp_hf.engines.vllm.middleware import FieldCheck

    return build(FieldCheck)


def call(app, body, path="/v1/chat/completions", headers=KEY, chunk=10**9, leave=False):
    """What an application sends for a body that arrives in chunks, perhaps not whole; and what it left unread."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    chunks = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    inbox = [{"type": "http.request", "body": part, "more_body": True} for part in chunks] or [
        {"type": "http.request"}
    ]
    inbox[-1]["more_body"] = leave
    outbox: list[typing.Any] = []

    async def receive():
        if not (inbox or leave):
            await asyncio.Event().wait()  # until the answer is sent
        return inbox.pop(0) if inbox else {"type": "http.disconnect"}

    async def send(message):
        outbox.append(message)

    headers = [(b"content-type", b"application/json"), *headers]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return outbox, len(inbox)


def error(outbox):
    start, *parts = outbox
    inner = json.loads(b"".join(part["body"] for part in parts))["error"]
    assert inner["code"] == start["status"]
    return start["status"], inner["message"]


@pytest.mark.parametrize("chunk", [1, 7, 10**9])
def test_a_good_body_arrives_whole_and_the_answer_in_parts(app, chunk):
    outbox, unread = call(app, GOOD, chunk=chunk)
    assert [message.get("body") for message in outbox[1:]] == [b"a", b"b", b"c", b""]
    (seen,) = app.state.seen
    assert (seen.messages, unread) == (GOOD["messages"], 0)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_a_misplaced_field_is_an_error_in_openais_form(app, chunk):
    status, message = error(call(app, BAD, chunk=chunk)[0])
    assert (status, app.state.seen) == (400, [])
    assert message.startswith("Unknown field 'budget' in the body: write {")
    assert call(build(), BAD)[0][0]["status"] == 200  # vLLM by itself ignores it


def test_a_key_is_checked_before_a_body_is_read(app):
    outbox, unread = call(app, BAD, headers=[], chunk=10)
    assert outbox[0]["status"] == 401
    assert unread == len(range(0, len(json.dumps(BAD)), 10))


def test_a_body_that_is_too_large_is_not_read_to_its_end(app, monkeypatch):
    monkeypatch.setattr("reccomp_hf.engines.vllm.middleware.MAX_BYTES", 1000)
    for size, status in ((1000, 200), (1001, 413)):
        body = json.dumps(GOOD).encode().ljust(size)
        assert call(app, body, chunk=100)[0][0]["status"] == status
    outbox, unread = call(app, json.dumps(GOOD).encode().ljust(5000), chunk=100)
    assert (error(outbox), unread) == ((413, "The request is larger than 1,000 bytes: send smaller images."), 39)
    assert len(app.state.seen) == 1


@pytest.mark.parametrize("name", NOT_JSON)
def test_a_body_that_is_not_json_is_left_to_vllm(app, name):
    body = NOT_JSON[name]
    (answer, _), (own, _) = call(app, body), call(build(), body)
    assert answer == own
    assert (answer[0]["status"], app.state.seen) == (400, [])


def test_a_client_that_leaves(app):
    call(app, GOOD, chunk=10, leave=True)
    assert app.state.seen == []


def test_other_routes_and_lifespans_are_left_alone(app):
    call(app, {"budget": 1}, path="/v1/load_lora_adapter")
    assert app.state.seen == [{"budget": 1}]
    scopes = []

    async def inner(scope, receive, send):
        scopes.append((scope["type"], receive))

    from reccomp_hf.engines.vllm.middleware import FieldCheck

    for kind in ({"type": "lifespan"}, {"type": "websocket", "path": "/v1/chat/completions"}):
        asyncio.run(FieldCheck(inner)(kind, call, None))
    assert scopes == [("lifespan", call), ("websocket", call)]


def fields(module):
    """Names of the fields of every type in a module."""
    from pydantic import BaseModel

    for value in vars(module).values():
        if typing.is_typeddict(value):
            yield from value.__annotations__
        elif inspect.isclass(value) and issubclass(value, BaseModel):
            yield from value.model_fields


def test_no_field_of_vllm_or_openai_is_refused():
    import openai.types.chat
    import openai.types.chat.completion_create_params
    import openai.types.completion_create_params
    import openai.types.responses
    import openai.types.responses.response_create_params
    import vllm.entrypoints.openai.chat_completion.protocol
    import vllm.entrypoints.openai.completion.protocol
    import vllm.entrypoints.openai.responses.protocol
    import vllm.renderers.chat_utils as messages

    entrypoints, types_ = vllm.entrypoints.openai, openai.types
    modules = [entrypoints.chat_completion, entrypoints.completion, entrypoints.responses]
    modules = [module.protocol for module in modules] + [messages, types_.chat, types_.responses]
    modules += [types_.completion_create_params, types_.chat.completion_create_params]
    names = {*fields(types_.responses.response_create_params)}.union(*map(fields, modules))
    assert len(names) > 250
    assert {"thinking_token_budget", "mm_processor_kwargs", "image_url", "verbosity"} <= names
    check_body(dict.fromkeys(names - {"messages", "input"}))
    inner = dict.fromkeys(names - {"mm_processor_kwargs", "content"})
    check_body({"messages": [{**inner, "content": [inner]}], "input": [inner]})
    for route in (entrypoints.completion.protocol.CompletionRequest,):
        check_body(dict.fromkeys(route.model_fields), pictures=False)
