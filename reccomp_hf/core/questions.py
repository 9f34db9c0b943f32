"""Finding the question in prompts and chat messages, and encoding it for CLIP's text encoder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, CLIPTextConfig

from .settings import is_int, shown
from .tensors import round_up
from .tokenizing import token_ids

ANSWER_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""Instructions after a question that are not part of it."""
TURNS = ("last", "all")
"""Which user turns of a conversation choose its visual tokens."""
LARGEST_IS_END = 2
"""`eos_token_id` of published CLIP configs, which stands for the largest id of a text."""
LENGTH_STEP = 8
"""Windows of a batch have a multiple of this length: few lengths mean few CUDA graphs and compiled programs."""

_UNREAD_PARTS = ("video", "audio")
"""Types of a message's parts that a LLaVA's chat template would leave out in silence."""
_PROBES = ("Is there a red circle?", "How many blue squares are on the left?")
_LEAST_SHARE = 0.9  # of a vocabulary, whose size may be padded

_TAG = r"<[^<>\s]+>"
_FIRST_TEXT, _ANSWER_TEXT, _SECOND_TEXT = "firstquestionsentinel", "answersentinel", "secondquestionsentinel"


def check_turns(turns: str) -> str:
    """Return `turns` if it is `"last"` or `"all"`.

    Raises:
        ValueError: It is neither.
    """
    if turns not in TURNS:
        raise ValueError(f"recovery_turns must be 'last' or 'all', got {shown(turns)}.")
    return turns


def check_messages(messages: Any) -> None:
    """Refuse a chat without messages, a message without a role, and content that is neither text nor parts.

    Raises:
        ValueError: The chat is empty or not a list, or a message is malformed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            "A chat must be a list of at least one message such as {'role': 'user', 'content': ...}, got "
            f"{shown(messages)}."
        )
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)
        if not isinstance(role, str) or not role:
            raise ValueError(
                f"Message {number} of a chat needs a role ('user', 'assistant' or 'system'), got {shown(message)}."
            )
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = [] if content is None or isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(
                f"The content of message {number} of a chat must be a text or a list of parts such as "
                f"{{'type': 'text', 'text': ...}}, got {shown(content)}."
            )
        for part in parts:
            if not isinstance(part.get("type"), str) or part["type"] in _UNREAD_PARTS:
                raise ValueError(
                    f"A part of message {number} of a chat must be of type 'text' or 'image', got {shown(part)}."
                )
            if part.get("type") == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"A text part of message {number} of a chat needs a text, got {shown(part)}.")


def given_prompts(text: Any, may_be_words: bool) -> list[str]:
    """The prompts of a call, one per row; a row that is split into words is joined, if it may be.

    Raises:
        ValueError: There is none, or one is not a text.
    """
    rows = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple | np.ndarray) else []
    rows = [" ".join(row) if may_be_words and _are_texts(row) else row for row in rows]
    if not rows or not _are_texts(rows):
        raise ValueError(f"text must be a prompt, or a list of at least one, got {shown(text)}.")
    return rows


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def given_questions(recovery_text: Any) -> list[list[str]]:
    """The questions that a caller gives, a list per row, without empty ones.

    Raises:
        ValueError: It is neither a text, nor a list of texts or of lists of texts.
    """
    given = [recovery_text] if isinstance(recovery_text, str) else recovery_text
    rows = [[row] if isinstance(row, str) else row for row in given] if isinstance(given, list | tuple) else None
    if rows is None or not all(
        isinstance(row, list | tuple) and all(isinstance(text, str) for text in row) for row in rows
    ):
        raise ValueError(
            "recovery_text must be one question per row, or a list of several, each of them a text, got "
            f"{shown(recovery_text)}."
        )
    return [[text.strip() for text in row if text.strip()] for row in rows]


def batched(conversation: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """A list of conversations, whether one or several were given."""
    several = isinstance(conversation, list | tuple) and conversation and isinstance(conversation[0], list | tuple)
    return conversation if several else [conversation]


def message_text(message: Any) -> str:
    """The text of a chat message, without its images."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or "" for part in content if part.get("type") == "text")


def split_user_turns(prompt: str, markers: tuple[str, str] | None) -> list[str]:
    """The texts of the user turns of a rendered prompt; the whole prompt if it has no opening of one.

    Args:
        prompt: A prompt as the chat template renders it.
        markers: Opening and closing of a user turn, from `find_turn_markers`.
    """
    opening, closing = markers or ("", "")
    if not opening or opening not in prompt:
        return [prompt]
    turns = prompt.split(opening)[1:]
    return [turn.partition(closing)[0] for turn in turns] if closing else turns


def choose_questions(texts: Sequence[str], turns: str, image_token: str) -> list[str]:
    """The questions of the `"last"` or of `"all"` user turns, without image tokens and answer instructions.

    Args:
        texts: The texts of the user turns, at least one.
        turns: `"last"` or `"all"`.
        image_token: The placeholder in the texts.

    Returns:
        The questions that are not empty.
    """
    questions = [_clean(text, image_token) for text in (texts if turns == "all" else texts[-1:])]
    return [question for question in questions if question]


