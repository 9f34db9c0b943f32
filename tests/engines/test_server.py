"""The server as clients see it: OpenAI's client, a server in a thread, and the trained demo model."""

import concurrent.futures
import copy
import http.server
import json
import threading
import urllib.request

import conftest
import demo_model
import openai
import pytest
from chat_client import ask, base64_of, chat, client_of, data_url, expected, raw_events, running
from PIL import Image

from reccomp_hf.demo import draw_scene, questions
from reccomp_hf.engines.server import app as app_module
from reccomp_hf.engines.server.answering import Service

SEEDS = (1_000_000, 1_000_001, 1_000_003, 1_000_006)
SCENES = [draw_scene(seed).image for seed in SEEDS]
QUESTION = "What letter is on the cyan sign?"


@pytest.fixture(scope="module")
def server():
    with running(Service("demo", *demo_model.demo_model()), "127.0.0.1") as running_server:
        yield running_server


@pytest.fixture
def client(server):
    with client_of(server) as opened:
        yield opened


def post(server, body):
    """Status and body of the response to a request that no client would send."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    address = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    try:
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [data_url, base64_of], ids=["data URL", "base64"])
def test_answers_are_those_of_generate(client, form):
    asked = questions(draw_scene(SEEDS[0]), SEEDS[0])
    assert len(asked) >= 5
    for question in asked:
        answer, headers = ask(client, chat(question.text, form(SCENES[0])))
        text, counts = expected(question.text, SCENES[0])
        assert answer.choices[0].message.content == text and text.strip() == question.answer
        assert answer.choices[0].finish_reason == "stop" and answer.model == "demo"
        assert (headers["x-visual-tokens"], headers["x-visual-tokens-uncompressed"]) == ("16", "144")
        assert counts == [16]


def test_usage_counts_what_the_language_model_reads(client):
    whole, _ = ask(client, chat(QUESTION, data_url(SCENES[0])), extra_body={"token_recovery": {"enabled": False}})
    short, _ = ask(client, chat(QUESTION, data_url(SCENES[0])))
    assert whole.usage.prompt_tokens - short.usage.prompt_tokens == 144 - 16
    assert short.usage.completion_tokens == 2  # the letter, and the end of the answer
    assert short.usage.total_tokens == short.usage.prompt_tokens + 2


def test_streams_are_those_of_generate(client):
    for question in questions(draw_scene(SEEDS[1]), SEEDS[1])[:3]:
        stream = client.chat.completions.create(
            model="demo", messages=chat(question.text, data_url(SCENES[1], "jpeg")), stream=True
        )
        with stream:
            assert stream.response.headers["x-visual-tokens"] == "16"
            chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text.strip() == question.answer
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == 2


def test_a_stream_ends_with_done(server):
    events = raw_events(server, chat(QUESTION, data_url(SCENES[0])))
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert events[-1] == "data: [DONE]" and len(chunks) > 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"] == 2


def test_an_image_needs_no_question_if_none_is_read():
    model, processor = demo_model.demo_model()
    blind = copy.copy(processor)
    blind._recovery_tokenizer = None
    with running(Service("demo", model, blind)) as server, client_of(server) as client:
        fields = {"extra_body": {"token_recovery": {"enabled": False}}}
        answer, headers = ask(client, chat("", data_url(SCENES[0])), **fields)
        assert headers["x-visual-tokens"] == "144" and answer.choices[0].message.content is not None


@pytest.mark.parametrize(
    "fields",
    [{"budget": None}, {"budget": 0.25, "position_ids": "compact"}, {"enabled": False}, {"method": "divprune"}],
    ids=["dynamic", "a quarter", "off", "divprune"],
)
def test_a_request_overrides_settings_for_itself(client, fields):
    for image in SCENES[:2]:
        answer, headers = ask(client, chat(QUESTION, data_url(image)), extra_body={"token_recovery": fields})
        text, counts = expected(QUESTION, image, token_recovery=fields)
        assert answer.choices[0].message.content == text
        assert [int(headers["x-visual-tokens"])] == (counts or [144])
    assert ask(client, chat(QUESTION, data_url(SCENES[0])))[1]["x-visual-tokens"] == "16"


def test_dynamic_counts_differ_between_images(client):
    fields = {"token_recovery": {"budget": None}}
    counts = {
        ask(client, chat(QUESTION, data_url(image)), extra_body=fields)[1]["x-visual-tokens"] for image in SCENES
    }
    assert len(counts) > 1


def test_conversations_and_prompts_without_images(client):
    turns = [
        *chat("What color is the square?", data_url(SCENES[0])),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": QUESTION},
    ]
    answer, headers = ask(client, turns)
    assert answer.choices[0].message.content.strip() == "N" and headers["x-visual-tokens"] == "16"
    answer, headers = ask(client, [{"role": "user", "content": "How many objects are there?"}])
    assert answer.choices[0].message.content == expected("How many objects are there?", None)[0]
    assert headers["x-visual-tokens"] == headers["x-visual-tokens-uncompressed"] == "0"


def test_four_at_once_get_their_own_answers(client):
    asked = [
        (image, *settings) for image in SCENES for settings in ((QUESTION, 16), ("How many objects are there?", 36))
    ]

    def answer(job):
        image, question, budget = job
        settings = {"extra_body": {"token_recovery": {"budget": budget}}, "stream": budget == 36}
        response, headers = ask(client, chat(question, data_url(image)), **settings)
        if budget == 36:
            return "".join(chunk.choices[0].delta.content or "" for chunk in response), headers["x-visual-tokens"]
        return response.choices[0].message.content, headers["x-visual-tokens"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, asked))
    wanted = [
        (expected(question, image, token_recovery={"budget": budget})[0], str(budget))
        for image, question, budget in asked
    ]
    assert answers == wanted
    assert len({text for text, _ in wanted}) > 3


def test_sampling_and_lengths(client):
    messages = chat("How many objects are there?", data_url(SCENES[2]))
    hot = {"temperature": 2.0, "extra_body": {"token_recovery": {"budget": 1, "coverage_share": 1.0}}}
    texts = [ask(client, messages, seed=seed, **hot)[0].choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    cut, _ = ask(client, messages, max_tokens=1)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 1)
    greedy, _ = ask(client, messages, temperature=0)
    assert greedy.choices[0].message.content == expected("How many objects are there?", SCENES[2])[0]
    word = greedy.choices[0].message.content.strip()
    stopped, _ = ask(client, messages, stop=[word[:2]])
    assert stopped.choices[0].message.content.strip().startswith(word[:2])
    narrow = {**hot, "top_p": 1e-6}  # the likeliest token alone
    texts = {ask(client, messages, seed=seed, **narrow)[0].choices[0].message.content for seed in (1, 2, 3, 4)}
    assert texts == {ask(client, messages, **{**hot, "temperature": 0})[0].choices[0].message.content}


def test_every_image_format_of_browsers(client):
    assert ask(client, chat(QUESTION, data_url(Image.new("RGB", (1, 1)))))[1]["x-visual-tokens"] == "16"
    turned = Image.new("L", (30, 9))
    assert ask(client, chat(QUESTION, data_url(turned, "gif"), data_url(turned, "webp")))[1]["x-visual-tokens"] == "32"


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_one_model_is_served(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="serves only 'demo', got model 'org/other'"):
        client.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError, match="serves only 'demo', got model 'org/other'"):
        client.chat.completions.create(model="org/other", messages=chat(QUESTION, data_url(SCENES[0])))
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/responses here"):
        client.responses.create(model="demo", input="?")


def test_a_model_may_have_several_names():
    with running(Service("ck", *demo_model.demo_model(), ["./ck/", "./ck"])) as server, client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["ck"]
        for name in ("ck", "./ck/", "./ck"):
            answer = client.chat.completions.create(model=name, messages=chat(QUESTION), max_tokens=1)
            assert answer.model == "ck"
        with pytest.raises(openai.NotFoundError, match="serves only 'ck', got model 'c'"):
            client.chat.completions.create(model="c", messages=chat(QUESTION))


def later(*content):
    """An image with its question, and a second user turn."""
    first = chat(QUESTION, data_url(SCENES[0]))
    return [*first, {"role": "assistant", "content": "N"}, {"role": "user", "content": list(content)}]


NO_QUESTION = "The image has no question: add a text part to the last user message."
LONG, HUGE = "word " * 600, {"budget": None, "outlier_threshold": 2**70}
MALFORMED = {
    "not JSON": (b"{", "not JSON"),
    "nested": (b"[" * 100_000, "not JSON"),
    "no object": ([1], "must be a JSON object"),
    "unknown field": ({"messages": chat("?"), "budget": 3}, "Unknown field 'budget'"),
    "no question": ({"messages": chat(" ", data_url(SCENES[0]))}, NO_QUESTION),
    "an image alone": (
        {"messages": [{"role": "user", "content": chat("", data_url(SCENES[0]))[0]["content"][:1]}]},
        NO_QUESTION,
    ),
    "no later question": ({"messages": later({"type": "text", "text": ""})}, NO_QUESTION),
    "unknown setting": ({"messages": chat("?"), "token_recovery": {"budgt": 3}}, "did you mean 'budget'"),
    "large budget": ({"messages": chat("?", data_url(SCENES[0])), "token_recovery": {"budget": 145}}, "144"),
    "huge setting": (
        {"messages": chat("?", data_url(SCENES[0])), "token_recovery": HUGE},
        "does not fit into 64 bits",
    ),
    "too long": ({"messages": chat(LONG)}, "leaves none for an answer"),
    "a placeholder": ({"messages": chat("<image> what?", data_url(SCENES[0]))}, "send the image instead"),
    "not an image": ({"messages": chat("?", "data:image/png;base64,aGVsbG8=")}, "not an image that can be read"),
}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("body", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_refused_with_a_reason(server, body, message, streams):
    body = {**body, "stream": streams} if isinstance(body, dict) else body
    status, answer = post(server, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert message in answer["error"]["message"] and "Traceback" not in answer["error"]["message"]


def test_a_large_request_is_refused(server, monkeypatch):
    monkeypatch.setattr(app_module, "_MAX_BYTES", 1000)
    status, answer = post(server, {"messages": chat(LONG)})
    assert status == 413 and "larger than 1,000 bytes" in answer["error"]["message"]


def test_files_of_the_server_are_never_read(client, tmp_path):
    file = tmp_path / "AAAA"  # its name is good base64
    SCENES[0].save(file, "PNG")
    for url in (str(file), f"file://{file}", f"FILE:{file}", str(file.relative_to("/")), "/etc/passwd"):
        with pytest.raises(openai.BadRequestError, match=r"never read|not an image that can be read"):
            ask(client, chat(QUESTION, url))


class _Hosts(http.server.BaseHTTPRequestHandler):
    """Serves an image at /picture; everything else redirects there."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.path == "/picture" else 302)
        self.send_header("Location", "/picture")
        self.end_headers()
        if self.path == "/picture":
            SCENES[0].save(self.wfile, "PNG")

    def log_message(self, *args):
        pass


@pytest.fixture
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hosts) as server:
        server.asked = []
        conftest.OPEN_PORTS.add(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        conftest.OPEN_PORTS.discard(server.server_port)
        server.shutdown()


def test_urls_are_fetched_only_from_allowed_hosts(client, host):
    port = host.server_port
    assert ask(client, chat(QUESTION, f"http://127.0.0.1:{port}/picture"))[0].choices[0].message.content.strip() == "N"
    with pytest.raises(openai.BadRequestError, match=r"127\.0\.0\.1 answers 302"):
        ask(client, chat(QUESTION, f"http://127.0.0.1:{port}/elsewhere"))
    assert host.asked == ["/picture", "/elsewhere"]
    for address in ("localhost", "127.0.0.1@localhost", "localhost\\@127.0.0.1", "[::1]"):
        with pytest.raises(openai.BadRequestError, match=r"fetches only from 127\.0\.0\.1"):
            ask(client, chat(QUESTION, f"http://{address}:{port}/picture"))
    assert len(host.asked) == 2
