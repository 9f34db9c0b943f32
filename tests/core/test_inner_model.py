"""The model without its head, called around `forward`: it reads the shortened sequence and answers at uncut places."""

import copy
import pickle

import pytest
import torch
from architectures import LLAVA, each_architecture

from reccomp_hf.core.compat import CACHE
from reccomp_hf.core.inner_model import slots_before


def inner_inputs(architecture, **options):
    batch = architecture.encode(**options)
    return {name: value for name, value in batch.items() if name != "labels"}


@each_architecture
@torch.no_grad()
def test_hidden_states_stand_at_the_places_of_the_uncut_sequence(architecture):
    model, batch = architecture.build(budget=9, merged_tokens=2), inner_inputs(architecture)
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    outputs = model.model(**batch, output_hidden_states=True)
    short, _ = model.compress_inputs(**batch)
    expected = model(**batch)
    hook.remove()
    assert lengths == [short["inputs_embeds"].shape[1]] * 2 and lengths[0] < batch["input_ids"].shape[1]
    assert outputs.last_hidden_state.shape[:2] == batch["input_ids"].shape
    assert {state.shape[:2] for state in outputs.hidden_states} == {batch["input_ids"].shape}
    assert outputs.get(CACHE) is None
    logits = model.lm_head(outputs.last_hidden_state)
    image = model.config.image_token_id
    for row in range(len(logits)):
        uncut, cut = batch["input_ids"][row], short["input_ids"][row]
        kept, shown = batch["attention_mask"][row].bool(), short["attention_mask"][row].bool()
        text, short_text = (kept & (uncut != image)).nonzero()[:, 0], (shown & (cut != image)).nonzero()[:, 0]
        assert torch.equal(uncut[text], cut[short_text])
        torch.testing.assert_close(logits[row, text], expected.logits[row, short_text], rtol=0, atol=0)
        # what predicts a token stands before it, on both sides
        following, short_following = text[text > 0] - 1, short_text[short_text > 0] - 1
        torch.testing.assert_close(
            logits[row, following][-3:], expected.logits[row, short_following][-3:], rtol=0, atol=0
        )
        if (uncut == image).any():
            last, short_last = (uncut == image).nonzero()[-1, 0], (cut == image).nonzero()[-1, 0]
            torch.testing.assert_close(logits[row, last], expected.logits[row, short_last], rtol=0, atol=0)


@torch.no_grad()
def test_what_is_not_compressed_is_stock():
    batch = inner_inputs(LLAVA)
    model = LLAVA.build(budget=9)
    stock_model = LLAVA.stock().eval()
    stock = stock_model.model
    given = {name: value for name, value in batch.items() if not name.startswith("recovery_")}
    off = copy.deepcopy(model)
    off.config.token_recovery = {**model.config.token_recovery.to_dict(), "enabled": False}
    torch.testing.assert_close(off.model(**given).last_hidden_state, stock(**given).last_hidden_state)
    on = model
    whole = on(**batch, token_recovery={"enabled": False}).logits
    torch.testing.assert_close(whole, stock_model(**given).logits)
    assert on(**batch).logits.shape[1] < whole.shape[1]
    text = {"input_ids": batch["input_ids"][:, -4:]}
    torch.testing.assert_close(on.model(**text).last_hidden_state, stock(**text).last_hidden_state)


@torch.no_grad()
def test_a_question_that_is_missing_is_an_error():
    batch = {name: value for name, value in inner_inputs(LLAVA).items() if not name.startswith("recovery_")}
    with pytest.raises(ValueError, match="recovery_input_ids"):
        LLAVA.build(budget=9).model(**batch)


@torch.no_grad()
def test_copies_compress_by_their_own_settings():
    batch, model = inner_inputs(LLAVA), LLAVA.build(budget=9, merged_tokens=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.config.token_recovery = {**model.config.token_recovery.to_dict(), "enabled": False}
        seen = []
        other.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        other.model(**batch)
        assert seen == [batch["input_ids"].shape[1]]
        assert model.model(**batch).last_hidden_state.shape[1] == seen[0]


def test_slots_before():
    source = torch.tensor([[0, 1, 4, 5], [-1, 2, 5, -1]])
    assert slots_before(source, 7).tolist() == [[0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2]]
