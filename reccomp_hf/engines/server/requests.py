"""Chat completion requests, validated before anything is computed."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from .errors import RequestError

DEFAULT_MAX_TOKENS = 1024
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_IMAGES = 32
_MAX_PIXELS = 100_000_000  # of all images
_MAX_STOP = 200  # characters
# Unsupported fields that would change the answer, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
# Fields that never change the answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "stream_options")
_READ = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_SUPPORTED = (*_READ, "token_recovery")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A validated request.

    Attributes:
        messages: Messages for the processor's chat template, with decoded images.
        images: Number of images.
        token_recovery: Fields of the config section that this request overrides; `None` for none.
        stream: Whether the answer is sent while it is generated.
        max_tokens: Longest answer, `None` for `DEFAULT_MAX_TOKENS`.
        temperature: 0 for greedy decoding; `None` for the checkpoint's generation config.
        top_p: As in `generate`; `None` for the checkpoint's generation config.
        seed: Seed for sampling.
        stop: Strings after which the answer ends.
    """

    messages: list[dict[str, Any]]
    images: int
    token_recovery: dict[str, Any] | None
    stream: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: list[str]


def read_request(body: Any, models: tuple[str, ...], open_image: Callable[[str, str], Image.Image]) -> ChatRequest:
    """Validate a request's body and open its images.

    Args:
        body: The parsed JSON.
        models: Names of the one model that is served, the listed one first.
        open_image: Opens the image of a URL; its second argument is the URL's place in the request, for errors.

    Raises:
        RequestError: The request is not valid.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The body must be a JSON object with model and messages, got {_short(body)}.")
    body = {name: value for name, value in body.items() if value is not None}
    _check_fields(body)
    check_model(body.get("model"), models)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {_short(messages)}.")
    parts = [_parts(message, f"messages[{index}]") for index, message in enumerate(messages)]
    urls = sum(kind == "image" for _, content in parts for kind, _, _ in content)
    if urls > _MAX_IMAGES:
        raise RequestError(f"A request may hold {_MAX_IMAGES} images, got {urls}.")
    recovery = body.get("token_recovery")
    if recovery is not None and not isinstance(recovery, dict):
        raise RequestError(f"token_recovery must be an object of fields, got {_short(recovery)}.")
    longest = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    request = ChatRequest(
        messages=[],
        images=urls,
        token_recovery=recovery,
        stream=_flag(body, "stream"),
        max_tokens=_integer(body, longest, 1, 2**31),
        temperature=_number(body, "temperature", 0, 2),
        top_p=_number(body, "top_p", 0, 1, least_excluded=True),
        seed=_integer(body, "seed", -(2**63), 2**63 - 1),
        stop=_stop(body.get("stop", [])),
    )
    open_next = _Pixels(open_image)  # once everything else is valid
    messages = [{"role": role, "content": [_content(part, open_next) for part in content]} for role, content in parts]
    return dataclasses.replace(request, messages=messages)


class _Pixels:
    """Opens images as long as all of them together stay below the limit."""

    def __init__(self, open_image: Callable[[str, str], Image.Image]) -> None:
        self._open, self._count = open_image, 0

    def __call__(self, url: str, where: str) -> Image.Image:
        image = self._open(url, where)
        self._count += image.width * image.height
        if self._count > _MAX_PIXELS:
            raise RequestError(f"The images of a request may have {_MAX_PIXELS:,} pixels together: send smaller ones.")
        return image


def check_model(name: Any, served: tuple[str, ...]) -> None:
    """Refuse other models; a request without a name means the one that is served.

    Raises:
        RequestError: The name is another model's.
    """
    if name is not None and name not in served:
        raise RequestError(f"This server serves only {served[0]!r}, got model {_short(name)}.", 404, "model_not_found")


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name not in (*_SUPPORTED, *_NEUTRAL, *_IGNORED):
            raise RequestError(f"Unknown field {_short(name)}; known ones are {', '.join(_SUPPORTED)}.")
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(f"{name} is not supported, got {_short(value)}: leave it out.")


def _parts(message: Any, where: str) -> tuple[str, list[tuple[str, str, str]]]:
    """The role of a message and its parts: kind, text or URL, and place in the request."""
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content, got {_short(message)}.")
    given, content = message.get("role"), message.get("content")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {_short(given)}.")
    if message.get("tool_calls"):
        raise RequestError(f"{where}.tool_calls: tools are not supported.")
    if isinstance(content, str):
        return role, [("text", _text(content, f"{where}.content"), where)]
    if content is None and role == "assistant":
        return role, [("text", "", where)]
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content must be a string or a list of parts, got {_short(content)}.")
    return role, [_part(part, role, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, role: str, where: str) -> tuple[str, str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return "text", _text(part.get("text"), f"{where}.text"), where
    if kind == "image_url":
        if role != "user":
            raise RequestError(f"{where}: images belong in user messages, this one has the role {role}.")
        holder = part.get("image_url")
        url = holder.get("url") if isinstance(holder, dict) else holder
        if not isinstance(url, str) or not url.strip():
            raise RequestError(
                f'{where}.image_url must be {{"url": "data:image/png;base64,..."}}, got {_short(holder)}.'
            )
        return "image", url.strip(), f"{where}.image_url"
    shown = _short(part if kind is None else kind)
    raise RequestError(f"{where}: a part must be of type text or image_url, got {shown}.")


def _content(part: tuple[str, str, str], open_image: Callable[[str, str], Image.Image]) -> dict[str, Any]:
    kind, value, where = part
    return {"type": "text", "text": value} if kind == "text" else {"type": kind, "image": open_image(value, where)}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string, got {_short(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} holds half of a surrogate pair at {error.start}, which is not a character."
        ) from error
    return value


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and len(texts) <= 4 and all(isinstance(text, str) and text for text in texts)
    if not fits:
        raise RequestError(f"stop must be a string or up to four, none of them empty, got {_short(value)}.")
    if max(map(len, texts), default=0) > _MAX_STOP:
        raise RequestError(f"A stop string may have {_MAX_STOP} characters, got {max(map(len, texts))}.")
    return [_text(text, "stop") for text in texts]


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {_short(value)}.")
    return value


def _integer(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
        return value
    raise RequestError(f"{name} must be an integer from {least} to {most}, got {_short(value)}.")


def _number(
    body: Mapping[str, Any], name: str, least: float, most: float, least_excluded: bool = False
) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (least_excluded and value == least):
        span = f"above {least} and at most {most}" if least_excluded else f"from {least} to {most}"
        raise RequestError(f"{name} must be a number {span}, got {_short(value)}.")
    return float(value)


def _short(value: Any) -> str:
    """A value for an error message; a long or deep one is cut."""
    return _REPR.repr(value)


__all__ = ["DEFAULT_MAX_TOKENS", "ChatRequest", "check_model", "read_request"]
