"""The LLaVA of a demo model: a projector and a Llama decoder on the frozen vision tower of its CLIP."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ...core import compat
from ...demo.scene_questions import Question, every_question, questions
from ...demo.scenes import VALIDATION_SEEDS, Scene
from .config import TrainingConfig
from .data import Scenes, batch_rows, file_in_place, pixel_values, scene_objects
from .loop import Figures, run_stage
from .packing import Packed, Packer
from .tokenizers import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID

logger = logging.getLogger(__name__)

_FEATURE_LAYER = -2
_QUESTION_STREAM = 22  # second word of the seed of the questions of a step
_ATTENTION = "reccomp_demo_training"
_TURNS = (1, 1, 1, 2, 3, 4)  # of a conversation, equally likely
_BATCH = 64  # images, wherever nothing is trained

Features = Callable[[np.ndarray], Tensor]
"""Function from rows of training scenes to the tower's features (B, patches, D)."""


def _rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention (B, heads, T, head_dim) whose softmax stays in the dtype of the scores, bfloat16 under autocast.

    It takes half the time of transformers' eager attention on a CPU, where moving the scores through memory dominates.
    """
    scores = (query * scaling) @ key.transpose(2, 3) + attention_mask.to(query.dtype)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _rounded_attention)


def new_llava(config: TrainingConfig, clip: CLIPModel, vocabulary: int) -> LlavaForConditionalGeneration:
    """A LLaVA with the vision tower of a CLIP, frozen, and random weights elsewhere."""
    torch.manual_seed(config.llava.seed)
    decoder = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=config.text_width,
        intermediate_size=3 * config.text_width,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.text_width // config.heads,
        max_position_embeddings=config.decoder_positions,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    full = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=decoder,
        image_token_index=IMAGE_ID,
        projector_hidden_act="gelu",
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=config.side**2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration._from_config(full, attn_implementation="eager")
    model.model.language_model.config._attn_implementation = _ATTENTION
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    tower = model.model.vision_tower.requires_grad_(False)
    compat.clip_vision_model(tower).load_state_dict(compat.clip_vision_model(clip.vision_model).state_dict())
    return model


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, pictures: np.ndarray, image_size: int) -> Tensor:
    """Features of images (B, 96, 96, 3) that the projector reads: (B, patches, D), without the class token."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        pixels = pixel_values(pictures, image_size, model.device)
        output = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
    return output.hidden_states[_FEATURE_LAYER][:, 1:].float()


def training_features(
    model: LlavaForConditionalGeneration, scenes: Scenes, config: TrainingConfig, file: Path
) -> Features:
    """Features of training scenes, from a float16 file that is filled first, or computed on demand."""
    if not config.cache_features:
        return lambda rows: tower_features(model, scenes.pictures[rows], config.image_size)
    if not file.exists():
        logger.info("computing the features of %d scenes", len(scenes.pictures))
        shape = (len(scenes.pictures), config.side**2, config.vision_width)
        with file_in_place(file) as temporary:
            features = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            for start in tqdm(range(0, shape[0], _BATCH), "features", mininterval=10):
                rows = slice(start, start + _BATCH)
                features[rows] = tower_features(model, scenes.pictures[rows], config.image_size).cpu().numpy()
            features.flush()
    kept = np.load(file, mmap_mode="r")
    return lambda rows: torch.from_numpy(kept[rows]).to(model.device).float()


class LlavaLoss(nn.Module):
    """A LLaVA that answers in several conversations after one copy of the image."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, features: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Logits (N, vocabulary) at the N places that have a label, and the labels (N,)."""
        model = self.llava.model
        embed = model.get_input_embeddings()
        patches = model.multi_modal_projector(features)
        first = embed(packed.prefix).expand(len(patches), -1, -1)
        embeddings = torch.cat([first, patches.to(first.dtype), embed(packed.input_ids)], dim=1)
        output = model.language_model(
            inputs_embeds=embeddings,
            position_ids=packed.position_ids,
            attention_mask=packed.attention_mask,
            use_cache=False,
        )
        states = output.last_hidden_state[:, -packed.input_ids.shape[1] :]
        labelled = packed.weights > 0
        return self.llava.lm_head(states[labelled]).float(), packed.labels[labelled]


