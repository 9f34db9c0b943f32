"""The registry of methods by name, and how a method of your own joins it."""

from __future__ import annotations

from ..settings import Settings
from .authors import AUTHORS
from .baselines import BASE_TILE, POOLING, POOLING_2X2, POOLING_3X3, RANDOM
from .cdpruner import CDPRUNER
from .contract import RecoveryMethod
from .divprune import DIVPRUNE
from .hiprune import HIPRUNE
from .holov import HOLOV
from .mmtok import MMTOK
from .prumerge import PRUMERGE, PRUMERGE_PLUS
from .recoverable import RECOVERABLE
from .scope import SCOPE
from .trim import TRIM
from .visionzip import VISIONZIP
from .vispruner import VISPRUNER
from .visual import VISUAL

_METHODS: dict[str, RecoveryMethod] = {
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
    "scope": SCOPE,
    "holov": HOLOV,
    "hiprune": HIPRUNE,
    "mmtok": MMTOK,
    "random": RANDOM,
    "pooling": POOLING,
    "pooling_2x2": POOLING_2X2,
    "pooling_3x3": POOLING_3X3,
    "base_tile": BASE_TILE,
}


def method_names() -> list[str]:
    """Names that `token_recovery.method` accepts, the built-in ones first."""
    return list(_METHODS)


def reads_question(section: Settings) -> bool:
    """Whether the choice of tokens reads the question, under the section's own settings or one of its rules."""
    return any(get_method(settings.method).reads_question(settings) for settings in section.all_settings)


def reads_encoded_question(section: Settings) -> bool:
    """Whether the choice of tokens reads the question as CLIP's text encoder gives it, under any of its settings."""
    return any(
        get_method(settings.method).reads_question(settings) and not get_method(settings.method).reads_words
        for settings in section.all_settings
    )


def reads_words(section: Settings) -> bool:
    """Whether the choice of tokens reads the question's words as LLaVA's tokens, under any of its settings."""
    return any(get_method(settings.method).reads_words for settings in section.all_settings)


def get_method(name: str) -> RecoveryMethod:
    """The registered method of that name.

    Raises:
        ValueError: No such method.
    """
    found = _METHODS.get(name)
    if found is None:
        raise ValueError(
            f"Unknown token_recovery.method {name!r}; known methods are {', '.join(map(repr, method_names()))}. "
            "Register a method of your own before the model or its config is loaded: "
            "reccomp_hf.register_method(name, method)."
        )
    return found


def register_method(name: str, method: RecoveryMethod, *, overwrite: bool = False) -> None:
    """Make a method of your own usable as `token_recovery.method`, in this process.

    A config.json that names it loads wherever the method was registered before; its code is not saved with a
    checkpoint.

    Args:
        name: The value of `token_recovery.method` in config.json.
        method: The method.
        overwrite: Whether to replace a method of that name.

    Raises:
        ValueError: A name that is taken or not a non-empty string, or `method` is not a [`RecoveryMethod`].
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"A method's name must be a non-empty string, got {name!r}.")
    if not isinstance(method, RecoveryMethod):
        raise ValueError(f"method must be a RecoveryMethod, got {type(method).__name__}.")
    if not overwrite and name in method_names():
        raise ValueError(f"The method name {name!r} is taken; choose another, or pass overwrite=True.")
    _METHODS[name] = method


__all__ = [
    "get_method",
    "method_names",
    "reads_encoded_question",
    "reads_question",
    "reads_words",
    "register_method",
]
