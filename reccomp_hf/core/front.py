"""The front of the compressed models: from pixels and questions to the tokens that stand for the images.

It is one function, however it is run: eagerly, compiled, exported, or captured as a CUDA graph. Under a fixed budget
it reads nothing from the device, copies nothing to it after its first run, and has no shape that depends on values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from .checks import check_finite, check_question, no_question_hint
from .compat import clip_vision_model, parameter
from .configuration import TokenRecoveryConfig
from .front_plan import FrontPlan
from .graphs import GraphCache
from .groups import GroupedPictures, check_rule, read_rules_of_images, take_rows
from .layout import ImageLayout
from .methods.registry import reads_encoded_question, reads_question, reads_words
from .picture_tokens import Choice, PictureTokens, Question, choose_tokens, text_pooling, window_mask
from .splicing import PlaceholderMap, Splice, check_placeholders, map_placeholders
from .tensor_checks import check_known_ids
from .tensors import constant, reads_are_free
from .text_encoder import RecoveryModulesMixin
from .vision import EncodedImages, check_not_empty, needed_states, vision_states
from .words import NO_WORD


class QuestionIds(NamedTuple):
    """The questions of a batch, as the arguments `recovery_...` of the models.

    Args:
        input_ids: (R, W, L) int64, in windows.
        attention_mask: (R, W, L), 0 for padding.
        rule: (R,) int64, the rule of the section that each question begins like, -1 for none.
        words: (R, M) int64, the questions' words as LLaVA's tokens, -1 for padding.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    rule: Tensor | None = None
    words: Tensor | None = None


@dataclasses.dataclass
class ChosenPrompts:
    """A batch of prompts and the tokens chosen for its images, before anything is read from the device.

    Args:
        pictures: The tokens of the images, or the choice where these depend on numbers to be read.
        plan: The plan of the run.
        placeholders: The image placeholders in the prompts.
        missing_question: (R,) bool, rows with an image and without a question.
    """

    pictures: Choice | PictureTokens | GroupedPictures
    plan: FrontPlan
    placeholders: PlaceholderMap
    missing_question: Tensor

    def sync_and_validate(self, splice: Splice | None = None) -> list[int]:
        """The one read from the device: sets the sizes, and checks features, placeholders and questions.

        Returns:
            The sizes of a splice; zeros without one.

        Raises:
            ValueError: Features that are not finite; placeholders or questions that do not fit.
        """
        pictures, layout, per_row = self.pictures, self.plan.layout, self.placeholders.per_row
        row_sizes = per_row.new_zeros(3) if splice is None else splice.sizes
        wanted = [per_row, self.missing_question.long(), row_sizes, *pictures.unread, pictures.non_finite]
        values = torch.cat([value.to(per_row.device) for value in wanted]).tolist()
        rows, tiles = len(per_row), sum(layout.tiles)
        check_finite(values[-tiles:], layout.tiles)
        check_placeholders(values[:rows], layout.lengths)
        missing, numbers = values[rows : 2 * rows], values[2 * rows : -tiles]
        if any(missing):
            raise ValueError(
                f"Row {missing.index(1)} has an image but no question: its recovery_attention_mask is all 0. Put a "
                f"question into the user turn or pass recovery_text= to the processor; "
                f"{no_question_hint(self.plan.section)}"
            )
        pictures.read(numbers[3:])
        return numbers[:3]


