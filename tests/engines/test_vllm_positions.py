"""Original positions in vLLM: `balanced` is served as it is, and answers as in transformers."""

import types

import pytest
import torch
from vllm_engines import ask, engine, forget, prompt, reference, run
from vllm_scenes import QUESTIONS, environment, loaded, requests, scene, user, wanted  # noqa: F401

from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PAIRS = [(number, question) for number in range(1_000_000, 1_000_010) for question in QUESTIONS]
FEW = PAIRS[:8]
# Steps of 48 tokens divide prompts anywhere, also within an image of 16 tokens.
CHUNKED = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 4}}


@pytest.fixture(scope="module", params=["demo", "demo-global"])
def served(request):
    """The engine, and model and processor in transformers."""
    folder = checkpoint_folder(request.param)
    transformers = loaded(folder)
    assert transformers[0].config.token_recovery.position_ids == "original"
    with engine(folder, **CHUNKED) as llm:
        yield llm, transformers


def test_answers_are_those_of_transformers(served):
    llm, transformers = served
    right = wanted(transformers, PAIRS)
    assert len({*map(tuple, right)}) > 10
    forget(llm)
    assert ask(llm, requests(PAIRS)) == ask(llm, requests(PAIRS)) == right
    forget(llm)
    assert [ask(llm, [request])[0] for request in requests(FEW)] == right[: len(FEW)]


def test_logits_are_those_at_original_positions_and_not_at_consecutive_ones(served):
    """The control: an answer often stays the same at consecutive positions, its probabilities do not."""
    llm, (model, processor) = served
    forget(llm)
    for step in ("cold", "warm"):
        outputs, consecutive = run(llm, requests(FEW), max_tokens=1, logprobs=20), []
        for (number, question), output in zip(FEW, outputs, strict=True):
            inputs = processor(images=scene(number), text=user(question), return_tensors="pt")
            (entries,) = output.outputs[0].logprobs
            ids, found = [*entries], torch.tensor([entry.logprob for entry in entries.values()])
            with torch.no_grad():
                logits = {
                    name: model(**inputs, token_recovery={"position_ids": name}).logits[0, -1].log_softmax(-1)[ids]
                    for name in ("original", "compact")
                }
            torch.testing.assert_close(found, logits["original"], rtol=1e-3, atol=1e-3, msg=step)
            consecutive.append(float((found - logits["compact"]).abs().max()))
        assert min(consecutive) > 0.05, consecutive


def test_several_pictures(served):
    llm, (model, processor) = served
    cases = [
        (range(first, first + count), question)
        for first in (1_000_000, 1_000_004)
        for count in (2, 3)
        for question in QUESTIONS
    ]
    batch = [prompt(user(question, len(numbers)), [*map(scene, numbers)]) for numbers, question in cases]
    right = [
        reference(
            model,
            dict(processor(images=[*map(scene, numbers)], text=user(question, len(numbers)), return_tensors="pt")),
        )
        for numbers, question in cases
    ]
    forget(llm)
    assert ask(llm, batch) == ask(llm, batch) == right


@pytest.mark.parametrize("budget", [4, 0.05, 1])
def test_a_request_may_have_a_smaller_budget(served, budget):
    llm, transformers = served
    batch = [*requests(FEW, token_recovery={"budget": budget}), *requests(FEW)]
    assert ask(llm, batch) == [*wanted(transformers, FEW, budget=budget), *wanted(transformers, FEW)]


def test_text_alone_and_pictures_together(served):
    llm, (model, processor) = served
    text = user(QUESTIONS[0], 0)
    alone = reference(model, dict(processor(text=text, return_tensors="pt")))
    assert ask(llm, [prompt(text), *requests(FEW), prompt(text)]) == [alone, *wanted((model, processor), FEW), alone]


def test_a_prompt_of_too_many_positions_is_refused(served):
    """Four pictures are 64 tokens, but 576 positions of a model that has 512."""
    llm, transformers = served
    numbers = range(1_000_000, 1_000_004)
    with pytest.raises(ValueError, match=r"takes \d{3} of the language model's 512 positions.*compact"):
        ask(llm, [prompt(user(QUESTIONS[0], 4), [*map(scene, numbers)])])
    assert ask(llm, requests(FEW[:1])) == wanted(transformers, FEW[:1])


def test_answers_past_the_models_positions_are_those_of_transformers(served):
    """A prompt of 3 pictures ends near position 460: an answer of 100 tokens goes past 512, and stays finite."""
    llm, (model, processor) = served
    numbers, text = range(1_000_000, 1_000_003), user(QUESTIONS[0], 3)
    inputs = processor(images=[*map(scene, numbers)], text=text, return_tensors="pt")
    assert 412 < inputs["input_ids"].shape[1] < 512
    (output,) = run(llm, [prompt(text, [*map(scene, numbers)])], max_tokens=100, min_tokens=100)
    answer = model.generate(**inputs, max_new_tokens=100, min_new_tokens=100, do_sample=False)[0]
    assert list(output.outputs[0].token_ids) == answer[inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("parallel", "speculative", "rope", "message"),
    [
        (2, None, {}, "with pipeline parallelism in vLLM"),
        (1, object(), {}, "with speculative decoding in vLLM"),
        (1, None, {"rope_type": "yarn"}, "with rotary embeddings of the type 'yarn' in vLLM"),
        (1, None, {"rope_type": "llama3"}, None),
    ],
)
def test_settings_that_would_change_positions_are_refused(parallel, speculative, rope, message):
    from reccomp_hf.engines.vllm.settings import RecoverySettings

    text = types.SimpleNamespace(rope_parameters=rope)
    given = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            uses_mrope=True,
            hf_text_config=text,
            hf_config=types.SimpleNamespace(token_recovery=types.SimpleNamespace(enabled=True)),
            multimodal_config=None,
        ),
        parallel_config=types.SimpleNamespace(
            pipeline_parallel_size=parallel, tensor_parallel_size=1, worker_cls="auto"
        ),
        speculative_config=speculative,
    )
    if message is None:
        RecoverySettings.verify_and_update_config(given)
        assert given.parallel_config.worker_cls.endswith("PlacesCPUWorker")
        return
    with pytest.raises(ValueError, match=rf"{message}.*--hf-overrides .*compact"):
        RecoverySettings.verify_and_update_config(given)


def test_without_the_runners_hook_the_first_picture_is_an_error():
    """vLLM's CPU runner does not switch the hook on by itself; were it off, no answer would be silently wrong."""
    folder = checkpoint_folder("demo")
    with engine(folder) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert type(worker).__name__ == "PlacesCPUWorker"
        assert worker.model_runner.is_multimodal_pruning_enabled is True
        worker.model_runner.is_multimodal_pruning_enabled = False
        with pytest.raises((RuntimeError, ValueError)):
            ask(llm, requests(FEW[:1]))
