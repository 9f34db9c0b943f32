"""Padding stays on its own side, so that the last columns of a batch are the last tokens that were passed."""

import pytest
import torch
from architectures import MODEL_SETTINGS, ROWS, each_architecture, each_side, labels_of, single_runs

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ANSWERS = ([40, 41, 42, 43, 44, 45], [50, 51, 52], [60], [70, 71, 72, 73, 74])
LONGEST = 6
each_position = pytest.mark.parametrize("setting", [MODEL_SETTINGS["paper"], MODEL_SETTINGS["spread"]], ids=str)


def with_answers(inputs, answers, pad=3):
    """Prompts with answers behind them, the answers padded on the right."""
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [pad] * (longest - len(answer)) for answer in answers])
    mask = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
    joined = {name: torch.cat([inputs[name], new], 1) for name, new in (("input_ids", ids), ("attention_mask", mask))}
    return {**inputs, **joined}


@torch.no_grad()
@each_architecture
@each_position
def test_the_last_logits_are_those_of_the_answers(architecture, setting):
    """Prompts padded on the left; rows lose different numbers of placeholders."""
    model = architecture.compressed()
    batch = with_answers(architecture.encode(), ANSWERS)
    last = model(**batch, logits_to_keep=LONGEST + 1, token_recovery=setting).logits
    assert last.shape[1] == LONGEST + 1
    everything = model(**batch, token_recovery=setting).logits
    for row, (single, answer) in enumerate(zip(single_runs(architecture), ANSWERS, strict=True)):
        alone = model(**with_answers(single, [answer]), token_recovery=setting).logits[0, -len(answer) - 1 :]
        read = slice(0, len(answer) + 1)
        torch.testing.assert_close(last[row, read], alone[read], **CLOSE)
        torch.testing.assert_close(everything[row, -LONGEST - 1 :][read], alone[read], **CLOSE)


@torch.no_grad()
@each_architecture
@each_position
def test_the_last_logits_of_rows_padded_on_the_right(architecture, setting):
    """Every row begins in the first column and loses another number of placeholders."""
    model, singles, padding = architecture.compressed(), single_runs(architecture), (3, 0, 5, 1)
    longest = max(single["input_ids"].shape[1] for single in singles) + LONGEST
    lengths = [longest - pad - single["input_ids"].shape[1] for pad, single in zip(padding, singles, strict=True)]
    answers = [[40 + place % 50 for place in range(length)] for length in lengths]
    rows = [with_answers(single, [answer]) for single, answer in zip(singles, answers, strict=True)]
    batch = dict(architecture.encode(side="right"))
    for name, fill in (("input_ids", 3), ("attention_mask", 0)):
        values = [
            torch.nn.functional.pad(row[name], (0, pad), value=fill) for row, pad in zip(rows, padding, strict=True)
        ]
        batch[name] = torch.cat(values)
    assert batch["attention_mask"][:, 0].all()
    alone = [model(**row, token_recovery=setting).logits[0] for row in rows]
    assert len({row["input_ids"].shape[1] - len(logits) for row, logits in zip(rows, alone, strict=True)}) > 2
    last = model(**batch, logits_to_keep=LONGEST, token_recovery=setting).logits
    assert last.shape[1] == LONGEST
    everything = model(**batch, token_recovery=setting).logits[:, -LONGEST:]
    for logits, sliced, single, pad in zip(last, everything, alone, padding, strict=True):
        torch.testing.assert_close(logits[: LONGEST - pad], single[pad - LONGEST :], **CLOSE)
        torch.testing.assert_close(sliced[: LONGEST - pad], single[pad - LONGEST :], **CLOSE)


@torch.no_grad()
@each_architecture
@each_side
def test_padding_stays_on_its_side(architecture, side):
    """Each row keeps its right padding; with labels a batch padded on the right alone begins in one column."""
    model, batch = architecture.compressed(), architecture.encode(side=side)
    short, _ = model.compress_inputs(**batch)
    right = [(values["attention_mask"].flip(-1).cumsum(-1) == 0).sum(-1).tolist() for values in (batch, short)]
    assert right[0] == right[1] and any(right[0]) == (side == "right")
    trained, _ = model.compress_inputs(**batch, labels=labels_of(model, batch))
    edge = 0 if side == "right" else -1
    assert trained["attention_mask"][:, edge].all()
    assert trained["input_ids"].shape[1] == int(trained["attention_mask"].sum(-1).max())
    if side == "left":
        both = with_answers(batch, ANSWERS)
        short, _ = model.compress_inputs(**both)
        expected = [LONGEST - len(answer) for answer in ANSWERS]
        assert (short["attention_mask"].flip(-1).cumsum(-1) == 0).sum(-1).tolist() == expected
        assert torch.equal(short["input_ids"][:, -LONGEST:], both["input_ids"][:, -LONGEST:])
        wider = {
            name: torch.nn.functional.pad(both[name], (0, 2), value=0) for name in ("input_ids", "attention_mask")
        }
        again, _ = model.compress_inputs(**{**both, **wider})
        assert torch.equal(again["attention_mask"][:, :-2], short["attention_mask"])
        assert not again["attention_mask"][:, -2:].any()


@torch.no_grad()
@each_architecture
def test_logits_of_cut_places_and_indices_are_refused(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    length = batch["input_ids"].shape[1]
    for keep in (torch.tensor([0, length - 1]), -1):
        with pytest.raises(ValueError, match="logits_to_keep must be a number of last tokens with images, got"):
            model(**batch, logits_to_keep=keep)
    with pytest.raises(ValueError, match=r"logits_to_keep reaches \d+ image placeholders that were cut"):
        model(**batch, logits_to_keep=length)
    whole = {"budget": architecture.whole_image[-1]}
    assert model(**batch, logits_to_keep=length, token_recovery=whole).logits.shape[1] == length
    text = architecture.encode([("Say hello.", 0)])
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    expected = model(**text).logits[:, [0, 2]]
    torch.testing.assert_close(model(**text, logits_to_keep=torch.tensor([0, 2])).logits, expected, **CLOSE)
