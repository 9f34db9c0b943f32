"""lmms-eval's `--model reccomp_hf`: its benchmarks on a compressed model, with the tokens that were really read.

Found by the entry point group `lmms_eval.models`. Tasks come as chat messages, or with `--force_simple` as text and
pictures, which is what lmms-eval needs for tasks that compare likelihoods. Written against lmms-eval 0.7.3.
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
from ..data.prompts import count_visual_tokens
from ..measure.evaluation.settings import parse_setting

MODEL = "reccomp_hf"


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval."""
    here = f"{__name__}.{{}}".format
    return ModelManifest(MODEL, simple_class_path=here("RecCompSimple"), chat_class_path=here("RecComp"))


@dataclasses.dataclass
class VisualTokenCounts(TokenCounts):
    """What a sample's log says about its tokens, under `token_counts`.

    Attributes:
        input_tokens: What the language model read: text and visual tokens, without padding.
        output_tokens: What it wrote, the end token included.
        visual_tokens: Of the read ones those that stand for pictures, LLaVA-NeXT's newlines included.
        images: How many pictures they stand for.
    """

    visual_tokens: int = 0
    images: int = 0

    def to_dict(self) -> dict[str, int | None]:
        """For the log."""
        return {**super().to_dict(), "visual_tokens": self.visual_tokens, "images": self.images}


