"""The front without a GPU: it compiles and exports to one graph, and what it costs a device is counted."""

import warnings

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, ROWS, each_architecture
from fixed_budgets import BALANCED, FIXED, KNOWN, MERGED
from prefill_elsewhere import DeviceCosts, costs_elsewhere
from second_device import DEVICE
from torch._subclasses import FakeTensorMode

from reccomp_hf.core.compat import clip_vision_model
from reccomp_hf.core.front import QuestionIds
from reccomp_hf.core.front_plan import FrontPlan
from reccomp_hf.core.methods import baselines
from reccomp_hf.core.tensors import _kept_constant, constant, used_constants

# Operators of a prefill up to the language model, of all its modules: no more than when this was written.
MOST_OPERATORS = {
    ("llava", "merged"): 846,
    ("llava", "balanced"): 871,
    ("llava_next", "merged"): 940,
    ("llava_next", "balanced"): 971,
}


class Front(torch.nn.Module):
    """The front of a model for one plan, as a module from named tensors to tensors."""

    def __init__(self, architecture, fields):
        super().__init__()
        # A model of its own: hooks that transformers adds for a call with hidden states do not compile.
        self.model, batch = architecture.build(), architecture.encode(ROWS)
        tower = clip_vision_model(self.model.model.vision_tower)
        tower.encoder.layers = tower.encoder.layers[:2]  # each takes as long to trace
        section = self.model._section(fields)
        names = ("input_ids", "attention_mask", "rule", "words")
        self.section, question = section, QuestionIds(*(batch.get(f"recovery_{name}") for name in names))
        pixels, layout = self.model._layout(batch["pixel_values"], batch.get("image_sizes"))
        call = batch["input_ids"], batch["pixel_values"], batch.get("image_sizes")
        self.chosen = self.model._read_pictures(*call, question, section, -2)
        self.plan = FrontPlan(section, -2, layout, self.model._grid(pixels)).bounded()
        self.inputs = {
            "pixel_values": pixels,
            "slots": self.plan.layout.slots,
            "rows": self.plan.layout.rows,
        }
        if self.model._reads_question(section):
            of_tile = self.chosen.placeholders.row[layout.image_of_tile(pixels)]
            read = {
                "question": question.input_ids,
                "windows": question.attention_mask.any(-1),
                "words": question.words,
            }
            self.inputs |= self.model._without_unread(read, section) | {"question_of_tile": of_tile}

    def forward(self, inputs):
        return self.model._front(inputs, self.plan).tensors()


@torch.no_grad()
@pytest.mark.parametrize("fields", [MERGED, BALANCED], ids=["merged", "balanced"])
@each_architecture
def test_it_compiles_to_one_graph(architecture, fields):
    front = Front(architecture, fields)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        compiled = torch.compile(front.forward, backend="eager", fullgraph=True)(front.inputs)
    check_equal(compiled, front(front.inputs))


@torch.no_grad()
@each_architecture
def test_it_exports(architecture):
    front = Front(architecture, BALANCED)
    exported = torch.export.export(front, (front.inputs,), strict=False)
    check_equal(exported.module()(front.inputs), front(front.inputs))


def check_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, msg=name)
        else:
            assert found[name].equal(value), name


@torch.no_grad()
@pytest.mark.parametrize("fields", [*FIXED.values(), *KNOWN.values()], ids=[*FIXED, *KNOWN])
@each_architecture
def test_bounds_give_the_tokens_that_sizes_give(architecture, fields):
    """With bounds in place of sizes that depend on the choice, images and tiles have padding and nothing else."""
    check_bounds(Front(architecture, fields), architecture is LLAVA)


@torch.no_grad()
@pytest.mark.parametrize(("number", "value"), [("longest", 1), ("total", 40), ("longest_image", 10 - 32)])
def test_a_bound_that_is_too_small_shows(monkeypatch, number, value):
    stock = baselines.budget_bounds

    def smaller(features, budget):
        return stock(features, budget)._replace(**{number: value})

    monkeypatch.setattr(baselines, "budget_bounds", smaller)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_bounds(Front(LLAVA_NEXT, KNOWN["random"]), False)


