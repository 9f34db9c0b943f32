"""The texts and tables of a model card; `template.md` puts them in order."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from typing import Any

from ...core.checks import is_tiled
from ...core.configuration import TokenRecoveryConfig
from ...core.counting import PAPER_SHARE, compressed_tokens, fixed_tokens, picture_tokens
from ...core.methods.contract import RELEVANCE, SALIENCY
from ...core.methods.registry import get_method, reads_question
from ...measure.cost import compare_costs
from ...measure.published import FULL_SIZE
from ..conversion_record import ConversionRecord

WIDTH = 120
NO_OWNER = "OWNER"
"""Placeholder for the owner in a Hub id that is not known yet."""
UNBROKEN = "\xa0"
"""Joins the words of an option when a command is wrapped."""
IMAGE_SIZES = ((336, 336), (640, 480), (480, 640), (1920, 1080))
"""Widths and heights in the token table of a LLaVA-NeXT."""
_FENCE_BREAKERS = re.compile(r"[`\x00-\x1f]")
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
PAPER_BASE = "llava-hf/llava-1.5-7b-hf"
PAPER_RESULTS = """\
| | ScienceQA | TextVQA | MME | VQAv2 | POPE | MMBench |
|---|---|---|---|---|---|---|
| LLaVA-1.5-7B, uncompressed | 68.40 | 58.20 | 1476.9 | 79.10 | 86.40 | 66.10 |
| Recoverable Compression, training-free, about 10 % of the tokens | 69.01 | 55.51 | 1284.9 | 70.41 | 72.00 | 57.90 |
"""
QUESTION_FIELDS = {"text_share", "text_limit", "text_by", *RELEVANCE}
BUDGET_FIELDS = {"text_share", "text_limit", "text_by", "merged_tokens", "coverage_share", "coverage_by"}
OUTLIER_FIELDS = {"outlier_neighbors", "merge_neighbors", "outlier_threshold"}
METHOD_FIELDS = {*QUESTION_FIELDS, *BUDGET_FIELDS, *OUTLIER_FIELDS, *SALIENCY}
"""Fields of the section that only some settings read; all others are always explained."""
COST_ROWS: dict[str, tuple[str, float]] = {
    "prompt_tokens": ("prompt, tokens", 1),
    "prefill_flops": ("language model's prefill, TFLOP", 1e-12),
    "prefill_seconds": ("language model's prefill, ms", 1e3),
    "first_token_seconds": ("time to the first token, vision included, ms", 1e3),
    "kv_cache_bytes": ("key-value cache of the prompt, MB", 1e-6),
    "largest_batch": ("largest batch of prompts", 1),
}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """The facts that a card is rendered from.

    Args:
        name: Name of the checkpoint.
        config: Config of the checkpoint, one of ours.
        base_model: Hub ids of the LLaVA and the CLIP that it was made of, the LLaVA first; empty if not known.
        license: Identifier of the licence; `None` if not known.
        repo: Hub id of the checkpoint; `None` if it has none yet.
        counts: Result of [`measure_tokens`]; `None` if nothing was measured.
        record: Record of the conversion; `None` if there is none.
        tuned: Sentence about how the settings were tuned; `None` if they were not.
        origin: Text about a checkpoint that was trained; `None` for a converted one.
        results: Text about results, with its source; `None` for the paper's or none.
    """

    name: str
    config: Any
    base_model: tuple[str, ...] = ()
    license: str | None = None
    repo: str | None = None
    counts: dict[str, float] | None = None
    record: ConversionRecord | None = None
    tuned: str | None = None
    origin: str | None = None
    results: str | None = None

    @property
    def section(self) -> TokenRecoveryConfig:
        """The `token_recovery` section."""
        return self.config.token_recovery

    @property
    def tiled(self) -> bool:
        """Whether it is a LLaVA-NeXT."""
        return is_tiled(self.config)


def pieces(facts: CardFacts) -> dict[str, Any]:
    """The values of the template's placeholders, without the metadata."""
    vision, measured = facts.config.vision_config, _measured_mean(facts)
    cost = compare_costs(facts.config, None if measured is None else [measured])
    return {
        "other_budget": (vision.image_size // vision.patch_size) ** 2 // 4,
        "name": _escaped(facts.name),
        "repo": facts.repo or f"{NO_OWNER}/{_hub_name(facts.name)}",
        "intro": _wrap(_intro(facts)),
        "origin": _wrap(facts.origin or _origin(facts)),
        "fields": field_rows(facts.section, facts.tiled),
        "tokens": _tokens(facts),
        "cost": _wrap(_cost(facts, cost)),
        "cost_rows": _cost_rows(cost),
        "results": _results(facts),
        "limits": [_wrap(limit, indent="  ") for limit in _limits(facts)],
        "made": _made(facts) + (f"\n\n{_wrap(facts.tuned)}" if facts.tuned else ""),
        "licence": _wrap(_licence(facts)),
    }


def field_descriptions() -> dict[str, str]:
    """The meaning of every field of the section, from the docstring of [`TokenRecoveryConfig`]."""
    documented = re.split(r"\n\s*Args:\n", TokenRecoveryConfig.__doc__ or "")[-1].split("Raises:")[0]
    entries = re.split(r"^ {8}(\w+): ", documented, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def field_rows(section: TokenRecoveryConfig, tiled: bool = True) -> list[dict[str, str]]:
    """The fields that change the output of this section (`tiled`: of a LLaVA-NeXT), with value and meaning.

    All fields are shown but those that are known to have no effect, so that a new field cannot be forgotten.
    """
    unread, described = _unread_fields(section) | (set() if tiled else {"newlines"}), field_descriptions()
    rows = []
    for field in dataclasses.fields(section):
        if field.name in unread:
            continue
        value = getattr(section, field.name)
        text = "<br>".join(map(_code, value)) if field.name == "rules" else _code(value)
        if field.name == "text_encoder_config" and value is not None:
            text = f"CLIP's, {value.get('max_position_embeddings', 77)} tokens at a time"
        meaning = re.sub("`(None|True|False)`", lambda word: f"`{JSON_WORDS[word[1]]}`", described[field.name])
        rows.append({"name": field.name, "value": text, "meaning": meaning.replace("|", "\\|")})
    return rows


def _code(value: Any) -> str:
    """A JSON value as code in a table's cell."""
    return "`" + json.dumps(value).replace("`", "'").replace("|", "\\|") + "`"


def _unread_fields(section: TokenRecoveryConfig) -> set[str]:
    """Fields that have no effect, given the others."""
    if section.enabled and section.rules:
        return set.intersection(*map(_unread_fields, section.all_settings)) - {"rules"}
    if not section.enabled:
        return {"version", "method", "method_options", "budget", "position_ids", "newlines", "rules", *METHOD_FIELDS}
    method = get_method(section.method)
    unread = {"version", "rules"} | ({"method_options"} if method.options is None else set())
    if section.budget is None:
        unread |= BUDGET_FIELDS
    else:
        unread |= OUTLIER_FIELDS if section.text_limit == "share" else {"merge_neighbors"}
    if method.fields is not None:
        unread |= METHOD_FIELDS - {*method.fields}
        unread |= {"budget"} if method.budget == "none" else set()
    elif not _reads_question(section):
        unread |= QUESTION_FIELDS - {"text_share"}
    return unread


# ---- sentences -----------------------------------------------------------------------------------------------------


def _intro(facts: CardFacts) -> str:
    family = "A LLaVA-NeXT" if facts.tiled else "A LLaVA-1.5"
    return (
        f"{family} that reads a fraction of its visual tokens: {_summary(facts)}. {_method(facts.section.method)}; "
        "the checkpoint was made by `reccomp_hf`, which is independent of the paper's authors."
    )


def _method(name: str) -> str:
    """A sentence about the method, its arXiv number as a link."""
    source = get_method(name).source
    if not source:  # a baseline, or a method of the user's
        return f"The method is `{name}`, which is not a published method"
    linked = re.sub(r"arXiv (\d+\.\d+)", r"arXiv [\1](https://arxiv.org/abs/\1)", source)
    return f"The method is {linked}, which needs no training"


def _summary(facts: CardFacts) -> str:
    _, patches, _ = picture_tokens(facts.config)
    if not facts.section.enabled:
        return "the compression is switched off in this checkpoint"
    if _is_open(facts):
        deciding = "the image and the question decide" if _reads_question(facts.section) else "the image decides"
        return f"{deciding} how many of them it keeps"
    after = compressed_tokens(facts.config, facts.section)
    if not facts.tiled:
        return f"every image becomes {_at_most(facts)}{after:,} tokens instead of {patches:,}"
    if isinstance(facts.section.budget, float) and not facts.section.rules:
        return f"every image becomes {facts.section.budget:.0%} of its tokens"
    newlines = " and a few newlines" if facts.section.newlines == "kept" else ""
    return f"every image becomes {_at_most(facts)}{after:,} tokens{newlines} instead of one or two thousand"


def _at_most(facts: CardFacts) -> str:
    """The words before a number of tokens, which with rules is the largest."""
    return "at most " if facts.section.rules and facts.section.enabled else ""


def _is_open(facts: CardFacts) -> bool:
    """Whether the number of tokens depends on the contents of the image."""
    return facts.section.enabled and fixed_tokens(facts.config, facts.section) is None


def _reads_question(section: TokenRecoveryConfig) -> bool:
    return section.text_encoder_config is not None and reads_question(section)


def _origin(facts: CardFacts) -> str:
    if not facts.base_model:
        return "Which LLaVA and CLIP its weights come from, and whether they were trained further, was not recorded."
    links = [f"[{name}](https://huggingface.co/{name})" for name in facts.base_model]
    parts = "Vision tower, projector and language model"
    text = f"Nothing was trained to make it. {parts} are those of {links[0]}"
    if facts.section.text_encoder_config is None:
        return text + ". There is no text encoder: the choice of tokens does not look at the question."
    clip = links[1] if len(links) > 1 else "its CLIP"
    return f"{text}; the text encoder and the projections of {clip} tell which patches a question is about."


def _tokens(facts: CardFacts) -> str:
    parts = [_tiled_tokens(facts) if facts.tiled else _plain_tokens(facts)]
    if facts.counts is not None:
        parts.append(_measured(facts.counts))
    elif _is_open(facts):
        parts.append("The number of tokens kept was not measured for this card; `reccomp-hf card FOLDER` measures it.")
    else:
        parts.append("These counts follow from the settings.")
    return "\n\n".join(_wrap(part) if "|---" not in part else part for part in parts)


def _plain_tokens(facts: CardFacts) -> str:
    _, patches, _ = picture_tokens(facts.config)
    if _is_open(facts):
        return f"Stock: {patches:,} per image. Here the number is dynamic; `model.recover(**inputs)` gives it."
    after = compressed_tokens(facts.config, facts.section)
    number, when = f"{_at_most(facts)}{after:,} ({after / patches:.1%})", "by rule" if _at_most(facts) else "always"
    return f"Stock: {patches:,} per image. Here: {number}, {when}."


def _tiled_tokens(facts: CardFacts) -> str:
    lines = ["| image (w x h) | tiles | stock: patches + newlines | here: tokens + newlines |", "|---|---|---|---|"]
    kept = facts.section.newlines == "kept"
    for size in IMAGE_SIZES:
        tiles, patches, newlines = picture_tokens(facts.config, size)
        after, most = compressed_tokens(facts.config, facts.section, size), newlines
        if _is_open(facts):
            here = "dynamic"
        elif facts.section.enabled and not kept:
            here = f"{_at_most(facts)}{after:,} + 0"
        else:
            most = min(newlines, after)
            here = f"{_at_most(facts)}{after:,} + {'' if not facts.section.enabled else 'up to '}{most}"
        lines.append(f"| {size[0]} x {size[1]} | 1 + {tiles - 1} | {patches:,} + {newlines} | {here} |")
    rule = "A newline is kept if its row of the image keeps a patch" if kept else "No newline is kept"
    note = f"A budget applies to the whole image. {rule}."
    return "\n".join([*lines, "", note])


def _measured(counts: dict[str, float]) -> str:
    """The measured counts, by the stage that chose the tokens."""
    stages = {
        "visual": "for their saliency",
        "text": "for the question",
        "coverage": "for coverage",
        "merged": "merged from the rest",
    }
    parts = [f"{counts[name]:.1f} {words}" for name, words in stages.items() if counts[name]]
    return (
        f"Measured on {counts['pictures']:.0f} drawn scenes with a question each (the package's, not photographs): of "
        f"{counts['stock']:,.0f} patches {counts['mean']:,.1f} tokens are kept on average, "
        f"{counts['least']:,.0f} at least and {counts['most']:,.0f} at most: {', '.join(parts)}."
    )


def _cost(facts: CardFacts, cost: dict[str, Any]) -> str:
    size = f" of {cost['picture'][0]} x {cost['picture'][1]} pixels" if cost["picture"] else ""
    assumption = ""
    if measured := _measured_mean(facts):
        assumption = f" The compressed prompt has {measured} visual tokens, the average measured above."
    elif _is_open(facts):
        assumption = (
            f" The compressed prompt is assumed to have the paper's average of {PAPER_SHARE:.1%} of the tokens, not "
            "this checkpoint's."
        )
    return (
        "Estimated by a roofline model (`reccomp-hf cost`), **not measured**: A100 with 40 GB, fp16, an image"
        f"{size} and {cost['text_tokens']} text tokens. Real kernels are slower.{assumption}"
    )


def _measured_mean(facts: CardFacts) -> int | None:
    """Measured average of a number that depends on the image; `None` for LLaVA-NeXT, where its size matters too."""
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
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:#.3g}"


def _results(facts: CardFacts) -> str:
    if facts.results is not None:
        return _wrap(facts.results)
    lines = ["Not measured: no benchmark was run on this checkpoint when it was made."]
    if PAPER_BASE in facts.base_model:
        same = facts.section.overridable() == TokenRecoveryConfig.from_preset("paper").overridable()
        lines[0] += " The paper's numbers for its own implementation" + (
            ":" if same else ", whose settings are not this checkpoint's (its number of tokens adapts to the image):"
        )
        lines += ["", PAPER_RESULTS, "Source: the paper's tables (arXiv 2409.01179)."]
        return "\n".join([_wrap(lines[0]), *lines[1:]])
    return _wrap(lines[0])


def _limits(facts: CardFacts) -> list[str]:
    section = facts.section
    limits = [
        "Fewer tokens change answers. Expect losses where details matter (text in images, counting, small objects), "
        "and test your own task."
    ]
    if _reads_question(section):
        limits.append("The tokens are chosen for the last user turn; all its images share that question.")
    if facts.tiled:
        limits.append(
            "LLaVA-NeXT's vision tower was fine-tuned, so CLIP's text encoder tells less exactly than for LLaVA-1.5 "
            "which patches a question is about."
        )
    if section.enabled and section.position_ids == "original":
        limits.append('`position_ids: "original"` needs sdpa or eager attention; flash attention is refused.')
    limits.append("The vision tower runs in full, so the time to the first token falls less than that of the prefill.")
    limits.append("Assisted generation with an assistant model is refused for prompts with images.")
    return limits


def _made(facts: CardFacts) -> str:
    if facts.origin is not None:
        return _wrap(
            "`reccomp_hf/demo/checkpoints/README.md` says how it was trained; `reccomp-hf demo` asks it about a drawn "
            "scene, nothing is downloaded."
        )
    if facts.record is None:
        return "Not recorded. `reccomp-hf convert` makes checkpoints of this kind out of a stock LLaVA and its CLIP."
    parts = facts.record.command(_hub_name(facts.name), facts.base_model)
    words = [_FENCE_BREAKERS.sub("?", part).replace(" ", UNBROKEN) for part in parts]
    lines = textwrap.wrap(" ".join(words), 100, break_long_words=False, break_on_hyphens=False)
    command = " \\\n    ".join(lines).replace(UNBROKEN, " ")
    block = f"```bash\n{command}\n```"
    if facts.tuned or facts.record.describes(facts.section):
        return block
    return f"{block}\n\n" + _wrap("Its settings were changed afterwards: those above are in effect.")


def _licence(facts: CardFacts) -> str:
    if facts.license is None:
        return (
            "The weights are under the base model's licence, which was not recorded: read its model card before you "
            "use or publish them, and set the licence with `reccomp-hf card FOLDER --license ID`."
        )
    known = next((entry for entry in FULL_SIZE.values() if entry.base_model in facts.base_model), None)
    source = f", the licence of {known.base_model}" if known is not None and known.license == facts.license else ""
    return f"The weights: `{facts.license}`{source}. The code of `reccomp_hf`: Apache-2.0."


def _escaped(name: str) -> str:
    """A name as plain text on one line of Markdown."""
    return re.sub(r"([\\`*\[\]<>&#|!~$])", r"\\\1", " ".join(name.split()))


def _hub_name(name: str) -> str:
    """A name with the characters alone that the Hub allows, which need no quotes in code either."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


__all__ = ["CardFacts", "field_descriptions", "field_rows", "pieces"]
