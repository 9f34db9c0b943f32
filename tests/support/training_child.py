"""Two ranks of a distributed training on a CPU: `training_child.py RESULT.json` forks them; both import once."""

import json
import os
import socket
import sys

import torch
import torch.multiprocessing
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


def rank(number: int, count: int, port: int, result: str) -> None:
    """One of the ranks, with the environment that torchrun gives it; the first one writes the facts."""
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(number)}
    os.environ |= {"LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    facts = {}
    for name in KINDS:
        weights, projected = train(name, count)
        facts[name] = {"ranks": count, "projected": projected, "weights": weights.tolist()}
    if number == 0:
        with open(result, "w", encoding="utf-8") as file:
            json.dump(facts, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(rank, (2, port, sys.argv[1]), nprocs=2, start_method="fork")
