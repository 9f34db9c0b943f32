"""The stock LLaVA processors, which also pass the question to CLIP's text encoder.

All fields of the stock processors stay as they are. With a recovery tokenizer (the CLIP tokenizer of the model's text
encoder) they add `recovery_input_ids` and `recovery_attention_mask` (rows, windows, length): the question alone, or
with `recovery_turns="all"` all questions, without system prompt, answers or answer instructions; and `recovery_words`
(rows, tokens), its words as LLaVA's tokens. For a model with rules they add `recovery_rule` (rows,), the rule that the
row's last question begins like.
"""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import create_repo
from transformers import AutoConfig, BatchFeature, LlavaNextProcessor, LlavaProcessor, ProcessorMixin

from .compat import mend_tokenizer_config, takes_processor_kwargs, with_listed_content
from .greyscale import readable_chat, readable_images
from .questions import (
    batched,
    check_messages,
    check_placeholders,
    check_prompt_tokenizer,
    check_question_tokenizer,
    check_turns,
    choose_questions,
    converted,
    encode_windows,
    find_turn_markers,
    given_questions,
    message_text,
    pads_to_length,
    split_user_turns,
)
from .recovery_tokenizer import RECOVERY_TOKENIZER_FOLDER, cached_path, load_recovery_tokenizer, window_length
from .remote_code import write_sources
from .rules import check_rules, find_rule
from .tokenizing import one_at_a_time
from .words import encode_words

_RECOVERY_INPUT_NAMES = ("recovery_input_ids", "recovery_attention_mask", "recovery_words")
_RULE = "recovery_rule"
_CALL_OPTIONS = ("recovery_text", "recovery_turns", "recovery_rules")


