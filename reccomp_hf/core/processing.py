"""The stock LLaVA processors, which also hand the question to CLIP's text encoder.

Everything the stock processors give stays as it is. With a recovery tokenizer (the CLIP tokenizer of the model's text
encoder) two fields are added, `recovery_input_ids` and `recovery_attention_mask`, of shape (rows, windows, length):
the question alone, without system prompt, earlier turns, answers or answer instructions. With `recovery_turns="all"`
the earlier questions are in it too, each in windows of its own.
"""

import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import create_repo
from transformers import AutoTokenizer, BatchFeature, LlavaNextProcessor, LlavaProcessor, ProcessorMixin
from transformers.utils import cached_file

from .remote_code import write_sources

RECOVERY_TOKENIZER_FOLDER = "recovery_tokenizer"
ANSWER_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)

RECOVERY_TURNS = ("last", "all")

_RECOVERY_INPUT_NAMES = ("recovery_input_ids", "recovery_attention_mask")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
_STANDARD_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TAG = r"<[^<>\s]+>"
_FIRST_TEXT, _ANSWER_TEXT, _SECOND_TEXT = "firstquestionsentinel", "answersentinel", "secondquestionsentinel"


class RecCompProcessorMixin(ProcessorMixin):
    """What both processors share: the recovery tokenizer, its files, and the question of every row."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        recovery_tokenizer: Any = None,
        recovery_max_length: int | None = None,
        recovery_turns: str = "last",
        **kwargs: Any,
    ) -> None:
        """Build the stock processor and remember the CLIP tokenizer of the model's text encoder.

        `recovery_max_length` is the text encoder's number of positions (77 for CLIP; by default the tokenizer's own
        limit). Without `recovery_tokenizer` the model is visual-only. `recovery_turns` says which of a conversation's
        questions choose the visual tokens, of all its pictures alike: that of the `"last"` user turn, or those of
        `"all"` user turns, of which a patch needs to fit one (the best score counts; questions that fit patches better
        in general get more of them). System prompts and answers never do. All other arguments are the stock
        processor's.
        """
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.recovery_max_length = _recovery_length(recovery_tokenizer, recovery_max_length)
        self.recovery_turns = _checked_turns(recovery_turns)
        self._recovery_tokenizer = recovery_tokenizer
        self._question_markers: dict[str, tuple[str, str] | None] = {}
        self.auto_map = {"AutoProcessor": f"processing_reccomp.{type(self).__name__}"}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `save_pretrained` writes the code and its `auto_map` itself."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name the parts that transformers saves and loads by itself.

        Transformers 5 would infer `recovery_tokenizer` too, and put the language model's in place of a missing one.
        """
        return ["image_processor", "tokenizer"]

    @property
    def recovery_tokenizer(self) -> Any:
        """The CLIP tokenizer of the text encoder, or None for a visual-only model."""
        return self._recovery_tokenizer

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        names = list(super().model_input_names)
        return names if self._recovery_tokenizer is None else [*names, *_RECOVERY_INPUT_NAMES]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        recovery_text: str | Sequence[str | Sequence[str]] | None = None,
        recovery_turns: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode images and prompts as the stock processor does, and each row's question for CLIP.

        Args:
            images: pictures for the image tokens in `text`.
            text: one prompt per row.
            recovery_text: one question per row, taken as it is, or a list of several; by default it is cut out of the
                prompt.
            recovery_turns: `"last"` or `"all"`, in place of the processor's own.
            **kwargs: passed to the stock processor; `return_tensors` holds for the added fields too.

        Returns:
            The stock fields and, with a recovery tokenizer and `text`, `recovery_input_ids` and
            `recovery_attention_mask`, int64 (rows, windows, recovery_max_length).

        Raises:
            ValueError: a row with images and no question, not one `recovery_text` per row, or unknown turns.
        """
        turns = self.recovery_turns if recovery_turns is None else _checked_turns(recovery_turns)
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        encoding = super().__call__(images=images, text=text, **kwargs)
        if self._recovery_tokenizer is None or text is None:
            return encoding
        prompts = [text] if isinstance(text, str) else [row if isinstance(row, str) else " ".join(row) for row in text]
        questions = self.questions_of_prompts(prompts, recovery_text, turns)
        convert = _converter(encoding["input_ids"])
        fields = self._encode_questions(questions)
        encoding.update({name: convert(field) for name, field in zip(_RECOVERY_INPUT_NAMES, fields, strict=True)})
        return encoding

    def apply_chat_template(self, conversation: Sequence[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render, and with `tokenize=True` encode, one or several conversations.

        The question of a row is the text of its last user turn, or with `recovery_turns="all"` those of all its user
        turns, unless `recovery_text` is given; both are read among the arguments and in `processor_kwargs`.

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template or the name of one; the processor's own by default.
            **kwargs: passed to the stock method, whose result is returned.
        """
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        options.update({name: kwargs.pop(name) for name in ("recovery_text", "recovery_turns") if name in kwargs})
        turns = options.pop("recovery_turns", None)
        if kwargs.get("tokenize") and self._recovery_tokenizer is not None and options.get("recovery_text") is None:
            rows = _batched(conversation)
            options["recovery_text"] = [self.questions_of(messages, turns) for messages in rows]
        if _takes_processor_kwargs():
            kwargs["processor_kwargs"] = options
        else:
            kwargs.update(options)
            conversation = _with_listed_content(conversation) if kwargs.get("tokenize") else conversation
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def extract_question(self, prompt: str) -> str:
        """Cut the last question out of a rendered prompt, see `extract_questions`; it may be empty."""
        return self._clean(self._user_turns(prompt)[-1])

    def extract_questions(self, prompt: str, recovery_turns: str | None = None) -> list[str]:
        """Cut the questions out of a rendered prompt that choose its visual tokens.

        A question is what stands between an opening of a user turn and the end of that turn, both taken from the chat
        template. Without a usable template, or if the prompt has no such opening, it is the whole prompt. Image tokens
        and known answer instructions are removed; what is empty then is left out.

        Args:
            prompt: as the chat template renders it, or written by hand in its way.
            recovery_turns: `"last"` or `"all"`, in place of the processor's own.
        """
        return self._choose(self._user_turns(prompt), recovery_turns)

    def questions_of(self, messages: Sequence[Any], recovery_turns: str | None = None) -> list[str]:
        """The questions of a conversation of chat messages that choose its visual tokens, see `extract_questions`."""
        return self._choose(
            [_text_of(message) for message in messages if message["role"] == "user"] or [""], recovery_turns
        )

    def encode_questions(self, questions: Sequence[str | Sequence[str]]) -> dict[str, torch.Tensor]:
        """The added fields for one question, or a list of them, per row.

        Returns:
            `recovery_input_ids` and `recovery_attention_mask`, int64 (rows, windows, recovery_max_length); nothing
            without a recovery tokenizer.
        """
        if self._recovery_tokenizer is None:
            return {}
        fields = self._encode_questions(questions)
        return dict(zip(_RECOVERY_INPUT_NAMES, map(torch.from_numpy, fields), strict=True))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the processor so that transformers 4.57 and 5 can both load it.

        The recovery tokenizer goes to the sub-folder `recovery_tokenizer`, and with `push_to_hub` up with the rest;
        `repo_id`, `commit_message`, `token` and `private` are for that. Returns what the stock method returns.
        """
        folder = os.fspath(save_directory)
        os.makedirs(folder, exist_ok=True)
        times = self._get_files_timestamps(folder)
        # Rewriting its files leaves a folder's time stamp as it was, and an upload would pass the folder over.
        times.pop(RECOVERY_TOKENIZER_FOLDER, None)
        token = kwargs.get("token")
        upload = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private") if name in kwargs}
        if self._recovery_tokenizer is not None:
            self._recovery_tokenizer.save_pretrained(os.path.join(folder, RECOVERY_TOKENIZER_FOLDER))
            _mend_tokenizer_config(os.path.join(folder, RECOVERY_TOKENIZER_FOLDER))
        files = super().save_pretrained(folder, push_to_hub=False, **kwargs)
        _mend_tokenizer_config(folder)
        write_sources(folder)
        if push_to_hub:
            name = upload.pop("repo_id", None) or os.path.basename(os.path.normpath(folder))
            repository = create_repo(name, token=token, private=upload.pop("private", None), exist_ok=True).repo_id
            self._upload_modified_files(folder, repository, times, token=token, **upload)
        return files

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the arguments of `__init__` and, if they name a recovery length, load the recovery tokenizer.

        Raises:
            OSError: there is a recovery length but no sub-folder `recovery_tokenizer`.
        """
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("recovery_max_length") is not None and "recovery_tokenizer" not in kwargs:
            settings["recovery_tokenizer"] = _load_recovery_tokenizer(pretrained_model_name_or_path, kwargs)
        return settings, unused

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Load image processor and tokenizer; arguments that are ours must not end up in their settings."""
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("recovery_")}
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def questions_of_prompts(
        self,
        prompts: Sequence[str],
        recovery_text: str | Sequence[str | Sequence[str]] | None = None,
        recovery_turns: str | None = None,
    ) -> list[list[str]]:
        """The questions that choose the visual tokens of rendered prompts, given or cut out, one list per prompt.

        Args:
            prompts: with their image tokens.
            recovery_text: one question per prompt, or a list of several, in place of those in the prompt.
            recovery_turns: `"last"` or `"all"`, in place of the processor's own.

        Raises:
            ValueError: a prompt with images and no question, or not one `recovery_text` per prompt.
        """
        if recovery_text is None:
            questions = [self.extract_questions(prompt, recovery_turns) for prompt in prompts]
        else:
            given = [recovery_text] if isinstance(recovery_text, str) else list(recovery_text)
            rows = [[row] if isinstance(row, str) else row for row in given]
            questions = [[text.strip() for text in row if text.strip()] for row in rows]
        if len(questions) != len(prompts):
            raise ValueError(
                f"recovery_text must hold one question per row: got {len(questions)}, expected {len(prompts)}."
            )
        for row, (prompt, asked) in enumerate(zip(prompts, questions, strict=True)):
            if self.image_token in prompt and not asked:
                raise ValueError(
                    f"Row {row} has an image but no question for the text encoder: got the prompt {prompt[:200]!r}. "
                    "Put a question in the user turn or pass one per row as recovery_text=."
                )
        return questions

    def _user_turns(self, prompt: str) -> list[str]:
        """What stands in the user turns of a rendered prompt, at least one."""
        opening, closing = self._turn_markers() or ("", "")
        if not opening or opening not in prompt:
            return [prompt]
        turns = prompt.split(opening)[1:]
        return [turn.partition(closing)[0] for turn in turns] if closing else turns

    def _choose(self, texts: Sequence[str], recovery_turns: str | None) -> list[str]:
        """The questions among the texts of user turns, of which there is at least one."""
        turns = self.recovery_turns if recovery_turns is None else _checked_turns(recovery_turns)
        questions = [self._clean(text) for text in (texts if turns == "all" else texts[-1:])]
        return [question for question in questions if question]

    def _clean(self, question: str) -> str:
        """Remove image tokens, surrounding white space and known answer instructions."""
        question = question.replace(self.image_token, "").strip()
        for instruction in ANSWER_INSTRUCTIONS:
            question = question.removesuffix(instruction).rstrip()
        return question

    def _turn_markers(self) -> tuple[str, str] | None:
        """Opening and closing of a user turn in the processor's chat template, None if it has no usable ones."""
        template = self.chat_template.get("default") if isinstance(self.chat_template, dict) else self.chat_template
        if not template:
            return None
        if template not in self._question_markers:
            render = functools.partial(
                super().apply_chat_template, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            self._question_markers[template] = _find_markers(render)
        return self._question_markers[template]

    def _encode_questions(self, questions: Sequence[str | Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, int64 (rows, windows, length); every window is wrapped in start and end.

        Several questions of a row share no window: the text encoder reads each by itself.
        """
        tokenizer, length = self._recovery_tokenizer, int(self.recovery_max_length or 0)
        rows = [[row] if isinstance(row, str) else list(row) for row in questions]
        texts = [text for row in rows for text in row]
        # verbose: no warning about questions longer than the text encoder reads
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        encoded = iter(tokenizer(texts, **options).input_ids if texts else [])
        windows = [
            [
                tokens[at : at + length - 2]
                for tokens in itertools.islice(encoded, len(row))
                for at in range(0, len(tokens), length - 2)
            ]
            for row in rows
        ]
        shape = (len(rows), max(1, *map(len, windows)), length)
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids, mask = np.full(shape, padding, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, pieces in enumerate(windows):
            for column, piece in enumerate(pieces):
                wrapped = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
                ids[row, column, : len(wrapped)] = wrapped
                mask[row, column, : len(wrapped)] = 1
        return ids, mask


class LlavaRecCompProcessor(RecCompProcessorMixin, LlavaProcessor):
    """Processor of `llava_reccomp` models: LLaVA's own, and the question for the text encoder."""


class LlavaNextRecCompProcessor(RecCompProcessorMixin, LlavaNextProcessor):
    """Processor of `llava_next_reccomp` models: LLaVA-NeXT's own, and the question for the text encoder."""


def _checked_turns(turns: str) -> str:
    if turns not in RECOVERY_TURNS:
        raise ValueError(f"recovery_turns must be 'last' or 'all', got {turns!r}.")
    return turns


def _text_of(message: Any) -> str:
    """The text of a chat message."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or "" for part in content if part.get("type") == "text")


def _recovery_length(tokenizer: Any, length: int | None) -> int | None:
    """The window length for a recovery tokenizer, None without one."""
    if tokenizer is None:
        if length is not None:
            raise ValueError(
                f"recovery_max_length={length} needs a recovery_tokenizer, got None: pass the CLIP tokenizer of the "
                "text encoder, or recovery_max_length=None for a visual-only model."
            )
        return None
    length = tokenizer.model_max_length if length is None else length
    if not 3 <= length <= 1_000_000:
        raise ValueError(
            f"recovery_max_length must be the number of positions of the text encoder (77 for CLIP, at least 3): "
            f"got {length}."
        )
    return length


def _load_recovery_tokenizer(source: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """Load the tokenizer from the sub-folder `recovery_tokenizer`, never from anywhere else."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    subfolder = "/".join(part for part in (kwargs.get("subfolder"), RECOVERY_TOKENIZER_FOLDER) if part)
    config = cached_file(
        source, "tokenizer_config.json", subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **hub
    )
    if config is None:
        raise OSError(
            f"{source} has recovery_max_length in its processor_config.json but no {subfolder}/tokenizer_config.json. "
            "Save it again with processor.save_pretrained, or pass recovery_tokenizer= to from_pretrained."
        )
    return AutoTokenizer.from_pretrained(source, subfolder=subfolder, **hub)


def _mend_tokenizer_config(folder: str) -> None:
    """Rewrite what transformers 5 puts in tokenizer_config.json and 4.57 cannot read; 5 reads both.

    4.57 knows no TokenizersBackend, wants unnamed special tokens as `additional_special_tokens`, and named ones
    (`image_token`) in a dictionary.
    """
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    before = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens", []), list):
        unnamed = config.pop("extra_special_tokens", [])
        named = {key: value for key, value in config.items() if key.endswith("_token") and key not in _STANDARD_TOKENS}
        config.update({"additional_special_tokens": unnamed} if unnamed else {})
        config.update({"extra_special_tokens": named} if named else {})
    if config != before:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")


def _find_markers(render: Callable[[list[dict[str, Any]]], str]) -> tuple[str, str] | None:
    """Opening and closing of a user turn, from a rendered conversation of two questions and an answer."""
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
            # A template that ends right behind a question still has an answer's opening behind an earlier one.
            closing = "".join(_common_prefix(to_answer, after)).strip() or "".join(to_answer).strip()
            if opening:
                # A tag ends the turn by itself, also where no answer is asked for behind it.
                return opening, closing if not re.match(_TAG, closing) else _atoms(closing)[0]
    return None


def _atoms(text: str) -> list[str]:
    """Characters, with tags such as <s> or <|im_end|> in one piece, so that no marker starts inside a tag."""
    return re.findall(f"{_TAG}|.", text, flags=re.DOTALL)


def _common_prefix(left: list[str], right: list[str]) -> list[str]:
    """The longest list that both start with."""
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))]


def _batched(conversation: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """A list of conversations, whether one or several were given."""
    return conversation if isinstance(conversation[0], (list, tuple)) else [conversation]


def _with_listed_content(conversation: Sequence[Any]) -> list[Any]:
    """A copy in which plain string contents are text parts: transformers 4.57 cannot encode plain strings."""
    if isinstance(conversation[0], (list, tuple)):
        return [_with_listed_content(messages) for messages in conversation]
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in conversation
    ]


def _converter(example: Any) -> Callable[[np.ndarray], Any]:
    """How to turn an array into what the stock processor returned: a tensor, an array or nested lists."""
    if isinstance(example, torch.Tensor):
        return torch.from_numpy
    return np.asarray if isinstance(example, np.ndarray) else np.ndarray.tolist


def _takes_processor_kwargs() -> bool:
    """Whether the stock `apply_chat_template` wants the arguments of `__call__` in a dictionary (transformers 5)."""
    return "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters


__all__ = ["LlavaNextRecCompProcessor", "LlavaRecCompProcessor", "RecCompProcessorMixin"]
