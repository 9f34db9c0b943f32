"""The registry of methods: what a method declares about itself, and how one's own joins the built-in ones."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from .configuration_reccomp import TokenRecoveryConfig
    from .recovery import MergedTokens, TokenSelection, VisualFeatures

RELEVANCE = ("text_relevance", "text_relevance_sign")
SALIENCY = ("visual_layer", "visual_heads")
OF_A_METHOD = (*RELEVANCE, *SALIENCY)
"""Fields of the config section whose defaults are the method's own."""

Budget = Literal["optional", "required", "none"]
_BUDGETS = ("optional", "required", "none")


def merge_nothing(
    features: VisualFeatures, selection: TokenSelection, config: TokenRecoveryConfig, max_merged: int
) -> MergedTokens:
    """No merged tokens: what is not kept is dropped."""
    from .recovery import MergedTokens

    dropped = torch.full_like(features.valid, -1, dtype=torch.long)
    return MergedTokens(features.hidden_states[:, :0], dropped[:, :0], dropped)


@dataclasses.dataclass(frozen=True)
class RecoveryMethod:
    """A way to choose tokens.

    Args:
        select: `select(features, config)` chooses patches without reading anything from the device.
        merge: `merge(features, selection, config, max_merged)` makes the merged tokens, given the largest number of
            them. The default makes none.
        reads_text: Whether a question changes the choice. With a fixed budget and `text_share` 0 it is not read.
        needs_text: Whether the method is undefined without a question; it is then read in any case.
        reads_projected: Whether the choice reads LLaVA's projected features of all patches
            (`VisualFeatures.projected`); they are computed only then.
        scales_similarity: Whether the text similarity is divided by the root of the projection width.
        budget: Whether `budget` may be given (`"optional"`), must be (`"required"`), or must not (`"none"`).
        compact_only: Whether a token may have no place in the picture, so that `position_ids` must be `"compact"`.
        shares_patches: Whether a patch may enter several merged tokens; its `cluster` is -1 then.
        defaults: Values of `text_relevance`, `text_relevance_sign`, `visual_layer` and `visual_heads` where the config
            does not give them: those of the published method.
        fields: Which fields of the config section it reads beyond `method`, `method_options`, `budget` and
            `position_ids`; `None`: perhaps any. Model cards show these, and costs are estimated by them.
        compares: What it compares with all patches of a tile, for the estimate of its cost: `"nothing"`, the
            `"tokens"` that come out, or all `"patches"`.
        source: Whose method it is, with the arXiv number of its paper, for model cards; empty for a baseline.
        options: A frozen dataclass of the method's own settings, all with defaults, whose `__post_init__` raises
            ValueError for a bad value; `config.options` is an instance made from `method_options`.

    Raises:
        ValueError: A default of another field, an unknown kind of budget, or options that are no dataclass.
    """

    select: Callable[[VisualFeatures, TokenRecoveryConfig], TokenSelection]
    merge: Callable[[VisualFeatures, TokenSelection, TokenRecoveryConfig, int], MergedTokens] = merge_nothing
    reads_text: bool = False
    needs_text: bool = False
    reads_projected: bool = False
    scales_similarity: bool = False
    budget: Budget = "optional"
    compact_only: bool = False
    shares_patches: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: type | None = None
    fields: tuple[str, ...] | None = None
    compares: Literal["nothing", "tokens", "patches"] = "nothing"
    source: str = ""

    def __post_init__(self) -> None:
        """Check what can be checked before the method runs."""
        if self.budget not in _BUDGETS:
            raise ValueError(f"budget must be {' or '.join(map(repr, _BUDGETS))}, got {self.budget!r}.")
        if other := [name for name in self.defaults if name not in OF_A_METHOD]:
            raise ValueError(f"defaults may name {', '.join(OF_A_METHOD)}, got {other[0]!r}.")
        if self.options is not None and not dataclasses.is_dataclass(self.options):
            raise ValueError(f"options must be a dataclass with defaults, got {self.options!r}.")

    def reads_question(self, config: TokenRecoveryConfig) -> bool:
        """Whether the question changes the choice under these settings."""
        return self.needs_text or (self.reads_text and (config.budget is None or config.text_share > 0))

    def read_options(self, name: str, values: Mapping[str, Any]) -> Any:
        """The options of method `name` as its own dataclass; `None` for a method without options.

        Raises:
            ValueError: An unknown option or a value that the method refuses.
        """
        known = [] if self.options is None else [field.name for field in dataclasses.fields(self.options)]
        for option in values:
            if option not in known:
                near = difflib.get_close_matches(str(option), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no options'}."
                raise ValueError(f"Unknown token_recovery.method_options {option!r} of method {name!r}; {hint}")
        try:
            return None if self.options is None else self.options(**values)
        except ValueError as error:
            raise ValueError(f"token_recovery.method_options of method {name!r}: {error}") from error


def check_int(name: str, value: Any, least: int) -> None:
    """Refuse an option that is no int of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Refuse an option that is no number in [0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}.")


_METHODS: dict[str, RecoveryMethod] = {}


def _registry() -> dict[str, RecoveryMethod]:
    """All methods by name, the package's own ones first."""
    if "recoverable" not in _METHODS:
        _METHODS.update({**_built_in(), **_METHODS})
    return _METHODS


def _built_in() -> dict[str, RecoveryMethod]:
    """The package's methods. Imported late, since they import what imports this; by name, for remote code's sake."""
    from .methods_authors import AUTHORS
    from .methods_baselines import BASE_TILE, POOLING, POOLING_2X2, POOLING_3X3, RANDOM
    from .methods_cdpruner import CDPRUNER
    from .methods_divprune import DIVPRUNE
    from .methods_prumerge import PRUMERGE, PRUMERGE_PLUS
    from .methods_recoverable import RECOVERABLE
    from .methods_trim import TRIM
    from .methods_visionzip import VISIONZIP
    from .methods_vispruner import VISPRUNER
    from .methods_visual import VISUAL

    return {
        "recoverable": RECOVERABLE,
        "authors": AUTHORS,
        "visual": VISUAL,
        "prumerge": PRUMERGE,
        "prumerge_plus": PRUMERGE_PLUS,
        "visionzip": VISIONZIP,
        "trim": TRIM,
        "vispruner": VISPRUNER,
        "divprune": DIVPRUNE,
        "cdpruner": CDPRUNER,
        "random": RANDOM,
        "pooling": POOLING,
        "pooling_2x2": POOLING_2X2,
        "pooling_3x3": POOLING_3X3,
        "base_tile": BASE_TILE,
    }


def method_names() -> list[str]:
    """The names that `token_recovery.method` may have, the built-in ones first."""
    return list(_registry())


def get_method(name: str) -> RecoveryMethod:
    """The registered method of that name.

    Raises:
        ValueError: No such method.
    """
    found = _registry().get(name)
    if found is None:
        raise ValueError(
            f"Unknown token_recovery.method {name!r}; known methods are {', '.join(map(repr, method_names()))}. "
            "Register a method of your own before the model or its config is loaded: "
            "reccomp_hf.register_method(name, method)."
        )
    return found


def register_method(name: str, method: RecoveryMethod, *, overwrite: bool = False) -> None:
    """Make a method of your own usable as `token_recovery.method`, in this process.

    A config.json that names it loads wherever it was registered before; the code of such a method is not saved with a
    checkpoint.

    Args:
        name: What config.json says.
        method: The method.
        overwrite: Replace a method of that name.

    Raises:
        ValueError: A name that is taken or no name, or no [`RecoveryMethod`].
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"A method's name must be a non-empty string, got {name!r}.")
    if not isinstance(method, RecoveryMethod):
        raise ValueError(f"method must be a RecoveryMethod, got {type(method).__name__}.")
    if not overwrite and name in method_names():
        raise ValueError(f"The method name {name!r} is taken; choose another, or pass overwrite=True.")
    _registry()[name] = method


__all__ = [
    "OF_A_METHOD",
    "RELEVANCE",
    "SALIENCY",
    "Budget",
    "RecoveryMethod",
    "check_int",
    "check_share",
    "get_method",
    "merge_nothing",
    "method_names",
    "register_method",
]
