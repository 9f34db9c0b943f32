"""Recovery switched off, or with every token kept, is the stock model: bit for bit, from the same files."""

import pytest
import torch
from architectures import ROWS, each_architecture, generate, labels_of, stock_inputs
from transformers import set_seed

POSITIONS = ("compact", "original")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Per architecture: the stock model, and ours, converted from the checkpoint that the stock class wrote."""
    loaded = {}

    def pair_of(architecture):
        if architecture.name not in loaded:
            folder = tmp_path_factory.mktemp(architecture.name)
            converted = architecture.save_converted(folder)
            stock = architecture.stock_class.from_pretrained(folder / "stock")
            loaded[architecture.name] = stock, architecture.model_class.from_pretrained(converted)
        return loaded[architecture.name]

    return pair_of


def settings_of(architecture):
    """Every way to say that nothing is to be left out."""
    whole = [{"budget": budget, "merged_tokens": 0} for budget in architecture.whole_image]
    whole += [{"budget": 1.0, "coverage_share": 0.5, "text_relevance": "value"}]  # nothing is left to merge
    return [{"enabled": False}, *({**one, "position_ids": positions} for one in whole for positions in POSITIONS)]


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize(
    ("rows", "side"),
    [(ROWS, "left"), (ROWS, "right"), (ROWS[:1], "left"), (ROWS[1:2], "left")],
    ids=["batch-left", "batch-right", "one picture", "two pictures"],  # one row has no padding
)
def test_forward(architecture, rows, side, pairs):
    stock, ours = pairs(architecture)
    batch = architecture.encode(rows, side)
    batch["labels"] = labels_of(stock, batch)
    expected = stock(**stock_inputs(batch))
    for setting in settings_of(architecture):
        output = ours(**batch, token_recovery=setting)
        assert torch.equal(output.logits, expected.logits), setting
        assert torch.equal(output.loss, expected.loss), setting


@torch.no_grad()
@each_architecture
def test_padding_that_every_row_has(architecture, pairs):
    stock, ours = pairs(architecture)
    batch = architecture.encode(ROWS, pad_to_multiple_of=64)
    assert not batch["attention_mask"][:, 0].any()
    expected = stock(**stock_inputs(batch)).logits
    for setting in settings_of(architecture):
        assert torch.equal(ours(**batch, token_recovery=setting).logits, expected), setting


@each_architecture
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generate(architecture, options, pairs):
    stock, ours = pairs(architecture)
    # Beams of a row with two pictures get the wrong pictures in the stock model of 4.57.
    batch = architecture.encode(ROWS if "num_beams" not in options else [ROWS[0], ROWS[3]])
    set_seed(3)
    expected = generate(stock, stock_inputs(batch), **options)
    for setting in settings_of(architecture):
        set_seed(3)
        assert torch.equal(generate(ours, batch, token_recovery=setting, **options), expected), setting


@each_architecture
def test_enabled_can_be_switched_off_in_the_config(architecture, pairs):
    stock, batch = pairs(architecture)[0], architecture.encode()
    ours = architecture.build(enabled=False)
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, stock(**stock_inputs(batch)).logits)
    assert torch.equal(generate(ours, batch), generate(stock, stock_inputs(batch)))
    assert torch.equal(generate(ours, stock_inputs(batch)), generate(stock, stock_inputs(batch)))
