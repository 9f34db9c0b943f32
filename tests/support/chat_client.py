"""A server in a thread of the test, its clients and the answers to expect."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import conftest
import demo_model
import openai
import torch
from PIL import Image

from reccomp_hf.engines.server.answering import Service
from reccomp_hf.engines.server.app import build_app
from reccomp_hf.engines.server.images import ImageReader
from reccomp_hf.engines.server.listening import Server, listen


@contextlib.contextmanager
def running(service: Service, *hosts: str, **options: Any) -> Iterator[Any]:
    """The server of a service while it runs, with its `port`; options are those of `build_app`."""
    listener = listen("127.0.0.1", 0)
    server: Any = Server(build_app(service, ImageReader(hosts), **options), service)
    server.port = listener.getsockname()[1]
    server.thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    conftest.OPEN_PORTS.add(server.port)
    server.thread.start()
    try:
        yield server
    finally:
        server.should_exit = True
        server.thread.join(20)
        listener.close()
        conftest.OPEN_PORTS.discard(server.port)
    assert not server.thread.is_alive()


def client_of(server: Any, **settings: Any) -> Any:
    """The official client."""
    address = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=address, max_retries=0, **{"api_key": "none", "timeout": 60, **settings})


def raw_events(server: Any, messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    """The events of a stream as they come over the wire, each ended by an empty line."""
    body = json.dumps({"messages": messages, "stream": True, "max_tokens": 16, **settings}).encode()
    address = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        *events, rest = response.read().decode().split("\n\n")
    assert rest == ""
    return events


def base64_of(image: Image.Image, kind: str = "PNG") -> str:
    """An image file as base64."""
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def data_url(image: Image.Image, kind: str = "png") -> str:
    """An image as clients send it."""
    return f"data:image/{kind};base64,{base64_of(image, kind.upper())}"


def ask(client: Any, messages: list[dict[str, Any]], **settings: Any) -> tuple[Any, Any]:
    """An answer, or the stream of one, and its headers."""
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=messages, **{"max_tokens": 16, **settings}
    )
    return raw.parse(), raw.headers


def chat(question: str, *urls: str) -> list[dict[str, Any]]:
    """Messages of one turn."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


@torch.no_grad()
def expected(question: str, image: Image.Image | None, **kwargs: Any) -> tuple[str, list[int]]:
    """The answer of `model.generate`, and the number of visual tokens of each image."""
    model, processor = demo_model.demo_model()
    content = [{"type": "image", "image": image}] if image is not None else []
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    settings = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    output = model.generate(**inputs, **settings)
    counts = [] if output.visual_token_counts is None else output.visual_token_counts.tolist()
    return processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), counts
