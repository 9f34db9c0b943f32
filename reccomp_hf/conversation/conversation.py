"""Several questions about the same images, whose visual tokens are chosen again, extended, or kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.checks import cache_length
from ..core.compat import CACHE
from ..core.features import TokenRecoveryOutput
from ..core.generation import PromptStreamer
from ..core.greyscale import readable_images
from ..core.tokenizing import token_ids
from ..core.vision import EncodedImages, concatenate
from ..measure.plot import plot_recovery
from .cache import ConversationCache, visual_tokens
from .inputs import Prefill, TurnInputs, call_fields, chat_message, check_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("rebuild", "append", "keep")
DEFAULT_MAX_NEW_TOKENS = 256


@dataclasses.dataclass
class Turn:
    """A question and its answer, with their cost.

    Attributes:
        question: The question.
        answer: The answer.
        prefilled: Positions that the language model read before the answer's first token.
        cache_length: Entries of the key-value cache after the answer; with `"rebuild"` they are not kept.
        visual_tokens: Visual tokens that the answer could attend to, merged ones and newlines included.
        recovered: Patches among them that the previous question could not attend to.
        records: For every image so far, the record of the choice for this question (with `"keep"`, for the question
            that the image came with); see [`plot_recovery`].
    """

    question: str
    answer: str
    prefilled: int
    cache_length: int
    visual_tokens: int
    recovered: int
    records: list[TokenRecoveryOutput]


class Conversation:
    """A conversation about images with a compressed model; an image goes through the vision tower once.

    The `mode` decides which visual tokens a later question can attend to:

    - `"rebuild"`: the tokens chosen for this question alone. The whole conversation is read again, so that a turn
      equals a call of `generate` on the conversation as the chat template writes it.
    - `"append"`: the tokens chosen for all questions so far. The cache stays; patches that the new question chooses
      and the cache lacks are inserted in front of the new turn, at their own positions in the uncut conversation
      (`position_ids` is always `"original"`), and with LLaVA-NeXT a newline when its row gets its first patch. The
      tokens merged for the first question stand for the remaining patches and stay. Nothing is read twice except the
      end of an answer that the chat template writes differently from the model.
    - `"keep"`: the tokens chosen for the question that an image came with. The cache stays, and only text is added.

    A later image is compressed for the question that it comes with, and stands where the chat template puts it; with
    `"rebuild"` and `"append"` later questions choose from it too. With `max_visual_tokens` an `"append"` conversation
    never holds more visual tokens, newlines included: the tokens that were not chosen for the longest time are removed
    first, merged tokens last.

    The processor's `recovery_turns` decides which questions choose tokens. With `rules` in the section the question of
    a turn decides which settings hold.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: The processor of the model, with a chat template.
        mode: `"rebuild"`, `"append"` or `"keep"`.
        token_recovery: Fields of the config section to override; `{"enabled": False}` for the uncompressed model.
        max_visual_tokens: Most visual tokens of an `"append"` conversation.
        system: A system prompt.

    Attributes:
        turns: A [`Turn`] per question.

    Raises:
        ValueError: An unknown mode, settings that contradict each other, a model or processor that is not of this
            package, or a processor without chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        mode: str = "rebuild",
        token_recovery: Mapping[str, Any] | None = None,
        max_visual_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
        for name, value, needed in (("model", model, "recover"), ("processor", processor, "encode_questions")):
            if not hasattr(value, needed):
                raise ValueError(
                    f"{name} must be that of a checkpoint from reccomp_hf.convert, got {type(value).__name__}."
                )
        if not processor.chat_template:
            raise ValueError("A conversation needs a chat template, but the processor's chat_template is None.")
        if max_visual_tokens is not None and (mode != "append" or max_visual_tokens < 1):
            raise ValueError(
                f"max_visual_tokens must be at least 1 and needs mode='append', got {max_visual_tokens} and {mode!r}."
            )
        self.model, self.processor = model, processor
        self.mode, self.max_visual_tokens = mode, max_visual_tokens
        self.turns: list[Turn] = []
        self._fields = call_fields(model.config.token_recovery, mode, token_recovery)
        self._section = model.config.token_recovery.replace(self._fields)
        self._messages = [] if system is None else [chat_message("system", system)]
        self._images: list[Any] = []
        self._lengths: list[int] = []  # number of placeholders of every image
        self._encoded: EncodedImages | None = None  # all images, if later questions choose from them
        self._cache = ConversationCache()

    @torch.no_grad()
    def ask(self, text: str, images: Any = None, streamer: Any = None, **generate_kwargs: Any) -> str:
        """Ask a question; the conversation keeps it and its answer.

        Args:
            text: The question.
            images: An image or a list of images that come with it.
            streamer: As in `generate`; it receives the prompt of the whole conversation.
            **generate_kwargs: As in `generate`, for example `max_new_tokens` (256). Inputs that the conversation
                makes itself are refused; in a mode with a cache, beams and assistants too.

        Returns:
            The answer without special tokens and surrounding white space.

        Raises:
            ValueError: A refused argument, a question or a template that does not fit, or `max_visual_tokens` too
                small for one question. After an error the conversation continues as if the question had not been
                asked, except that tokens removed for `max_visual_tokens` do not return.
        """
        if not isinstance(text, str):
            raise ValueError(f"A question must be a text, got {type(text).__name__}.")
        check_options(self.mode, generate_kwargs, self.model.generation_config)
        images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
        encoded = self._encode(images) if images else None
        lengths = [*self._lengths, *(encoded.layout.lengths if encoded else [])]
        messages = [*self._messages, chat_message("user", text, len(images))]
        ids = self._ids(messages, lengths)
        question = self.processor.encode_questions([self.processor.questions_of(messages)], self._section.rules)
        question = {name: field.to(ids.device) for name, field in question.items()}
        options = {**self._default_length(generate_kwargs), **generate_kwargs, "streamer": streamer}
        inputs = TurnInputs(text, ids, lengths, question, encoded, {**options, "return_dict_in_generate": True})
        turn = self._rebuild(inputs) if self.mode == "rebuild" else self._extend(inputs)
        self.turns.append(turn)
        self._messages = [*messages, chat_message("assistant", turn.answer)]
        self._images += images
        self._lengths = lengths
        if encoded is not None and self.mode != "keep":
            self._encoded = concatenate([self._encoded, encoded])
        return turn.answer

    def plot(self, picture: int = 0) -> Figure:
        """Draw a panel per question with the tokens of an image that were chosen for it, see [`plot_recovery`].

        Raises:
            ValueError: The image does not exist.
        """
        turns = [turn for turn in self.turns if picture < len(turn.records)]
        if not turns or picture < 0:
            raise ValueError(f"picture must be below the {len(self._images)} images so far, got {picture}.")
        return plot_recovery(
            self._images[picture],
            [turn.records[picture] for turn in turns],
            processor=self.processor,
            questions=[turn.question for turn in turns],
            answers=[turn.answer for turn in turns],
            method=self._section.method,
        )

    # ---- the prompt --------------------------------------------------------------------------------------------

    def _encode(self, images: Sequence[Any]) -> EncodedImages:
        inputs = self.processor.image_processor(readable_images(images), return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return self.model.encode_images(pixel_values, inputs.get("image_sizes"), token_recovery=self._fields)

    def _ids(self, messages: Sequence[Any], lengths: Sequence[int]) -> Tensor:
        """The uncut conversation as the chat template writes it: (1, L) int64."""
        tokenizer, image_token = self.processor.tokenizer, self.processor.image_token
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        texts = prompt.split(image_token)
        if len(texts) != len(lengths) + 1:
            raise ValueError(
                f"The conversation has {len(lengths)} images, but the chat template writes {image_token!r} "
                f"{len(texts) - 1} times: use a template that writes it once per image, and no text that contains it."
            )
        placeholders = [image_token * length for length in lengths]
        prompt = "".join(itertools.chain.from_iterable(zip(texts, [*placeholders, ""], strict=True)))
        has_start = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = token_ids(tokenizer, [prompt], add_special_tokens=not has_start)
        return torch.tensor(ids, device=self.model.device)

    def _default_length(self, generate_kwargs: Mapping[str, Any]) -> dict[str, int]:
        given = "generation_config" in generate_kwargs or self.model.generation_config.max_new_tokens is not None
        return {} if given else {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS}

    # ---- modes -------------------------------------------------------------------------------------------------

    def _rebuild(self, inputs: TurnInputs) -> Turn:
        """Mode `"rebuild"`: a single call on the whole conversation."""
        call: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": torch.ones_like(inputs.ids)}
        encoded = concatenate([self._encoded, inputs.images])
        if encoded is not None:
            call["pixel_values"] = encoded
        output = self.model.generate(**call, **inputs.question, token_recovery=self._fields, **inputs.options)
        visual, records = 0, []
        if encoded is not None:
            visual = int((output.visual_token_counts + output.newline_counts).sum())
            records = output.token_recovery.split(encoded.layout.tiles)
        previous = [record.kept_mask for record in self.turns[-1].records] if self.turns else []
        new_patches = [
            record.kept_mask if mask is None else record.kept_mask & ~mask
            for record, mask in itertools.zip_longest(records, previous)
        ]
        return Turn(
            question=inputs.text,
            answer=self._text(output.sequences[0, inputs.ids.shape[1] :]),
            prefilled=inputs.ids.shape[1] - sum(inputs.lengths) + visual,
            cache_length=cache_length(getattr(output, CACHE)),
            visual_tokens=visual,
            recovered=sum(int(mask.sum()) for mask in new_patches),
            records=records,
        )

    def _extend(self, inputs: TurnInputs) -> Turn:
        """Modes `"append"` and `"keep"`: read only the tokens that the cache does not hold."""
        cache, ids = self._cache, inputs.ids[0].tolist()
        prefill = self._new_tokens(inputs, cache.rewind(ids))
        if self.mode == "append":
            prefill = self._insert_recovered(inputs, prefill)
            if self.max_visual_tokens is not None:
                cache.make_room(prefill.visual, self.max_visual_tokens, len(self.turns))
        elif self.turns:
            prefill.records = [*self.turns[-1].records, *prefill.records]
        answer = self._answer(inputs, prefill)
        return Turn(
            question=inputs.text,
            answer=self._text(answer),
            prefilled=prefill.ids.shape[1],
            cache_length=len(cache),
            visual_tokens=len(cache.visual),
            recovered=sum(token.kind == "patch" for token in prefill.visual),
            records=prefill.records,
        )

    def _answer(self, inputs: TurnInputs, prefill: Prefill) -> Tensor:
        """Generate with the cache and record its new entries; returns the new ids, (new,) int64."""
        cache, past, width = self._cache, len(self._cache), prefill.ids.shape[1]
        options = dict(inputs.options)
        if options["streamer"] is not None:
            options["streamer"] = PromptStreamer(options["streamer"], inputs.ids)
        if prefill.embeds is not None:
            options["inputs_embeds"] = prefill.embeds
        try:
            output = self.model.generate(
                input_ids=prefill.ids,
                attention_mask=prefill.ids.new_ones((1, past + width)),
                position_ids=prefill.positions,
                cache=cache.key_values,
                token_recovery=self._fields,
                **options,
            )
        except BaseException:
            cache.drop_end(len(cache) - past)
            raise
        answer = output.sequences[0, width:]
        read = len(cache) - past - width  # all but the last new id
        entries = (prefill.ids[0] == self.model.config.image_token_id).nonzero().flatten() + past
        for token, entry in zip(prefill.visual, entries.tolist(), strict=True):
            token.entry = entry
        cache.record([*inputs.ids[0].tolist(), *answer[:read].tolist()], inputs.ids.shape[1], prefill.visual)
        return answer

    def _new_tokens(self, inputs: TurnInputs, start: int) -> Prefill:
        """The ids from `start`, with the images among them compressed."""
        ids = inputs.ids[:, start:]
        first = start if self._section.position_ids == "original" else len(self._cache)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
        if inputs.images is None:
            return Prefill(ids, positions, None, [], [])
        short, record = self.model.compress_inputs(
            input_ids=ids,
            position_ids=positions,
            pixel_values=inputs.images,
            **inputs.question,
            token_recovery=self._fields,
        )
        layout = inputs.images.layout.with_newlines(self._section.newlines)
        return Prefill(
            short["input_ids"],
            short["position_ids"],
            short["inputs_embeds"],
            record.split(layout.tiles),
            visual_tokens(layout, record, len(self._lengths), len(self.turns)),
        )

    def _insert_recovered(self, inputs: TurnInputs, prefill: Prefill) -> Prefill:
        """Insert the tokens of earlier images that the question chooses and the cache does not hold."""
        if self._encoded is None:
            return prefill
        image_token = self.model.config.image_token_id
        layout = self._encoded.layout.with_newlines(self._section.newlines)
        short, record = self.model.compress_inputs(
            input_ids=prefill.ids.new_full((1, sum(layout.lengths)), image_token),
            pixel_values=self._encoded,
            **inputs.question,
            token_recovery=self._fields,
        )
        chosen = visual_tokens(layout, record, 0, len(self.turns))
        missing = self._cache.refresh(chosen, len(self.turns))
        prefill.records = [*record.split(layout.tiles), *prefill.records]
        if not missing:
            return prefill
        places = {(token.image, token.place) for token in missing}
        index = [at for at, token in enumerate(chosen) if (token.image, token.place) in places]
        starts = (inputs.ids[0] == image_token).nonzero().flatten()
        starts = starts[torch.tensor([0, *itertools.accumulate(inputs.lengths)][: len(inputs.lengths)])].tolist()
        positions = [starts[token.image] + token.place for token in missing]
        embeds = self.model.get_input_embeddings()(prefill.ids) if prefill.embeds is None else prefill.embeds
        return Prefill(
            torch.cat([prefill.ids.new_full((1, len(missing)), image_token), prefill.ids], dim=1),
            torch.cat([prefill.positions.new_tensor([positions]), prefill.positions], dim=1),
            torch.cat([short["inputs_embeds"][:, index], embeds], dim=1),
            prefill.records,
            [*missing, *prefill.visual],
        )

    def _text(self, answer: Tensor) -> str:
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


__all__ = ["Conversation", "Turn"]
