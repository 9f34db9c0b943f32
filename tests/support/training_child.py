"""One rank of a distributed training on a CPU: `torchrun --nproc-per-node 2 training_child.py RESULT.json`."""

import json
import os
import sys

import torch
from architectures import LLAVA
from training import CompressedSFTTrainer, Rows, adapted, sft_trainer, trained, trainer, watched

KINDS = ("Trainer", "SFTTrainer")


def train(kind: str, ranks: int) -> tuple[torch.Tensor, list[int]]:
    """The trained weights after two steps of four rows, and the rows that this rank's projector mapped."""
    model = adapted(LLAVA)
    options = {"per_device_train_batch_size": 4 // ranks, "optim": "sgd", "learning_rate": 1.0}
    if ranks > 1:
        options["ddp_backend"] = "gloo"
    if kind == "Trainer":
        run = trainer(LLAVA, model, Rows(8), **options)
    else:
        run = sft_trainer(CompressedSFTTrainer, LLAVA, model, Rows(8), **options)
    with watched(model) as seen:
        run.train()
    assert run.accelerator.num_processes == ranks
    return torch.cat([value.flatten() for value in trained(model).values()]), seen.projected


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    facts = {}
    for name in KINDS:
        weights, projected = train(name, world)
        facts[name] = {"ranks": world, "projected": projected, "weights": weights.tolist()}
    if torch.distributed.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(facts, file)
    torch.distributed.destroy_process_group()