def encode_windows(
    tokenizer: Any, length: int, questions: Sequence[str | Sequence[str]], whole: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of questions in windows, each wrapped in the start and end token.

    Several questions of a row share no window: the text encoder reads each by itself. All windows are as long as the
    longest one, rounded up to a multiple of 8. If the tokenizer does not pad with its end token, the last place of
    a window shorter than `length` is padding, see `lengthened`.

    Args:
        tokenizer: The text encoder's tokenizer.
        length: Most tokens of a window.
        questions: One question, or a list of them, per row.
        whole: Whether all windows have `length` tokens, whatever the questions.

    Returns:
        Two int64 arrays (rows, windows, tokens).
    """
    rows = [[row] if isinstance(row, str) else list(row) for row in questions]
    texts = [text for row in rows for text in row]
    encoded = iter(token_ids(tokenizer, texts))
    windows = [
        [
            tokens[at : at + length - 2]
            for tokens in itertools.islice(encoded, len(row))
            for at in range(0, len(tokens), length - 2)
        ]
        for row in rows
    ]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max((len(piece) + 2 for pieces in windows for piece in pieces), default=1)
    longest += padding != tokenizer.eos_token_id
    tokens = length if whole else min(round_up(longest, LENGTH_STEP), length)
    shape = (len(rows), max(1, *map(len, windows)), tokens)
    ids, mask = np.full(shape, padding, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, pieces in enumerate(windows):
        for column, piece in enumerate(pieces):
            wrapped = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            ids[row, column, : len(wrapped)] = wrapped
            mask[row, column, : len(wrapped)] = 1
    return ids, mask


def pads_to_longest(kwargs: Mapping[str, Any]) -> bool:
    """Whether a processor's call pads prompts to the longest one, and no rows of other calls will join them."""
    return (kwargs.get("text_kwargs") or {}).get("padding", kwargs.get("padding")) in (True, "longest")


def lengthened(input_ids: Tensor, length: int) -> Tensor:
    """Windows (..., tokens) of `encode_windows` with more padding, at least (..., length): their last id repeated."""
    missing = max(0, length - input_ids.shape[-1])
    return torch.cat([input_ids, input_ids[..., -1:].expand(*input_ids.shape[:-1], missing)], dim=-1)


def converted(field: np.ndarray, example: Any) -> Any:
    """An array as the kind of a field that a stock processor returned: a tensor, an array or nested lists."""
    if isinstance(example, Tensor):
        return torch.from_numpy(field)
    return field if isinstance(example, np.ndarray) else field.tolist()


def check_question_tokenizer(tokenizer: Any, encoder: Mapping[str, Any]) -> None:
    """Check that a tokenizer belongs to a text encoder: vocabulary, start and end of text, and probe questions.

    Without its files transformers 5 builds a tokenizer of two tokens, for which all questions are the same.

    Args:
        tokenizer: CLIP's.
        encoder: `text_encoder_config` of the section.

    Raises:
        ValueError: It does not.
    """
    config, advice = CLIPTextConfig(**encoder), "Use the tokenizer of the same CLIP, with all of its files."
    _check_vocabulary("The recovery tokenizer", tokenizer, config.vocab_size, advice)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    (ids,) = token_ids(tokenizer, _PROBES[:1])
    if config.eos_token_id == LARGEST_IS_END:
        fits, wanted = end is not None and end > max(ids), "an end of text that is its largest id"
    else:
        fits = end == config.eos_token_id and end not in ids and config.bos_token_id in (None, start)
        wanted = f"start and end of text {config.bos_token_id} and {config.eos_token_id}"
    if not fits or start is None:
        raise ValueError(
            f"The recovery tokenizer does not fit text_encoder_config, which asks for {wanted}: got {start} and "
            f"{end}, and {ids} for {_PROBES[0]!r}. {advice}"
        )


def check_prompt_tokenizer(tokenizer: Any, vocabulary: int, image_token: str, image_token_id: int) -> None:
    """Check that a tokenizer belongs to a LLaVA: vocabulary, image token, and probe questions.

    Args:
        tokenizer: LLaVA's own.
        vocabulary: Size of the language model's vocabulary.
        image_token: Placeholder of an image in prompts.
        image_token_id: Id of that token in the model's config.

    Raises:
        ValueError: It does not.
    """
    if not 0 <= image_token_id < vocabulary:
        raise ValueError(
            f"image_token_id {image_token_id} is outside the language model's vocabulary of {vocabulary}: the config "
            "needs another id, or the embedding table more rows."
        )
    _check_vocabulary("The LLaVA's tokenizer", tokenizer, vocabulary, "Use the LLaVA's own, with all of its files.")
    (ids,) = token_ids(tokenizer, [image_token])
    if ids != [image_token_id]:
        raise ValueError(
            f"The LLaVA's tokenizer does not fit its config: {image_token!r} must be the one id {image_token_id}, got "
            f"{ids}. Use the tokenizer that was saved with the model, or correct image_token_index in config.json."
        )


def check_tokenizers(processor: Any, config: Mapping[str, Any]) -> None:
    """Check both tokenizers of a processor against the fields of a config.json of ours; of others nothing is read.

    Raises:
        ValueError: One does not belong to the model.
    """
    encoder, text = (config.get("token_recovery") or {}).get("text_encoder_config"), config.get("text_config")
    if encoder is not None and processor.recovery_tokenizer is not None:
        check_question_tokenizer(processor.recovery_tokenizer, encoder)
    if "token_recovery" in config and text is not None:
        vocabulary = AutoConfig.for_model(**{"model_type": "llama", **text}).vocab_size
        image_token_id = config.get("image_token_index", config.get("image_token_id", 32000))
        check_prompt_tokenizer(processor.tokenizer, vocabulary, processor.image_token, image_token_id)


def check_placeholders(patch_size: Any, strategy: Any, additional: Any) -> None:
    """Check a processor's settings of the placeholders of an image; without a patch size it writes one.

    Raises:
        ValueError: The patch size is not an int above 0, the strategy is unknown, or the additional tokens are not an
            int of at least 0.
    """
    for name, value, fits, wanted in (
        ("patch_size", patch_size, patch_size is None or (is_int(patch_size) and patch_size > 0), "an int above 0"),
        ("vision_feature_select_strategy", strategy, strategy in (None, "default", "full"), "'default' or 'full'"),
        ("num_additional_image_tokens", additional, is_int(additional) and additional >= 0, "an int, 0 or more"),
    ):
        if not fits:
            raise ValueError(
                f"The processor's {name} must be {wanted}, got {shown(value)}: correct it in processor_config.json."
            )


def _check_vocabulary(name: str, tokenizer: Any, vocabulary: int, advice: str) -> None:
    """Check a tokenizer's length, which may be padded in the model, and that it tells two questions apart."""
    if not _LEAST_SHARE * vocabulary <= len(tokenizer) <= vocabulary:
        raise ValueError(f"{name} has {len(tokenizer)} tokens, but the model's vocabulary has {vocabulary}. {advice}")
    one, other = token_ids(tokenizer, _PROBES)
    if not one or one == other:
        raise ValueError(f"{name} encodes {_PROBES[0]!r} and {_PROBES[1]!r} as the same ids, {one}. {advice}")


def _clean(question: str, image_token: str) -> str:
    """Remove image tokens, surrounding white space and known answer instructions."""
    question = question.replace(image_token, "").strip()
    for instruction in ANSWER_INSTRUCTIONS:
        question = question.removesuffix(instruction).rstrip()
    return question


def find_turn_markers(render: Callable[[list[dict[str, Any]]], str]) -> tuple[str, str] | None:
    """Opening and closing of a user turn in a chat template; `None` if it has no usable ones.

    Args:
        render: Renders chat messages by the template; it is given two questions and an answer.
    """
    for as_content in (lambda text: [{"type": "text", "text": text}], lambda text: text):
        texts = (("user", _FIRST_TEXT), ("assistant", _ANSWER_TEXT), ("user", _SECOND_TEXT))
        try:
            rendered = render([{"role": role, "content": as_content(text)} for role, text in texts])
        except Exception:  # a template may raise anything
            continue
        pieces = re.split(f"{_FIRST_TEXT}|{_ANSWER_TEXT}|{_SECOND_TEXT}", rendered)
        # A template made for plain strings may print the list itself.
        if len(pieces) == 4 and "'type':" not in rendered:
            before, to_answer, to_second, after = (_atoms(piece) for piece in pieces)
            opening = "".join(_common_prefix(before[::-1], to_second[::-1])[::-1]).strip()
            # A template that ends right after a question still has an answer's opening after an earlier one.
            closing = "".join(_common_prefix(to_answer, after)).strip() or "".join(to_answer).strip()
            if opening:
                # A tag ends the turn by itself, even if no answer is to follow.
                return opening, closing if not re.match(_TAG, closing) else _atoms(closing)[0]
    return None


def _atoms(text: str) -> list[str]:
    """The characters of a text, tags such as <s> or <|im_end|> in one piece: no marker starts inside a tag."""
    return re.findall(f"{_TAG}|.", text, flags=re.DOTALL)


def _common_prefix(left: list[str], right: list[str]) -> list[str]:
    """The longest list that both lists start with."""
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))]


__all__ = [
    "ANSWER_INSTRUCTIONS",
    "LARGEST_IS_END",
    "LENGTH_STEP",
    "TURNS",
    "batched",
    "check_messages",
    "check_placeholders",
    "check_prompt_tokenizer",
    "check_question_tokenizer",
    "check_tokenizers",
    "check_turns",
    "choose_questions",
    "converted",
    "encode_windows",
    "find_turn_markers",
    "given_prompts",
    "given_questions",
    "lengthened",
    "message_text",
    "pads_to_longest",
    "split_user_turns",
]
