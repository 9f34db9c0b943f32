"""The method: scores and features in, the few tokens that stand for an image out.

Recoverable Compression (Chen et al., AAAI 2025, arXiv 2409.01179): the class token's attention keeps the salient
patches, the question recovers further ones, and what remains is clustered and merged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .configuration_reccomp import TokenRecoveryConfig
from .outliers import upper_outliers
from .relevance import class_saliency


@dataclasses.dataclass
class TokenRecoveryOutput:
    """Which tokens stand for each image, and where every patch went. B images, N patches, K tokens at most.

    Args:
        tokens: (B, K, C), the kept patches in raster order, then the merged tokens; right-padded with zeros.
        counts: (B,) int64, tokens of each image.
        visual_mask: (B, N) bool, patches kept for their saliency.
        text_mask: (B, N) bool, patches recovered for the question.
        coverage_mask: (B, N) bool, patches kept to cover the image evenly.
        centre_mask: (B, N) bool, patches around which the rest was merged.
        cluster: (B, N) int64, index in `tokens` that a patch went into; -1 where it was dropped.
        places: (B, K) int64, raster index of the patch that a token stands for (the centre of a merged one); -1 for
            padding and for a token that has no place.
        saliency: (B, N) float32, class attention; higher means more salient.
        text_similarity: (B, N) float32, or `None` without a question; higher means more relevant.
    """

    tokens: Tensor
    counts: Tensor
    visual_mask: Tensor
    text_mask: Tensor
    coverage_mask: Tensor
    centre_mask: Tensor
    cluster: Tensor
    places: Tensor
    saliency: Tensor
    text_similarity: Tensor | None

    def split(self) -> list[TokenRecoveryOutput]:
        """One output per image (B = 1 each), without padding. Reads the counts from the device."""
        return [self._image(index, count) for index, count in enumerate(self.counts.tolist())]

    def _image(self, index: int, count: int) -> TokenRecoveryOutput:
        row = slice(index, index + 1)
        fields: dict[str, Any] = {
            field.name: None if (value := getattr(self, field.name)) is None else value[row]
            for field in dataclasses.fields(self)
        }
        fields["tokens"], fields["places"] = self.tokens[row, :count], self.places[row, :count]
        return TokenRecoveryOutput(**fields)


@dataclasses.dataclass
class VisualFeatures:
    """What a method may look at. B images, N patches of width C, class token apart.

    Args:
        hidden_states: (B, N, C), what LLaVA's projector reads.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N) or `None`; higher means more relevant to the question.
        num_heads: Attention heads of the vision tower.
        grid: (rows, columns) of the patches in raster order.
        valid: (B, N) bool, patches that exist.
        all_valid: Whether `valid` is known, without looking at the device, to be all true.
    """

    hidden_states: Tensor
    class_query: Tensor
    keys: Tensor
    text_similarity: Tensor | None
    num_heads: int
    grid: tuple[int, int]
    valid: Tensor
    all_valid: bool


@dataclasses.dataclass
class TokenSelection:
    """A method's choice, still on the device: masks (B, N), and how many merged tokens follow the kept ones.

    `known_sizes` holds the values of `sizes` where they follow from a fixed budget; `None` means they must be read.
    """

    visual_mask: Tensor
    text_mask: Tensor
    coverage_mask: Tensor
    centre_mask: Tensor
    merged_counts: Tensor
    saliency: Tensor
    known_sizes: list[int] | None = None

    @property
    def kept_mask(self) -> Tensor:
        """(B, N) bool, patches that enter the sequence as they are."""
        return self.visual_mask | self.text_mask | self.coverage_mask

    @property
    def counts(self) -> Tensor:
        """(B,) int64, kept and merged tokens of each image."""
        return self.kept_mask.sum(-1) + self.merged_counts

    @property
    def sizes(self) -> Tensor:
        """(3,) int64 on the device: the largest count, the largest number of merged tokens, all tokens together."""
        counts = self.counts
        return torch.stack([counts.max(), self.merged_counts.max(), counts.sum()])


@dataclasses.dataclass
class MergedTokens:
    """What a method made of the patches that were not kept. M merged tokens at most.

    Args:
        tokens: (B, M, C); rows with fewer merged tokens are padded.
        places: (B, M) int64, raster index a merged token stands at, -1 without one.
        cluster: (B, N) int64, merged token that a patch went into, -1 for none.
    """

    tokens: Tensor
    places: Tensor
    cluster: Tensor


@dataclasses.dataclass(frozen=True)
class RecoveryMethod:
    """A way to choose tokens.

    Args:
        select: Chooses patches without reading anything from the device.
        merge: Makes the merged tokens, given the largest number of them.
        scales_similarity: Whether the text similarity is divided by the root of the projection width.
        needs_text: Whether the method is undefined without a question.
    """

    select: Callable[[VisualFeatures, TokenRecoveryConfig], TokenSelection]
    merge: Callable[[VisualFeatures, TokenSelection, TokenRecoveryConfig, int], MergedTokens]
    scales_similarity: bool = False
    needs_text: bool = False


def get_method(name: str) -> RecoveryMethod:
    """The registered method of that name.

    Raises:
        ValueError: No such method.
    """
    from .methods_authors import AUTHORS

    methods = {"recoverable": RECOVERABLE, "authors": AUTHORS}
    if name not in methods:
        raise ValueError(f"Unknown token_recovery.method {name!r}; known methods are {', '.join(map(repr, methods))}.")
    return methods[name]


def recover_tokens(
    hidden_states: Tensor,
    class_query: Tensor,
    keys: Tensor,
    text_similarity: Tensor | None,
    config: TokenRecoveryConfig,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> TokenRecoveryOutput:
    """Choose, recover and merge the visual tokens of a batch of images.

    Args:
        hidden_states: (B, N, C) patches only, any floating dtype; what LLaVA's projector reads.
        class_query: (B, C), the class token's query.
        keys: (B, N + 1, C), class token first.
        text_similarity: (B, N), higher means more relevant to the question; `None` for a visual-only choice.
        config: The method and its settings.
        num_heads: Attention heads of the vision tower, read by `visual_heads="mean"`.
        grid: (rows, columns) of the patches; `None` takes them for a square.
        valid: (B, N) bool, `False` for patches that do not exist; `None` means that all do. A row with fewer valid
            patches than an int budget keeps all of them.

    Returns:
        A [`TokenRecoveryOutput`]; kept and merged tokens are differentiable in `hidden_states`, the choice is not.
        In dynamic mode (budget `None`) one value is read from the device.

    Raises:
        ValueError: Shapes that do not fit, a budget above the number of patches, a method without its question.
    """
    features = check_features(
        hidden_states, class_query, keys, text_similarity, config, num_heads=num_heads, grid=grid, valid=valid
    )
    selection = select_tokens(features, config)
    sizes = selection.known_sizes or selection.sizes.tolist()
    return assemble_tokens(features, selection, config, sizes)


def check_features(
    hidden_states: Tensor,
    class_query: Tensor,
    keys: Tensor,
    text_similarity: Tensor | None,
    config: TokenRecoveryConfig,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> VisualFeatures:
    """Check shapes and settings against each other, see [`recover_tokens`]; nothing is read from the device."""
    batch, patches, width = _shape(hidden_states)
    for name, tensor, needed in (
        ("class_query", class_query, (batch, width)),
        ("keys", keys, (batch, patches + 1, width)),
        ("text_similarity", text_similarity, (batch, patches)),
        ("valid", valid, (batch, patches)),
    ):
        if tensor is not None and tuple(tensor.shape) != needed:
            raise ValueError(
                f"{name} must have shape {needed} beside hidden_states of shape {tuple(hidden_states.shape)}, got "
                f"{tuple(tensor.shape)}" + ("; keys start with the class token." if name == "keys" else ".")
            )
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width {width}, got {num_heads}.")
    if isinstance(config.budget, int) and config.budget > patches:
        raise ValueError(
            f"token_recovery.budget is {config.budget}, but an image has only {patches} patches; "
            f"write an int up to {patches} or a share in (0, 1]."
        )
    if text_similarity is None and get_method(config.method).needs_text:
        raise ValueError(f"Method {config.method!r} needs a question: text_similarity is None.")
    return VisualFeatures(
        hidden_states=hidden_states,
        class_query=class_query.detach(),
        keys=keys.detach(),
        text_similarity=None if text_similarity is None else text_similarity.detach().float(),
        num_heads=num_heads,
        grid=_grid(grid, patches, config),
        valid=keys.new_ones((batch, patches), dtype=torch.bool) if valid is None else valid,
        all_valid=valid is None,
    )


@torch.no_grad()
def select_tokens(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    """The method's choice of patches; reads nothing from the device."""
    return get_method(config.method).select(features, config)


