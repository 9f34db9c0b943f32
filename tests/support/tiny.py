"""Tiny models, tokenizers, processors and pictures, built in memory from seeds: no network, no files."""

import contextlib
import functools
import inspect
import json
import logging
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "What is the colour of the small square in the picture?",
    "How many red circles are there next to the green triangle?",
    "Is the cat sitting on the left or on the right of the table?",
    "USER: Describe the image in detail. ASSISTANT: The image shows a blue square.",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
]
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
IMAGE_SIZE, PATCH_SIZE = 40, 4
PROCESSOR_SETTINGS = {
    "patch_size": PATCH_SIZE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Random q and k projections give nearly uniform class attention, in which no value is an outlier.
PEAKINESS = 5.0


def _merges(words: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """BPE merges that put each word together from its left; training would break ties differently per version."""
    pairs = [("".join(word[:end]), word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(pairs))


@functools.lru_cache
def _llm_backend() -> str:
    """The language model's byte-level BPE as JSON."""
    words = [("Ġ", *word) for sentence in SENTENCES for word in re.findall("[A-Za-z]+", sentence)]
    merges = _merges(words)
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


def llm_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens; ids 0 to 4 are SPECIAL_TOKENS and `<s>` is put in front."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_llm_backend()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


@functools.lru_cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: bytes, bytes at the end of a word, merges in order, start, end."""
    words = [re.findall("[a-z]", word) for sentence in SENTENCES for word in sentence.lower().split()]
    merges = _merges([(*word[:-1], word[-1] + "</w>") for word in words])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(a + b for a, b in merges), CLIP_BOS, CLIP_EOS]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def clip_tokenizer() -> Any:
    """CLIP's own tokenizer class over a tiny vocabulary: model_max_length 77, eos = pad."""
    vocabulary, merges = _clip_vocabulary()
    if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:  # transformers 5
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        merges_file.write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
        return transformers.CLIPTokenizerFast(str(vocab_file), str(merges_file), model_max_length=77)


def image_processor(size: int = IMAGE_SIZE) -> Any:
    """The PIL image processor of CLIP, which has another name on transformers 5."""
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _text_ids() -> dict[str, int]:
    """Vocabulary size and special ids of the language model."""
    return {"vocab_size": len(llm_tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def _vision_config() -> dict[str, int]:
    """The vision tower that the stock LLaVA and the CLIP model share."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 16,
    }


def llava_config(**overrides: Any) -> LlavaConfig:
    """A LLaVA-1.5 of hidden size 32 with 100 patches per image."""
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **_text_ids(),
    )
    settings = {
        "vision_config": CLIPVisionConfig(**_vision_config()),
        "text_config": text,
        "image_token_index": SPECIAL_TOKENS.index("<image>"),
        "image_seq_length": PATCHES,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(**{**settings, **overrides})


def clip_config() -> CLIPConfig:
    """A CLIP whose vision tower has the shape of `llava_config`'s."""
    vocabulary, _ = _clip_vocabulary()
    text = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": 16,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary[CLIP_BOS],
        "eos_token_id": vocabulary[CLIP_EOS],
        "pad_token_id": vocabulary[CLIP_EOS],
    }
    return CLIPConfig(text_config=text, vision_config=_vision_config(), projection_dim=16)


def _sharpen(vision: torch.nn.Module) -> None:
    """Scale the query and key projections so that class attention has peaks."""
    for name, parameter in vision.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data.mul_(PEAKINESS)


def _flat(vision: torch.nn.Module) -> torch.nn.Module:
    """The module that holds `embeddings` and `encoder`, on either transformers line."""
    return getattr(vision, "vision_model", vision)


def stock_llava(seed: int = 0, **config_overrides: Any) -> LlavaForConditionalGeneration:
    """Transformers' own LLaVA with random float32 weights, in eval mode."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(llava_config(**config_overrides)).eval()
    _sharpen(model.model.vision_tower)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model


def clip_model(seed: int = 0, vision_from: LlavaForConditionalGeneration | None = None) -> CLIPModel:
    """A random CLIP; with `vision_from` its vision tower has that LLaVA's weights."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config()).eval()
    if vision_from is None:
        _sharpen(model.vision_model)
    else:
        _flat(model.vision_model).load_state_dict(_flat(vision_from.model.vision_tower).state_dict())
    return model


def stock_processor(padding_side: str = "left") -> LlavaProcessor:
    """The processor that belongs to `stock_llava`."""
    return LlavaProcessor(
        image_processor(),
        llm_tokenizer(padding_side),
        chat_template=VICUNA_TEMPLATE,
        **PROCESSOR_SETTINGS,
    )


def next_image_processor() -> Any:
    """The PIL image processor of LLaVA-NeXT for tiles of `IMAGE_SIZE`."""
    name, size = "LlavaNextImageProcessor", IMAGE_SIZE
    cls = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    return cls(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints)


def stock_next_processor(padding_side: str = "left") -> LlavaNextProcessor:
    """LLaVA-NeXT's own processor with the settings of `stock_processor`."""
    return LlavaNextProcessor(
        next_image_processor(), llm_tokenizer(padding_side), chat_template=VICUNA_TEMPLATE, **PROCESSOR_SETTINGS
    )


def recovery_processor(cls: Any = None, padding_side: str = "left", **overrides: Any) -> Any:
    """Our processor (`cls`: LlavaRecCompProcessor by default) with the CLIP tokenizer; `overrides` go to __init__."""
    from reccomp_hf.core import processing as processing_reccomp

    cls = cls or processing_reccomp.LlavaRecCompProcessor
    images = next_image_processor() if issubclass(cls, LlavaNextProcessor) else image_processor()
    settings = {**PROCESSOR_SETTINGS, "chat_template": VICUNA_TEMPLATE, "recovery_tokenizer": clip_tokenizer()}
    return cls(images, llm_tokenizer(padding_side), **{**settings, **overrides})


def turn(role: str, text: str, images: Sequence[Image.Image | None] = ()) -> dict[str, Any]:
    """One chat message; None among `images` is a picture that is named but not given."""
    parts = [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    """RGB pictures of different sizes: a noisy background with a few coloured shapes."""
    rng = random.Random(seed)
    images = []
    for index in range(n):
        width, height = rng.randint(40, 90), rng.randint(40, 90)
        noise = np.random.default_rng(seed * 1000 + index).integers(0, 60, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        draw = ImageDraw.Draw(image)
        for _ in range(rng.randint(1, 4)):
            left, top = rng.randrange(width - 20), rng.randrange(height - 20)
            box = (left, top, left + rng.randint(6, 18), top + rng.randint(6, 18))
            colour = tuple(rng.randrange(80, 256) for _ in range(3))
            rng.choice([draw.rectangle, draw.ellipse])(box, fill=colour)
        images.append(image)
    return images


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect what transformers logs as a warning or worse."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def save_stock(folder: str | Path) -> LlavaForConditionalGeneration:
    """Write the stock LLaVA and its processor to a folder; returns the model."""
    model = stock_llava()
    model.save_pretrained(folder)
    stock_processor().save_pretrained(folder)
    return model


def save_clip(folder: str | Path) -> CLIPModel:
    """Write a CLIP with `save_stock`'s vision tower and its tokenizer to a folder; returns the model."""
    model = clip_model(seed=1, vision_from=stock_llava())
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model