class RecCompProcessorMixin(ProcessorMixin):
    """The recovery tokenizer, its files, and the question of every row, for both processors."""

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
        questions choose the visual tokens of its images: the one in the `"last"` user turn, or those of `"all"` user
        turns, where a patch's best score counts (questions that fit patches better in general get more of them).
        System prompts and answers are never read. All other arguments are the stock processor's.
        """
        check_placeholders(patch_size, vision_feature_select_strategy, num_additional_image_tokens)
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
        self.recovery_max_length = window_length(recovery_tokenizer, recovery_max_length)
        self.recovery_turns = check_turns(recovery_turns)
        self._recovery_tokenizer = recovery_tokenizer
        self._recovery_rules: list[Any] = []
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
    def recovery_rules(self) -> list[Any]:
        """The `rules` of the model's section, by which a question's beginning chooses settings.

        `from_pretrained` reads them in the config.json next to the processor, and they are saved there alone. Assign
        them after those of the model were changed: `processor.recovery_rules = model.config.token_recovery.rules`.
        """
        return self._recovery_rules

    @recovery_rules.setter
    def recovery_rules(self, rules: Sequence[Any]) -> None:
        check_rules(rules)
        self._recovery_rules = list(rules)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        names = [] if self._recovery_tokenizer is None else [*_RECOVERY_INPUT_NAMES]
        return [*super().model_input_names, *names, *([_RULE] if self._recovery_rules else [])]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        recovery_text: str | Sequence[str | Sequence[str]] | None = None,
        recovery_turns: str | None = None,
        recovery_rules: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode images and prompts as the stock processor does, and each row's question for CLIP.

        Args:
            images: images for the image tokens in `text`; greyscale of more than 8 bits is scaled by its own depth.
            text: one prompt per row.
            recovery_text: one question per row, used as it is, or a list of several; by default extracted from the
                prompt.
            recovery_turns: `"last"` or `"all"`, instead of the processor's own.
            recovery_rules: the rules of the call's settings, instead of the processor's own.
            **kwargs: passed to the stock processor; `return_tensors` applies to the added fields too.

        Returns:
            The stock fields and, with a recovery tokenizer and `text`, those of `encode_questions`; if prompts are
            padded to `"max_length"`, so are questions.

        Raises:
            ValueError: a row with images and no question, not one `recovery_text` per row, unknown turns, or rules
                that are not valid.
        """
        turns = self.recovery_turns if recovery_turns is None else check_turns(recovery_turns)
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        whole, own = pads_to_length(kwargs), one_at_a_time(self)
        encoding = super(RecCompProcessorMixin, own).__call__(images=readable_images(images), text=text, **kwargs)
        if text is None or not self._reads_text(recovery_rules):
            return encoding
        prompts = [text] if isinstance(text, str) else [row if isinstance(row, str) else " ".join(row) for row in text]
        questions = self.questions_of_prompts(prompts, recovery_text, turns)
        fields = self._fields(questions, recovery_rules, whole)
        encoding.update({name: converted(field, encoding["input_ids"]) for name, field in fields.items()})
        return encoding

    def apply_chat_template(self, conversation: Sequence[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render, and with `tokenize=True` encode, one or several conversations.

        The question of a row is the text of its last user turn, or with `recovery_turns="all"` those of all its user
        turns, unless `recovery_text` is given; these and `recovery_rules` are read among the arguments and in
        `processor_kwargs`.

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template or the name of one; the processor's own by default.
            **kwargs: passed to the stock method, whose result is returned.
        """
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        options.update({name: kwargs.pop(name) for name in _CALL_OPTIONS if name in kwargs})
        conversation = readable_chat(conversation)
        turns, rows = options.pop("recovery_turns", None), batched(conversation)
        for messages in rows:
            check_messages(messages)
        reads_text = self._reads_text(options.get("recovery_rules"))
        if kwargs.get("tokenize") and reads_text and options.get("recovery_text") is None:
            options["recovery_text"] = [self.questions_of(messages, turns) for messages in rows]
        if takes_processor_kwargs():
            kwargs["processor_kwargs"] = options
        else:
            kwargs.update(options)
            conversation = with_listed_content(conversation) if kwargs.get("tokenize") else conversation
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def extract_question(self, prompt: str) -> str:
        """The last question of a rendered prompt, see `extract_questions`; it may be empty."""
        return next(iter(choose_questions(self._user_turns(prompt), "last", self.image_token)), "")

    def extract_questions(self, prompt: str, recovery_turns: str | None = None) -> list[str]:
        """The questions of a rendered prompt that choose its visual tokens.

        A question is the text between the opening and the end of a user turn, both taken from the chat template.
        Without a usable template, or if the prompt has no such opening, it is the whole prompt. Image tokens and known
        answer instructions are removed; empty questions are left out.

        Args:
            prompt: as the chat template renders it, or written by hand in the same form.
            recovery_turns: `"last"` or `"all"`, in place of the processor's own.
        """
        return self._choose(self._user_turns(prompt), recovery_turns)

    def questions_of(self, messages: Sequence[Any], recovery_turns: str | None = None) -> list[str]:
        """The questions of a conversation of chat messages that choose its visual tokens, see `extract_questions`."""
        check_messages(messages)
        return self._choose(
            [message_text(message) for message in messages if message["role"] == "user"] or [""], recovery_turns
        )

    def encode_questions(
        self, questions: Sequence[str | Sequence[str]], recovery_rules: Sequence[Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """The added fields for one question, or a list of them, per row.

        Args:
            questions: one question, or a list of them, per row.
            recovery_rules: the rules of the call's settings, instead of the processor's own.

        Returns:
            With a recovery tokenizer `recovery_input_ids` and `recovery_attention_mask`, int64 (rows, windows,
            length), as long as the longest question needs in steps of 8, and `recovery_words`, int64 (rows, tokens),
            -1 for padding; with rules `recovery_rule`, int64 (rows,), -1 where none fits the (last) question.
        """
        return {name: torch.from_numpy(field) for name, field in self._fields(questions, recovery_rules).items()}

    def _rules(self, given: Sequence[Any] | None) -> Sequence[Any]:
        """The rules of a call, or else the processor's own."""
        if given is None:
            return self._recovery_rules
        check_rules(given)
        return given

    def _reads_text(self, recovery_rules: Sequence[Any] | None) -> bool:
        """Whether a call with these rules adds a field."""
        return self._recovery_tokenizer is not None or bool(self._rules(recovery_rules))

    def _fields(self, questions: Sequence[Any], recovery_rules: Any, whole: bool = False) -> dict[str, np.ndarray]:
        """The added fields, see `encode_questions`; `whole`: with windows of the text encoder's length."""
        fields, rules = {}, self._rules(recovery_rules)
        if self._recovery_tokenizer is not None:
            windows = encode_windows(self._recovery_tokenizer, self.recovery_max_length or 0, questions, whole)
            words = encode_words(self.tokenizer, questions)
            fields = dict(zip(_RECOVERY_INPUT_NAMES, (*windows, words), strict=True))
        if rules:
            fields[_RULE] = np.array([find_rule(rules, asked) for asked in questions], dtype=np.int64)
        return fields

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the processor so that transformers 4.57 and 5 can both load it.

        The recovery tokenizer is written to the sub-folder `recovery_tokenizer`, and the code to the folder itself.
        With `push_to_hub` everything is uploaded; `repo_id`, `commit_message`, `token` and `private` are for that.
        Returns the stock method's result.
        """
        folder = os.fspath(save_directory)
        os.makedirs(folder, exist_ok=True)
        times = self._get_files_timestamps(folder)
        # Rewriting its files does not change a folder's time stamp, and an upload would skip the folder.
        times.pop(RECOVERY_TOKENIZER_FOLDER, None)
        token = kwargs.get("token")
        upload = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private") if name in kwargs}
        if self._recovery_tokenizer is not None:
            self._recovery_tokenizer.save_pretrained(os.path.join(folder, RECOVERY_TOKENIZER_FOLDER))
            mend_tokenizer_config(os.path.join(folder, RECOVERY_TOKENIZER_FOLDER))
        files = super().save_pretrained(folder, push_to_hub=False, **kwargs)
        mend_tokenizer_config(folder)
        write_sources(folder)
        if push_to_hub:
            name = upload.pop("repo_id", None) or os.path.basename(os.path.normpath(folder))
            repository = create_repo(name, token=token, private=upload.pop("private", None), exist_ok=True).repo_id
            self._upload_modified_files(folder, repository, times, token=token, **upload)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As the stock method; both tokenizers are compared with the config.json next to them, whose rules are read.

        Raises:
            ValueError: A tokenizer does not fit the model, or the rules are not valid.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = cached_path(pretrained_model_name_or_path, "config.json", kwargs.get("subfolder") or "", kwargs)
        if config is not None:
            with open(config, encoding="utf-8") as file:
                processor._read_config(pretrained_model_name_or_path, json.load(file))
        return processor

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the arguments of `__init__` and, if they contain a recovery length, load the recovery tokenizer.

        Raises:
            OSError: there is a recovery length but no sub-folder `recovery_tokenizer`.
        """
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("recovery_max_length") is not None and "recovery_tokenizer" not in kwargs:
            settings["recovery_tokenizer"] = load_recovery_tokenizer(pretrained_model_name_or_path, kwargs)
        return settings, unused

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Load image processor and tokenizer, without the recovery arguments, which are not theirs."""
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("recovery_")}
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def questions_of_prompts(
        self,
        prompts: Sequence[str],
        recovery_text: str | Sequence[str | Sequence[str]] | None = None,
        recovery_turns: str | None = None,
    ) -> list[list[str]]:
        """The questions that choose the visual tokens of rendered prompts, given or extracted, one list per prompt.

        Args:
            prompts: with their image tokens.
            recovery_text: one question per prompt, or a list of several, instead of those in the prompt.
            recovery_turns: `"last"` or `"all"`, instead of the processor's own.

        Raises:
            ValueError: a prompt with images and no question, or not one `recovery_text` per prompt.
        """
        if recovery_text is None:
            questions = [self.extract_questions(prompt, recovery_turns) for prompt in prompts]
        else:
            questions = given_questions(recovery_text)
        if len(questions) != len(prompts):
            raise ValueError(
                f"recovery_text must hold one question per row: got {len(questions)}, expected {len(prompts)}."
            )
        for row, (prompt, asked) in enumerate(zip(prompts, questions, strict=True)):
            if self.image_token in prompt and not asked and self._recovery_tokenizer is not None:
                raise ValueError(
                    f"Row {row} has an image but no question for the text encoder: got the prompt {prompt[:200]!r}. "
                    "Put a question in the user turn or pass one per row as recovery_text=."
                )
        return questions

    def _read_config(self, source: str | os.PathLike[str], config: dict[str, Any]) -> None:
        """Compare both tokenizers with a model config of ours and read its rules; others are not read."""
        encoder, text = (config.get("token_recovery") or {}).get("text_encoder_config"), config.get("text_config")
        try:
            if encoder is not None and self._recovery_tokenizer is not None:
                check_question_tokenizer(self._recovery_tokenizer, encoder)
            if "token_recovery" in config and text is not None:
                vocabulary = AutoConfig.for_model(**{"model_type": "llama", **text}).vocab_size
                image_token_id = config.get("image_token_index", config.get("image_token_id", 32000))
                check_prompt_tokenizer(self.tokenizer, vocabulary, self.image_token, image_token_id)
            self.recovery_rules = (config.get("token_recovery") or {}).get("rules") or []
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _user_turns(self, prompt: str) -> list[str]:
        """The texts of the user turns of a rendered prompt, at least one."""
        return split_user_turns(prompt, self._turn_markers())

    def _choose(self, texts: Sequence[str], recovery_turns: str | None) -> list[str]:
        """The questions among the texts of user turns."""
        turns = self.recovery_turns if recovery_turns is None else check_turns(recovery_turns)
        return choose_questions(texts, turns, self.image_token)

    def _turn_markers(self) -> tuple[str, str] | None:
        """Opening and closing of a user turn in the processor's chat template, `None` if it has no usable ones."""
        template = self.chat_template.get("default") if isinstance(self.chat_template, dict) else self.chat_template
        if not template:
            return None
        if template not in self._question_markers:
            render = functools.partial(
                super().apply_chat_template, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            self._question_markers[template] = find_turn_markers(render)
        return self._question_markers[template]


class LlavaRecCompProcessor(RecCompProcessorMixin, LlavaProcessor):
    """Processor of `llava_reccomp` models: LLaVA's own, and the question for the text encoder."""


class LlavaNextRecCompProcessor(RecCompProcessorMixin, LlavaNextProcessor):
    """Processor of `llava_next_reccomp` models: LLaVA-NeXT's own, and the question for the text encoder."""


__all__ = ["LlavaNextRecCompProcessor", "LlavaRecCompProcessor", "RecCompProcessorMixin"]
