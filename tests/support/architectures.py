"""The table of architectures that the model-level tests run over.

Tests take everything that differs between architectures from here, and what goes into a model from its processor:
they never look into `pixel_values`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

import reccomp_hf

Row = tuple[str, int]  # question, number of pictures

LONG_QUESTION = " ".join([*tiny.SENTENCES[:3], "Zebras and xylophones: which of them are huge, grey and fuzzy?"] * 2)
ROWS: tuple[Row, ...] = (
    (tiny.SENTENCES[0], 1),
    (tiny.SENTENCES[1], 2),
    ("Say hello.", 0),
    (LONG_QUESTION, 1),  # two windows of the text encoder
)
MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "heads": {"visual_heads": "mean"},
    "budget": {"budget": 24},
    "spread": {"budget": 0.25, "coverage_share": 0.25, "text_relevance": "value", "position_ids": "original"},
    "visual": {"budget": 16, "text_share": 0.0},
    "penultimate": {
        "text_relevance": "penultimate",
        "text_relevance_sign": -1,
        "visual_layer": -2,
        "outlier_threshold": 1.6,  # with the default a patch is equally near to two centres, see assert_clear_choices
    },
}
# Every other method once: its fields, and the masks that mark something in a record of it.
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "authors": ({}, ("visual", "text")),
    "random": ({"budget": 24, "method_options": {"seed": 7}}, ("visual",)),
    "pooling": ({"budget": 0.16, "position_ids": "original"}, ("centre",)),
    "visual": ({"budget": 16}, ("visual",)),
    "prumerge": ({}, ("centre",)),
    "prumerge_plus": ({"budget": 0.2, "position_ids": "original"}, ("centre",)),
    "visionzip": ({"budget": 24, "method_options": {"contextual_share": 0.5}}, ("visual", "centre")),
    "trim": ({"position_ids": "original"}, ("text", "centre")),
    "vispruner": ({"budget": 24, "method_options": {"important_share": 0.9}}, ("visual", "coverage")),
    "divprune": ({"budget": 0.2}, ("coverage",)),
    "cdpruner": ({"budget": 16, "position_ids": "original"}, ("text",)),
    "scope": ({"budget": 16}, ("coverage",)),
    "hiprune": ({"budget": 20, "method_options": {"anchor_share": 0.5}}, ("visual",)),
    "holov": ({"budget": 0.2, "position_ids": "original"}, ("visual",)),
    "mmtok": ({"budget": 14}, ("coverage",)),
}
MODEL_SETTINGS |= {f"method {name}": {"method": name, **fields} for name, (fields, _) in METHODS.items()}
_PARAMETERS = inspect.signature(LlavaForConditionalGeneration.forward).parameters
CHOICES = ("counts", "visual_mask", "text_mask", "coverage_mask", "centre_mask", "cluster", "places")
"""Fields of a record in which two computations of the same thing agree exactly."""
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"
"""The name of the key-value cache in calls and outputs of the installed transformers."""
_BUILT: dict[tuple[Any, str], tuple[Any, Tensor]] = {}
"""Models that `Architecture.build` copies, and the state of torch's random numbers behind them."""
OF_THE_STOCK_CONFIG = ("model_type", "architectures", "transformers_version")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The facts about a model family that tests need.

    `stock` and `stock_processor` build the model and the processor of transformers itself. `whole_image` are the
    budgets that keep every token of a picture of `tiny.pictures`, `host_reads` what a prefill reads from the device.
    """

    name: str
    stock_class: type
    model_class: type
    base_class: type
    config_class: type
    processor_class: type
    stock: Callable[[], Any]
    stock_processor: Callable[..., Any]
    whole_image: tuple[int | float, ...]
    host_reads: int = 1

    def build(self, **fields: Any) -> Any:
        """A fresh compressed model with the weights of `stock()` and a CLIP text encoder, built without `convert`.

        It is a copy of one that was built before, which takes a fifth of the time; torch's random numbers go on as
        behind a first one.
        """
        key = self, repr(sorted(fields.items()))
        if key not in _BUILT:
            _BUILT[key] = self._build(fields), torch.get_rng_state()
        model, state = _BUILT[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    def _build(self, fields: dict[str, Any]) -> Any:
        stock = self.stock()
        clip = tiny.clip_model(seed=1, vision_from=stock)
        settings = {name: value for name, value in stock.config.to_dict().items() if name not in OF_THE_STOCK_CONFIG}
        section = {"text_encoder_config": self.text_config(), **fields}
        model = self.model_class(self.config_class(token_recovery=section, **settings)).eval()
        model.load_state_dict({**stock.state_dict(), **_text_weights(clip)})
        model.generation_config = stock.generation_config
        return model

    @functools.lru_cache  # noqa: B019 the rows of the table live as long as the process
    def compressed(self) -> Any:
        """One compressed model with the default settings, shared by all tests: not to be changed."""
        return self.build()

    @functools.lru_cache  # noqa: B019
    def shared_stock(self) -> Any:
        """One stock model with the same weights, shared by all tests: not to be changed."""
        return self.stock()

    def processor(self, padding_side: str = "left", **overrides: Any) -> Any:
        """Our processor."""
        return tiny.recovery_processor(self.processor_class, padding_side, **overrides)

    def text_config(self) -> dict[str, Any]:
        """The `text_encoder_config` of the compressed models."""
        config = tiny.clip_config()
        return {**config.text_config.to_diff_dict(), "projection_dim": config.projection_dim}

    def encode(self, rows: Sequence[Row] = ROWS, side: str = "left", first: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Our processor's output for some rows, their pictures being number `first` and following of a fixed set."""
        return dict(self._encoded(tuple(rows), side, first, **kwargs))

    @functools.lru_cache  # noqa: B019
    def _encoded(self, rows: Sequence[Row], side: str, first: int, **kwargs: Any) -> Any:
        return self.processor(side)(**call(rows, first), return_tensors="pt", padding=True, **kwargs)

    def save_sources(self, folder: Path) -> tuple[Path, Path]:
        """A stock checkpoint and its CLIP, each with its processor, as transformers writes them."""
        stock = self.stock()
        stock.save_pretrained(folder / "stock")
        self.stock_processor().save_pretrained(folder / "stock")
        tiny.clip_model(seed=1, vision_from=stock).save_pretrained(folder / "clip")
        tiny.clip_tokenizer().save_pretrained(folder / "clip")
        return folder / "stock", folder / "clip"

    def save_converted(self, folder: Path, preset: str = "paper", **fields: Any) -> Path:
        """A folder that `reccomp_hf.convert` wrote from `save_sources`."""
        return reccomp_hf.convert(*self.save_sources(folder), folder / "converted", preset, **fields)


