"""A small LLaVA-NeXT put to vLLM: a checkpoint of random weights, and requests with pictures of any shape."""

import dataclasses
import functools

import tiny
from architectures import LLAVA_NEXT, prompt_of
from next_model import PINPOINTS, SIZES, picture, stock_model
from transformers import LlamaConfig
from vllm_engines import copy_checkpoint, prompt, reference

SHARE = 0.2
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}
FIELDS = {"text_relevance": "value", "visual_layer": -2, "coverage_share": 0.25, "coverage_by": "content"}
NONE = {"newlines": "none"}
QUESTIONS = tiny.SENTENCES[:3]
ROWS = [(names, question) for names in [(name,) for name in SIZES] for question in QUESTIONS]
ROWS += [(("wide", "tiny"), QUESTIONS[0]), (("large", "square", "tall"), QUESTIONS[1]), ((), QUESTIONS[2])]


@functools.lru_cache
def stock():
    """A stock LLaVA-NeXT whose heads are as wide as vLLM's attention on a CPU wants them."""
    wide = LlamaConfig(**{**tiny.llava_config().text_config.to_dict(), **WIDE})
    return stock_model("llama", seed=0, text_config=wide)  # answers differ from row to row


NEXT = dataclasses.replace(LLAVA_NEXT, stock=stock)


def save_checkpoint(folder):
    """A checkpoint that keeps its newlines, as they usually are; its folder."""
    NEXT.build(budget=SHARE, **FIELDS).save_pretrained(folder / "built")
    processor = NEXT.processor()
    processor.image_processor.image_grid_pinpoints = PINPOINTS
    processor.save_pretrained(folder / "built")
    return copy_checkpoint(folder / "built", folder / "checkpoint", "4x")


def inputs_of(transformers, names, question):
    images = [picture(name) for name in names] or None
    return transformers[1](images=images, text=prompt_of(question, len(names)), return_tensors="pt")


def expected(transformers, rows=ROWS, **fields):
    return [reference(transformers[0], inputs_of(transformers, *row), **{**NONE, **fields}) for row in rows]


def requests(rows=ROWS, **arguments):
    return [
        prompt(prompt_of(question, len(names)), [picture(name) for name in names], **(arguments if names else {}))
        for names, question in rows
    ]
