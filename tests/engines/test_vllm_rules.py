"""Rules by question in vLLM: the ids of transformers, whatever is asked together or again.

Run with `pytest -m vllm` where vLLM is installed.
"""

import pytest
import torch
from vllm_engines import ask, copy_checkpoint, engine, forget, reference, run
from vllm_scenes import PAIRS, environment, requests, scene, user  # noqa: F401

from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

COMMON = 12
RULES = [
    {"begins": "How many", "budget": 30},
    {"begins": "is there", "method": "trim", "budget": 5},
    {"begins": "what color", "text_share": 0.0, "budget": 0.05},
]
TOKENS = [COMMON, 30, 7, 5]  # of QUESTIONS, in their order
SETTINGS = {"budget": COMMON, "position_ids": "compact", "text_limit": "outliers", "text_by": "similarity"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("rules") / "checkpoint"
    return copy_checkpoint(checkpoint_folder("demo"), target, **SETTINGS, rules=RULES)


def test_answers_are_those_of_transformers_under_the_questions_rule(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    wanted, small = [], []
    for number, question in PAIRS:
        inputs = processor(images=scene(number), text=user(question), return_tensors="pt")
        wanted.append(reference(model, inputs))
        small.append(reference(model, inputs, budget=4))
    assert wanted != small
    with engine(folder) as llm:
        assert ask(llm, requests()) == ask(llm, requests()) == wanted
        forget(llm)
        outputs = run(llm, requests()[::-1])[::-1]
        assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
        image_token = model.config.image_token_id
        held = [output.prompt_token_ids.count(image_token) for output in outputs]
        assert held == TOKENS * (len(PAIRS) // 4)
        assert ask(llm, requests(token_recovery={"budget": 4})) == small
        both = ask(llm, [*requests(PAIRS[:4]), *requests(PAIRS[:4], token_recovery={"budget": 4})])
        assert both == wanted[:4] + small[:4]
        with pytest.raises(ValueError, match="31 is 31 tokens of an image, more than the 30"):
            ask(llm, requests(PAIRS[:1], token_recovery={"budget": 31}))
