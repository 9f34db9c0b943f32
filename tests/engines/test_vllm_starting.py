"""Checkpoints that vLLM starts with or refuses; the advice of each refusal is tried."""

import pytest
import vllm_engines
from vllm_engines import ask, copy_checkpoint, drop_recovery_tokenizer, engine, prompt, renamed
from vllm_scenes import (  # noqa: F401
    BUDGET,
    COMPACT,
    DEMO,
    PAIRS,
    PAPER,
    SCENES,
    embeddings,
    environment,
    loaded,
    requests,
    user,
    wanted,
)

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO)


REFUSED = {
    "positions of embeddings": (
        {},
        {"enable_mm_embeds": True},
        r'image_embeds do not say the positions.*--hf-overrides .*"position_ids": "compact"',
    ),
    "a divided tower": (
        {},
        {"tensor_parallel_size": 2},
        r"--tensor-parallel-size 2 divides among ranks: add --mm-encoder-tp-mode data",
    ),
    "speculation": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        r"with speculative decoding in vLLM",
    ),
    "dynamic": (
        {**COMPACT, "budget": None},
        {},
        r'budget is null.*--hf-overrides .*"budget": 64.*image_embeds, with --enable-mm-embeds .*"image": 0',
    ),
    "dynamic, embeddings too": ({**COMPACT, "budget": None}, {"enable_mm_embeds": True}, r"budget is null"),
    "no budget": (
        {**COMPACT, "method": "authors", "budget": None},
        {},
        r"'authors' has no budget.*\"method\": \"recoverable\", \"budget\": 64",
    ),
    "too large": ({**COMPACT, "budget": 145}, {}, r"budget is 145, but an image has only 144 patches"),
    "unknown field": (
        {**COMPACT, "budgets": 64},
        {},
        r"Unknown token_recovery field 'budgets'; did you mean 'budget'",
    ),
    "processor arguments": (
        COMPACT,
        {"mm_processor_kwargs": {"token_recovery": {"budget": 8}}},
        r"--mm-processor-kwargs contain 'token_recovery'.*--hf-overrides",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_start(name):
    fields, options, message = REFUSED[name]
    overrides = {"hf_overrides": {"token_recovery": fields}} if fields else {}
    with pytest.raises(ValueError, match=message), engine(DEMO, **overrides, **options):
        pass


def test_overrides_and_the_keys_of_modules(tmp_path, demo):
    """The refusals' advice for positions and for a dynamic checkpoint, on keys by the names of the modules."""
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "modules", budget=None)
    fields = {**COMPACT, "budget": 24, "merged_tokens": 4, "text_limit": "share"}
    with engine(folder, hf_overrides={"token_recovery": fields}) as llm:
        assert ask(llm, requests()) == wanted(demo, **fields)


def test_a_visual_only_checkpoint_of_4x(tmp_path):
    """Without CLIP's text side; a question changes nothing, so that a picture is encoded once for all of them."""
    fields = {"method": "divprune", "text_encoder_config": None, "budget": BUDGET, **COMPACT}
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "4x", **fields)
    ours, seen = loaded(folder), []
    with engine(folder) as llm:
        (handle,) = llm.apply_model(
            lambda model: model.vision_tower.vision_model.pre_layrnorm.register_forward_pre_hook(
                lambda module, args: seen.append(len(args[0]))
            )
        )
        assert ask(llm, requests()) == wanted(ours)
        handle.remove()
    assert sum(seen) == len(SCENES)


def test_switched_off_it_is_the_stock_model(demo):
    with engine(DEMO, hf_overrides={"token_recovery": {"enabled": False}}) as llm:
        assert ask(llm, requests()) == wanted(demo, enabled=False)
        with pytest.raises(ValueError, match=r"token recovery enabled; got 8 with enabled=False"):
            ask(llm, requests(PAIRS[:1], token_recovery={"budget": 8}))


def test_a_dynamic_checkpoint_serves_embeddings_alone(demo):
    """The other way out of a dynamic count: no vision tower is there, and pictures are refused."""
    from vllm.exceptions import VLLMValidationError

    batch, answers = [], []
    for number, question in PAIRS[:6]:
        tokens, ids = embeddings(demo, user(question), (number,), **PAPER, **COMPACT)
        batch, answers = [*batch, prompt(user(question), tokens)], [*answers, ids]
    assert len({len(request["multi_modal_data"]["image"][0]) for request in batch}) > 3
    options = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    with engine(DEMO, hf_overrides={"token_recovery": {**PAPER, **COMPACT}}, **options) as llm:
        assert ask(llm, batch) == answers
        with pytest.raises(VLLMValidationError, match=r"At most 0 image"):
            ask(llm, requests(PAIRS[:1]))


def test_a_checkpoint_without_the_text_side_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", **COMPACT)
    weights = load_file(folder / "model.safetensors")
    weights.pop("token_recovery.visual_projection.weight")
    save_file(weights, folder / "model.safetensors")
    message = r"lacks 1 weights of CLIP's text encoder, among them token_recovery.visual_projection"
    with pytest.raises(ValueError, match=message), engine(folder):
        pass


def test_a_processor_without_the_text_sides_tokenizer_is_refused(tmp_path):
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", **COMPACT)
    drop_recovery_tokenizer(folder)
    message = r'has no recovery_tokenizer.*--hf-overrides .*"text_share": 0.0'
    with pytest.raises(ValueError, match=message), engine(folder):
        pass
    ours = loaded(folder)
    with engine(folder, hf_overrides={"token_recovery": {"text_share": 0.0}}) as llm:
        assert ask(llm, requests(PAIRS[:8])) == wanted(ours, PAIRS[:8], text_share=0.0)


def test_an_engine_in_a_process_of_its_own(tmp_path, demo, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "4x")
    with engine(folder) as llm:
        assert ask(llm, requests()) == ask(llm, requests()) == wanted(demo)
        smaller = requests(PAIRS[:4], token_recovery={"budget": 4})
        assert ask(llm, smaller) == wanted(demo, PAIRS[:4], budget=4)


def test_layouts_differ():
    """Of the keys that the three checkpoints above are written with."""
    key = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    names = {layout: renamed(key, layout) for layout in vllm_engines.LAYOUTS}
    assert len({*names.values()}) == 3, names
