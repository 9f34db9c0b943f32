"""Checks of what vLLM can serve. Every refusal says what to do instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.checks import check_supported, is_tiled
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens
from ...core.methods.registry import get_method
from ...core.rules import NO_RULE
from ...core.settings import FIELDS, did_you_mean, shown

REQUEST_KEYS = ("token_recovery", "recovery_text", "recovery_turns")
"""Keys of a request's `mm_processor_kwargs` that this plug-in handles."""
_CHARACTERS = 16
"""More than the tokens of a text have on average."""
_ARGUMENTS = "mm_processor_kwargs"
_BODY_NAMES = (*REQUEST_KEYS, _ARGUMENTS, "extra_body", *(name for name in FIELDS if name != "version"))
"""Names in a body that concern token recovery; no other name of vLLM's or OpenAI's is near one."""
_NEAR = 0.75
_MOST_NAMES = 1000
"""Most names of a body that are compared with near ones, which takes some 0.1 ms each."""


def override(**fields: Any) -> str:
    """The option that starts vLLM with other fields of the section; `{...}` without any."""
    section = json.dumps(fields) if fields else "{...}"
    return f"--hf-overrides '{{\"token_recovery\": {section}}}' (hf_overrides= in Python, --set in reccomp-hf)"


def keeps_places(config: Any) -> bool:
    """Whether tokens of images keep the positions of their placeholders in the uncompressed prompt."""
    section = config.token_recovery
    return section.enabled and section.position_ids == "original"


def check_servable(config: Any, *, pictures: bool = True, embeds: bool = False) -> None:
    """Refuse a checkpoint whose answers vLLM would change without an error, before anything is loaded.

    Args:
        config: The checkpoint's config.
        pictures: Whether requests may contain images.
        embeds: Whether requests may contain `image_embeds`.

    Raises:
        ValueError: A number of tokens that depends on the image's content, original positions with `image_embeds`,
            or a vision tower that is not supported.
    """
    section = config.token_recovery
    if not (pictures or embeds):
        return
    if not section.enabled:
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if (tower, strategy) != ("clip_vision_model", "default"):
            raise ValueError(
                f"With token_recovery.enabled false the number of an image's tokens is known here for a CLIP vision "
                f"tower without its class token, got {tower!r} with vision_feature_select_strategy {strategy!r}: "
                "serve the stock checkpoint, which needs no plug-in."
            )
        return
    check_supported(config, section)
    if embeds and keeps_places(config):
        raise ValueError(
            'token_recovery.position_ids is "original", but image_embeds do not say the positions of their tokens: '
            "start without --enable-mm-embeds, or serve and embed with consecutive positions, "
            f"{override(position_ids='compact')}."
        )
    if not pictures:
        return
    for rule, settings in enumerate(section.all_settings, start=NO_RULE):
        where = "" if rule == NO_RULE else f"token_recovery.rules[{rule}]: "
        if settings.method == "pooling":
            raise ValueError(
                f"{where}Method 'pooling' gives whole cells, about as many as its budget, and vLLM must know the "
                "exact number of tokens before it encodes an image. Use another method: "
                f"{override(method='recoverable')}."
            )
        if fixed_tokens(config, settings) is None:
            raise ValueError(f"{where}{_how_to_fix_the_count(settings)}")
    if is_tiled(config) and section.newlines == "kept":
        raise ValueError(
            'token_recovery.newlines is "kept": the number of newline embeddings that stay depends on the image, and '
            "vLLM must know the number of tokens before it encodes one. Serve without newlines: "
            f'{override(newlines="none")}, or convert with newlines="none".'
        )