@dataclasses.dataclass
class _Row:
    """A question: its chat messages and their pictures, in reading order."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]


class RecComp(lmms):
    """A compressed LLaVA for lmms-eval's tasks of chat messages.

    Args:
        pretrained: `demo`, `demo-global`, a folder, or a Hub id (`org/name@revision`).
        device: For torch; by default a GPU if there is one. Of several processes each has its own.
        dtype: By default float32 on a CPU and the weights' own elsewhere.
        batch_size: Questions read at once.
        preset: A setting as `reccomp-hf eval` writes it (`balanced`, `balanced:0.1`, `cdpruner:16`, `off`) in place of
            the checkpoint's own.
        token_recovery: Fields that override it, as JSON (`{"budget":64,"enabled":false}`).
        attn_implementation: As in `from_pretrained`.
        device_map: As in `from_pretrained`, for a model that is spread over several GPUs.
        **fields: The same fields one by one (`budget=64,enabled=False`).

    Raises:
        ValueError: No compressed checkpoint, or arguments that do not fit.
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
                raise ValueError("device_map spreads one model over GPUs: start one process, or leave it out.")
            device = str(self.accelerator.device)
        given = {"attn_implementation": attn_implementation, "device_map": device_map}
        options: dict[str, Any] = {name: value for name, value in given.items() if value}
        self.fields = _fields(preset, token_recovery, fields)
        self._model, self.processor = load(pretrained, self.fields, device, dtype, **options)
        self.device = self._model.device
        if self.processor.chat_template is None:
            raise ValueError(f"{pretrained} has no chat template, which lmms-eval's messages need: save one with it.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer greedily, or by the task's `generation_kwargs`.

        As in lmms-eval's own `llava_hf`, 1024 new tokens are allowed unless the task says otherwise, and an answer
        ends where the model ends it: `until` is not read. An error ends the run; it is no empty answer.

        Raises:
            ValueError: A picture that cannot be read, or anything that is no picture.
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
        takes the *smallest* number for the likeliest answer (its own models return the loss, too), so this is the mean
        loss in nats per token, the closing of the answer's turn included, and whether each token was the likeliest
        one. lmms-eval 0.7.3 turns a plain pair into a string, hence the pair stands inside a result.

        Raises:
            ValueError: An answer without a question (`acc_mutual_info`), or a template that writes it elsewhere.
        """
        began, results = time.perf_counter(), []
        for request in requests:
            if len(request.args) != 6:
                raise ValueError(
                    f"Expected a question, an answer and pictures, got {request.args!r}: likelihoods without a "
                    "question (acc_mutual_info) are not supported."
                )
        batches, original = self._batches(requests, None)
        for batch in batches:
            results += self._compare(*zip(*map(self._choice, batch), strict=True))
        self._report([result.token_counts for result in results], time.perf_counter() - began)
        return original(results)

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"--model {MODEL} answers tasks of one round. For conversations of several rounds use "
            "reccomp_hf.Conversation, or leave out tasks whose output_type is generate_until_multi_round."
        )

    @staticmethod
    def _generation_kwargs(args: Sequence[Any]) -> dict[str, Any]:
        return args[2]

    def _row(self, args: Sequence[Any]) -> _Row:
        """What a request asks a chat model."""
        _, messages, _, doc_id, task, split = args
        chat = ChatMessages(messages=messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = chat.extract_media()
        if videos or sounds:
            raise ValueError(f"Task {task!r} shows videos or plays sounds: these models read pictures alone.")
        return _Row(chat.to_hf_messages(), [_opened(image, task) for image in images])

    def _choice(self, args: Sequence[Any]) -> tuple[_Row, str]:
        """The question and the answer of a request for a likelihood."""
        context, answer, visuals, doc_id, task, split = args
        document = self.task_dict[task][split][doc_id]
        answer = str(answer if isinstance(answer, str) else answer(document)).strip()
        return _asked(context, visuals(document), task), answer

    def _batches(
        self, requests: list[Instance], grouped_by: Callable[[Sequence[Any]], Any] | None
    ) -> tuple[Iterator[list[tuple[Any, ...]]], Callable[[list[Any]], list[Any]]]:
        """Arguments of requests in batches, the longest first, and what brings results into the requests' order."""
        group = {"group_fn": grouped_by, "grouping": True} if grouped_by else {}
        order = utils.Collator([request.args for request in requests], lambda args: -len(args[0]), **group)
        batches = order.get_batched(n=self.batch_size)
        total = -(-len(requests) // self.batch_size)
        return tqdm(batches, total=total, desc="batches", disable=self.rank != 0), order.get_original

    def _encode(self, rows: Sequence[_Row], texts: list[str], side: str) -> Any:
        """The processor's tensors; what CLIP reads is the question, whatever else stands in the text."""
        images = [image for row in rows for image in row.images]
        questions = [self.processor.questions_of(row.messages) for row in rows]
        options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        encoded = self.processor(images=images or None, text=texts, recovery_text=questions, **options)
        return encoded.to(self.device, self._model.dtype)

    def _prompt(self, row: _Row, answer: str | None = None) -> str:
        """A row as the chat template writes it, up to where the answer begins, or with one."""
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
                raise ValueError(f"The chat template must write an answer behind {prompt!r}, but it wrote {text!r}.")
        inputs = self._encode(rows, texts, "right")
        ends = inputs["attention_mask"].sum(-1, keepdim=True)
        own = torch.tensor(self._answer_lengths(prompts, texts), device=ends.device).unsqueeze(-1)
        place = torch.arange(inputs["input_ids"].shape[1], device=ends.device)
        labels = inputs["input_ids"].masked_fill((place < ends - own) | (place >= ends), -100)
        short, _ = self._model.compress_inputs(**inputs, labels=labels)
        labels = short.pop("labels")
        pairs = _losses(self._model(**short).logits, labels)
        read = short["attention_mask"].sum(-1).tolist()
        return _results(rows, pairs, read, [0] * len(rows), self._placeholders(short["input_ids"]))

    def _answer_lengths(self, prompts: list[str], texts: list[str]) -> list[int]:
        """How many ids at each text's end are not its prompt's."""
        asked, whole = (self.processor.tokenizer(some).input_ids for some in (prompts, texts))
        return [len(ids) - _common(start, ids) for start, ids in zip(asked, whole, strict=True)]

    def _placeholders(self, ids: Tensor) -> list[int]:
        return (ids == self._model.config.image_token_id).sum(-1).tolist()

    def _report(self, counts: list[Any], seconds: float) -> None:
        """Say how many visual tokens a picture came to; lmms-eval writes it to its results under `throughput`."""
        written = sum(count.output_tokens for count in counts)
        of_images = [count.visual_tokens / count.images for count in counts if count.images]
        facts = {
            "visual_tokens_per_image": sum(of_images) / max(len(of_images), 1),
            "visual_tokens_per_image_min": min(of_images, default=0),
            "visual_tokens_per_image_max": max(of_images, default=0),
        }
        log_metrics(seconds, written, written / seconds, facts)


class RecCompSimple(RecComp):
    """The same for lmms-eval's tasks of a text and pictures (`--force_simple`)."""

    is_simple = True

    @staticmethod
    def _generation_kwargs(args: Sequence[Any]) -> dict[str, Any]:
        return args[1]

    def _row(self, args: Sequence[Any]) -> _Row:
        """What a request asks a simple model."""
        context, _, visuals, doc_id, task, split = args
        return _asked(context, visuals(self.task_dict[task][split][doc_id]), task)


def _fields(preset: str | None, token_recovery: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What overrides the checkpoint's section."""
    whole = token_recovery if token_recovery is not None else {}
    if isinstance(whole, str):
        whole = _value(whole)
    if not isinstance(whole, dict):
        raise ValueError(f'token_recovery must be a JSON object such as {{"budget":64}}, got {token_recovery!r}.')
    named = parse_setting(preset).fields if preset else {}
    return overridden(overridden(named, whole), {name: _value(value) for name, value in fields.items()})


def _value(value: Any) -> Any:
    """A value as JSON means it: lmms-eval leaves `null` and `{...}` strings, and makes -2 a float."""
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _asked(context: str, visuals: Any, task: str) -> _Row:
    """A text and its pictures as a chat message: where the text marks them, or else in front of it."""
    images = [_opened(visual, task) for visual in visuals or []]
    pieces = context.split("<image>")
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) != len(images) + 1:
        raise ValueError(f"Task {task!r}: {len(images)} pictures, but the text marks {len(pieces) - 1}: {context!r}.")
    content: list[dict[str, str]] = []
    for place, piece in enumerate(pieces):
        content += [{"type": "image"}] * (place > 0)
        content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return _Row([{"role": "user", "content": content}], images)


def _opened(image: Any, task: str) -> Image.Image:
    """A picture, or the file of one."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str):
        raise ValueError(f"Task {task!r} shows {type(image).__name__}: these models read pictures alone.")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"Task {task!r}: {image} is no picture that can be read ({error}).") from error


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` for `generate`, with the defaults of lmms-eval's own `llava_hf`."""
    options = {"max_new_tokens": settings.get("max_new_tokens", 1024), "num_beams": settings.get("num_beams", 1)}
    temperature = settings.get("temperature") or 0
    sampling = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    return {**options, **(sampling if temperature > 0 else {"do_sample": False})}


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _lengths(ids: Tensor, end: int | list[int] | None) -> list[int]:
    """How many ids every row has up to its first end token, which counts, or in all."""
    if end is None:
        return [ids.shape[1]] * ids.shape[0]
    ended = torch.isin(ids, torch.as_tensor(end, device=ids.device)).cumsum(-1)
    return (torch.nn.functional.pad(ended, (1, 0))[:, :-1] == 0).sum(-1).tolist()


def _losses(logits: Tensor, labels: Tensor) -> list[tuple[float, bool]]:
    """Of every row the mean loss of what is labelled, and whether each of it is the likeliest.

    Args:
        logits: (R, L, V).
        labels: (R, L) int64, -100 for what is not looked at.
    """
    following = labels[:, 1:]
    rows, places = (following != -100).nonzero(as_tuple=True)
    scores, wanted = logits[rows, places].float(), following[rows, places]  # (T, V), (T,)
    losses = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
    zeros = losses.new_zeros(len(labels))
    mean = zeros.index_add(0, rows, losses) / zeros.index_add(0, rows, torch.ones_like(losses))
    missed = zeros.index_add(0, rows, (scores.argmax(-1) != wanted).to(losses.dtype))
    return list(zip(mean.tolist(), (missed == 0).tolist(), strict=True))


def _results(
    rows: Sequence[_Row], texts: Sequence[Any], read: list[int], written: list[int], visual: list[int]
) -> list[GenerationResult]:
    counts = [
        VisualTokenCounts(input_tokens=inputs, output_tokens=outputs, visual_tokens=seen, images=len(row.images))
        for row, inputs, outputs, seen in zip(rows, read, written, visual, strict=True)
    ]
    return [GenerationResult(text, count) for text, count in zip(texts, counts, strict=True)]


__all__ = ["MODEL", "RecComp", "RecCompSimple", "VisualTokenCounts", "manifest"]
