"""Two processes on a CPU answer as transformers does: two models, or parts of one, of which the first chooses."""

import asyncio

import pytest
import torch
import vllm_next
from vllm_engines import NEW_TOKENS, ask, engine, forget, prompt, reference
from vllm_scenes import DEMO, PAIRS, QUESTIONS, SCENES, environment, loaded, requests, scene, user, wanted  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PARTS = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO)


@pytest.fixture(scope="module", autouse=True)
def cores(environment):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


@pytest.fixture(scope="module")
def llm(cores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for functions that `apply_model` sends
        with engine(DEMO, **PARTS, limit_mm_per_prompt={"image": 2}) as llm:
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


def test_a_llava_next_at_consecutive_positions(tmp_path):
    """It starts an engine of its own, and so stands before the tests of `llm`, a LLaVA-1.5 at original positions."""
    folder = vllm_next.save_checkpoint(tmp_path)
    right = vllm_next.expected(loaded(folder))
    assert len({*map(tuple, right)}) > len(vllm_next.ROWS) // 2
    options = {"hf_overrides": {"token_recovery": vllm_next.NONE}, "limit_mm_per_prompt": {"image": 3}}
    with engine(folder, **PARTS, **options, max_model_len=2048) as llm:
        batch = vllm_next.requests()
        assert ask(llm, batch) == ask(llm, batch[::-1])[::-1] == right


def test_two_models_share_the_requests(demo, monkeypatch):
    """Data parallelism. A request may say which of the two answers it; the others go to either."""
    # vLLM 0.33 wants a memory node for each model, unless this is set; 0 simulates nothing.
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64}

    async def answer(llm, name, request, rank):
        async for output in llm.generate(request, greedy, name, data_parallel_rank=rank):
            ids = list(output.outputs[0].token_ids)
        return ids

    async def answers():
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(DEMO), data_parallel_size=2, **options))
        try:
            batch = [(rank, request) for rank in (0, 1, None) for request in requests()]
            asked = (answer(llm, str(name), request, rank) for name, (rank, request) in enumerate(batch))
            return await asyncio.gather(*asked)
        finally:
            llm.shutdown()

    assert asyncio.run(answers()) == wanted(demo) * 3


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