def assemble_tokens(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, sizes: list[int]
) -> TokenRecoveryOutput:
    """Gather the kept tokens, append the merged ones, and note where every patch went; `sizes` as read."""
    kept, patches = selection.kept_mask, features.valid.shape[1]
    max_tokens, max_merged, _ = sizes
    merged = get_method(config.method).merge(features, selection, config, max_merged)
    kept_counts, counts = kept.sum(-1, keepdim=True), selection.counts.unsqueeze(-1)  # (B, 1)
    slot = torch.arange(max_tokens, device=kept.device).expand(kept.shape[0], -1)  # (B, K)
    kept_places = nonzero_first(kept, max_tokens)
    index = torch.where(slot < kept_counts, kept_places, patches + slot - kept_counts)  # into kept, then merged
    index = index.clamp(max=patches + max_merged - 1)
    source = torch.cat([features.hidden_states, merged.tokens], dim=1) if max_merged else features.hidden_states
    tokens = _gather_rows(source, index)
    tokens = tokens.masked_fill((slot >= counts).unsqueeze(-1), 0)
    raster = torch.arange(patches, device=kept.device).expand(kept.shape[0], -1)
    places = torch.cat([raster, merged.places], dim=1).gather(1, index).masked_fill(slot >= counts, -1)
    cluster = torch.where(merged.cluster >= 0, kept_counts + merged.cluster, merged.cluster)
    cluster = torch.where(kept, kept.cumsum(-1) - 1, cluster)
    return TokenRecoveryOutput(
        tokens=tokens,
        counts=selection.counts,
        visual_mask=selection.visual_mask,
        text_mask=selection.text_mask,
        coverage_mask=selection.coverage_mask,
        centre_mask=selection.centre_mask,
        cluster=cluster,
        places=places,
        saliency=selection.saliency,
        text_similarity=features.text_similarity,
    )