def train_llava(
    llava: LlavaForConditionalGeneration,
    tokenizer: Any,
    scenes: Scenes,
    validation: Scenes,
    config: TrainingConfig,
    folder: Path,
) -> list[Figures]:
    """Train projector and decoder in place; see [`run_stage`] for resuming.

    Args:
        llava: The model, on the device to train on, with a trained vision tower.
        tokenizer: The decoder's tokenizer.
        scenes: Training scenes.
        validation: Validation scenes, evaluated every `evaluate_every` steps.
        config: Sizes and lengths.
        folder: Folder of the training state and the cached features.

    Returns:
        The reported figures.
    """
    packer = Packer(tokenizer, config.side**2, llava.device)
    features = training_features(llava, scenes, config, folder / "features.npy")
    module = LlavaLoss(llava)

    def loss_of_step(step: int) -> tuple[Tensor, Figures]:
        rows = batch_rows(step, config.llava.images, len(scenes.objects), config.llava.seed)
        rng = np.random.default_rng([config.llava.seed, _QUESTION_STREAM, step])
        asked = [every_question(scene_objects(scenes.objects[row]), rng)[: config.questions] for row in rows]
        packed = packer.pack([_group_turns(items, rng, step >= config.conversations_from) for items in asked])
        with torch.autocast(llava.device.type, dtype=torch.bfloat16):
            logits, labels = module(features(rows), packed)
        weights = packed.weights[packed.weights > 0]
        loss = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        answers = labels != EOS_ID
        right = (logits.argmax(-1) == labels)[answers].float().mean()
        return loss, {"loss": loss.item(), "accuracy": right.item()}

    def evaluate() -> Figures:
        return accuracy(llava, tokenizer, validation, config)

    return run_stage("LLaVA", module, loss_of_step, evaluate, config.llava, folder / "llava.pt")


def conversations(asked: list[Question], rng: np.random.Generator) -> list[list[Question]]:
    """Divide questions, in random order, into conversations of one to four turns, about half of them of one."""
    drawn = [asked[index] for index in rng.permutation(len(asked))]
    held: list[list[Question]] = []
    while drawn:
        turns = _TURNS[rng.integers(len(_TURNS))]
        held.append(drawn[:turns])
        drawn = drawn[turns:]
    return held


def _group_turns(asked: list[Question], rng: np.random.Generator, several: bool) -> list[list[Question]]:
    return conversations(asked, rng) if several else [[question] for question in asked]


@torch.no_grad()
def accuracy(llava: LlavaForConditionalGeneration, tokenizer: Any, scenes: Scenes, config: TrainingConfig) -> Figures:
    """Share of right answers by kind, over the questions that `questions` asks of the validation scenes."""
    packer, module = Packer(tokenizer, config.side**2, llava.device), LlavaLoss(llava)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes.pictures), _BATCH):
        rows = range(start, min(start + _BATCH, len(scenes.pictures)))
        asked = [_standard_questions(scenes, row) for row in rows]
        features = tower_features(llava, scenes.pictures[start : start + _BATCH], config.image_size)
        with torch.autocast(llava.device.type, dtype=torch.bfloat16):
            logits, labels = module(features, packer.pack([[[item] for item in items] for items in asked]))
        hits = (logits.argmax(-1) == labels)[labels != EOS_ID].tolist()
        for question, hit in zip((item for items in asked for item in items), hits, strict=True):
            right[question.kind].append(hit)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}


def _standard_questions(scenes: Scenes, row: int) -> list[Question]:
    scene = Scene(Image.fromarray(scenes.pictures[row]), scene_objects(scenes.objects[row]))
    return questions(scene, VALIDATION_SEEDS[row])


__all__ = ["LlavaLoss", "accuracy", "conversations", "new_llava", "tower_features", "train_llava", "training_features"]
