"""Demo scenes and questions put to vLLM, and the environment in which its engines run."""

import functools

import pytest
import torch
import vllm_engines
from vllm_engines import prompt, reference

from reccomp_hf.demo import checkpoint_folder, draw_scene

DEMO = checkpoint_folder("demo")
BUDGET = 16
COMPACT = {"position_ids": "compact"}
QUESTIONS = (
    "What letter is on the cyan sign?",
    "How many objects are there?",
    "What color is the ring?",
    "Is there a red circle?",
)
SCENES = (1_000_000, 1_000_001, 1_000_002, 1_000_003)
PAPER = {"method": "recoverable", "budget": None, "text_relevance": "last", "visual_layer": -1, "text_limit": "share"}
PAPER |= {"text_share": 0.5, "coverage_share": 0.0, "merged_tokens": 8}


def user(question, images=1):
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:"


@functools.lru_cache
def scene(number):
    return draw_scene(number).image


PAIRS = [(number, question) for number in SCENES for question in QUESTIONS]


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vllm_engines.ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def requests(pairs=PAIRS, **arguments):
    return [prompt(user(question), scene(number), **arguments) for number, question in pairs]


def embeddings(transformers, text, numbers, **fields):
    """The embeddings of some images, each (K, D), and the answer to them."""
    model, processor = transformers
    inputs = processor(images=[*map(scene, numbers)], text=text, return_tensors="pt")
    with torch.no_grad():
        short, record = model.compress_inputs(**inputs, token_recovery=fields)
    tokens = short["inputs_embeds"][short["input_ids"] == model.config.image_token_id]
    return list(tokens.split(record.counts.tolist())), reference(model, inputs, **fields)


def loaded(folder):
    """Model and processor in transformers, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def wanted(transformers, pairs=PAIRS, **fields):
    """Greedy ids that transformers answers each pair of scene and question with."""
    model, processor = transformers
    return [
        reference(model, processor(images=scene(number), text=user(question), return_tensors="pt"), **fields)
        for number, question in pairs
    ]
