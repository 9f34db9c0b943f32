"""Several questions about the same pictures: chosen anew, added to, or kept as the first one chose them."""

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
from ..core.vision import EncodedImages, concatenate
from ..measure.plot import plot_recovery
from .cache import ConversationCache, visual_tokens
from .inputs import Asked, Part, call_fields, chat_message, check_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("rebuild", "append", "keep")
DEFAULT_MAX_NEW_TOKENS = 256


@dataclasses.dataclass
class Turn:
    """A question, its answer, and what they took.

    Attributes:
        question: As it was asked.
        answer: As it was returned.
        prefilled: Positions that the language model read before the answer's first token.
        cache_length: Entries of the key-value cache after the answer; with `"rebuild"` they are not kept.
        visual_tokens: Visual tokens that the answer could look at, merged ones and newlines included.
        recovered: Patches among them that the question before could not look at.
        records: For every picture so far, how its tokens were chosen for this question (with `"keep"`, for the one
            that it came with); see [`plot_recovery`].
    """

    question: str
    answer: str
    prefilled: int
    cache_length: int
    visual_tokens: int
    recovered: int
    records: list[TokenRecoveryOutput]


class Conversation:
    """A conversation about pictures with a compressed model; a picture goes through the vision tower once.

    Which visual tokens a later question finds is the `mode`:

    - `"rebuild"`: those chosen for it alone. The whole conversation is read again, so that a turn equals a call of
      `generate` on the conversation as the chat template writes it.
    - `"append"`: those of all questions so far. The cache stays; patches that the new question chooses and that it
      lacks are put in front of the new turn, at their own positions in the uncut conversation (`position_ids` is
      always `"original"`), a newline of LLaVA-NeXT when its row first gets a patch. What was merged for the first
      question stands for the rest and stays. Nothing is read twice but the end of an answer that the chat template
      writes otherwise than the model did.
    - `"keep"`: those chosen for the question that a picture came with. The cache stays, and only text is added.

    A picture that comes later is chosen from for the question that it comes with, and stands where the chat template
    puts it; with `"rebuild"` and `"append"` the later questions choose from it too. With `max_visual_tokens` an
    `"append"` conversation never holds more visual tokens, newlines included: what was not chosen for the longest time
    leaves first, merged tokens last.

    The questions that choose are those of the processor's `recovery_turns`.

    Args:
        model: A compressed LLaVA, in eval mode.
        processor: Its processor, with a chat template.
        mode: `"rebuild"`, `"append"` or `"keep"`.
        token_recovery: Fields of the config section to override; `{"enabled": False}` for the uncompressed model.
        max_visual_tokens: Cap of an `"append"` conversation.
        system: A system prompt.

    Attributes:
        turns: A [`Turn`] per question.

    Raises:
        ValueError: An unknown mode, settings that do not fit concatenate, or a processor without chat template.
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
        self._pictures: list[Any] = []
        self._lengths: list[int] = []  # placeholders of every picture
        self._encoded: EncodedImages | None = None  # of all pictures, where later questions choose from them
        self._held = ConversationCache()

    @torch.no_grad()
    def ask(self, text: str, images: Any = None, streamer: Any = None, **generate_kwargs: Any) -> str:
        """Ask a question; the answer is remembered with it.

        Args:
            text: The question.
            images: A picture or a list of them that come with it.
            streamer: As in `generate`; the prompt that it is given is that of the whole conversation.
            **generate_kwargs: As in `generate`, `max_new_tokens` (256) for one. What the conversation makes itself is
                refused, with a cache also beams and assistants.

        Returns:
            The answer without special tokens and surrounding white space.

        Raises:
            ValueError: A refused argument, a question or a template that does not fit, or `max_visual_tokens` too
                small for one question. After an error the conversation goes on as if it had not been asked, but what
                left for `max_visual_tokens` stays away.
        """
        check_options(self.mode, generate_kwargs, self.model.generation_config)
        pictures = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
        new = self._encode(pictures) if pictures else None
        lengths = [*self._lengths, *(new.layout.lengths if new else [])]
        messages = [*self._messages, chat_message("user", text, len(pictures))]
        ids = self._ids(messages, lengths)
        question = self.processor.encode_questions([self.processor.questions_of(messages)])
        question = {name: field.to(ids.device) for name, field in question.items()}
        options = {**self._default_length(generate_kwargs), **generate_kwargs, "streamer": streamer}
        asked = Asked(text, ids, lengths, question, new, {**options, "return_dict_in_generate": True})
        turn = self._read_again(asked) if self.mode == "rebuild" else self._read_on(asked)
        self.turns.append(turn)
        self._messages = [*messages, chat_message("assistant", turn.answer)]
        self._pictures += pictures
        self._lengths = lengths
        if new is not None and self.mode != "keep":
            self._encoded = concatenate([self._encoded, new])
        return turn.answer

    def plot(self, picture: int = 0) -> Figure:
        """A panel per question with what was chosen of a picture for it, see [`plot_recovery`].

        Raises:
            ValueError: No such picture.
        """
        turns = [turn for turn in self.turns if picture < len(turn.records)]
        if not turns or picture < 0:
            raise ValueError(f"picture must be below the {len(self._pictures)} pictures so far, got {picture}.")
        return plot_recovery(
            self._pictures[picture],
            [turn.records[picture] for turn in turns],
            processor=self.processor,
            questions=[turn.question for turn in turns],
            answers=[turn.answer for turn in turns],
            method=self._section.method,
        )

    # ---- the prompt --------------------------------------------------------------------------------------------

    def _encode(self, pictures: Sequence[Any]) -> EncodedImages:
        inputs = self.processor.image_processor(pictures, return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return self.model.encode_images(pixel_values, inputs.get("image_sizes"), token_recovery=self._fields)

    def _ids(self, messages: Sequence[Any], lengths: Sequence[int]) -> Tensor:
        """The uncut conversation as the chat template writes it: (1, L) int64."""
        tokenizer, image_token = self.processor.tokenizer, self.processor.image_token
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        texts = prompt.split(image_token)
        if len(texts) != len(lengths) + 1:
            raise ValueError(
                f"The conversation has {len(lengths)} pictures, but as the chat template writes it {len(texts) - 1} "
                f"times {image_token!r}: use a template that writes it once per picture, and no text that holds it."
            )
        spelled = [image_token * length for length in lengths]
        prompt = "".join(itertools.chain.from_iterable(zip(texts, [*spelled, ""], strict=True)))
        has_start = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not has_start, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def _default_length(self, generate_kwargs: Mapping[str, Any]) -> dict[str, int]:
        given = "generation_config" in generate_kwargs or self.model.generation_config.max_new_tokens is not None
        return {} if given else {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS}

    # ---- modes -------------------------------------------------------------------------------------------------

    def _read_again(self, asked: Asked) -> Turn:
        """Mode `"rebuild"`: a single call on the whole conversation."""
        inputs: dict[str, Any] = {"input_ids": asked.ids, "attention_mask": torch.ones_like(asked.ids)}
        encoded = concatenate([self._encoded, asked.new])
        if encoded is not None:
            inputs["pixel_values"] = encoded
        output = self.model.generate(**inputs, **asked.question, token_recovery=self._fields, **asked.options)
        visual, records = 0, []
        if encoded is not None:
            visual = int((output.visual_token_counts + output.newline_counts).sum())
            records = output.token_recovery.split(encoded.layout.tiles)
        had = [record.kept_mask for record in self.turns[-1].records] if self.turns else []
        new_patches = [
            record.kept_mask if mask is None else record.kept_mask & ~mask
            for record, mask in itertools.zip_longest(records, had)
        ]
        return Turn(
            question=asked.text,
            answer=self._text(output.sequences[0, asked.ids.shape[1] :]),
            prefilled=asked.ids.shape[1] - sum(asked.lengths) + visual,
            cache_length=cache_length(getattr(output, CACHE)),
            visual_tokens=visual,
            recovered=sum(int(mask.sum()) for mask in new_patches),
            records=records,
        )

    def _read_on(self, asked: Asked) -> Turn:
        """Modes `"append"` and `"keep"`: what the cache does not hold is read."""
        held, ids = self._held, asked.ids[0].tolist()
        part = self._new_part(asked, held.go_back(ids))
        if self.mode == "append":
            part = self._with_recovered(asked, part)
            if self.max_visual_tokens is not None:
                held.make_room(part.visual, self.max_visual_tokens, len(self.turns))
        elif self.turns:
            part.records = [*self.turns[-1].records, *part.records]
        answer = self._answer(asked, part)
        return Turn(
            question=asked.text,
            answer=self._text(answer),
            prefilled=part.ids.shape[1],
            cache_length=len(held),
            visual_tokens=len(held.visual),
            recovered=sum(token.kind == "patch" for token in part.visual),
            records=part.records,
        )

    def _answer(self, asked: Asked, part: Part) -> Tensor:
        """Generate behind the cache and keep account of what it then holds; (new,) int64."""
        held, past, width = self._held, len(self._held), part.ids.shape[1]
        options = dict(asked.options)
        if options["streamer"] is not None:
            options["streamer"] = PromptStreamer(options["streamer"], asked.ids)
        if part.embeds is not None:
            options["inputs_embeds"] = part.embeds
        try:
            output = self.model.generate(
                input_ids=part.ids,
                attention_mask=part.ids.new_ones((1, past + width)),
                position_ids=part.positions,
                cache=held.cache,
                token_recovery=self._fields,
                **options,
            )
        except BaseException:
            held.drop_end(len(held) - past)
            raise
        answer = output.sequences[0, width:]
        read = len(held) - past - width  # all but the last new id
        entries = (part.ids[0] == self.model.config.image_token_id).nonzero().flatten() + past
        for token, entry in zip(part.visual, entries.tolist(), strict=True):
            token.entry = entry
        held.take([*asked.ids[0].tolist(), *answer[:read].tolist()], asked.ids.shape[1], part.visual)
        return answer

    def _new_part(self, asked: Asked, start: int) -> Part:
        """The ids from `start` on, the pictures that come with them compressed."""
        ids = asked.ids[:, start:]
        first = start if self._section.position_ids == "original" else len(self._held)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
        if asked.new is None:
            return Part(ids, positions, None, [], [])
        short, record = self.model.compress_inputs(
            input_ids=ids,
            position_ids=positions,
            pixel_values=asked.new,
            **asked.question,
            token_recovery=self._fields,
        )
        layout = asked.new.layout.with_newlines(self._section.newlines)
        return Part(
            short["input_ids"],
            short["position_ids"],
            short["inputs_embeds"],
            record.split(layout.tiles),
            visual_tokens(layout, record, len(self._lengths), len(self.turns)),
        )

    def _with_recovered(self, asked: Asked, part: Part) -> Part:
        """In front of a part, what the question chooses of the earlier pictures and the cache does not hold."""
        if self._encoded is None:
            return part
        image_token = self.model.config.image_token_id
        layout = self._encoded.layout.with_newlines(self._section.newlines)
        short, record = self.model.compress_inputs(
            input_ids=part.ids.new_full((1, sum(layout.lengths)), image_token),
            pixel_values=self._encoded,
            **asked.question,
            token_recovery=self._fields,
        )
        chosen = visual_tokens(layout, record, 0, len(self.turns))
        missing = self._held.refresh(chosen, len(self.turns))
        part.records = [*record.split(layout.tiles), *part.records]
        if not missing:
            return part
        wanted = {(token.image, token.place) for token in missing}
        index = [at for at, token in enumerate(chosen) if (token.image, token.place) in wanted]
        starts = (asked.ids[0] == image_token).nonzero().flatten()
        starts = starts[torch.tensor([0, *itertools.accumulate(asked.lengths)][: len(asked.lengths)])].tolist()
        places = [starts[token.image] + token.place for token in missing]
        embeds = self.model.get_input_embeddings()(part.ids) if part.embeds is None else part.embeds
        return Part(
            torch.cat([part.ids.new_full((1, len(missing)), image_token), part.ids], dim=1),
            torch.cat([part.positions.new_tensor([places]), part.positions], dim=1),
            torch.cat([short["inputs_embeds"][:, index], embeds], dim=1),
            part.records,
            [*missing, *part.visual],
        )

    def _text(self, answer: Tensor) -> str:
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


__all__ = ["Conversation", "Turn"]
