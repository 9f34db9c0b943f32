"""LLaVA-NeXT in vLLM answers as in transformers, without newlines: pictures of any shape, one tile or five.

The weights are random, so that logits are compared besides the ids.
"""

import pytest
import tiny
import torch
from architectures import prompt_of
from next_model import SIZES
from vllm_engines import ask, engine, forget, prompt, reference, run
from vllm_next import NONE, QUESTIONS, ROWS, SHARE, expected, inputs_of, requests, save_checkpoint
from vllm_scenes import environment, loaded  # noqa: F401

from reccomp_hf.core.counting import picture_tokens

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def transformers(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def llm(folder):
    options = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 3}, "max_model_len": 2048}
    with engine(folder, hf_overrides={"token_recovery": NONE}, **options) as llm:
        yield llm


def compare_logits(llm, transformers, rows=ROWS, **fields):
    model = transformers[0]
    for row, output in zip(rows, run(llm, requests(rows), max_tokens=1, logprobs=20), strict=True):
        with torch.no_grad():
            logits = model(**inputs_of(transformers, *row), token_recovery={**NONE, **fields}).logits[0, -1]
        (entries,) = output.outputs[0].logprobs
        ids, found = [*entries], [entry.logprob for entry in entries.values()]
        torch.testing.assert_close(torch.tensor(found), logits.log_softmax(-1)[ids], rtol=0, atol=3e-4)


def test_newlines_that_depend_on_the_picture_are_refused(folder):
    message = r'newlines is "kept".*--hf-overrides .*"newlines": "none"'
    with pytest.raises(ValueError, match=message), engine(folder):
        pass


def test_original_positions(folder, transformers):
    """Of pictures of any shape, whose newlines have places too; with steps that divide prompts and pictures.

    It starts an engine of its own, and so stands before the tests of `llm`.
    """
    fields = {**NONE, "position_ids": "original", "budget": 24}
    # A prompt of 3 pictures takes more positions than the model has; a picture of one tile becomes 24 tokens as well.
    rows = [row for row in ROWS if len(row[0]) < 3]
    options = {"max_model_len": 2048, "max_num_batched_tokens": 80, "max_num_seqs": 4}
    with engine(folder, hf_overrides={"token_recovery": fields}, **options) as llm:
        assert (
            ask(llm, requests(rows)) == ask(llm, requests(rows)[::-1])[::-1] == expected(transformers, rows, **fields)
        )
        forget(llm)
        compare_logits(llm, transformers, rows, **fields)
        with pytest.raises(AssertionError):
            compare_logits(llm, transformers, rows, **{**fields, "position_ids": "compact"})


def test_answers_are_those_of_transformers(llm, transformers):
    wanted = expected(transformers)
    assert len({tuple(ids) for ids in wanted}) > len(ROWS) // 2
    forget(llm)
    assert ask(llm, requests()) == ask(llm, requests()[::-1])[::-1] == wanted
    forget(llm)
    assert [ask(llm, [request])[0] for request in requests()] == wanted


def test_logits_are_those_of_transformers(llm, transformers):
    compare_logits(llm, transformers)


@pytest.mark.parametrize("budget", [24, 0.05, SHARE])
def test_a_request_may_have_a_smaller_budget(llm, transformers, budget):
    rows = [row for row in ROWS if set(row[0]) <= {"wide", "tall", "large", "broad"}]
    outputs = run(llm, [*requests(rows, token_recovery={"budget": budget}), *requests(rows)])
    wanted = [*expected(transformers, rows, budget=budget), *expected(transformers, rows)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    image_token = transformers[0].config.image_token_id
    for (names, _), output in zip(rows, outputs, strict=False):
        patches = [picture_tokens(transformers[0].config, SIZES[name])[1] for name in names]
        tokens = [budget if budget > 1 else int(budget * count + 0.5) for count in patches]
        assert output.prompt_token_ids.count(image_token) == sum(tokens)


def test_a_budget_is_compared_for_each_picture(llm, transformers):
    """Of a large picture 45 tokens are less than its share, of a small one more."""
    rows = [(("large",), QUESTIONS[0]), (("tiny",), QUESTIONS[0])]
    assert ask(llm, requests(rows[:1], token_recovery={"budget": 45})) == expected(transformers, rows[:1], budget=45)
    with pytest.raises(ValueError, match=r"budget of 45 is 45 tokens of an image, more than the \d+ with which"):
        ask(llm, requests(rows, token_recovery={"budget": 45}))


def test_embeddings_of_any_length(llm, transformers):
    """Newlines do not matter here: the model reads the embeddings as they are sent."""
    model, rows, batch, wanted = transformers[0], ROWS[:9:2] + ROWS[-3:-1], [], []
    for names, question in rows:
        inputs, fields = inputs_of(transformers, names, question), {"budget": None}
        with torch.no_grad():
            short, _ = model.compress_inputs(**inputs, token_recovery=fields)
            counts = model(**inputs, token_recovery=fields)
        tokens = short["inputs_embeds"][short["input_ids"] == model.config.image_token_id]
        lengths = (counts.visual_token_counts + counts.newline_counts).tolist()
        batch.append(prompt(prompt_of(question, len(names)), list(tokens.split(lengths))))
        wanted.append(reference(model, inputs, **fields))
    assert ask(llm, [*batch, *requests(ROWS[:3])]) == wanted + expected(transformers, ROWS[:3])


def test_switched_off_it_is_the_stock_model(folder, transformers):
    with engine(folder, hf_overrides={"token_recovery": {"enabled": False}}, max_model_len=2048) as llm:
        assert ask(llm, requests(ROWS[:12])) == expected(transformers, ROWS[:12], enabled=False)


def test_profiling_takes_the_picture_of_most_tiles(llm):
    size = llm.renderer.mm_processor.info.get_image_size_with_most_features()
    assert (size.width, size.height) == (2 * tiny.IMAGE_SIZE, 2 * tiny.IMAGE_SIZE)
