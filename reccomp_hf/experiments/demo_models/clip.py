"""The CLIP of a demo model: a sigmoid contrastive loss, and for one model a region loss with the objects' boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from ...core import compat
from ...demo.scenes import COLORS, IMAGE_SIZE, LETTERS, SHAPES, SIGN
from .config import TrainingConfig
from .data import NOTHING, Scenes, batch_rows, pixel_values
from .loop import Figures, run_stage
from .texts import ANY, Kind, TextTable, matches, truths
from .tokenizers import CLIP_TEXT_LENGTH

_INITIAL_SCALE, _INITIAL_BIAS = 10.0, -3.0  # of cosines that become logits
_CONTRASTIVE_WEIGHT, _REGION_WEIGHT = 10.0, 2.0
_BACKGROUND_WEIGHT = 0.5  # of patches on no object, in the region loss
_POSITION_AMPLITUDE = 0.3  # of the sines that the position table starts from
_TEXT_STREAM = 21  # second word of the seed of the texts of a step
_EVALUATION_BATCH = 64


def new_clip(config: TrainingConfig, tokenizer: Any) -> CLIPModel:
    """A CLIP with random weights, its patch positions starting as sines of row and column.

    Shape depends on neighbouring patches, which takes long to learn from a table near zero.
    """
    torch.manual_seed(config.clip.seed)
    width = config.vision_width
    vision = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "hidden_act": "gelu",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "projection_dim": config.text_width,
    }
    text = {
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.heads,
        "hidden_act": "gelu",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CLIP_TEXT_LENGTH,
        "projection_dim": config.text_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    full = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.text_width)
    model = CLIPModel._from_config(full, attn_implementation="eager")
    with torch.no_grad():
        model.logit_scale.fill_(math.log(_INITIAL_SCALE))
        table = model.vision_model.embeddings.position_embedding.weight
        table[1:] = _POSITION_AMPLITUDE * _sines(config.side, width)
    return model


def _sines(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, width)."""
    frequencies = torch.from_numpy(np.geomspace(2.0, 0.1, width // 4)).float()
    angles = torch.arange(float(side))[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = along[:, None].expand(side, side, -1), along[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


class ClipLoss(nn.Module):
    """A CLIP with the additional parameters of its training: biases, and the scale of the region loss.

    Args:
        clip: The model, trained in place.
        table: All texts.
        config: Sizes.
        boxes: Whether to add the region loss, which trains patches on the texts that are true of their object.
    """

    def __init__(self, clip: CLIPModel, table: TextTable, config: TrainingConfig, boxes: bool) -> None:
        super().__init__()
        self.clip, self.table, self.config, self.boxes = clip, table, config, boxes
        self.bias = nn.Parameter(torch.tensor(_INITIAL_BIAS))
        if boxes:
            self.region_log_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_SCALE)))
            self.region_bias = nn.Parameter(torch.tensor(_INITIAL_BIAS))

    def embed_pictures(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images (B, 96, 96, 3) and of their patches: (B, D) and (B, patches, D), float32."""
        tower = self.clip.vision_model
        output = tower(pixel_values=pixel_values(pictures, self.config.image_size, self.bias.device))
        whole = self.clip.visual_projection(output.pooler_output)
        if not self.boxes:
            return functional.normalize(whole.float(), dim=-1), whole[:, None]
        patches = self.clip.visual_projection(tower.post_layernorm(output.last_hidden_state[:, 1:]))
        return functional.normalize(whole.float(), dim=-1), functional.normalize(patches.float(), dim=-1)

    def embed_close_ups(self, pictures: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Unit embeddings (B, D), float32, of images (B, 48, 48, 3), each at a random place of the position table."""
        tower, side, within = self.clip.vision_model, self.config.side, self.config.close_up_side
        pixels = pixel_values(pictures, within * self.config.patch_size, self.bias.device)
        embeddings = tower.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, within * within, C)
        corners = torch.from_numpy(rng.integers(side - within + 1, size=(len(pictures), 2)))
        grid = torch.arange(within)
        rows, columns = (corners[:, axis, None] + grid for axis in range(2))
        places = 1 + (rows[:, :, None] * side + columns[:, None]).flatten(1).to(pixels.device)
        first = (embeddings.class_embedding + embeddings.position_embedding.weight[0]).expand(len(patches), 1, -1)
        states = tower.pre_layrnorm(torch.cat([first, patches + embeddings.position_embedding(places)], dim=1))
        for block in tower.encoder.layers:
            states = compat.run_block(block, states)
        whole = self.clip.visual_projection(tower.post_layernorm(states[:, 0]))
        return functional.normalize(whole.float(), dim=-1)

    def embed_texts(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings of texts of the table: (T, D), float32."""
        device, chosen = self.bias.device, torch.from_numpy(rows)
        output = self.clip.text_model(
            input_ids=self.table.input_ids[chosen].to(device),
            attention_mask=self.table.attention_mask[chosen].to(device),
        )
        return functional.normalize(self.clip.text_projection(output.pooler_output).float(), dim=-1)

    def forward(
        self,
        pictures: np.ndarray,
        close_ups: np.ndarray,
        objects: np.ndarray,
        rows: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Figures]:
        """Loss of images (B, 96, 96, 3) and close-ups (S, 48, 48, 3) with objects (B + S, 5, 6) and texts (T,)."""
        about, device = self.table.kinds[rows], self.bias.device
        whole, patches = self.embed_pictures(pictures)
        whole = torch.cat([whole, self.embed_close_ups(close_ups, rng)])
        texts = self.embed_texts(rows)
        logits = self.clip.logit_scale.exp() * _cosines(whole, texts) + self.bias
        true = truths(objects, about).to(device)
        contrastive = _CONTRASTIVE_WEIGHT * functional.binary_cross_entropy_with_logits(logits, true)
        if not self.boxes:
            return contrastive, {"contrastive": contrastive.item()}
        few = self.config.region_texts
        region = self._region_loss(patches, texts[:few], objects[: len(pictures)], about[:few])
        return contrastive + _REGION_WEIGHT * region, {"contrastive": contrastive.item(), "region": region.item()}

    def _region_loss(self, patches: Tensor, texts: Tensor, objects: np.ndarray, about: np.ndarray) -> Tensor:
        """Cross-entropy of every patch with every text; three parts, each a mean, as most patches lie on no object."""
        inside = torch.from_numpy(patches_inside(objects, self.config)).to(patches.device).float()  # (B, 5, P)
        matching = torch.from_numpy(matches(objects, about)).to(patches.device).float()  # (B, 5, T)
        true = (inside.transpose(1, 2) @ matching > 0).float()  # (B, P, T)
        on_object = inside.amax(1)[:, :, None]  # (B, P, 1)
        others, background = on_object * (1 - true), (1 - on_object).expand_as(true)
        logits = self.region_log_scale.exp() * _cosines(patches, texts) + self.region_bias
        positive = (functional.softplus(-logits) * true).sum() / (true.sum() + 1)
        negative = functional.softplus(logits)
        mistaken = (negative * others).sum() / (others.sum() + 1)
        empty = (negative * background).sum() / (background.sum() + 1)
        return positive + mistaken + _BACKGROUND_WEIGHT * empty


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines (..., T) of unit vectors (..., D) and (T, D), which bfloat16 would round to two digits."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other.T


def patches_inside(objects: np.ndarray, config: TrainingConfig) -> np.ndarray:
    """Mask of the patches whose centre lies in an object's box: (B, 5, 6) -> (B, 5, patches), bool."""
    centres = (np.arange(config.side) + 0.5) * config.patch_size * IMAGE_SIZE / config.image_size
    down, right = (axis.ravel() for axis in np.meshgrid(centres, centres, indexing="ij"))
    x, y, size = (objects[:, :, None, column] for column in (3, 4, 5))
    present = objects[:, :, None, 0] != NOTHING
    return present & (right >= x) & (right < x + size) & (down >= y) & (down < y + size)


def train_clip(
    clip: CLIPModel,
    tokenizer: Any,
    scenes: Scenes,
    close_ups: Scenes,
    validation: Scenes,
    config: TrainingConfig,
    boxes: bool,
    state_file: Path,
) -> list[Figures]:
    """Train a CLIP in place; see [`run_stage`] for resuming.

    Args:
        clip: The model, on the device to train on.
        tokenizer: CLIP's tokenizer.
        scenes: Training scenes.
        close_ups: Training images of one object each.
        validation: Validation scenes, evaluated every `evaluate_every` steps.
        config: Sizes and lengths.
        boxes: Whether to add the region loss.
        state_file: File of the training state.

    Returns:
        The reported figures.
    """
    table = TextTable(tokenizer)
    module = ClipLoss(clip, table, config, boxes).to(clip.device)

    def loss_of_step(step: int) -> tuple[Tensor, Figures]:
        rows = batch_rows(step, config.clip.images, len(scenes.objects), config.clip.seed)
        near = batch_rows(step, config.close_ups_per_step, len(close_ups.objects), config.clip.seed)
        objects = np.concatenate([scenes.objects[rows], close_ups.objects[near]])
        rng = np.random.default_rng([config.clip.seed, _TEXT_STREAM, step])
        letters = config.letter_texts if step >= config.letters_from else 0.0
        texts = table.draw(objects, config.texts, rng, letters)
        with torch.autocast(clip.device.type, dtype=torch.bfloat16):
            return module(scenes.pictures[rows], close_ups.pictures[near], objects, texts, rng)

    def evaluate() -> Figures:
        return retrieval(module, validation)

    return run_stage("CLIP", module, loss_of_step, evaluate, config.clip, state_file)


@torch.no_grad()
def retrieval(module: ClipLoss, scenes: Scenes) -> Figures:
    """Average precision of retrieval between images and texts about colors, shapes, letters and pairs of them."""
    embedded = []
    with torch.autocast(module.bias.device.type, dtype=torch.bfloat16):
        for start in range(0, len(scenes.pictures), _EVALUATION_BATCH):
            embedded.append(module.embed_pictures(scenes.pictures[start : start + _EVALUATION_BATCH])[0])
        pictures, figures = torch.cat(embedded), {}
        colors, shapes, letters = range(len(COLORS)), range(len(SHAPES)), range(len(LETTERS))
        sign = SHAPES.index(SIGN)
        groups: dict[str, list[Kind]] = {
            "color": [(color, ANY, ANY) for color in colors],
            "shape": [(ANY, shape, ANY) for shape in shapes],
            "color and shape": [(color, shape, ANY) for color in colors for shape in shapes],
            "letter": [(ANY, sign, letter) for letter in letters],
            "color and letter": [(color, sign, letter) for color in colors for letter in letters],
        }
        for name, group in groups.items():
            texts = module.embed_texts(np.array([module.table.first(kind) for kind in group]))
            true = truths(scenes.objects, np.array(group)).numpy()
            figures[f"AP {name}"] = average_precision(_cosines(pictures, texts).cpu().numpy(), true)
    return figures


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Mean, over all true pairs, of the share of true pairs among those with at least as high a score."""
    ranked = true.ravel()[np.argsort(-scores.ravel(), kind="stable")] > 0
    precision = ranked.cumsum() / np.arange(1, ranked.size + 1)
    return round(float(precision[ranked].mean()), 4) if ranked.any() else 0.0


__all__ = ["ClipLoss", "average_precision", "new_clip", "patches_inside", "retrieval", "train_clip"]
