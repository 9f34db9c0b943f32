"""An adapter repository that names one of our checkpoints as its base loads by every road that users take."""

import pytest
import tiny
import torch
from architectures import LLAVA, each_architecture
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the left?"}]}]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Per architecture: the folders of a checkpoint and of an adapter, and the adapted model's logits."""
    written = {}

    def of(architecture):
        if architecture.name not in written:
            folder = tmp_path_factory.mktemp(architecture.name)
            base = architecture.save_converted(folder, budget=16)
            model = get_peft_model(
                AutoModelForImageTextToText.from_pretrained(base),
                LoraConfig(r=4, target_modules="all-linear", exclude_modules=r".*vision_tower.*"),
            )
            torch.manual_seed(0)
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if "lora_B" in name:
                        value.normal_(std=0.3)
                plain = AutoModelForImageTextToText.from_pretrained(base)(**architecture.encode()).logits
                expected = model.eval()(**architecture.encode()).logits
            assert not torch.allclose(plain, expected, atol=1e-3)
            model.save_pretrained(folder / "adapter")
            AutoProcessor.from_pretrained(base).save_pretrained(folder / "adapter")
            written[architecture.name] = base, folder / "adapter", expected
        return written[architecture.name]

    return of


def with_load_adapter(base, adapter):
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


ROADS = {
    "AutoPeftModel": lambda base, adapter: AutoPeftModel.from_pretrained(adapter, import_allowlist=["reccomp_hf"]),
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base), adapter
    ),
    "AutoModelForImageTextToText": lambda base, adapter: AutoModelForImageTextToText.from_pretrained(adapter),
    "load_adapter": with_load_adapter,
    "pipeline": lambda base, adapter: pipeline("image-text-to-text", model=str(adapter)).model,
    "merged": lambda base, adapter: PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base), adapter
    ).merge_and_unload(),
}


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("road", ROADS)
def test_adapters_load(architecture, road, repository):
    base, adapter, expected = repository(architecture)
    model = ROADS[road](base, adapter).eval()
    output = model(**architecture.encode())
    assert {*output.visual_token_counts.tolist()} == {16}
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


@each_architecture
def test_a_pipeline_answers_with_the_adapter(architecture, repository):
    base, adapter, _ = repository(architecture)
    chat = [{**turn, "content": [dict(part) for part in turn["content"]]} for turn in CHAT]
    chat[0]["content"][0]["image"] = tiny.pictures(1)[0]
    answers = [
        pipeline("image-text-to-text", model=str(folder))(
            text=chat, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False}
        )[0]["generated_text"]
        for folder in (base, adapter)
    ]
    assert answers[0] != answers[1]


def test_auto_peft_model_asks_for_consent(repository):
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(repository(LLAVA)[1])