def check_request(given: Mapping[str, Any], server: Mapping[str, Any], positions: int) -> None:
    """Refuse arguments of a request's `mm_processor_kwargs` that would be ignored, or end or occupy the engine.

    Args:
        given: The request's arguments, with those of the server perhaps.
        server: The server's own `--mm-processor-kwargs`.
        positions: The longest sequence, which bounds a question in a prompt.

    Raises:
        ValueError: An argument that is not one of `REQUEST_KEYS`, not of its type, or longer than a prompt can be.
    """
    for name, value in given.items():
        if name in server and server[name] == value:
            continue
        if name not in REQUEST_KEYS:
            hint = did_you_mean(name, REQUEST_KEYS, f"a request may set {', '.join(REQUEST_KEYS)}.")
            if name in FIELDS:
                hint = f"write {{'token_recovery': {{{name!r}: {shown(value)}}}}}."
            raise ValueError(f"Unknown field {shown(name)} in mm_processor_kwargs; {hint}")
        texts = value if name == "recovery_text" and isinstance(value, list | tuple) else [value]
        if name != "token_recovery" and not all(text is None or isinstance(text, str) for text in texts):
            several = " or a list of strings" if name == "recovery_text" else ""
            raise ValueError(f"{name} in mm_processor_kwargs must be a string{several}, got {shown(value)}.")
        if name != "token_recovery" and sum(map(len, filter(None, texts))) > (most := _CHARACTERS * positions):
            raise ValueError(
                f"{name} in mm_processor_kwargs must have at most {most} characters, which is more than a prompt of "
                f"{positions} tokens has: shorten it."
            )


def check_body(body: Any, *, pictures: bool = True) -> None:
    """Refuse a field that vLLM's server would ignore, in the body of a request, a message or a part of its content.

    Args:
        body: A parsed body, of any type: vLLM itself refuses what is not an object.
        pictures: Whether this kind of request may contain images.

    Raises:
        ValueError: A name of token recovery, or one that is near, anywhere but in `mm_processor_kwargs`.
    """
    others: set[str] = set()
    for where, given in _objects(body):
        for name in given:
            if name in others or (name == _ARGUMENTS and not where and pictures):
                continue
            near = [name] if name in _BODY_NAMES else []
            if not near and len(others) < _MOST_NAMES:
                near = difflib.get_close_matches(name[:40].lower(), _BODY_NAMES, n=1, cutoff=_NEAR)
                others.add(name)
            if near:
                meant = "" if near[0] == name else f"did you mean {near[0]!r}? If so, "
                hint = f"{meant}{_where_to_write(near[0], pictures)}"
                raise ValueError(f"Unknown field {shown(name)} in {where or 'the body'}: {hint}")


def _objects(body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The body, its messages (the items of `input` in a request for a response) and their parts, with their places."""
    if isinstance(body, dict):
        yield "", body
        for name in ("messages", "input"):
            for where, message in _listed(body.get(name), name):
                yield where, message
                yield from _listed(message.get("content"), f"{where}.content")


def _listed(value: Any, name: str, batch: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, or of the lists of a batch, with their places."""
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield f"{name}[{index}]", item
        elif isinstance(item, list) and batch:
            yield from _listed(item, f"{name}[{index}]", batch=False)


def _where_to_write(name: str, pictures: bool) -> str:
    """The end of a sentence about a field that vLLM's server would ignore."""
    if not pictures:
        return "these requests have no images, ask for a chat completion."
    if name == "extra_body":
        return "OpenAI's Python client puts what is in its argument extra_body at the top of the body, write it there."
    inside = {_ARGUMENTS: "...", "budget": '{"token_recovery": {"budget": ...}}'}
    if name in (*inside, *REQUEST_KEYS):
        inner = inside.get(name, f'{{"{name}": ...}}')
        return f'write {{"{_ARGUMENTS}": {inner}}} at the top of the body.'
    return f"a request may set only the budget; the server sets other fields, {override()}."


def _how_to_fix_the_count(section: TokenRecoveryConfig) -> str:
    ways = (
        "or compress outside vLLM (reccomp-hf embed) and send image_embeds, with --enable-mm-embeds "
        "--limit-mm-per-prompt '{\"image\": 0}', to trusted clients only."
    )
    if get_method(section.method).budget == "none":
        return (
            f"Method {section.method!r} has no budget: the number of tokens of an image depends on its content, and "
            "vLLM must know it before it encodes one. Use a method with a budget, "
            f"{override(method='recoverable', budget=64)}, {ways}"
        )
    return (
        "token_recovery.budget is null: the number of tokens of an image depends on its content, and vLLM must know "
        f"it before it encodes one. Set a budget, {override(budget=64)}, {ways}"
    )


__all__ = ["REQUEST_KEYS", "check_body", "check_request", "check_servable", "keeps_places", "override"]
