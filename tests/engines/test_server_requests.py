"""Validation of requests, the text of streams, the server's addresses, and the command."""

import ast
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import conftest
import demo_model
import hypothesis
import openai
import pytest
from chat_client import base64_of, chat
from hypothesis import strategies
from PIL import Image
from torchao_noise import without_torchao

from reccomp_hf.cli import serve
from reccomp_hf.cli.serve import names_of
from reccomp_hf.engines.server import answering, images
from reccomp_hf.engines.server.errors import RequestError
from reccomp_hf.engines.server.images import ImageReader
from reccomp_hf.engines.server.listening import Server, listen, url_of
from reccomp_hf.engines.server.requests import read_request
from reccomp_hf.engines.server.rows import Pieces

pytest_plugins = ("command_line",)

URL = f"data:image/png;base64,{base64_of(Image.new('RGB', (20, 10), 'red'))}"


def read(**body):
    return read_request({"model": "demo", "messages": chat("What?", URL), **body}, ("demo",), ImageReader())


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def test_a_request_is_read():
    request = read(max_tokens=7, temperature=0, top_p=1, seed=3, stop="x", stream=True, token_recovery={"budget": 3})
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (7, 0.0, 1.0, 3)
    assert (request.stop, request.stream, request.token_recovery, request.images) == (["x"], True, {"budget": 3}, 1)
    image, text = request.messages[0]["content"]
    assert image["image"].size == (20, 10) and image["image"].getpixel((3, 3)) == (255, 0, 0)
    assert text == {"type": "text", "text": "What?"}


def test_fields_that_change_nothing_are_accepted():
    neutral = {"n": 1, "logprobs": False, "frequency_penalty": 0, "tools": None, "response_format": {"type": "text"}}
    request = read(**neutral, user="me", stream_options={"include_usage": True}, max_completion_tokens=9, max_tokens=3)
    assert request.max_tokens == 9
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "?", "name": "x"},
    ]
    assert [(turn["role"], turn["content"][0]["text"]) for turn in read(messages=turns).messages] == [
        ("system", "Be brief."),
        ("assistant", ""),
        ("user", "?"),
    ]


