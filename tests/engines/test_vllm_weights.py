"""No weight is lost on the way into vLLM: adapters and quantised weights answer as in transformers, or are refused."""

import pytest
import torch
from vllm_engines import ask, copy_checkpoint, engine, reference
from vllm_scenes import BUDGET, PAIRS, environment, requests, scene, user  # noqa: F401

from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LANGUAGE_MODEL = r".*language_model.*(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("demo") / "checkpoint"
    return copy_checkpoint(checkpoint_folder("demo"), target, budget=BUDGET)


def loaded(folder, **options):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()
    return model, AutoProcessor.from_pretrained(folder)


def answers(model, processor):
    inputs = [processor(images=scene(number), text=user(q), return_tensors="pt") for number, q in PAIRS]
    return [reference(model, dict(one)) for one in inputs]


def adapter(folder, target, seed, modules):
    """An adapter with weights that change answers, and the ids that transformers gives with it."""
    from peft import LoraConfig, get_peft_model

    model, processor = loaded(folder)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=modules))
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(target)
    return answers(model, processor)


def test_two_adapters_by_request(folder, tmp_path):
    from vllm.lora.request import LoRARequest

    wanted = [adapter(folder, tmp_path / name, seed, LANGUAGE_MODEL) for seed, name in ((0, "a"), (1, "b"))]
    base = answers(*loaded(folder))
    assert base != wanted[0] != wanted[1] != base
    with engine(folder, enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=5)
        loras = [LoRARequest(name, number, str(tmp_path / name)) for number, name in ((1, "a"), (2, "b"))]
        got = [llm.generate(requests(), settings, lora_request=lora, use_tqdm=False) for lora in loras]
        assert [[list(one.outputs[0].token_ids) for one in outputs] for outputs in got] == wanted
        # vLLM's CPU kernels read the last slot for a request without an adapter: it must be an empty one.
        order = [(loras[0], wanted[0]), (None, base), (loras[1], wanted[1])]
        asked = [order[index % 3] for index in range(len(PAIRS))]
        mixed = llm.generate(requests(), settings, lora_request=[lora for lora, _ in asked], use_tqdm=False)
        right = [answers[index] for index, (_, answers) in enumerate(asked)]
        assert [list(one.outputs[0].token_ids) for one in mixed] == right


@pytest.mark.parametrize("part", ["multi_modal_projector.linear_1", "vision_tower"])
def test_an_adapter_of_the_vision_side_is_refused(folder, tmp_path, part):
    from vllm.lora.request import LoRARequest

    modules = rf".*{part}.*" if part.startswith("multi") else rf".*{part}.*q_proj"
    adapter(folder, tmp_path / "adapter", 0, modules)
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        with pytest.raises(ValueError, match=rf"adapter trains .*{part}.*Merge the adapter"):
            llm.llm_engine.add_lora(LoRARequest("adapter", 1, str(tmp_path / "adapter")))
        assert ask(llm, requests(PAIRS[:2])) == answers(*loaded(folder))[:2]


def test_a_checkpoint_of_int8_weights(folder, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, processor = loaded(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    model.save_pretrained(tmp_path / "int8")
    processor.save_pretrained(tmp_path / "int8")
    wanted = answers(*loaded(tmp_path / "int8"))
    assert wanted == answers(model, processor)
    with engine(tmp_path / "int8") as llm:
        assert ask(llm, requests()) == wanted


def test_keys_that_the_metadata_does_not_name_are_an_error(folder, tmp_path):
    """Without the check the engine would answer from weights that were never loaded."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model, processor = loaded(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    model.save_pretrained(tmp_path / "int8", save_original_format=True)
    processor.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="weights were not loaded from the checkpoint"), engine(tmp_path / "int8"):
        pass
