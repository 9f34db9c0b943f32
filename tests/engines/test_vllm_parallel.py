"""Tensor parallelism: two processes on a CPU answer as transformers does, by the tokens that the first one chose."""

import pytest
import torch
from vllm_engines import ask, engine, forget, prompt, reference
from vllm_scenes import PAIRS, QUESTIONS, SCENES, environment, loaded, requests, scene, user, wanted  # noqa: F401

from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

DEMO = checkpoint_folder("demo")


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO)


@pytest.fixture(scope="module")
def llm(environment):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for functions that `apply_model` sends
        with engine(DEMO, tensor_parallel_size=2, mm_encoder_tp_mode="data", limit_mm_per_prompt={"image": 2}) as llm:
            yield llm


# ---- functions that run in each process, which imports this module ------------------------------------------------


def heads(model):
    tower, language_model = model.vision_tower.vision_model, model.language_model.model
    return tower.encoder.layers[0].self_attn.tp_size, language_model.layers[0].self_attn.num_heads


def change_the_second_tower(model):
    weight, generator = model.vision_tower.vision_model.pre_layrnorm.weight, torch.Generator().manual_seed(0)
    if torch.distributed.get_rank() == 1:
        weight.data += torch.randn(weight.shape, generator=generator)


def decide_alone(model):
    from reccomp_hf.engines.vllm import models

    models.of_first_rank = lambda tensor: tensor


# --------------------------------------------------------------------------------------------------------------------


def test_the_language_model_is_divided_and_the_tower_is_not(llm):
    assert llm.apply_model(heads) == [(1, 2), (1, 2)]  # of the 4 heads of the language model


def test_answers_are_those_of_transformers(llm, demo):
    right = wanted(demo)
    assert ask(llm, requests()) == ask(llm, requests()) == right
    forget(llm)
    assert ask(llm, requests()[::-1]) == right[::-1]
    smaller = requests(PAIRS[:6], token_recovery={"budget": 4})
    assert ask(llm, smaller) == wanted(demo, PAIRS[:6], budget=4)
    model, processor = demo
    two = processor(images=[*map(scene, SCENES[:2])], text=user(QUESTIONS[1], 2), return_tensors="pt")
    assert ask(llm, [prompt(user(QUESTIONS[1], 2), [*map(scene, SCENES[:2])])]) == [reference(model, two)]


def test_the_first_rank_decides(llm, demo):
    """Another tower on the other rank stands for the last bits that may differ between devices."""

    llm.apply_model(change_the_second_tower)
    forget(llm)
    assert ask(llm, requests()) == wanted(demo)
    llm.apply_model(decide_alone)  # the control; the engine is not used afterwards
    forget(llm)
    assert ask(llm, requests()) != wanted(demo)
