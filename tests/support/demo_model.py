"""The trained demo model, for the tests that need true answers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from reccomp_hf.demo import checkpoint_folder


@functools.lru_cache
def demo_model() -> tuple[Any, Any]:
    """The model in float32 and its processor, shared by all tests: not to be changed."""
    folder = checkpoint_folder("demo")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)
