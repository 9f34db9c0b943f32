"""Prompts and counts that evaluation, prediction and lmms-eval share."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from architectures import each_architecture

from reccomp_hf.data.prompts import add_instruction, build_prompt, count_visual_tokens, encode_rows

TEMPLATE = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>{% else %}[{{ part['text'] }}]"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@each_architecture
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_prompt_with_and_without_a_template(architecture, images):
    processor = architecture.processor()
    processor.chat_template = None
    placeholders = "<image>\n" * images
    assert build_prompt(processor, "Is it?", images) == f"USER: {placeholders}Is it? ASSISTANT:"
    processor.chat_template = TEMPLATE
    assert build_prompt(processor, "Is it?", images) == "<image>" * images + "[Is it?]>"


def test_an_instruction_stands_on_its_own_line():
    assert add_instruction("Is it?", "One word.") == "Is it?\nOne word."
    assert add_instruction("Is it?", "") == "Is it?"


@each_architecture
def test_rows_are_encoded_as_the_processor_does(architecture):
    processor, pictures = architecture.processor(), tiny.pictures(3)
    processor.chat_template = None
    short, long = sorted(tiny.SENTENCES[:2], key=len)
    found = encode_rows(processor, [pictures[:1], pictures[1:]], [add_instruction(short, long), long], [short, [long]])
    wanted = processor(
        images=pictures,
        text=[f"USER: <image>\n{short}\n{long} ASSISTANT:", f"USER: <image>\n<image>\n{long} ASSISTANT:"],
        recovery_text=[short, long],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(found["recovery_input_ids"][0], found["recovery_input_ids"][1])
    assert found["attention_mask"][:, -1].all() and not found["attention_mask"][:, 0].all()


def test_visual_tokens_of_rows_with_several_images():
    output = SimpleNamespace(visual_token_counts=torch.tensor([3, 4, 5]), newline_counts=torch.tensor([0, 1, 2]))
    assert count_visual_tokens(output, [2, 0, 1], [9, 0, 9]) == [8, 0, 7]
    off = SimpleNamespace(visual_token_counts=None, newline_counts=None)
    assert count_visual_tokens(off, [2, 0, 1], [9, 0, 9]) == [9, 0, 9]