def check_bounds(front, is_exact):
    bounded, exact = front.model._front(front.inputs, front.plan), front.chosen
    exact.sync_and_validate()
    wanted = front.model._tokens(exact.pictures)
    if bounded.unread:
        bounded.read(torch.cat(bounded.unread).tolist())
    assert (front.plan.most_newlines is None) == is_exact
    assert bounded.lengths.equal(wanted.lengths)
    torch.testing.assert_close(bounded.packed(), wanted.packed())
    width, tokens = wanted.features.shape[1], wanted.record.tokens.shape[1]
    exists = torch.arange(width) < wanted.lengths.unsqueeze(-1)
    assert bounded.places[:, :width][exists].equal(wanted.places[exists])
    assert bounded.record.cluster.equal(wanted.record.cluster)
    assert bounded.record.places[:, :tokens].equal(wanted.record.places)
    assert (bounded.record.places[:, tokens:] == -1).all()


# ---- what a prefill costs a device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["merged", "balanced"])
@each_architecture
def test_a_prefill_costs_no_copy_from_the_host_and_no_more_operators(architecture, setting):
    """The read that a prefill makes is answered from outside; any other would raise."""
    first, second = costs_elsewhere(architecture, architecture.encode(ROWS), FIXED[setting])
    assert 3 < sum(first.copies.values()) <= 6  # constants, which are kept
    assert not second.copies, second.copies
    assert 500 < sum(second.operators.values()) <= MOST_OPERATORS[architecture.name, setting]


@each_architecture
def test_a_dynamic_prefill_costs_no_copy_from_the_host_either(architecture):
    assert not costs_elsewhere(architecture, architecture.encode(ROWS), {"budget": None})[1].copies


def test_the_costs_are_counted():
    with FakeTensorMode():
        host, elsewhere = torch.zeros(3), torch.zeros(3, device=DEVICE)
        with DeviceCosts() as costs:
            host.to(DEVICE) + elsewhere.copy_(host)
    assert (costs.copies, costs.operators["add"]) == ({"_to_copy": 1, "copy_": 1}, 1)


# ---- constants -----------------------------------------------------------------------------------------------------


def test_constants_are_made_once_and_may_be_kept():
    made = []

    def make(count):
        made.append(count)
        return list(range(count))

    like = torch.zeros(1)
    with used_constants() as used:
        assert constant(like, make, 3) is constant(like, make, 3)
    assert made == [3] and constant(like, make, 3).tolist() == [0, 1, 2]
    assert [value.tolist() for value in used] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("pair", [((True, False), (1, 0)), ((1, 0), (True, False)), ((1, 2), (1.0, 2.0))], ids=str)
def test_constants_of_equal_values_keep_their_types(pair):
    """Python holds (True, False) and (1, 0) equal, and as an index they mean other things."""
    _kept_constant.cache_clear()
    like = torch.zeros(1)
    for values in (*pair, *pair):
        made = constant(like, tuple, values)
        assert made.dtype == torch.tensor(values).dtype and made.tolist() == list(values)
    nested = [constant(like, lambda rows: rows, ((values[0],),)) for values in pair]
    assert nested[0].dtype != nested[1].dtype


def test_constants_made_in_inference_serve_training():
    with torch.inference_mode():
        index = constant(torch.zeros(1), tuple, (0, 2, 5, 7))
    assert not index.is_inference()
    values = torch.ones(8, requires_grad=True)
    values[index].sum().backward()
    assert values.grad.sum() == 4


def test_constants_of_traced_code_are_not_kept():
    with FakeTensorMode():
        fake = constant(torch.zeros(1), tuple, (4, 4, 4))
    kept = constant(torch.zeros(1), tuple, (4, 4, 4))
    assert type(kept) is torch.Tensor is not type(fake)
