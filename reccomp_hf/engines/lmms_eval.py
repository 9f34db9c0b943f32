"""lmms-eval's `--model reccomp_hf`: its benchmarks on a compressed model, with counts of the tokens that were read.

lmms-eval finds the model through the entry point group `lmms_eval.models`. Tasks come as chat messages, or with
`--force_simple` as text and images, which lmms-eval needs for tasks that compare likelihoods. Written for lmms-eval
0.7.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.loading import load
from ..core.configuration import overridden
from ..core.tokenizing import token_ids
from ..data.pictures import open_picture, upright_rgb
from ..data.prompts import count_visual_tokens
from ..measure.evaluation.settings import parse_setting

MODEL = "reccomp_hf"


def manifest() -> ModelManifest:
    """The entry point: the names of the model's classes."""
    return ModelManifest(MODEL, simple_class_path=f"{__name__}.RecCompSimple", chat_class_path=f"{__name__}.RecComp")


@dataclasses.dataclass
class VisualTokenCounts(TokenCounts):
    """Token counts in a sample's log, under `token_counts`.

    Attributes:
        input_tokens: Text and visual tokens that the language model read, without padding.
        output_tokens: Tokens that it generated, the end token included.
        visual_tokens: Input tokens that stand for images, LLaVA-NeXT's newlines included.
        images: Number of images.
    """

    visual_tokens: int = 0
    images: int = 0

    def to_dict(self) -> dict[str, int | None]:
        """The counts as lmms-eval logs them."""
        return {**super().to_dict(), "visual_tokens": self.visual_tokens, "images": self.images}


