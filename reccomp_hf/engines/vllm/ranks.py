"""Tensor parallelism: each rank has the whole vision tower, and the tokens that rank 0 chose are those of all."""

from __future__ import annotations

from torch import Tensor
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group


def of_first_rank(tensor: Tensor) -> Tensor:
    """The values that a tensor has on rank 0; its shape and dtype must be the same on all ranks.

    Saliency that differs in its last bit can rank two patches differently on two devices. Ranks that disagree about a
    token would add up parts of different features, and decode at different positions.
    """
    return get_tp_group().broadcast(tensor.contiguous(), src=0)


def check_ranks(model_config: ModelConfig, ranks: int) -> None:
    """Refuse a vision tower whose attention heads are divided among ranks, before anything is built.

    Args:
        model_config: The settings of a model with token recovery.
        ranks: Size of the tensor-parallel group.

    Raises:
        ValueError: The tower would be divided.
    """
    multimodal = model_config.multimodal_config
    if not model_config.hf_config.token_recovery.enabled or multimodal is None:
        return
    if multimodal.get_limit_per_prompt("image") > 0 and ranks > 1 and multimodal.mm_encoder_tp_mode != "data":
        raise ValueError(
            "Token recovery reads whole attention heads of the vision tower, which --tensor-parallel-size "
            f"{ranks} divides among ranks: add --mm-encoder-tp-mode data (mm_encoder_tp_mode='data' in Python), which "
            "gives every rank the whole tower and divides the language model."
        )


__all__ = ["check_ranks", "of_first_rank"]
