"""The cost of choosing tokens, counted rather than timed: graphs, operators, the largest tensor."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reccomp_hf import TokenRecoveryConfig, recover_tokens
from reccomp_hf.core.methods.registry import get_method, method_names

BATCH, WIDTH = 2, 32
PROJECTED = 4
BUDGETS = {
    "plain": {"budget": 16},
    "merged": {"budget": 16, "merged_tokens": 4},
    "spread": {"budget": 0.1, "coverage_share": 0.25},
    "visual": {"budget": 16, "text_share": 0.0, "visual_heads": "mean"},
    "diverse": {"budget": 16, "text_by": "diversity", "merged_tokens": 0},
    "herded": {"budget": 16, "coverage_share": 0.5, "coverage_by": "content", "merged_tokens": 0},
}
METHODS = {name: {"method": name, "budget": 9} for name in method_names() if get_method(name).budget != "none"}
HOST_SIDE = ("random", "pooling")  # their drawing and tabulating on the host is not part of a graph
each_budget = pytest.mark.parametrize("fields", BUDGETS.values(), ids=BUDGETS)
LIMITED = {"budget": 16, "text_limit": "half_or_few", "text_by": "diversity", "coverage_by": "content"}
COMPILED = {
    **BUDGETS,
    "limited": LIMITED,
    **{f"method {name}": fields for name, fields in METHODS.items() if name not in HOST_SIDE},
}
each_method_and_budget = pytest.mark.parametrize("fields", COMPILED.values(), ids=COMPILED)


class Counts(TorchDispatchMode):
    """Counts operators and remembers the number of elements of the largest tensor that one gave."""

    def __init__(self):
        super().__init__()
        self.operators, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators[func.overloadpacket.__name__] += 1
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tensors(result)]
        self.largest = max([self.largest, *sizes])
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def random_image(patches, batch=BATCH, width=WIDTH):
    generator = torch.Generator().manual_seed(patches)
    shapes = ((batch, patches, width), (batch, width), (batch, patches + 1, width), (batch, patches))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def further(states):
    """Features that some methods read besides, for images with these hidden states (B, N, C)."""
    batch, patches, width = states.shape
    others = {"projected": torch.randn(batch, patches, PROJECTED), "received": torch.rand(batch, 2, patches)}
    words = torch.rand(batch, 3, patches) - 0.5
    return {**others, "class_state": torch.randn(batch, width), "word_similarity": words}


def counted(config, patches, **shape):
    image = random_image(patches, **shape)
    given = further(image[0])
    recover_tokens(*image, config, **given)  # makes the constants, which later calls share
    with Counts() as counts:
        recover_tokens(*image, config, **given)
    return counts


def test_operators_and_elements_are_counted():
    with Counts() as counts:
        torch.zeros(3, 5).add(1).sum()
    assert counts.operators["add"] == counts.operators["sum"] == 1
    assert counts.largest == 15


@each_method_and_budget
def test_a_fixed_budget_compiles_to_one_graph_that_chooses_alike(fields):
    """`fullgraph` raises where a graph would break."""
    config, image, graphs = TokenRecoveryConfig.from_preset("paper", **fields), random_image(64), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    others = further(image[0])
    compiled = torch.compile(recover_tokens, backend=backend, fullgraph=True)(*image, config, **others)
    assert len(graphs) == 1
    wanted = recover_tokens(*image, config, **others)
    assert compiled.cluster.equal(wanted.cluster)
    torch.testing.assert_close(compiled.tokens, wanted.tokens)


@pytest.mark.parametrize("fields", [{}, *BUDGETS.values()], ids=["dynamic", *BUDGETS])
def test_operators_do_not_depend_on_images_or_patches(fields):
    """No loop over rows or tokens; coverage takes a step per covering token, whose number a share would change."""
    config = TokenRecoveryConfig.from_preset("paper", **{**fields, "budget": 16 if fields else None})
    wanted = counted(config, 64).operators
    assert counted(config, 64, batch=7).operators == wanted
    assert counted(config, 256).operators == wanted


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pooling"])
def test_operators_of_methods_do_not_depend_on_images_or_patches(method):
    """Greedy methods take a step per token; `vispruner` takes one for some dropped patches, hence not more patches."""
    config = TokenRecoveryConfig(method=method, budget=9)
    wanted = counted(config, 64).operators
    assert counted(config, 64, batch=7).operators == wanted
    if method != "vispruner":
        assert counted(config, 256).operators == wanted


@pytest.mark.parametrize("fields", [{"budget": 16}, {"budget": 16, "text_share": 0.0}], ids=["text", "visual"])
def test_no_tensor_is_larger_than_the_features(fields):
    config = TokenRecoveryConfig.from_preset("paper", **{"merged_tokens": 0, **fields})
    for patches in (256, 1024):
        assert counted(config, patches, width=8).largest <= BATCH * (patches + 1) * 8


def test_outliers_take_a_window_and_never_all_pairs():
    """Their tensors hold some multiple of k entries for every patch: they grow with patches, not with their square."""
    config = TokenRecoveryConfig.from_preset("paper")
    few, many = (counted(config, patches, width=4).largest for patches in (512, 2048))
    assert many <= 4.2 * few