def _text_weights(clip: Any) -> dict[str, Tensor]:
    parts = {
        "text_encoder.text_model": clip.text_model,
        "text_encoder.text_projection": clip.text_projection,
        "visual_projection": clip.visual_projection,
    }
    return {
        f"token_recovery.{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def stock_llava_next(seed: int = 10) -> LlavaNextForConditionalGeneration:
    """Transformers' own LLaVA-NeXT with random float32 weights and the sizes of `tiny.stock_llava`.

    With the default seed no choice depends on a near tie, see `assert_clear_choices`.
    """
    torch.manual_seed(seed)
    settings = {
        name: value for name, value in tiny.llava_config().to_dict().items() if name not in OF_THE_STOCK_CONFIG
    }
    pinpoints = tiny.next_image_processor().image_grid_pinpoints
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=pinpoints, **settings)).eval()
    tiny._sharpen(model.model.vision_tower)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model


LLAVA = Architecture(
    name="llava",
    stock_class=LlavaForConditionalGeneration,
    model_class=reccomp_hf.LlavaRecCompForConditionalGeneration,
    base_class=reccomp_hf.LlavaRecCompModel,
    config_class=reccomp_hf.LlavaRecCompConfig,
    processor_class=reccomp_hf.LlavaRecCompProcessor,
    stock=tiny.stock_llava,
    stock_processor=tiny.stock_processor,
    whole_image=(tiny.PATCHES, 1.0),
)
LLAVA_NEXT = Architecture(
    name="llava_next",
    stock_class=LlavaNextForConditionalGeneration,
    model_class=reccomp_hf.LlavaNextRecCompForConditionalGeneration,
    base_class=reccomp_hf.LlavaNextRecCompModel,
    config_class=reccomp_hf.LlavaNextRecCompConfig,
    processor_class=reccomp_hf.LlavaNextRecCompProcessor,
    stock=stock_llava_next,
    stock_processor=tiny.stock_next_processor,
    whole_image=(1.0,),
    host_reads=2,  # the sizes of the pictures too, as in the stock model: the number of tiles depends on them
)
ARCHITECTURES = (LLAVA, LLAVA_NEXT)

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
each_setting = pytest.mark.parametrize("setting", MODEL_SETTINGS.values(), ids=MODEL_SETTINGS)
each_side = pytest.mark.parametrize("side", ["left", "right"])