@dataclasses.dataclass
class _Row:
    """A question: its chat messages and their images, in reading order."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]


class RecComp(lmms):
    """A compressed LLaVA for lmms-eval's tasks of chat messages.

    Args:
        pretrained: `demo`, `demo-global`, a folder, or a Hub id (`org/name@revision`).
        device: A torch device; by default a GPU if there is one. Each of several processes gets its own.
        dtype: Dtype of the weights; by default float32 on a CPU, and the checkpoint's own elsewhere.
        batch_size: Questions per batch.
        preset: A setting as `reccomp-hf eval` writes it (`balanced`, `balanced:0.1`, `cdpruner:16`, `off`) in place of
            the checkpoint's own.
        token_recovery: Fields that override the setting, as JSON (`{"budget":64,"enabled":false}`).
        attn_implementation: As in `from_pretrained`.
        device_map: As in `from_pretrained`, to spread the model over several GPUs.
        **fields: The same fields one by one (`budget=64,enabled=False`).

    Raises:
        ValueError: The checkpoint is not a compressed LLaVA, or the arguments do not fit it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 1,
        preset: str | None = None,
        token_recovery: str | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        device_map: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ValueError("Name the checkpoint: --model_args pretrained=FOLDER_OR_ID, or pretrained=demo.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            if device_map is not None:
                raise ValueError("device_map spreads one model over GPUs: start a single process, or leave it out.")
            device = str(self.accelerator.device)
        optional = {"attn_implementation": attn_implementation, "device_map": device_map}
        options: dict[str, Any] = {name: value for name, value in optional.items() if value}
        self.fields = _fields(preset, token_recovery, fields)
        self._model, self.processor = load(pretrained, self.fields, device, dtype, **options)
        self.device = self._model.device
        if self.processor.chat_template is None:
            raise ValueError(f"{pretrained} has no chat template, which lmms-eval's messages need: save it with one.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer greedily, or by the task's `generation_kwargs`.

        As in lmms-eval's own `llava_hf`, 1024 new tokens are allowed unless the task says otherwise, and an answer
        ends where the model ends it: `until` is not read. An error ends the run instead of giving an empty answer.

        Raises:
            ValueError: An image that cannot be read, or media other than images.
        """
        began, results = time.perf_counter(), []
        batches, original = self._batches(requests, self._generation_kwargs)
        for batch in batches:
            results += self._answer([self._row(args) for args in batch], self._generation_kwargs(batch[0]))
        self._report([result.token_counts for result in results], time.perf_counter() - began)
        return original(results)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Compare answers by the loss of their tokens, as the chat template writes them behind the question.

        The question alone chooses the visual tokens, so that all answers are compared on the same ones. lmms-eval
        takes the *smallest* number for the likeliest answer (its own models return the loss, too), so a result is the
        mean loss in nats per token, the end of the answer's turn included, and whether each token is the argmax.
        lmms-eval 0.7.3 turns a plain pair into a string, hence the pair is wrapped in a `GenerationResult`.

        Raises:
            ValueError: An answer without a question (`acc_mutual_info`), or a template that does not write the answer
                after the prompt.
        """
        began, results = time.perf_counter(), []
        for request in requests:
            if len(request.args) != 6:
                raise ValueError(
                    f"Expected a question, an answer and images, got {request.args!r}: likelihoods without a "
                    "question (acc_mutual_info) are not supported."
                )
        batches, original = self._batches(requests, None)
        for batch in batches:
            results += self._compare(*zip(*map(self._row_and_answer, batch), strict=True))
        self._report([result.token_counts for result in results], time.perf_counter() - began)
        return original(results)

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"--model {MODEL} answers tasks of one round only. For conversations of several rounds use "
            "reccomp_hf.Conversation, or leave out tasks whose output_type is generate_until_multi_round."
        )

    @staticmethod
    def _generation_kwargs(args: Sequence[Any]) -> dict[str, Any]:
        return args[2]

    def _row(self, args: Sequence[Any]) -> _Row:
        """The question of a request."""
        _, messages, _, doc_id, task, split = args
        chat = ChatMessages(messages=messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = chat.extract_media()
        if videos or sounds:
            raise ValueError(f"Task {task!r} contains videos or audio, but these models read only images.")
        return _Row(chat.to_hf_messages(), [_open_image(image, task) for image in images])

    def _row_and_answer(self, args: Sequence[Any]) -> tuple[_Row, str]:
        """The question and the answer of a request for a likelihood."""
        context, answer, visuals, doc_id, task, split = args
        document = self.task_dict[task][split][doc_id]
        answer = str(answer if isinstance(answer, str) else answer(document)).strip()
        return _row_from_text(context, visuals(document), task), answer

    def _batches(
        self, requests: list[Instance], grouped_by: Callable[[Sequence[Any]], Any] | None
    ) -> tuple[Iterator[list[tuple[Any, ...]]], Callable[[list[Any]], list[Any]]]:
        """Arguments of requests in batches, the longest first, and a function that restores the original order."""
        group = {"group_fn": grouped_by, "grouping": True} if grouped_by else {}
        order = utils.Collator([request.args for request in requests], lambda args: -len(args[0]), **group)
        batches = order.get_batched(n=self.batch_size)
        total = -(-len(requests) // self.batch_size)
        return tqdm(batches, total=total, desc="batches", disable=self.rank != 0), order.get_original

    def _encode(self, rows: Sequence[_Row], texts: list[str], side: str) -> Any:
        """The processor's tensors; CLIP reads only the question, whatever else the text contains."""
        images = [image for row in rows for image in row.images]
        questions = [self.processor.questions_of(row.messages) for row in rows]
        options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        encoded = self.processor(images=images or None, text=texts, recovery_text=questions, **options)
        return encoded.to(self.device, self._model.dtype)

    def _prompt(self, row: _Row, answer: str | None = None) -> str:
        """A row as the chat template writes it, up to the beginning of the answer, or with an answer."""
        turn = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return self.processor.apply_chat_template([*row.messages, *turn], add_generation_prompt=answer is None)

    @torch.no_grad()
    def _answer(self, rows: list[_Row], settings: dict[str, Any]) -> list[GenerationResult]:
        inputs = self._encode(rows, [self._prompt(row) for row in rows], "left")
        prompt = inputs["input_ids"]
        output = self._model.generate(**inputs, **_options(settings), return_dict_in_generate=True)
        placeholders = self._placeholders(prompt)
        visual = count_visual_tokens(output, [len(row.images) for row in rows], placeholders)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        new = output.sequences[:, prompt.shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        written = _lengths(new, self._model.generation_config.eos_token_id)
        read = [length - cut + kept for length, cut, kept in zip(lengths, placeholders, visual, strict=True)]
        return _results(rows, texts, read, written, visual)

    @torch.no_grad()
    def _compare(self, rows: Sequence[_Row], answers: Sequence[str]) -> list[GenerationResult]:
        prompts = [self._prompt(row) for row in rows]
        texts = [self._prompt(row, answer) for row, answer in zip(rows, answers, strict=True)]
        for prompt, text in zip(prompts, texts, strict=True):
            if not text.startswith(prompt):
                raise ValueError(f"The chat template must write an answer after {prompt!r}, but it wrote {text!r}.")
        inputs = self._encode(rows, texts, "right")
        ends = inputs["attention_mask"].sum(-1, keepdim=True)
        starts = ends - torch.tensor(self._answer_lengths(prompts, texts), device=ends.device).unsqueeze(-1)
        place = torch.arange(inputs["input_ids"].shape[1], device=ends.device)
        labels = inputs["input_ids"].masked_fill((place < starts) | (place >= ends), -100)
        short, _ = self._model.compress_inputs(**inputs, labels=labels)
        labels = short.pop("labels")
        pairs = _losses(self._model(**short).logits, labels)
        read = short["attention_mask"].sum(-1).tolist()
        return _results(rows, pairs, read, [0] * len(rows), self._placeholders(short["input_ids"]))

    def _answer_lengths(self, prompts: list[str], texts: list[str]) -> list[int]:
        """Number of ids at the end of each text that do not belong to its prompt."""
        tokenizer = self.processor.tokenizer
        prompt_ids, text_ids = (token_ids(tokenizer, batch, add_special_tokens=True) for batch in (prompts, texts))
        pairs = zip(prompt_ids, text_ids, strict=True)
        return [len(ids) - _common_prefix_length(prompt, ids) for prompt, ids in pairs]

    def _placeholders(self, ids: Tensor) -> list[int]:
        return (ids == self._model.config.image_token_id).sum(-1).tolist()

    def _report(self, counts: list[Any], seconds: float) -> None:
        """Report visual tokens per image; lmms-eval writes them to its results under `throughput`."""
        written = sum(count.output_tokens for count in counts)
        per_image = [count.visual_tokens / count.images for count in counts if count.images]
        metrics = {
            "visual_tokens_per_image": sum(per_image) / max(len(per_image), 1),
            "visual_tokens_per_image_min": min(per_image, default=0),
            "visual_tokens_per_image_max": max(per_image, default=0),
        }
        log_metrics(seconds, written, written / seconds, metrics)


class RecCompSimple(RecComp):
    """[`RecComp`] for lmms-eval's tasks of text and images (`--force_simple`)."""

    is_simple = True

    @staticmethod
    def _generation_kwargs(args: Sequence[Any]) -> dict[str, Any]:
        return args[1]

    def _row(self, args: Sequence[Any]) -> _Row:
        """The question of a request."""
        context, _, visuals, doc_id, task, split = args
        return _row_from_text(context, visuals(self.task_dict[task][split][doc_id]), task)


def _fields(preset: str | None, token_recovery: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that override the checkpoint's section."""
    section = token_recovery if token_recovery is not None else {}
    if isinstance(section, str):
        section = _parse_value(section)
    if not isinstance(section, dict):
        raise ValueError(f'token_recovery must be a JSON object such as {{"budget":64}}, got {token_recovery!r}.')
    setting = parse_setting(preset).fields if preset else {}
    return overridden(overridden(setting, section), {name: _parse_value(value) for name, value in fields.items()})


def _parse_value(value: Any) -> Any:
    """Parse a value as JSON: lmms-eval leaves `null` and `{...}` as strings, and turns -2 into a float."""
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _row_from_text(context: str, visuals: Any, task: str) -> _Row:
    """A text and its images as a chat message: images stand where the text marks them, or else in front of it."""
    images = [_open_image(visual, task) for visual in visuals or []]
    pieces = context.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) != len(images) + 1:
        raise ValueError(f"Task {task!r}: {len(images)} images, but the text marks {len(pieces) - 1}: {context!r}.")
    content: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        content += [{"type": "image"}] * (place > 0)
        content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return _Row([{"role": "user", "content": content}], images)


def _open_image(image: Any, task: str) -> Image.Image:
    """An image in RGB and upright, opened if it is the name of a file."""
    if not isinstance(image, Image.Image | str):
        raise ValueError(f"Task {task!r} contains a {type(image).__name__}, but these models read only images.")
    try:
        return upright_rgb(image) if isinstance(image, Image.Image) else open_picture(image)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        shown = image if isinstance(image, str) else "an image"
        raise ValueError(f"Task {task!r}: {shown} cannot be read as an image ({reason}).") from error


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate` from a task's `generation_kwargs`, with the defaults of lmms-eval's `llava_hf`."""
    options = {"max_new_tokens": settings.get("max_new_tokens", 1024), "num_beams": settings.get("num_beams", 1)}
    temperature = settings.get("temperature") or 0
    sampling = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    return {**options, **(sampling if temperature > 0 else {"do_sample": False})}


def _common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of ids that two rows have in common at their beginning."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _lengths(ids: Tensor, end: int | list[int] | None) -> list[int]:
    """Number of ids in every row, up to its first end token, which is included."""
    if end is None:
        return [ids.shape[1]] * ids.shape[0]
    ended = torch.isin(ids, torch.as_tensor(end, device=ids.device)).cumsum(-1)
    return (torch.nn.functional.pad(ended, (1, 0))[:, :-1] == 0).sum(-1).tolist()


def _losses(logits: Tensor, labels: Tensor) -> list[tuple[float, bool]]:
    """Per row: the mean loss over labelled tokens, and whether each of them is the argmax.

    Args:
        logits: (R, L, V).
        labels: (R, L) int64, -100 for tokens without a label.
    """
    following = labels[:, 1:]
    rows, places = (following != -100).nonzero(as_tuple=True)
    scores, targets = logits[rows, places].float(), following[rows, places]  # (T, V), (T,)
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    zeros = losses.new_zeros(len(labels))
    mean = zeros.index_add(0, rows, losses) / zeros.index_add(0, rows, torch.ones_like(losses))
    missed = zeros.index_add(0, rows, (scores.argmax(-1) != targets).to(losses.dtype))
    return list(zip(mean.tolist(), (missed == 0).tolist(), strict=True))


def _results(
    rows: Sequence[_Row], texts: Sequence[Any], read: list[int], written: list[int], visual: list[int]
) -> list[GenerationResult]:
    """Results with counts of the input, output and visual tokens of every row."""
    counts = [
        VisualTokenCounts(input_tokens=inputs, output_tokens=outputs, visual_tokens=seen, images=len(row.images))
        for row, inputs, outputs, seen in zip(rows, read, written, visual, strict=True)
    ]
    return [GenerationResult(text, count) for text, count in zip(texts, counts, strict=True)]


__all__ = ["MODEL", "RecComp", "RecCompSimple", "VisualTokenCounts", "manifest"]
