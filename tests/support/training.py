"""Rows, trainers and what a model sees of a batch, for the tests that train."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from reccomp_hf import CompressedTrainerMixin

BUDGET = 16
LORA = LoraConfig(r=4, target_modules="all-linear", exclude_modules=r".*vision_tower.*")
ANSWERS = ("a red circle", "two blue squares", "on the left", "nothing")


class CompressedSFTTrainer(CompressedTrainerMixin, SFTTrainer):
    """What the README shows."""


class Rows(torch.utils.data.Dataset):
    """Questions about pictures with their answers, in TRL's form; `images` pictures each."""

    def __init__(self, count: int = 8, images: int = 1, question: str = ""):
        self.count, self.images, self.question = count, images, question

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        pictures = tiny.pictures(self.images, seed=index)
        asked = self.question or tiny.SENTENCES[index % 3]
        return {
            "images": pictures,
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": ANSWERS[index % 4]}],
        }

    def dataset(self) -> Dataset:
        """As SFTTrainer takes them."""
        return Dataset.from_list([self[index] for index in range(len(self))])


def collator(processor: Any, **options: Any) -> Any:
    """TRL's own; the answers alone are labels."""
    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, **options)


def arguments(cls: type = TrainingArguments, **options: Any) -> Any:
    """Two steps of two rows on a CPU, in silence."""
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **options}
    if cls is SFTConfig:
        options = {"max_length": None, "bf16": False, "gradient_checkpointing": False, **options}
    return cls(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )


def adapted(architecture: Any, seed: int = 0, **fields: Any) -> Any:
    """A compressed model with fresh adapters on projector and language model."""
    torch.manual_seed(seed)
    return get_peft_model(architecture.build(**{"budget": BUDGET, "merged_tokens": 4, **fields}), LORA)


def trainer(architecture: Any, model: Any, rows: Rows | None = None, **options: Any) -> Trainer:
    """Transformers' Trainer with TRL's collator."""
    batches = collator(architecture.processor())
    return Trainer(model, arguments(**options), data_collator=batches, train_dataset=rows or Rows())


def sft_trainer(cls: type, architecture: Any, model: Any, rows: Rows | None = None, **options: Any) -> Any:
    """TRL's trainer, or ours on top of it."""
    data = (rows or Rows()).dataset()
    return cls(
        model,
        arguments(SFTConfig, completion_only_loss=True, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=architecture.processor(),
    )


@dataclasses.dataclass
class Seen:
    """Rows that the projector mapped, and widths and positions that the language model read, call by call."""

    projected: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Seen]:
    """Look at what the parts of a model are given."""
    seen, inner = Seen(), getattr(model, "base_model", model)
    while not hasattr(inner, "multi_modal_projector"):
        inner = inner.model
    hooks = [
        inner.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: seen.projected.append(args[0].shape[:-1].numel())
        ),
        inner.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
