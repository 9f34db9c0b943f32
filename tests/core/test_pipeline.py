"""The image-text-to-text pipeline on a folder, and a photograph through a model of LLaVA-1.5's real geometry."""

import pytest
import tiny
import torch
from architectures import LLAVA, each_architecture, prompt_of
from PIL import Image
from skimage import data
from transformers import CLIPVisionConfig, LlamaConfig, pipeline

QUESTION = tiny.SENTENCES[0]
RECOVERY = {"token_recovery": {"budget": 8}, "max_new_tokens": 4, "do_sample": False}
CALL = {"generate_kwargs": RECOVERY, "return_full_text": False}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """A pipeline per architecture, loaded from a folder."""
    loaded = {}

    def pipe_of(architecture):
        if architecture.name not in loaded:
            folder = architecture.save_converted(tmp_path_factory.mktemp(architecture.name))
            loaded[architecture.name] = pipeline("image-text-to-text", model=str(folder))
        return loaded[architecture.name]

    return pipe_of


def answer(pipe, image, prompt, **recovery):
    """The answer of `generate` to a rendered prompt."""
    inputs = pipe.processor(images=image, text=prompt, return_tensors="pt", **recovery)
    ids = pipe.model.generate(**inputs, **RECOVERY)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(image, question=QUESTION):
    return [tiny.turn("user", question, [image])]


@each_architecture
def test_the_pipeline_loads_our_classes(architecture, pipes):
    pipe = pipes(architecture)
    assert type(pipe.model) is architecture.model_class
    assert type(pipe.processor) is architecture.processor_class


@each_architecture
def test_chat_messages(architecture, pipes):
    pipe, image = pipes(architecture), tiny.pictures(1)[0]
    expected = answer(pipe, image, f"USER: <image>\n{QUESTION} ASSISTANT:", recovery_text=[QUESTION])
    [result] = pipe(text=chat(image), **CALL)
    assert result["generated_text"] == expected
    [result] = pipe(text=chat(image), generate_kwargs=RECOVERY, return_full_text=True)
    assert result["generated_text"][0]["role"] == "user"
    assert result["generated_text"][-1] == {"role": "assistant", "content": expected}


@each_architecture
def test_picture_and_text(architecture, pipes):
    pipe, image = pipes(architecture), tiny.pictures(1)[0]
    prompt = prompt_of(QUESTION, 1)
    expected = answer(pipe, image, prompt)
    [result] = pipe(images=image, text=prompt, **CALL)
    assert result["generated_text"] == expected
    assert QUESTION not in expected
    [result] = pipe(images=image, text=prompt, generate_kwargs=RECOVERY, return_full_text=True)
    assert QUESTION in result["generated_text"]
    assert result["generated_text"].endswith(expected)


@each_architecture
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_list_of_chats(architecture, batch_size, pipes):
    pipe, images = pipes(architecture), tiny.pictures(3)
    chats = [chat(image, question) for image, question in zip(images, tiny.SENTENCES, strict=False)]
    results = pipe(text=chats, batch_size=batch_size, **CALL)
    for [result], [single] in zip(results, (pipe(text=one, **CALL) for one in chats), strict=True):
        assert result["generated_text"] == single["generated_text"]


@each_architecture
def test_a_list_of_pictures_and_texts(architecture, pipes):
    pipe, images = pipes(architecture), tiny.pictures(2)
    prompts = [prompt_of(question, 1) for question in tiny.SENTENCES[:2]]
    results = pipe(images=images, text=prompts, batch_size=2, **CALL)
    results = [result[0] if isinstance(result, list) else result for result in results]
    expected = [answer(pipe, *pair) for pair in zip(images, prompts, strict=True)]
    assert [result["generated_text"] for result in results] == expected


@each_architecture
def test_the_budget_of_a_call_reaches_the_model(architecture, pipes, monkeypatch):
    pipe, image, counts = pipes(architecture), tiny.pictures(1)[0], []
    project = pipe.model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape[-2])
    )
    try:
        pipe(text=chat(image), **CALL)
        pipe(text=chat(image), generate_kwargs={"max_new_tokens": 2, "token_recovery": {"budget": 3}})
    finally:
        project.remove()
    assert counts == [8, 3]


@pytest.fixture(scope="module")
def full_size():
    """A random LLaVA of narrow layers with the geometry of LLaVA-1.5: 336 pixels, 24 x 24 patches."""
    torch.manual_seed(0)
    stock = tiny.llava_config()
    vision = {**stock.vision_config.to_dict(), "image_size": 336, "patch_size": 14}
    config = LLAVA.config_class(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**stock.text_config.to_dict()),
        image_token_index=stock.image_token_id,
        image_seq_length=576,
        token_recovery={"text_encoder_config": LLAVA.text_config()},
    )
    model = LLAVA.model_class(config).eval()
    tiny._sharpen(model.model.vision_tower)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    processor = LLAVA.processor(patch_size=14)
    processor.image_processor = tiny.image_processor(336)
    return model, processor


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_a_photograph(name, full_size):
    model, processor = full_size
    photograph = Image.fromarray(getattr(data, name)())
    inputs = processor(images=photograph, text=prompt_of(QUESTION, 1), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    [record] = model.recover(**inputs)
    assert record.visual_mask.any()
    assert 1 <= int(record.counts) < 576
    assert (record.cluster >= 0).all()
    with torch.no_grad():
        assert model(**inputs).visual_token_counts.tolist() == record.counts.tolist()
        for budget, count in ((1, 1), (64, 64), (192, 192), (1 / 9, 64), (0.5, 288), (576, 576), (1.0, 576)):
            output = model(**inputs, token_recovery={"budget": budget, "coverage_share": 0.25})
            assert output.visual_token_counts.tolist() == [count]
            assert output.logits.shape[1] == inputs["input_ids"].shape[1] - 576 + count
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < ids.shape[1] <= inputs["input_ids"].shape[1] + 3