def budget_split(patches: int, config: TokenRecoveryConfig, has_text: bool) -> tuple[int, int, int, int]:
    """How a fixed budget is spent on an image of that many patches.

    Returns:
        (visual, text, coverage, merged) counts.
    """
    budget = config.budget
    if budget is None:
        raise ValueError("budget_split needs a fixed budget, got None.")
    total = budget if isinstance(budget, int) else max(1, math.floor(budget * patches + 0.5))
    merged = 0 if total >= patches else min(config.merged_tokens, total - 1)
    total = min(total, patches)
    coverage = math.floor(config.coverage_share * (total - merged))
    text = math.floor(config.text_share * (total - merged - coverage)) if has_text else 0
    return total - merged - coverage - text, text, coverage, merged


def top_mask(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """The `counts` candidates of highest score in each row; of equal scores the lower index wins.

    Args:
        scores: (B, N) float.
        counts: (B,) or (B, 1) int.
        candidates: (B, N) bool.

    Returns:
        (B, N) bool.
    """
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # Candidates first even where their own score is -inf.
    order = order.gather(-1, candidates.gather(-1, order).logical_not().byte().argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, _positions(order))
    return (rank < counts.reshape(-1, 1)) & candidates


def nonzero_first(mask: Tensor, length: int) -> Tensor:
    """Indices of the `True` entries of each row in ascending order, padded with others: (B, N) -> (B, length)."""
    index = mask.logical_not().byte().argsort(dim=-1, stable=True)[:, :length]
    return torch.nn.functional.pad(index, (0, max(length - mask.shape[1], 0)))


def _select_recoverable(features: VisualFeatures, config: TokenRecoveryConfig) -> TokenSelection:
    saliency = class_saliency(
        features.class_query, features.keys, features.num_heads, config.visual_heads, features.valid
    )
    select = _select_dynamic if config.budget is None else _select_budget
    return select(features, saliency, config)


def _select_dynamic(features: VisualFeatures, saliency: Tensor, config: TokenRecoveryConfig) -> TokenSelection:
    """Outliers decide how many tokens each stage keeps (paper, section on the dynamic scale filter)."""
    k, threshold, valid = config.outlier_neighbors, config.outlier_threshold, features.valid
    similarity = features.text_similarity
    visual = top_mask(saliency, upper_outliers(saliency, k, threshold, valid).sum(-1), valid)
    rest = valid & ~visual
    text = torch.zeros_like(visual)
    if similarity is not None:
        text = top_mask(similarity, upper_outliers(similarity, k, threshold, rest).sum(-1), rest)
        rest = rest & ~text
    centres = upper_outliers(saliency, config.merge_neighbors, threshold, rest)
    highest = top_mask(saliency, torch.ones_like(valid[:, 0], dtype=torch.long), rest)
    centres = torch.where(centres.any(-1, keepdim=True), centres, highest)
    return TokenSelection(visual, text, torch.zeros_like(visual), centres, centres.sum(-1), saliency)


def _select_budget(features: VisualFeatures, saliency: Tensor, config: TokenRecoveryConfig) -> TokenSelection:
    """Exactly `budget` tokens, chosen in the order visual, text, coverage, centres, each among what is left."""
    similarity, patches = features.text_similarity, features.valid.shape[1]
    sizes = [patches] if features.all_valid else range(patches + 1)
    table = [budget_split(size, config, similarity is not None) for size in sizes]
    splits = torch.tensor(table, device=saliency.device)
    rows = torch.zeros_like(features.valid.sum(-1)) if features.all_valid else features.valid.sum(-1)
    n_visual, n_text, n_coverage, n_merged = splits[rows].unbind(-1)
    rest = features.valid
    visual = top_mask(saliency, n_visual, rest)
    rest = rest & ~visual
    text = top_mask(saliency if similarity is None else similarity, n_text, rest)
    rest = rest & ~text
    steps = max(split[2] for split in table)
    most, most_merged = max(map(sum, table)), max(split[3] for split in table)
    coverage = farthest_points(visual | text, rest, n_coverage, features.grid, steps)
    rest = rest & ~coverage
    centres = top_mask(saliency, n_merged, rest)
    return TokenSelection(
        visual,
        text,
        coverage,
        centres,
        n_merged,
        saliency,
        [most, most_merged, most * len(saliency)] if features.all_valid else None,
    )


def farthest_points(kept: Tensor, candidates: Tensor, counts: Tensor, grid: tuple[int, int], steps: int) -> Tensor:
    """Spread `counts` further patches evenly: each is the candidate farthest from everything kept so far.

    Distances are squared Euclidean ones on (row, column). With nothing kept the first candidate in raster order
    starts. The loop runs over steps, for all rows at once.

    Args:
        kept: (B, N) bool, patches that are kept already.
        candidates: (B, N) bool, patches to choose from.
        counts: (B,) int, how many to choose.
        grid: (rows, columns).
        steps: The largest of `counts`.

    Returns:
        (B, N) bool.
    """
    chosen = torch.zeros_like(kept)
    if steps == 0:
        return chosen
    index = torch.arange(kept.shape[1], device=kept.device)
    row, column = index // grid[1], index % grid[1]
    distance = _squared_distance_transform(kept, grid)
    for step in range(steps):
        pick = distance.masked_fill(~candidates | chosen, -1).argmax(-1, keepdim=True)  # (B, 1), first of equals
        active = (step < counts).unsqueeze(-1)
        chosen = chosen | ((index == pick) & active & candidates)
        from_pick = (row - pick // grid[1]) ** 2 + (column - pick % grid[1]) ** 2
        distance = torch.where(active, torch.minimum(distance, from_pick), distance)
    return chosen


def _squared_distance_transform(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squared distance of every cell to the nearest `True` cell: rows first, then columns. (B, N) -> (B, N)."""
    far = 4 * (grid[0] + grid[1]) ** 2  # more than any distance on the grid
    cells = mask.reshape(-1, *grid)
    rows, columns = (torch.arange(size, device=mask.device) for size in grid)
    along_row = torch.where(cells.unsqueeze(2), (columns[:, None] - columns) ** 2, far).amin(-1)  # (B, rows, columns)
    between_rows = ((rows[:, None] - rows) ** 2)[None, :, :, None]  # (1, rows, rows, 1)
    return (along_row.unsqueeze(1) + between_rows).amin(2).flatten(1)


def _merge_recoverable(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, max_merged: int
) -> MergedTokens:
    """Every patch that was not kept joins the centre of most similar key; a cluster becomes its weighted mean."""
    centres = nonzero_first(selection.centre_mask, max_merged)  # (B, M)
    cluster = torch.full_like(features.valid, -1, dtype=torch.long)
    if max_merged == 0:
        return MergedTokens(features.hidden_states[:, :0], centres, cluster)
    slot = torch.arange(max_merged, device=centres.device)  # (M,)
    with torch.no_grad():
        keys = torch.nn.functional.normalize(features.keys[:, 1:].float(), dim=-1)  # (B, N, C)
        similarity = _gather_rows(keys, centres) @ keys.transpose(1, 2)  # (B, M, N)
        unused = (slot >= selection.merged_counts.unsqueeze(-1)).unsqueeze(-1)
        nearest = similarity.masked_fill(unused, -torch.inf).argmax(1)  # (B, N), first of equals
        nearest = torch.where(selection.centre_mask, selection.centre_mask.cumsum(-1) - 1, nearest)
        member = features.valid & ~selection.kept_mask & (selection.merged_counts > 0).unsqueeze(-1)
        cluster = torch.where(member, nearest, cluster)
        weights = (cluster.unsqueeze(1) == slot[:, None]) * selection.saliency.unsqueeze(1)  # (B, M, N)
        peak = weights.amax(-1, keepdim=True)  # 0 where the whole cluster's saliency underflowed: a plain mean
        weights = torch.where(peak > 0, weights / peak, (cluster.unsqueeze(1) == slot[:, None]).float())
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    states = features.hidden_states
    precise = torch.promote_types(states.dtype, torch.float32)
    tokens = (weights.to(precise) @ states.to(precise)).to(states.dtype)
    return MergedTokens(tokens, centres, cluster)


def _gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, N, C) at index (B, K) -> (B, K, C)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _positions(index: Tensor) -> Tensor:
    return torch.arange(index.shape[-1], device=index.device).expand_as(index)


def _shape(hidden_states: Tensor) -> tuple[int, int, int]:
    if hidden_states.ndim != 3 or hidden_states.shape[1] == 0:
        raise ValueError(f"hidden_states must have shape (B, N, C) with N > 0, got {tuple(hidden_states.shape)}.")
    batch, patches, width = hidden_states.shape
    return batch, patches, width


def _grid(grid: tuple[int, int] | None, patches: int, config: TokenRecoveryConfig) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        square = side * side == patches
        if not square and config.budget is not None and config.coverage_share > 0:
            raise ValueError(f"coverage_share needs the grid of the {patches} patches, no square: pass grid=.")
        return (side, side) if square else (1, patches)
    if grid[0] * grid[1] != patches:
        raise ValueError(f"grid {tuple(grid)} has {grid[0] * grid[1]} cells, but there are {patches} patches.")
    return grid


RECOVERABLE = RecoveryMethod(_select_recoverable, _merge_recoverable)

__all__ = ["RecoveryMethod", "TokenRecoveryOutput", "VisualFeatures", "get_method", "recover_tokens"]
