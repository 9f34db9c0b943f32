"""Configuration: the validated `token_recovery` section and the model configs that carry it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from transformers import LlavaConfig, LlavaNextConfig, PretrainedConfig
from transformers.activations import ACT2FN

from .compat import default_auto_map
from .methods.contract import METHOD_FIELDS, check_int, check_share
from .methods.registry import get_method
from .remote_code import model_auto_map, write_sources
from .rules import CHANGED_BY_RULES, read_rules
from .settings import (
    CHOICES,
    FIELDS,
    LARGEST,
    PRESETS,
    TEXT_SIZES,
    Settings,
    as_json,
    did_you_mean,
    fields_text,
    is_budget,
    is_int,
    is_number,
    require,
    shown,
)

logger = logging.getLogger(__name__)


class TokenRecoveryConfig(Settings):
    """The `token_recovery` section of config.json: everything that decides which visual tokens a model reads.

    Args:
        version: Layout of the section; 1.
        enabled: `False` gives the stock model, bit for bit.
        method: `"recoverable"` (the paper's method), `"authors"` (its released code), a published method to compare
            with, a baseline, or a method of your own, registered before (`reccomp_hf.method_names()` lists
            them). Another method has its own defaults of how saliency and text relevance are found.
        method_options: Settings of the method alone, by name.
        budget: `None` lets the number of tokens adapt to the image; an `int` is the exact number of tokens of an
            image; a `float` in (0, 1] is a share of the image's patches.
        text_share: Share in [0, 1] of the kept tokens of a fixed budget that the question chooses.
        text_limit: `"share"`: the question chooses its whole share of a fixed budget; `"outliers"`: it chooses only
            patches that stand out among the similarities, as many as the dynamic mode would, and at most its share;
            coverage gets the rest. `"half_outliers"`: half as many; `"half_or_few"`: half or 2 % of the patches.
        text_by: `"similarity"`: of a fixed budget the question chooses the patches most similar to it; `"diversity"`:
            patches that are similar to it and unlike each other (CDPruner, Zhang et al., arXiv 2506.10967).
        merged_tokens: Number of tokens of a fixed budget that are merged ones (cluster means of the patches that
            are not kept).
        coverage_share: Share in [0, 1] of the kept tokens of a fixed budget that represent the image as a whole.
        coverage_by: `"place"` spreads these tokens evenly over the image; `"content"` chooses them so that their mean
            is as close as possible to the mean of all patches (kernel herding, Welling, ICML 2009).
        outlier_neighbors: Number of neighbours of the local outlier factor in the visual and text stage.
        merge_neighbors: Number of neighbours of the local outlier factor that chooses cluster centres.
        outlier_threshold: A local outlier factor above this is an outlier (scikit-learn's `"auto"` is 1.5).
        text_relevance: CLIP patch embeddings compared with the question: `"last"` (last block's output, the paper),
            `"penultimate"` (post_layernorm of the last block's input), `"value"` (the last block's value path). For
            this and the next three fields `None` means the method's own default; those of `"recoverable"` are
            `"last"`, 1, -1 and `"joint"`.
        text_relevance_sign: 1, or -1 for a CLIP whose dense similarity is inverted.
        visual_layer: Block whose class query and keys give the saliency, counted from the end; -1 is the last.
        visual_heads: `"joint"` (one head as wide as the model) or `"mean"` (softmax per head, averaged).
        position_ids: `"compact"` renumbers the shortened sequence, `"original"` keeps every token's own place.
        newlines: For LLaVA-NeXT: `"kept"` keeps the newline of every row that keeps a patch, `"none"` keeps none.
        rules: Other settings for some questions: a list of mappings of `begins` (one or several beginnings of
            questions, such as `"how many"`) and of the fields that change, such as `budget`. The first rule that fits
            a question holds for its row. Rules cannot change `version`, `enabled`, `position_ids`, `newlines` and
            `text_encoder_config`. To override another field, in a call or in a config, sets the rules aside, unless
            `rules` are given too.
        text_encoder_config: A `clip_text_model` config as a dict, or `None` for a model without text recovery.

    Raises:
        ValueError: An unknown field, a wrong type or an impossible combination.
    """

    def __init__(
        self,
        /,
        *,
        version: int = 1,
        enabled: bool = True,
        method: str = "recoverable",
        method_options: Mapping[str, Any] | None = None,
        budget: int | float | None = None,
        text_share: float = 0.5,
        text_limit: str = "share",
        text_by: str = "similarity",
        merged_tokens: int = 8,
        coverage_share: float = 0.0,
        coverage_by: str = "place",
        outlier_neighbors: int = 20,
        merge_neighbors: int = 10,
        outlier_threshold: float = 1.5,
        text_relevance: str | None = None,
        text_relevance_sign: int | None = None,
        visual_layer: int | None = None,
        visual_heads: str | None = None,
        position_ids: str = "compact",
        newlines: str = "kept",
        rules: Sequence[Mapping[str, Any]] | None = None,
        text_encoder_config: Mapping[str, Any] | PretrainedConfig | None = None,
        **unknown: NoReturn,
    ) -> None:
        """Set the given fields, take the defaults for the others, and validate."""
        fields = {name: value for name, value in locals().items() if name in FIELDS}
        _refuse_unknown(unknown)
        defaults = default_fields(method)
        for name in (*METHOD_FIELDS, "method_options"):
            fields[name] = defaults[name] if fields[name] is None else fields[name]
        fields["rules"] = [] if rules is None else rules
        if isinstance(text_encoder_config, PretrainedConfig):
            fields["text_encoder_config"] = text_encoder_config.to_dict()
        self.__dict__.update({name: as_json(name, value) for name, value in fields.items()})
        self.validate()

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        """Refuse to change the section in place, with an AttributeError."""
        raise AttributeError(
            f"A token_recovery section cannot be changed in place: got {name} = {value!r}. Assign the fields that "
            f"change to the config instead: config.token_recovery = {{{name!r}: {value!r}}}."
        )

    @classmethod
    def from_preset(cls, name: str, /, **overrides: Any) -> TokenRecoveryConfig:
        """Build a preset, with single fields overridden: `"paper"`, `"authors"`, `"balanced"` or `"balanced-v1"`.

        Raises:
            ValueError: An unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(map(repr, PRESETS))}.")
        return cls(**overridden(PRESETS[name], overrides))

    @classmethod
    def from_value(cls, value: TokenRecoveryConfig | Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """Read a section: an instance as it is, a mapping of fields, or `None` for the defaults."""
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"token_recovery must be a mapping of fields or None, got {type(value).__name__}.")
        return cls(**overridden({}, value or {}))

    def replace(self, overrides: TokenRecoveryConfig | Mapping[str, Any] | None) -> TokenRecoveryConfig:
        """A copy with the given fields overridden, validated; an instance replaces all fields.

        Another `method` brings its own defaults of `text_relevance`, `text_relevance_sign`, `visual_layer` and
        `visual_heads`, and without `method_options`, unless they are overridden too. A field that rules could change
        then holds for all questions: `rules` are dropped, unless they are overridden too.
        """
        if overrides is None or isinstance(overrides, TokenRecoveryConfig):
            return self if overrides is None else overrides
        if not isinstance(overrides, Mapping):
            raise ValueError(f"token_recovery must be a mapping of fields, got {type(overrides).__name__}.")
        return type(self)(**overridden(self.to_dict(), overrides))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, without empty `rules`; validates: nothing impossible is ever written."""
        self.validate()
        fields = {name: as_json(name, getattr(self, name)) for name in FIELDS}
        return {name: value for name, value in fields.items() if name != "rules" or value}

    def overridable(self) -> dict[str, Any]:
        """The fields that a user may override, as plain JSON values: all but the text encoder's, which is loaded."""
        fields = self.to_dict()
        del fields["text_encoder_config"]
        return fields

    def validate(self) -> None:
        """Check every field and their combination.

        Raises:
            ValueError: A field or a combination is not valid; the message says what to write instead.
        """
        text, own = fields_text(self), self.__dict__
        if text and "_validated" in own and own["_validated"] == (text, id(get_method(self.method))):
            return  # it would take a tenth of a millisecond before every prefill
        if not is_int(self.version) or self.version != 1:
            raise ValueError(
                f"token_recovery.version must be 1, got {shown(self.version)}; a newer section needs a newer "
                "reccomp_hf."
            )
        require(isinstance(self.enabled, bool), "enabled", "true or false", self.enabled)
        require(isinstance(self.method, str) and self.method != "", "method", "a method's name", self.method)
        is_mapping = isinstance(self.method_options, Mapping)
        require(is_mapping, "method_options", "a mapping of the method's options", self.method_options)
        require(is_budget(self.budget), "budget", "null, an int >= 1 or a float in (0, 1]", self.budget)
        for name in ("text_share", "coverage_share"):
            check_share(f"token_recovery.{name}", getattr(self, name))
        for name, least in (("merged_tokens", 0), ("outlier_neighbors", 1), ("merge_neighbors", 1)):
            check_int(f"token_recovery.{name}", getattr(self, name), least)
        threshold, layer = self.outlier_threshold, self.visual_layer
        fits = is_number(threshold) and 0 < threshold <= LARGEST
        require(fits, "outlier_threshold", f"a number > 0 and up to {LARGEST}", threshold)
        require(is_int(layer) and layer < 0, "visual_layer", "an int < 0", layer)
        check_int("token_recovery.visual_layer", layer, -LARGEST)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            fits = isinstance(value, type(allowed[0])) and not isinstance(value, bool) and value in allowed
            require(fits, name, " or ".join(map(repr, allowed)), value)
        self._validate_text_encoder()
        self._validate_combination()
        read_rules(self)
        own["_validated"] = (text, id(get_method(self.method)))

    def _validate_text_encoder(self) -> None:
        encoder = self.text_encoder_config
        if encoder is None:
            return
        require(isinstance(encoder, Mapping), "text_encoder_config", "null or a CLIP text config", encoder)
        model_type = encoder.get("model_type")
        if model_type != "clip_text_model":
            raise ValueError(
                "token_recovery.text_encoder_config must be of model_type 'clip_text_model', got "
                f"{shown(model_type)}; only CLIP text encoders match a CLIP vision tower."
            )
        for name in (name for name in TEXT_SIZES if name in encoder):
            check_int(f"token_recovery.text_encoder_config.{name}", encoder[name], 1)
        activation = encoder.get("hidden_act", "quick_gelu")
        fits = isinstance(activation, str) and activation in ACT2FN
        require(fits, "text_encoder_config.hidden_act", "an activation of transformers", activation)

    def _validate_combination(self) -> None:
        method = get_method(self.method)
        self.__dict__["_options"] = method.read_options(self.method, self.method_options)
        if method.budget == "required" and self.budget is None:
            raise ValueError(
                f"method {self.method!r} needs a budget, got null; write an int >= 1 or a float in (0, 1]."
            )
        needed: dict[str, Any] = {"budget": None} if method.budget == "none" else {}
        if method.compact_only:
            needed["position_ids"] = "compact"
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"method {self.method!r} fixes the number of tokens itself and needs {name}={value!r}, got "
                    f"{getattr(self, name)!r}; use method 'recoverable' for it."
                )


class _RecCompConfigMixin:
    """The `token_recovery` section of a model config: read, validated on assignment, written back."""

    # Outputs that evaluation loops do not collect as predictions.
    keys_to_ignore_at_inference = [
        *("past_key_values", "image_hidden_states"),
        *("cache", "image_outputs"),  # from transformers 5.24 on
        *("visual_token_counts", "newline_counts"),
    ]

    token_recovery: TokenRecoveryConfig

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning a mapping to `token_recovery` overrides single fields of the section that is there."""
        if name == "token_recovery":
            present = self.__dict__.get("token_recovery")
            value = TokenRecoveryConfig.from_value(value) if present is None else present.replace(value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """The stock dictionary with the section as plain JSON values, and the classes that `auto_map` names."""
        output = super().to_dict()  # type: ignore[misc]
        output["token_recovery"] = self.token_recovery.to_dict()
        # A checkpoint that was loaded from the Hub names its repository there; a saved one carries the code itself.
        output["auto_map"] = {**(output.get("auto_map") or {}), **model_auto_map(output["model_type"])}
        return output

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the stock method; the code that loads the config and its model is written next to it."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_sources(os.fspath(save_directory))

    def _upload_modified_files(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; `save_pretrained` with `push_to_hub` comes here before the code is written."""
        write_sources(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `save_pretrained` writes the code and its `auto_map` itself."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; a stock LLaVA's is taken for a visual-only model of ours, with a warning.

        Raises:
            ValueError: It belongs to another kind of model.
        """
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        stock_type = super().model_type  # type: ignore[misc]
        model_type = fields.get("model_type", cls.model_type)  # type: ignore[attr-defined]
        if model_type == stock_type:
            fields = {**fields, "model_type": cls.model_type}  # type: ignore[attr-defined]
            fields.pop("architectures", None)
            if not (fields.get("token_recovery") or {}).get("text_encoder_config"):
                logger.warning(
                    f"{pretrained_model_name_or_path} is a stock {stock_type!r} checkpoint, read as visual-only: "
                    "without CLIP's text encoder the question does not influence which visual tokens are kept. To add "
                    "it: reccomp_hf.convert(llava, clip, output), or `reccomp-hf convert LLAVA CLIP OUT`."
                )
        elif model_type != cls.model_type:  # type: ignore[attr-defined]
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of model_type {model_type!r}; {cls.__name__} reads "
                f"{cls.model_type!r} and stock {stock_type!r}."  # type: ignore[attr-defined]
            )
        return fields, unused


class LlavaRecCompConfig(_RecCompConfigMixin, LlavaConfig):
    """`LlavaConfig` with a `token_recovery` section.

    Args:
        vision_config: As in `LlavaConfig`; a CLIP vision tower.
        text_config: As in `LlavaConfig`.
        token_recovery: A [`TokenRecoveryConfig`], its fields as a mapping, or `None` for the preset `"paper"`.
        **kwargs: Everything else that `LlavaConfig` takes.
    """

    model_type = "llava_reccomp"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        token_recovery: TokenRecoveryConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the stock config and validate the section."""
        self.token_recovery = TokenRecoveryConfig.from_value(token_recovery)
        kwargs = {**default_auto_map(model_auto_map(self.model_type)), **kwargs}
        super().__init__(vision_config=vision_config, text_config=text_config, **kwargs)


class LlavaNextRecCompConfig(_RecCompConfigMixin, LlavaNextConfig):
    """`LlavaNextConfig` with a `token_recovery` section.

    Args:
        vision_config: As in `LlavaNextConfig`; a CLIP vision tower.
        text_config: As in `LlavaNextConfig`.
        token_recovery: A [`TokenRecoveryConfig`], its fields as a mapping, or `None` for the preset `"paper"`.
        **kwargs: Everything else that `LlavaNextConfig` takes.
    """

    model_type = "llava_next_reccomp"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        token_recovery: TokenRecoveryConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the stock config and validate the section."""
        self.token_recovery = TokenRecoveryConfig.from_value(token_recovery)
        kwargs = {**default_auto_map(model_auto_map(self.model_type)), **kwargs}
        super().__init__(vision_config=vision_config, text_config=text_config, **kwargs)


def default_fields(method: Any) -> dict[str, Any]:
    """Default of every field for a method; those of `"recoverable"` if `method` is not a name.

    Raises:
        ValueError: No method of that name.
    """
    own = get_method(method).defaults if isinstance(method, str) and method else {}
    usual = {field.name: field.default for field in dataclasses.fields(Settings)}
    return {**usual, "method_options": {}, **own}


def overridden(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with overrides; some of them drop others, see `TokenRecoveryConfig.replace`.

    Raises:
        ValueError: An unknown field.
    """
    _refuse_unknown([name for name in overrides if name not in FIELDS])
    before = fields.get("method", "recoverable")
    after = overrides.get("method", before)
    leaving = {*METHOD_FIELDS, "method_options"} if isinstance(after, str) and after != before else set()
    leaving |= {"rules"} if CHANGED_BY_RULES & overrides.keys() else set()
    return {**{name: value for name, value in fields.items() if name not in leaving}, **overrides}


def _refuse_unknown(fields: Iterable[Any]) -> None:
    for name in fields:
        hint = did_you_mean(name, FIELDS, f"known fields are {', '.join(FIELDS)}.")
        raise ValueError(f"Unknown token_recovery field {name!r}; {hint}")


__all__ = ["LlavaNextRecCompConfig", "LlavaRecCompConfig", "TokenRecoveryConfig", "default_fields", "overridden"]
