"""Verifying that a new checkpoint computes the same as its sources, on a model of one language-model layer."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector, image_size_to_num_patches

from ...core import compat
from ...core.configuration import TokenRecoveryConfig
from ...core.methods.contract import RELEVANCE
from ...core.picture_tokens import Question, question_similarity, window_mask
from ...core.relevance import patch_embeddings, relevance_state, text_similarity
from ..quiet import quiet
from .shards import Headers, is_weight, place_of, read_tensor

PROJECTORS = {"llava_reccomp": LlavaMultiModalProjector, "llava_next_reccomp": LlavaNextMultiModalProjector}
TOLERANCE = 1e-4  # relative to the largest value: equal weights may be laid out differently in memory
_DEEPER_LAYER = re.compile(r"^language_model\.layers\.[1-9]")


@torch.no_grad()
def prove(folder: Path, model_class: Any, config: Any, llava: tuple[Path, Headers], clip: Path | None) -> str:
    """Load a checkpoint and compare it with modules of transformers' classes that hold the sources' weights.

    One layer of the language model is loaded: the others are verified by their keys and bytes.

    Args:
        folder: The staged checkpoint.
        model_class: Class of the compressed model.
        config: Config of the checkpoint.
        llava: Folder and headers of the stock LLaVA.
        clip: Folder of the CLIP; `None` for a visual-only model.

    Returns:
        The verified parts, as a clause.

    Raises:
        RuntimeError: The checkpoint computes something else.
    """
    with quiet():
        model, info = model_class.from_pretrained(
            folder, config=_one_layer(config), dtype="auto", output_loading_info=True
        )
        clip_model = None
        if clip is not None:
            dtype = model.token_recovery.visual_projection.weight.dtype
            clip_model = CLIPModel.from_pretrained(clip, dtype=dtype).float().eval()
    unread = [key for key in info["unexpected_keys"] if is_weight(key) and not _DEEPER_LAYER.match(place_of(key))]
    if unread:
        raise RuntimeError(
            f"{model_class.__name__} does not read {len(unread)} weights, {min(unread)} among them: please report it."
        )
    pixels, sizes = _picture(config)
    tower = _stock_module(AutoModel.from_config(config.vision_config), "vision_tower", model.model, llava)
    projector = _stock_module(PROJECTORS[config.model_type](config), "multi_modal_projector", model.model, llava)
    if model.token_recovery is not None:
        model.token_recovery.float()
    tiles = pixels.flatten(0, -4)
    states = tower(tiles, output_hidden_states=True).hidden_states
    ours = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
    layer = config.vision_feature_layer
    for name, one, other in (
        ("vision tower", ours[layer], states[layer]),
        ("last block of the vision tower", ours[-1], states[-1]),
        ("projector", model.model.multi_modal_projector(ours[layer][:, 1:]), projector(states[layer][:, 1:])),
    ):
        _check_close(name, one, other)
    verified, question = ["vision tower", "projector"], None
    if clip_model is not None:
        question = _question(clip_model.config.text_config)
        own = config.token_recovery  # its method may scale the similarity, as the released code does
        relevance = {name: getattr(own, name) for name in RELEVANCE}
        section = own.replace({"method": "recoverable", **relevance})
        read = relevance_state(section.text_relevance, config.vision_config.num_hidden_layers)
        wanted = _clip_similarity(clip_model, compat.clip_vision_model(tower), states[read], question, section)
        rows = torch.zeros(len(tiles), dtype=torch.long)
        asked = Question(question, window_mask(question, None), rows)
        own_tower = compat.clip_vision_model(model.model.vision_tower)
        found = question_similarity(own_tower, model.token_recovery, ours[read], asked, section)
        _check_close("text similarity", found, wanted)
        verified.append("text similarity")
    count, patches = _count(model, pixels, sizes, question)
    return f"{', '.join(verified)} equal to the sources'; {count} of {patches} visual tokens chosen on a probe image"


def prove_processor(folder: Path, processor: Any) -> None:
    """Compare the saved tokenizers with those of the processor.

    Raises:
        RuntimeError: They encode a prompt differently.
    """
    saved = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    prompt = f"USER: {processor.image_token}\nIs there a red circle in the picture? ASSISTANT:"
    for name in ("tokenizer", "recovery_tokenizer"):
        wanted = getattr(processor, name)
        if wanted is not None and wanted(prompt)["input_ids"] != getattr(saved, name)(prompt)["input_ids"]:
            raise RuntimeError(f"The saved {name} encodes a prompt differently from its source; please report this.")


def _one_layer(config: Any) -> Any:
    config = copy.deepcopy(config)
    text = config.text_config
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return config


def _picture(config: Any) -> tuple[Tensor, Tensor | None]:
    """An image of noise as the processor would return it, and its size if the model needs one."""
    side = config.vision_config.image_size
    shape, sizes = [1, config.vision_config.num_channels, side, side], None
    if config.model_type == "llava_next_reccomp":
        sizes = torch.tensor([[side, side]])
        shape.insert(1, image_size_to_num_patches([side, side], config.image_grid_pinpoints, side))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), sizes


def _stock_module(stock: Any, name: str, model: Any, llava: tuple[Path, Headers]) -> Any:
    """A module of transformers' with weights read from the source one by one; it and ours become float32."""
    ours = getattr(model, name)
    dtype = next(ours.parameters()).dtype
    weights = {
        key: read_tensor(llava[0], llava[1][place_of(f"{name}.{key}")]).to(dtype).float() for key in stock.state_dict()
    }
    ours.float()
    stock.float().load_state_dict(weights)
    return stock.eval()