WRONG = [
    ({"messages": None}, "messages must be a list of at least one message, got None"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hello"}, "at least one message, got 'hello'"),
    ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
    (
        {"messages": [{"content": "?"}]},
        r"messages\[0\].role must be one of system, developer, user, assistant, got None",
    ),
    ({"messages": [{"role": "tool", "content": "?"}]}, "got 'tool'"),
    ({"messages": [{"role": ["user"], "content": "?"}]}, r"got \['user'\]"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tools are not supported"),
    (
        {"messages": [{"role": "system", "content": chat("", URL)[0]["content"]}]},
        "images belong in user messages, this one has the role system",
    ),
    (user(None), "content must be a string or a list of parts, got None"),
    (user([]), "list of parts"),
    (user(3), "list of parts, got 3"),
    (user(["text"]), "type text or image_url, got 'text'"),
    (user([{"type": "input_audio"}]), "got 'input_audio'"),
    (user([{"type": "text", "text": 3}]), r"content\[0\].text must be a string, got 3"),
    (user("\ud800"), "half of a surrogate pair"),
    (user([{"type": "image_url"}]), "image_url must be .*got None"),
    (user([{"type": "image_url", "image_url": {"url": 3}}]), "got {'url': 3}"),
    (user([{"type": "image_url", "image_url": ""}]), "got ''"),
    ({"messages": chat("?", "data:image/png;base64,%%%")}, "which is not valid base64"),
    ({"messages": chat("?", "data:image/png,abc")}, "expected data:image/png;base64"),
    ({"messages": chat("?", "data:text/plain;base64,aGVsbG8=")}, "got 'data:text/plain;base64'"),
    ({"messages": chat("?", URL[:-40])}, "not valid base64|not an image that can be read"),
    ({"messages": chat("?", "https://example.com/a.png")}, "started without --allow-urls HOST"),
    ({"messages": chat("?", "ftp://example.com/a.png")}, "starts with 'ftp:'"),
    ({"messages": chat("?", *[URL] * 33)}, "may hold 32 images, got 33"),
    ({"model": 3}, "serves only 'demo', got model 3"),
    ({"max_tokens": -1}, "max_tokens must be an integer from 1 .* got -1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens must be an integer from 1"),
    ({"max_tokens": 1.5}, "got 1.5"),
    ({"max_tokens": True}, "got True"),
    ({"temperature": -0.1}, "temperature must be a number from 0 to 2"),
    ({"temperature": float("nan")}, "got nan"),
    ({"temperature": "hot"}, "got 'hot'"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
    ({"seed": 2**63}, "seed must be an integer"),
    ({"stop": 3}, "stop must be a string or up to four"),
    ({"stop": [""]}, "none of them empty"),
    ({"stream": "yes"}, "stream must be true or false, got 'yes'"),
    ({"n": 2}, "n is not supported, got 2"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"logit_bias": {"3": 1}}, "logit_bias is not supported"),
    ({"generation_config": "{}"}, "Unknown field 'generation_config'"),
    ({"token_recovery": 3}, "token_recovery must be an object"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_refusals_say_what_is_wrong(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(**body)
    assert caught.value.status in (400, 404) and len(str(caught.value)) < 400


def test_known_fields_are_the_supported_ones():
    with pytest.raises(RequestError, match="Unknown field 'top_k'; known ones are ") as caught:
        read(top_k=3)
    known = str(caught.value).partition("known ones are ")[2].rstrip(".").split(", ")
    assert set(known) == {
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
        *("stream", "token_recovery"),
    }


def test_names_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ck").mkdir()
    assert names_of("./ck/") == ["ck", "./ck/", "./ck"]
    assert names_of(str(tmp_path / "ck")) == ["ck", str(tmp_path / "ck")]
    assert names_of("demo") == ["demo"] and names_of("org/model") == ["org/model"]
    monkeypatch.chdir("ck")
    assert names_of(".") == ["ck", "."]


def test_images_that_are_too_large_are_not_decoded(monkeypatch):
    monkeypatch.setattr(images, "_MAX_PIXELS", 199)
    with pytest.raises(RequestError, match="not an image that can be read: it has 20 x 10 pixels"):
        read()


def test_only_image_formats_of_the_web_are_read(tmp_path):
    text = base64_of(Image.new("RGB", (9, 9)), "TIFF")
    with pytest.raises(RequestError, match=r"PNG, JPEG, WEBP, GIF, BMP"):
        read(messages=chat("?", text))


def test_a_prompt_that_is_too_long_is_refused_before_its_images_are_read(monkeypatch):
    service = answering.Service("demo", *demo_model.demo_model())
    monkeypatch.setattr(service.model, "compress_inputs", None)
    with pytest.raises(RequestError, match="leaves none for an answer") as caught:
        service.check(read(messages=chat("word " * 600, URL)))
    assert caught.value.code == "context_length_exceeded"


# ---- the text of a stream ------------------------------------------------------------------------------------------


def pieces_of(decode, ids):
    """The pieces sent for each token, and those at the end."""
    sent = []
    pieces = Pieces(decode, sent.append)
    for token in ids:
        pieces.add(token)
    before = len(sent)
    pieces.end()
    return sent[:before], sent[before:]


def from_bytes(ids):
    return bytes(ids).decode(errors="replace")


def from_words(ids):
    """As Llama's tokenizer: every token brings a space, which the first of a text loses."""
    return " ".join(["a", "bc", ",", "d"][token] for token in ids)


def test_a_character_of_several_tokens_comes_with_its_last_one():
    assert pieces_of(from_bytes, "aé€b".encode()) == (["a", "é", "€", "b"], [])
    assert pieces_of(from_bytes, "a€".encode()[:-1]) == (["a"], ["\ufffd"])


def test_words_keep_the_spaces_between_them():
    assert pieces_of(from_words, [0, 1, 3]) == (["a", " bc", " d"], [])


@hypothesis.given(strategies.binary(max_size=40))
def test_pieces_make_up_the_text(data):
    """Of bytes, valid or not, and of the demo model's tokens."""
    first, last = pieces_of(from_bytes, data)
    assert "".join(first + last) == from_bytes(data) and all(first + last)
    tokenizer = demo_model.demo_model()[1].tokenizer
    ids = [byte % len(tokenizer) for byte in data]
    first, last = pieces_of(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ids)
    assert "".join(first + last) == tokenizer.decode(ids, skip_special_tokens=True)


# ---- addresses -----------------------------------------------------------------------------------------------------


def test_addresses():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}/v1" and port > 0
        with pytest.raises(
            OSError, match=rf"port {port} of 127.0.0.1 is in use: choose another --port, or 0 for a free"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--port must be from 0 .* got 70000"):
        listen("127.0.0.1", 70000)
    with pytest.raises(OSError, match=r"192\.0\.2\.1 is not an address of this machine"):
        listen("192.0.2.1", 0)


def test_an_unknown_host(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match=r"nowhere\.example is not a known host"):
        listen("nowhere.example", 0)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["starlette"], ["starlette", "uvicorn"]], ids=" and ".join)
def test_missing_packages_are_one_line(error, monkeypatch, missing):
    find = serve.importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    expected = f"reccomp-hf serve needs {' and '.join(missing)}: pip install 'reccomp_hf[serve]'."
    assert error("serve", "demo") == expected


def test_the_server_needs_nothing_of_transformers_own():
    """Its server is private and differs between releases: only public parts of transformers are imported."""
    third_party = set()
    for file in Path(answering.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                third_party.add(node.module)
            elif isinstance(node, ast.Import):
                third_party |= {alias.name for alias in node.names}
    third_party = {name for name in third_party if name.partition(".")[0] not in sys.stdlib_module_names}
    allowed = {"torch", "transformers", "jinja2", "PIL", "uvicorn", "uvicorn.protocols.http.h11_impl"}
    assert {name for name in third_party if not name.startswith("starlette.")} == allowed


def test_errors_before_anything_is_loaded(error):
    with listen("127.0.0.1", 0) as taken:
        assert "is in use" in error("serve", "demo", "--port", taken.getsockname()[1])
    assert "--port must be" in error("serve", "demo", "--port", "-1")
    assert "did you mean 'budget'" in error("serve", "demo", "--port", "0", "--set", "budgt=3")
    assert "only 144 patches" in error("serve", "demo", "--port", "0", "--budget", "145")


def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "reccomp_hf", "serve", "--port", "0", "--budget", "20"]
    command += ["--allow-urls", "b.example", "--allow-urls", "a.example", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            port = int(re.fullmatch(r"Serving demo on http://127\.0\.0\.1:(\d+)/v1 \(Ctrl-C ends it\)\.\n", line)[1])
            conftest.OPEN_PORTS.add(port)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                answer = client.chat.completions.with_raw_response.create(model="demo", messages=chat("What?", URL))
                assert answer.headers["x-visual-tokens"] == "20"
                with pytest.raises(openai.BadRequestError, match=r"fetches only from a\.example, b\.example"):
                    client.chat.completions.create(model="demo", messages=chat("What?", "http://c.example/a.png"))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    conftest.OPEN_PORTS.discard(port)
    assert (process.returncode, out) == (0, "Stopped.\n")
    answered = r"[\d:]+ chatcmpl-\w+: 20 of 144 visual tokens, prompt of \d+ tokens, after [\d.]+ s\n"
    assert re.fullmatch(answered + r"[\d:]+ 400: .* only from a\.example, b\.example\.\n", without_torchao(err))


def test_an_address_beyond_this_machine_is_announced(run, monkeypatch):
    monkeypatch.setattr("reccomp_hf.checkpoints.loading.load", lambda *arguments: demo_model.demo_model())
    monkeypatch.setattr(Server, "run", lambda self, sockets: None)
    code, out, _ = run("serve", "demo", "--host", "0.0.0.0", "--port", "0")
    warning = "No API key is required: anyone who can reach this address can use it (see --api-key)."
    assert code == 0 and out.splitlines()[1:] == [warning, "Stopped."]
    assert warning not in run("serve", "demo", "--port", "0")[1]
