"""Parts of other models in two processes: adapters, int8 weights and the positions that the demo does not have."""

import json

import pytest
import torch
import vllm_next
from vllm_engines import ask, copy_checkpoint, engine
from vllm_scenes import QUESTIONS, environment, loaded, requests, wanted  # noqa: F401

from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PARTS = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
PAIRS = [(1_000_000 + number, question) for number in range(6) for question in QUESTIONS]
LANGUAGE_MODEL, PROJECTOR = r".*language_model.*(q_proj|v_proj|down_proj)", r".*multi_modal_projector.linear_1"


@pytest.fixture(scope="module", autouse=True)
def cores(environment):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


def add_adapter(model, modules, seed):
    """The model with an adapter whose weights change answers."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=modules))
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return model


def test_adapters_and_consecutive_positions(tmp_path):
    """A projector's adapter is merged, or refused; the language model's is divided among the processes."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = copy_checkpoint(checkpoint_folder("demo"), tmp_path / "demo", position_ids="compact")
    model, processor = loaded(folder)
    before = wanted((model, processor), PAIRS)
    model = add_adapter(model, PROJECTOR, seed=0)
    model.save_pretrained(tmp_path / "projector")
    for part in (model.merge_and_unload(), processor):
        part.save_pretrained(tmp_path / "merged")
    model, _ = merged = loaded(tmp_path / "merged")
    right = wanted(merged, PAIRS)
    adapted = add_adapter(model, LANGUAGE_MODEL, seed=1).eval()
    adapted.save_pretrained(tmp_path / "language")
    other = wanted((adapted, processor), PAIRS)
    assert before != right != other
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["token_recovery"]["position_ids"] == "compact"

    with engine(tmp_path / "merged", **PARTS, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        greedy, lora = SamplingParams(temperature=0, max_tokens=5), LoRARequest("a", 1, str(tmp_path / "language"))
        for use in ([None] * 24, [lora] * 24, [lora, None] * 12):
            outputs = llm.generate(requests(PAIRS), greedy, lora_request=use, use_tqdm=False)
            expected = [(other if one else right)[row] for row, one in enumerate(use)]
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        with pytest.raises(Exception, match=r"adapter trains .*multi_modal_projector.*Merge the adapter"):
            llm.llm_engine.add_lora(LoRARequest("b", 2, str(tmp_path / "projector")))
        assert ask(llm, requests(PAIRS[:4])) == right[:4]


def test_int8_weights(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig

    demo = checkpoint_folder("demo")
    how = {"dtype": torch.float32, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    for part in (AutoModelForImageTextToText.from_pretrained(demo, **how), AutoProcessor.from_pretrained(demo)):
        part.save_pretrained(tmp_path / "int8")
    pairs = [(1_000_004 + number, question) for number in range(6) for question in QUESTIONS]
    right = wanted(loaded(tmp_path / "int8"), pairs)
    assert right != wanted(loaded(demo), pairs)  # one answer
    with engine(tmp_path / "int8", **PARTS) as llm:
        assert ask(llm, requests(pairs)) == right


def test_a_llava_next_at_original_positions(tmp_path):
    folder = vllm_next.save_checkpoint(tmp_path)
    transformers = loaded(folder)
    fields = {**vllm_next.NONE, "position_ids": "original"}
    right = vllm_next.expected(transformers, **fields)
    assert right != vllm_next.expected(transformers)
    options = {"hf_overrides": {"token_recovery": fields}, "limit_mm_per_prompt": {"image": 3}}
    with engine(folder, **PARTS, **options, max_model_len=2048) as llm:
        batch = vllm_next.requests()
        assert ask(llm, batch) == ask(llm, batch[::-1])[::-1] == right