def _question(text: Any) -> Tensor:
    """Ids (1, 1, length) that end with the text encoder's end-of-text token."""
    length = min(8, text.max_position_embeddings)
    ids = torch.arange(1, length + 1) * 7 % (text.vocab_size - 2)
    # An eos_token_id of 2 in the published configs stands for the largest id.
    ids[-1] = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    return ids.view(1, 1, length)


def _clip_similarity(clip: Any, tower: Any, states: Tensor, question: Tensor, section: TokenRecoveryConfig) -> Tensor:
    """(B, N), the similarity computed with the CLIP's own text model and projections."""
    text = clip.text_projection(clip.text_model(input_ids=question[0]).pooler_output).unsqueeze(0)  # (1, 1, P)
    patches = patch_embeddings(
        section.text_relevance,
        states,
        tower.encoder.layers[-1],
        tower.post_layernorm,
        clip.visual_projection,
    )
    text = text.expand(len(patches), -1, -1)
    return text_similarity(patches, text, torch.ones(text.shape[:2], dtype=torch.bool), section.text_relevance_sign)


def _check_close(name: str, ours: Tensor, wanted: Tensor) -> None:
    difference = (ours - wanted).abs().max().item() if ours.shape == wanted.shape else math.inf
    if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise RuntimeError(
            f"The converted checkpoint does not compute the same as its sources: the {name} differs by "
            f"{difference:.3g}. Nothing was written; please report this."
        )


def _count(model: Any, pixels: Tensor, sizes: Tensor | None, question: Tensor | None) -> tuple[int, int]:
    """Number of tokens that the model chooses, and of patches.

    Raises:
        RuntimeError: The settings give another number of tokens.
    """
    section = model.config.token_recovery
    _, layout = model._layout(pixels, sizes)
    valid = layout.valid
    patches = layout.patches * layout.tiles[0] if valid is None else int(valid.sum())
    input_ids = torch.full((1, layout.lengths[0]), model.config.image_token_id)
    words = None if question is None else torch.arange(8).unsqueeze(0)
    inputs = {"pixel_values": pixels, "recovery_input_ids": question, "recovery_words": words, "image_sizes": sizes}
    for rule in range(len(section.rules)):
        model.recover(input_ids, recovery_rule=torch.tensor([rule]), **inputs)
    record = model.recover(input_ids, recovery_rule=torch.tensor([-1]), **inputs)[0]
    count = int(record.counts.sum())
    if section.budget is None:
        masks = (record.visual_mask, record.text_mask, record.coverage_mask, record.centre_mask)
        expected = int(sum(mask.sum() for mask in masks)) if section.method == "recoverable" else count
    elif isinstance(section.budget, int):
        expected = min(section.budget, patches)
    else:
        expected = max(1, math.floor(section.budget * patches + 0.5))
    if count != expected:
        raise RuntimeError(f"The converted checkpoint chooses {count} of {patches} visual tokens, not {expected}.")
    return count, patches


__all__ = ["prove", "prove_processor"]
