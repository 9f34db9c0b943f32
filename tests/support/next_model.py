"""Small LLaVA-NeXTs, and batches of pictures of any shape for them."""

import dataclasses
import functools

import pytest
import tiny
import torch
from architectures import LLAVA_NEXT, prompt_of
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

SIDE, CELLS, PATCHES = tiny.IMAGE_SIZE, tiny.IMAGE_SIZE // tiny.PATCH_SIZE, tiny.PATCHES
PINPOINTS = [[height * SIDE, width * SIDE] for height, width in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
LARGEST = 5 * PATCHES  # the base tile and two by two
SIZES = {  # width, height
    "square": (40, 40),
    "wide": (200, 60),
    "tall": (50, 300),
    "tiny": (20, 17),
    "broad": (70, 40),
    "large": (90, 85),
    "thin": (2, 200),  # unpadding leaves no column of its grid
}
MIXED = (("square",), ("wide", "tall"), (), ("tiny", "broad"), ("large",))
QUESTIONS = (*tiny.SENTENCES[:3], "Is it red?", "How many squares are on the table?", "Describe the small cat.")
BATCHES = {"mixed": MIXED, **{name: ((name,),) for name in SIZES}, "several": (("wide", "tiny", "large"),)}
TILE_SETTINGS = {
    "paper": {},
    "budget": {"budget": 24},
    "share": {"budget": 0.1, "merged_tokens": 12, "visual_heads": "mean"},
    "spread": {"budget": 45, "coverage_share": 0.25, "text_relevance": "value", "position_ids": "original"},
    "authors": {"method": "authors"},
    "pooling_2x2": {"method": "pooling_2x2"},
    "pooling_3x3": {"method": "pooling_3x3"},
    "base_tile": {"method": "base_tile"},
    "random": {"method": "random", "budget": 0.1},
    "pooling": {"method": "pooling", "budget": 50},
}
each_setting = pytest.mark.parametrize("setting", TILE_SETTINGS.values(), ids=TILE_SETTINGS)


def stock_model(text, seed=6, **config):
    """Transformers' own LLaVA-NeXT with tiles and grids of `PINPOINTS`; with seed 6 no choice is a near tie."""
    base = tiny.llava_config(**config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    mistral = {name: getattr(base.text_config, name) for name in names}
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=base.vision_config,
        text_config=MistralConfig(sliding_window=None, **mistral) if text == "mistral" else base.text_config,
        image_token_index=base.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    tiny._sharpen(model.model.vision_tower)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model


TEXTS = {
    name: dataclasses.replace(LLAVA_NEXT, name=name, stock=functools.partial(stock_model, name))
    for name in ("llama", "mistral")
}
NEXT = TEXTS["llama"]


def picture(name):
    return tiny.pictures(1, seed=list(SIZES).index(name))[0].resize(SIZES[name])


def encode(rows, side="left", processor=None):
    processor = NEXT.processor(side) if processor is None else processor
    processor.image_processor.image_grid_pinpoints = PINPOINTS
    images = [picture(name) for row in rows for name in row]
    text = [prompt_of(QUESTIONS[index], len(row)) for index, row in enumerate(rows)]
    return dict(processor(images=images or None, text=text, padding=True, return_tensors="pt"))


def layout_and_states(model, batch):
    """The batch's layout and what the projector may read of every tile, (T, N, C)."""
    tiles, layout = model._layout(batch["pixel_values"], batch.get("image_sizes"))
    return layout, model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]