def prompt_of(question: str, images: int) -> str:
    """The rendered prompt of a row."""
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:"


def call(rows: Sequence[Row] = ROWS, first: int = 0) -> dict[str, Any]:
    """`images` and `text` for a processor."""
    count = sum(images for _, images in rows)
    pictures = tiny.pictures(8)[first : first + count]
    return {"images": pictures or None, "text": [prompt_of(*row) for row in rows]}


def single_runs(architecture: Architecture, rows: Sequence[Row] = ROWS) -> list[dict[str, Any]]:
    """Every row of `encode(rows)` encoded alone."""
    starts = [sum(images for _, images in rows[:index]) for index in range(len(rows))]
    return [architecture.encode([row], first=start) for row, start in zip(rows, starts, strict=True)]


def labels_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """Labels for every token that is neither padding nor a placeholder."""
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == model.config.image_token_id)
    return batch["input_ids"].masked_fill(ignored, -100)


def stock_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The fields of a batch that the stock model reads."""
    return {name: value for name, value in batch.items() if not name.startswith("recovery_")}


def generate(model: Any, batch: dict[str, Any], new_tokens: int = 6, **kwargs: Any) -> Tensor:
    """Generated ids, greedy unless `kwargs` say otherwise."""
    return model.generate(**batch, **{"do_sample": False, "max_new_tokens": new_tokens, **kwargs})


@torch.no_grad()
def greedy_by_hand(
    architecture: Architecture, embeds: Tensor, mask: Tensor, positions: Tensor, new_tokens: int = 6
) -> Tensor:
    """Greedy ids (R, new_tokens) of the stock language model behind embeddings (R, L, D): no `generate`, no cache."""
    stock, ids = architecture.shared_stock(), []
    for _ in range(new_tokens):
        states = stock.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        ids.append(stock.lm_head(states.last_hidden_state[:, -1]).argmax(-1, keepdim=True))
        embeds = torch.cat([embeds, stock.get_input_embeddings()(ids[-1])], dim=1)
        mask = torch.cat([mask, torch.ones_like(ids[-1])], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.cat(ids, dim=1)


@torch.no_grad()
def assert_clear_choices(model: Any, batch: dict[str, Any], setting: dict[str, Any]) -> None:
    """No choice depends on a near tie, so that equal choices can be expected of two computations on any processor.

    Noise on the pixels moves saliency and similarity by ten to thirty times as much as a different order of float32
    additions does, and every choice has to stay the same.
    """
    expected, pixels = model.recover(**batch, token_recovery=setting), batch["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        noise = 3e-6 * torch.randn(pixels.shape, generator=generator)
        moved = pixels + noise * (pixels != 0)  # missing tiles stay empty
        records = model.recover(**batch | {"pixel_values": moved}, token_recovery=setting)
        for number, (record, wanted) in enumerate(zip(records, expected, strict=True)):
            assert not torch.equal(record.saliency, wanted.saliency)
            for name in CHOICES:
                value, other = getattr(record, name), getattr(wanted, name)
                assert torch.equal(value, other), f"near tie: {name} of picture {number}, choose other inputs"


def assert_same_records(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Equal choices, and scores and tokens that agree to 1e-5."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        fields = [
            (field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
        ]
        exact = [name for name, value, _ in fields if isinstance(value, Tensor) and not value.is_floating_point()]
        assert {*CHOICES} <= {*exact}
        for name, value, wanted in sorted(fields, key=lambda field: field[0] not in exact):
            if name in exact:
                assert torch.equal(value, wanted), name
            else:
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, msg=name)