class FrontMixin(RecoveryModulesMixin):
    """The front of a compressed LLaVA."""

    get_input_embeddings: Any
    _graphs: GraphCache | None = None

    def _read_pictures(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | EncodedImages,
        image_sizes: Tensor | None,
        question: QuestionIds,
        section: TokenRecoveryConfig,
        feature_layer: int,
        *,
        projects: bool = True,
    ) -> ChosenPrompts:
        """Run the front on a call's arguments; for LLaVA-1.5 without rules nothing is read from the device."""
        ids, mask, rule, words = QuestionIds(*question)
        reads = [self._reads_question(settings) for settings in section.all_settings]
        if any(reads):
            check_question(ids, mask, words, input_ids.shape[0], section)
        if isinstance(pixel_values, EncodedImages):
            layout, grid = pixel_values.layout, pixel_values.grid
            inputs = {_state_name(index): state for index, state in pixel_values.states.items()}
        else:
            check_not_empty(pixel_values, self.config.vision_config.num_channels)
            pixel_values, layout = self._layout(pixel_values, image_sizes)
            grid, inputs = self._grid(pixel_values), {"pixel_values": pixel_values}
        lengths = constant(input_ids, tuple, tuple(layout.lengths))
        placeholders = map_placeholders(input_ids == self.config.image_token_id, lengths)
        missing = torch.zeros_like(placeholders.per_row, dtype=torch.bool)
        if any(reads) and ids is not None:
            windows = window_mask(ids, mask).to(input_ids.device)
            missing = (placeholders.per_row > 0) & ~windows.any(-1)
            inputs |= {"question": ids, "windows": windows}
        if any(reads) and words is not None and reads_words(section):
            check_known_ids("recovery_words", words, self.config.get_text_config().vocab_size, NO_WORD)
            inputs["words"] = words = words.to(input_ids.device)
            missing = missing | ((placeholders.per_row > 0) & (words == NO_WORD).all(-1))
        plan = FrontPlan(section, feature_layer, layout.with_newlines(section.newlines), grid, projects=projects)
        if section.rules:
            rule = check_rule(rule, input_ids.shape[0]).to(input_ids.device)
            rules, rows = read_rules_of_images(rule, placeholders.row, len(section.rules))
            missing = missing & constant(rule, tuple, tuple(reads))[rule + 1]
            if len(set(rules)) > 1:
                pictures = self._run_groups(inputs, plan, rules, rows)
                return ChosenPrompts(pictures, plan, placeholders, missing)
            plan = dataclasses.replace(plan, section=section.of_rule(rules[0]))
        inputs = self._without_unread(inputs, plan.section)
        if inputs.keys() & {"question", "words"}:
            inputs["question_of_tile"] = placeholders.row[layout.image_of_tile(input_ids)]
        return ChosenPrompts(self._run_front(inputs, plan), plan, placeholders, missing)

    def _without_unread(self, inputs: dict[str, Tensor], section: TokenRecoveryConfig) -> dict[str, Tensor]:
        """Inputs of `_front` without the forms of the questions that a section does not read."""
        encoded, words = (
            self._reads_question(section) and reads(section) for reads in (reads_encoded_question, reads_words)
        )
        read = {"question": encoded, "windows": encoded, "words": words}
        return {name: value for name, value in inputs.items() if read.get(name, True)}

    def _run_groups(
        self, inputs: dict[str, Tensor], plan: FrontPlan, rules: list[int], rows: list[int]
    ) -> GroupedPictures:
        """Choose the tokens of images for which different rules hold; the vision tower runs once.

        Args:
            inputs: As in `_front`, without `"question_of_tile"`.
            plan: A plan for all images.
            rules: The rule of each image.
            rows: The row of each image.
        """
        section, tiles, inputs = plan.section, plan.layout.tiles, dict(inputs)
        if "pixel_values" in inputs:
            states = self._any_states(inputs.pop("pixel_values"), self._needed_states(section, plan.feature_layer))
            inputs |= {_state_name(index): state for index, state in states.items()}
        groups = [[image for image, own in enumerate(rules) if own == rule] for rule in sorted(set(rules))]
        parts, starts = [], [0, *itertools.accumulate(tiles)]
        for group in groups:
            settings, layout = section.of_rule(rules[group[0]]), plan.layout.take(group)
            asked = sorted({rows[image] for image in group})
            index = dict.fromkeys(("question", "windows", "words"), asked)
            own_tiles = [tile for image in group for tile in range(starts[image], starts[image + 1])]
            for state in self._needed_states(settings, plan.feature_layer):
                index[_state_name(state)] = own_tiles
            read = self._without_unread(inputs, settings)
            part = {name: take_rows(read[name], chosen) for name, chosen in index.items() if name in read}
            if part.keys() & {"question", "words"}:
                of_tile = [asked.index(rows[image]) for image in group for _ in range(tiles[image])]
                like = part["words"] if "words" in part else part["windows"]
                part["question_of_tile"] = torch.tensor(of_tile).to(like.device)
            own_plan = dataclasses.replace(plan, section=settings, layout=layout.with_newlines(settings.newlines))
            parts.append(self._run_front(part, own_plan))
        return GroupedPictures(parts, groups, tiles)

    def _run_front(self, inputs: dict[str, Tensor], plan: FrontPlan) -> Choice | PictureTokens:
        """`_front`, by a recording if the model uses any.

        If the questions are on the host, every text is read once and to its end: on a GPU finding that would wait.
        """
        if "question" in inputs and self.token_recovery is not None and reads_are_free(inputs["question"]):
            texts, of_window = self.token_recovery.distinct_texts(
                inputs["question"], text_pooling(plan.section), rounded=self._graphs is not None
            )
            device = inputs["windows"].device
            inputs = {**inputs, "question": texts.unsqueeze(1).to(device), "text_of_window": of_window.to(device)}
        pictures = self._recorded_front(inputs, plan) if self._graphs is not None and plan.projects else None
        return self._front(inputs, plan) if pictures is None else pictures

    def use_cuda_graph(self, enabled: bool = True, *, limit: int = 16) -> None:
        """Replay the prefill as CUDA graphs from now on: on a GPU a short prompt is read several times as fast.

        It serves `generate`, `forward`, `compress_inputs` and everything that calls them. The first call of a shape
        records it in under a second per graph, without a compiler: one graph takes images and questions to the tokens
        that stand for them, another one, for batches of up to 1,024 tokens, is the language model's prefill. Further
        tokens are decoded as before; `cache_implementation="static"` compiles that.

        Some computations cannot be recorded; they run as before, and the reason is logged once: a dynamic number of
        tokens, training, gradients, autocast, weights that are quantised or on other devices, modules with hooks, and
        other devices than CUDA. A graph reads the weights where they are: changes in place are seen. Before every run
        the addresses of the weights and the active adapters are compared with those of the time of recording; where
        they differ, all graphs are dropped.

        Args:
            enabled: `False` drops all graphs and switches back.
            limit: Number of graphs that are kept in one memory pool; the least recently used one is dropped.

        Raises:
            ValueError: `limit` below 1.
        """
        self._graphs = GraphCache(limit) if enabled else None

    def _recorded_front(self, inputs: dict[str, Tensor], plan: FrontPlan) -> PictureTokens | None:
        """The tokens of images by a recording of `_front`; `None` if it must be called itself."""
        assert self._graphs is not None
        plan = plan.bounded()
        if plan.layout.has_newlines:
            inputs = {**inputs, "slots": plan.layout.slots, "rows": plan.layout.rows}
            inputs["newline"] = self._llava.image_newline

        def tokens(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            pictures = self._front(inputs, plan)
            if isinstance(pictures, Choice):
                raise RuntimeError("the number of tokens depends on the images")
            return pictures.tensors()

        parts = [self._llava.vision_tower, self._llava.multi_modal_projector, self.token_recovery]
        name = "front with words" if "words" in inputs else "front"
        parts += [self.get_input_embeddings()] if "words" in inputs else []
        modules = [module for module in parts if module is not None]
        outputs = self._graphs.run(name, modules, plan.key, tokens, inputs)
        if outputs is None:
            return None
        images, longest = outputs["features"].shape[:2]
        return PictureTokens.of_tensors(outputs, [longest] * images if plan.most_newlines is None else None)

    def _front(self, inputs: dict[str, Tensor], plan: FrontPlan) -> Choice | PictureTokens:
        """Choose the tokens of images, and make them if their number is known.

        Args:
            inputs: `"pixel_values"` (T, 3, H, W), or the hidden states that a tower has given; `"question"` (R, W, L)
                int64 and `"windows"` (R, W) bool, or `"words"` (R, M) int64, and `"question_of_tile"` (T,) int64 if
                the choice reads questions; with `"text_of_window"` (R, W) int64 `"question"` holds texts (texts, 1,
                L); `"slots"` and `"rows"` (I, L) int64 and `"newline"` (D,) in place of the layout's and the model's.
            plan: The plan of the run.
        """
        tower = clip_vision_model(self._llava.vision_tower)
        if "pixel_values" in inputs:
            states = self._states(inputs["pixel_values"], self._needed_states(plan.section, plan.feature_layer))
        else:
            names = {index: _state_name(index) for index in range(len(tower.encoder.layers) + 1)}
            states = {index: inputs[name] for index, name in names.items() if name in inputs}
        slots, rows = inputs.get("slots", plan.layout.slots), inputs.get("rows", plan.layout.rows)
        question = None
        if "question_of_tile" in inputs:
            parts = ("question", "windows", "question_of_tile", "words", "text_of_window")
            question = Question(*map(inputs.get, parts))  # type: ignore[arg-type]
        choice = choose_tokens(
            tower,
            self.token_recovery,
            EncodedImages(states, dataclasses.replace(plan.layout, slots=slots, rows=rows), plan.grid),
            question,
            plan.section,
            plan.feature_layer,
            num_heads=self.config.vision_config.num_attention_heads,
            projector=self._llava.multi_modal_projector,
            embedding=self.get_input_embeddings(),
        )
        if not plan.projects or not choice.fix_sizes(plan.most_newlines):
            return choice
        return self._tokens(choice, inputs.get("newline"))

    def _tokens(
        self, choice: Choice | PictureTokens | GroupedPictures, newline: Tensor | None = None
    ) -> PictureTokens:
        """The tokens of a choice whose sizes are known."""
        if isinstance(choice, PictureTokens):
            return choice
        if isinstance(choice, GroupedPictures):
            return choice.tokens([self._tokens(part) for part in choice.parts])
        if newline is None and choice.layout.has_newlines:
            newline = parameter(self._llava, "image_newline")
        return choice.tokens(self._llava.multi_modal_projector, newline)

    def _states(self, pixel_values: Tensor, needed: set[int]) -> dict[int, Tensor]:
        """The vision tower's hidden states by index; no graph is built for a frozen tower."""
        tower = clip_vision_model(self._llava.vision_tower)
        frozen = not any(weight.requires_grad for weight in tower.parameters())
        with record_function("reccomp::vision_tower"), torch.no_grad() if frozen else contextlib.nullcontext():
            return vision_states(tower, pixel_values, needed)

    def _encode(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None,
        sections: Sequence[TokenRecoveryConfig],
        feature_layer: int,
    ) -> EncodedImages:
        """`encode_images` with its settings."""
        check_not_empty(pixel_values, self.config.vision_config.num_channels)
        pixel_values, layout = self._layout(pixel_values, image_sizes)
        needed: set[int] = set().union(*(self._needed_states(section, feature_layer) for section in sections))
        states = self._any_states(pixel_values, needed)
        return EncodedImages(states, layout, self._grid(pixel_values))

    def _any_states(self, pixel_values: Tensor, needed: set[int]) -> dict[int, Tensor]:
        """`_states`, by a recording if the model uses any."""
        states = None if self._graphs is None else self._recorded_states(pixel_values, needed)
        return self._states(pixel_values, needed) if states is None else states

    def _recorded_states(self, pixel_values: Tensor, needed: set[int]) -> dict[int, Tensor] | None:
        """The vision tower's hidden states by a recording of `_states`; `None` if it must be called itself."""
        assert self._graphs is not None

        def states(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {str(index): state for index, state in self._states(inputs["pixel_values"], needed).items()}

        inputs, modules = {"pixel_values": pixel_values}, [self._llava.vision_tower]
        outputs = self._graphs.run("vision tower", modules, tuple(sorted(needed)), states, inputs)
        return None if outputs is None else {int(index): state for index, state in outputs.items()}

    def _needed_states(self, section: TokenRecoveryConfig, feature_layer: int) -> set[int]:
        """The vision tower's hidden states that a section reads from this model, under all of its rules."""
        blocks = len(clip_vision_model(self._llava.vision_tower).encoder.layers)
        return needed_states(section, feature_layer, blocks, self.token_recovery is not None)

    def _layout(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, ImageLayout]:
        """Tiles (T, 3, H, W) of all images, and the placeholders that stand for their patches."""
        rows, columns = self._grid(pixel_values)
        return pixel_values, ImageLayout.of_grids(len(pixel_values), rows * columns, pixel_values)

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def _reads_question(self, section: TokenRecoveryConfig) -> bool:
        return self.token_recovery is not None and reads_question(section)


def _state_name(index: int) -> str:
    return f"state {index}"


__all__ = ["ChosenPrompts", "FrontMixin", "FrontPlan", "QuestionIds"]
