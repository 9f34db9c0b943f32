"""What a model card says about a checkpoint, piece by piece; `template.md` puts the pieces in order."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import textwrap
from typing import Any

from ...core.configuration import LlavaNextRecCompConfig, TokenRecoveryConfig, default_fields
from ...core.counting import PAPER_SHARE, compressed_tokens, fixed_tokens, picture_tokens
from ...core.methods.contract import METHOD_FIELDS, RELEVANCE, SALIENCY
from ...core.methods.registry import get_method
from ...core.settings import PRESETS
from ...measure.cost import compare_costs
from ...measure.published import FULL_SIZE

WIDTH = 120
NO_OWNER = "OWNER"
"""Stands in a Hub id that is not known yet."""
UNBROKEN = "\xa0"
"""Holds the words of an option together when a command is cut into lines."""
PICTURES = ((336, 336), (640, 480), (480, 640), (1920, 1080))
"""Sizes of pictures in a LLaVA-NeXT's table."""
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
PAPER_BASE = "llava-hf/llava-1.5-7b-hf"
PAPER_RESULTS = """\
| | ScienceQA | TextVQA | MME | VQAv2 | POPE | MMBench |
|---|---|---|---|---|---|---|
| LLaVA-1.5-7B, uncompressed | 68.40 | 58.20 | 1476.9 | 79.10 | 86.40 | 66.10 |
| Recoverable Compression, training-free, about 10 % of the tokens | 69.01 | 55.51 | 1284.9 | 70.41 | 72.00 | 57.90 |
"""
OF_A_QUESTION = ("text_share", "text_limit", *RELEVANCE)
OF_A_BUDGET = ("text_share", "text_limit", "merged_tokens", "coverage_share", "coverage_by")
OF_OUTLIERS = ("outlier_neighbors", "merge_neighbors", "outlier_threshold")
OF_SALIENCY = SALIENCY
"""Fields of the section that are read under a condition only; all others are always explained."""
COST_ROWS: dict[str, tuple[str, float]] = {
    "prompt_tokens": ("prompt, tokens", 1),
    "prefill_flops": ("language model's prefill, TFLOP", 1e-12),
    "prefill_seconds": ("language model's prefill, ms", 1e3),
    "first_token_seconds": ("all up to the first token, vision included, ms", 1e3),
    "kv_cache_bytes": ("key-value cache of the prompt, MB", 1e-6),
    "largest_batch": ("prompts that fit at a time", 1),
}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is rendered from.

    Args:
        name: The checkpoint's name.
        config: Its config, one of ours.
        base_model: Hub ids of the LLaVA and the CLIP that it was made of, the LLaVA first; empty if not known.
        license: The licence's identifier; `None` if not known.
        repo: Its Hub id; `None` if it has none yet.
        counts: What [`measure_tokens`] found; `None` if nothing was measured.
        origin: What is to be said about its making instead of the command; `None` for a converted checkpoint.
        results: What is to be said of results, with its source; `None` for the paper's or none.
    """

    name: str
    config: Any
    base_model: tuple[str, ...] = ()
    license: str | None = None
    repo: str | None = None
    counts: dict[str, float] | None = None
    origin: str | None = None
    results: str | None = None

    @property
    def section(self) -> TokenRecoveryConfig:
        """The `token_recovery` section."""
        return self.config.token_recovery

    @property
    def tiled(self) -> bool:
        """Whether it is a LLaVA-NeXT."""
        return self.config.model_type == LlavaNextRecCompConfig.model_type


def pieces(facts: CardFacts) -> dict[str, Any]:
    """All that the template asks for, metadata apart."""
    vision, measured = facts.config.vision_config, _measured_mean(facts)
    cost = compare_costs(facts.config, None if measured is None else [measured])
    return {
        "other_budget": (vision.image_size // vision.patch_size) ** 2 // 4,
        "name": facts.name,
        "repo": facts.repo or f"{NO_OWNER}/{facts.name}",
        "intro": _wrap(_intro(facts)),
        "origin": _wrap(facts.origin or _origin(facts)),
        "fields": field_rows(facts.section, facts.tiled),
        "tokens": _tokens(facts),
        "cost": _wrap(_cost(facts, cost)),
        "cost_rows": _cost_rows(cost),
        "results": _results(facts),
        "limits": [_wrap(limit, indent="  ") for limit in _limits(facts)],
        "made": _made(facts),
        "licence": _wrap(_licence(facts)),
    }


def field_descriptions() -> dict[str, str]:
    """What every field of the section means, out of the docstring of [`TokenRecoveryConfig`]."""
    documented = re.split(r"\n\s*Args:\n", TokenRecoveryConfig.__doc__ or "")[-1].split("Raises:")[0]
    entries = re.split(r"^ {8}(\w+): ", documented, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def field_rows(section: TokenRecoveryConfig, tiled: bool = True) -> list[dict[str, str]]:
    """The fields that change what this section does to a LLaVA (`tiled`: LLaVA-NeXT), with value and meaning.

    What is shown is everything but what is known to be without effect: a new field shows up by itself.
    """
    silent, described = _without_effect(section) | (set() if tiled else {"newlines"}), field_descriptions()
    rows = []
    for field in dataclasses.fields(section):
        if field.name in silent:
            continue
        value = getattr(section, field.name)
        if field.name == "text_encoder_config" and value is not None:
            shown = f"CLIP's, {value.get('max_position_embeddings', 77)} tokens at a time"
        else:
            shown = f"`{json.dumps(value)}`"
        meaning = re.sub("`(None|True|False)`", lambda word: f"`{JSON_WORDS[word[1]]}`", described[field.name])
        rows.append({"name": field.name, "value": shown, "meaning": meaning.replace("|", "\\|")})
    return rows


def recipe(section: TokenRecoveryConfig) -> tuple[str, dict[str, Any]]:
    """The preset that comes nearest, and the fields to set besides."""
    values, of_method = section.to_dict(), default_fields(section.method)

    def differing(preset: str) -> dict[str, Any]:
        usual = TokenRecoveryConfig.from_preset(preset).to_dict()
        if usual["method"] != section.method:  # another method brings its own defaults
            usual |= {name: of_method[name] for name in (*METHOD_FIELDS, "method_options")}
        return {name: values[name] for name in usual if name != "text_encoder_config" and values[name] != usual[name]}

    preset = min(PRESETS, key=lambda name: len(differing(name)))
    return preset, differing(preset)


def _without_effect(section: TokenRecoveryConfig) -> set[str]:
    """Fields that are known to change nothing, given the others."""
    if not section.enabled:
        of_all = {"version", "method", "method_options", "budget", "position_ids", "newlines"}
        return {*of_all, *OF_A_QUESTION, *OF_A_BUDGET, *OF_OUTLIERS, *OF_SALIENCY}
    unread = OF_OUTLIERS if section.text_limit == "share" else ("merge_neighbors",)
    silent = {"version", *(unread if section.budget is not None else OF_A_BUDGET)}
    method = get_method(section.method)
    silent |= {"method_options"} if method.options is None else set()
    if method.fields is not None:
        silent |= {*OF_A_QUESTION, *OF_A_BUDGET, *OF_OUTLIERS, *OF_SALIENCY} - {*method.fields}
        silent |= {"budget"} if method.budget == "none" else set()
    elif not _reads_question(section):
        silent |= {*OF_A_QUESTION} - {"text_share"}
    return silent


# ---- sentences -----------------------------------------------------------------------------------------------------


def _intro(facts: CardFacts) -> str:
    family = "A LLaVA-NeXT" if facts.tiled else "A LLaVA-1.5"
    return (
        f"{family} that reads a fraction of its visual tokens: {_summary(facts)}. {_whose(facts.section.method)}; the "
        "checkpoint was made by `reccomp_hf`, which is independent of the paper's authors."
    )


def _whose(name: str) -> str:
    """A sentence about the method, its arXiv number as a link."""
    source = get_method(name).source
    if not source:  # chance, means of the grid's cells, or a method of the checkpoint's maker
        return f"The method is `{name}`, which is none of a paper's"
    linked = re.sub(r"arXiv (\d+\.\d+)", r"arXiv [\1](https://arxiv.org/abs/\1)", source)
    return f"The method is {linked}, which needs no training"


def _summary(facts: CardFacts) -> str:
    _, patches, _ = picture_tokens(facts.config)
    if not facts.section.enabled:
        return "the compression is switched off in this checkpoint"
    if _is_open(facts):
        asking = "the picture and the question decide" if _reads_question(facts.section) else "the picture decides"
        return f"{asking} how many of them it keeps"
    after = compressed_tokens(facts.config, facts.section)
    if not facts.tiled:
        return f"every picture becomes {after:,} tokens instead of {patches:,}"
    if isinstance(facts.section.budget, float):
        return f"every picture becomes {facts.section.budget:.0%} of its tokens"
    beside = " and a few newlines" if facts.section.newlines == "kept" else ""
    return f"every picture becomes {after:,} tokens{beside} instead of one or two thousand"


def _is_open(facts: CardFacts) -> bool:
    """Whether the number of tokens depends on the picture beyond its size."""
    return facts.section.enabled and fixed_tokens(facts.config, facts.section) is None


def _reads_question(section: TokenRecoveryConfig) -> bool:
    return section.text_encoder_config is not None and get_method(section.method).reads_question(section)


def _origin(facts: CardFacts) -> str:
    if not facts.base_model:
        return "Which LLaVA and CLIP its weights come from, and whether they were trained further, was not recorded."
    links = [f"[{name}](https://huggingface.co/{name})" for name in facts.base_model]
    parts = "Vision tower, projector and language model"
    text = f"Nothing was trained to make it. {parts} are those of {links[0]}"
    if facts.section.text_encoder_config is None:
        return text + ". There is no text encoder: the choice of tokens does not look at the question."
    beside = (
        f"{links[1]}'s text encoder and its projections stand" if len(links) > 1 else "its CLIP's text side stands"
    )
    return f"{text}; {beside} beside them and tell which patches a question is about."


def _tokens(facts: CardFacts) -> str:
    parts = [_tiled_tokens(facts) if facts.tiled else _plain_tokens(facts)]
    if facts.counts is not None:
        parts.append(_measured(facts.counts))
    elif _is_open(facts):
        parts.append("How many stay was not measured for this card; `reccomp-hf card FOLDER` does it.")
    else:
        parts.append("These counts follow from the settings.")
    return "\n\n".join(_wrap(part) if "|---" not in part else part for part in parts)


def _plain_tokens(facts: CardFacts) -> str:
    _, patches, _ = picture_tokens(facts.config)
    if _is_open(facts):
        return f"Stock: {patches:,} per picture. Here the count is dynamic; `model.recover(**inputs)` gives it."
    after = compressed_tokens(facts.config, facts.section)
    return f"Stock: {patches:,} per picture. Here: {after:,} ({after / patches:.1%}), always."


def _tiled_tokens(facts: CardFacts) -> str:
    lines = ["| picture (w x h) | tiles | stock: patches + newlines | here: tokens + newlines |", "|---|---|---|---|"]
    kept = facts.section.newlines == "kept"
    for size in PICTURES:
        tiles, patches, newlines = picture_tokens(facts.config, size)
        after, most = compressed_tokens(facts.config, facts.section, size), newlines
        if _is_open(facts):
            here = "dynamic"
        elif facts.section.enabled and not kept:
            here = f"{after:,} + 0"
        else:
            most = min(newlines, after)
            here = f"{after:,} + {'' if not facts.section.enabled else 'up to '}{most}"
        lines.append(f"| {size[0]} x {size[1]} | 1 + {tiles - 1} | {patches:,} + {newlines} | {here} |")
    stays = "A newline stays where its row of the picture keeps a patch" if kept else "No newline stays"
    note = f"A budget is one for the whole picture. {stays}."
    return "\n".join([*lines, "", note])


def _measured(counts: dict[str, float]) -> str:
    """The counts that were found on the probe set, by the stage that chose them."""
    stages = {
        "visual": "for their saliency",
        "text": "for the question",
        "coverage": "for coverage",
        "merged": "merged from the rest",
    }
    parts = [f"{counts[name]:.1f} {words}" for name, words in stages.items() if counts[name]]
    return (
        f"Measured on {counts['pictures']:.0f} drawn scenes with a question each (the package's, no photographs): of "
        f"{counts['stock']:,.0f} patches {counts['mean']:,.1f} tokens stay on average, "
        f"{counts['least']:,.0f} at least and {counts['most']:,.0f} at most: {', '.join(parts)}."
    )


def _cost(facts: CardFacts, cost: dict[str, Any]) -> str:
    picture = f" of {cost['picture'][0]} x {cost['picture'][1]} pixels" if cost["picture"] else ""
    assumed = ""
    if measured := _measured_mean(facts):
        assumed = f" Compressed are {measured} visual tokens, the average measured above."
    elif _is_open(facts):
        assumed = f" Assumed is the paper's average of {PAPER_SHARE:.1%} of the tokens, not this checkpoint's own."
    return (
        "Estimated by a roofline model (`reccomp-hf cost`), **not measured**: A100 with 40 GB, fp16, a picture"
        f"{picture} and {cost['text_tokens']} text tokens. Real kernels are slower.{assumed}"
    )


def _measured_mean(facts: CardFacts) -> int | None:
    """Tokens that an open count came to on the probe set; LLaVA-NeXT's depend on the picture's size too."""
    return round(facts.counts["mean"]) if facts.counts and _is_open(facts) and not facts.tiled else None


def _cost_rows(cost: dict[str, Any]) -> list[dict[str, str]]:
    stock, ours = cost["rows"]
    rows = []
    for entry, (label, factor) in COST_ROWS.items():
        ratio = ours[entry] / stock[entry] if stock[entry] else None
        rows.append(
            {
                "label": label,
                "stock": _number(stock[entry] * factor),
                "compressed": _number(ours[entry] * factor),
                "ratio": "" if ratio is None else f"{ratio:.2f}",
            }
        )
    return rows


def _number(value: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def _results(facts: CardFacts) -> str:
    if facts.results is not None:
        return _wrap(facts.results)
    lines = ["Not measured: no benchmark was run on this checkpoint when it was made."]
    if PAPER_BASE in facts.base_model:
        preset, fields = recipe(facts.section)
        own = preset == "paper" and not fields
        lines[0] += " The paper's own numbers for its own implementation" + (
            ":" if own else ", whose settings are not this checkpoint's (its number of tokens adapts to the picture):"
        )
        lines += ["", PAPER_RESULTS, "Source: the paper's tables (arXiv 2409.01179)."]
        return "\n".join([_wrap(lines[0]), *lines[1:]])
    return _wrap(lines[0])


def _limits(facts: CardFacts) -> list[str]:
    section = facts.section
    limits = [
        "Fewer tokens change answers. Expect losses where details decide (text in pictures, counting, small objects), "
        "and check your own task."
    ]
    if _reads_question(section):
        limits.append("The tokens are chosen for the last user turn; all its pictures share that question.")
    if facts.tiled:
        limits.append(
            "LLaVA-NeXT fine-tuned its vision tower, so CLIP's text encoder tells less exactly than for LLaVA-1.5 "
            "which patches a question is about."
        )
    if section.enabled and section.position_ids == "original":
        limits.append('`position_ids: "original"` needs sdpa or eager attention; flash attention is refused.')
    limits.append("The vision tower runs in full, so the time to the first token falls less than the prefill alone.")
    limits.append("Assisted generation with an assistant model is refused beside pictures.")
    return limits


def _made(facts: CardFacts) -> str:
    if facts.origin is not None:
        return _wrap(
            "`reccomp_hf/demo/checkpoints/README.md` says how it was trained; `reccomp-hf demo` asks it about a drawn "
            "scene, nothing is downloaded."
        )
    if not facts.base_model:
        return "Not recorded. `reccomp-hf convert` makes checkpoints of this kind out of a stock LLaVA and its CLIP."
    preset, fields = recipe(facts.section)
    known = list(facts.base_model)
    words = ["reccomp-hf convert", known[0]]
    if facts.section.text_encoder_config is not None:
        words.append(known[1] if len(known) > 1 else "CLIP")
    words += [facts.name, f"--preset{UNBROKEN}{preset}"]
    words += [f"--set{UNBROKEN}{_quoted(name, value)}" for name, value in fields.items()]
    words += [] if facts.section.text_encoder_config is not None else ["--visual-only"]
    lines = textwrap.wrap(" ".join(words), 100, break_long_words=False, break_on_hyphens=False)
    command = " \\\n    ".join(lines).replace(UNBROKEN, " ")
    return f"```bash\n{command}\n```"


def _quoted(name: str, value: Any) -> str:
    """`name=value` for a shell, in one piece."""
    text = f"{name}={json.dumps(value)}"
    return shlex.quote(text).replace(" ", UNBROKEN) if isinstance(value, dict) else text


def _licence(facts: CardFacts) -> str:
    if facts.license is None:
        return (
            "The weights are under the base model's licence, which was not recorded: ask its model card before you "
            "use or publish them, and set it with `reccomp-hf card FOLDER --license ID`."
        )
    known = next((entry for entry in FULL_SIZE.values() if entry.base_model in facts.base_model), None)
    whose = f", the licence of {known.base_model}" if known is not None and known.license == facts.license else ""
    return f"The weights: `{facts.license}`{whose}. The code of `reccomp_hf`: Apache-2.0."


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


__all__ = ["CardFacts", "field_descriptions", "field_rows", "pieces", "recipe"]
