"""The two tokenizers of a demo checkpoint, built from the words of the scenes.

Their files are not written by transformers, because newer releases save classes that older ones do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...demo.scene_questions import COUNT_QUESTION, NUMBER_WORDS
from ...demo.scenes import COLORS, LETTERS, SHAPES, SIGN
from .texts import kinds, texts_about

CLIP_TEXT_LENGTH = 32
"""Longest text that CLIP reads, in tokens."""

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}USER: "
    "{% for c in m['content'] %}{% if c['type']=='image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type']=='text' %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% elif m['role']=='system' %}{{ m['content'][0]['text'] }} "
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The conversation of LLaVA-1.5; a system message stands before it, without a role."""

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"  # of CLIP
_LLAMA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID, IMAGE_ID = range(len(_LLAMA_SPECIALS))
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def save_clip_tokenizer(folder: Path) -> None:
    """Write a `CLIPTokenizer` that can encode every byte, with the captions' words in few tokens each."""
    words = _clip_pipeline(models.BPE())
    merges = _merges(_words(words, _captions()), suffix="</w>")
    pieces = [_BOS, _EOS, *_bytes(), *(f"{byte}</w>" for byte in _bytes()), *(one + two for one, two in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token=_EOS, end_of_word_suffix="</w>", fuse_unk=False)
    tokenizer = _clip_pipeline(model)
    tokenizer.add_special_tokens([_BOS, _EOS])
    tokenizer.post_processor = processors.RobertaProcessing(
        (_EOS, vocabulary[_EOS]), (_BOS, vocabulary[_BOS]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    fields = {
        "bos_token": _BOS,
        "eos_token": _EOS,
        "model_max_length": CLIP_TEXT_LENGTH,
        "pad_token": _EOS,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _EOS,
    }
    _save(tokenizer, fields, folder)


def save_llama_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE like Llama 3's, with `<image>`; every answer is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = _merges(_words(tokenizer, _conversations()), suffix="")
    pieces = [*_LLAMA_SPECIALS, *_bytes(), *(one + two for one, two in merges)]
    tokenizer.model = models.BPE({piece: number for number, piece in enumerate(pieces)}, merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_LLAMA_SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    fields = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    _save(tokenizer, fields, folder)


def answer_words() -> list[str]:
    """Every answer to a question about a scene."""
    return [*COLORS, *SHAPES, "yes", "no", *NUMBER_WORDS, *LETTERS]


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> set[str]:
    """The distinct words of texts after the tokenizer's normalisation and splitting."""
    normalizer, split = tokenizer.normalizer, tokenizer.pre_tokenizer
    normalized = (normalizer.normalize_str(text) if normalizer else text for text in texts)
    return {word for text in normalized for word, _ in split.pre_tokenize_str(text)}


def _merges(words: Iterable[str], suffix: str) -> list[tuple[str, str]]:
    """Merges in their order of priority, by which every word becomes one piece.

    Words are processed in order: the pieces that the merges so far leave of a word are joined from the left. Later
    merges have a lower priority and do not affect earlier words. Unlike pair counts this has no ties to break.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(words):
        pieces = _apply_merges([*word[:-1], word[-1] + suffix], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _apply_merges(pieces, ranks)
    return list(ranks)


def _apply_merges(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply merges to the pieces of a word, always the first in rank."""
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        pair = min(known, key=ranks.__getitem__)
        place = list(pairwise(pieces)).index(pair)
        pieces = [*pieces[:place], "".join(pair), *pieces[place + 2 :]]
    return pieces


def _captions() -> Iterable[str]:
    yield from (text for kind in kinds() for text in texts_about(kind))
    yield from _conversations()


def _conversations() -> Iterable[str]:
    asked = [COUNT_QUESTION]
    for color in COLORS:
        asked += [f"What shape is the {color} object?", f"What letter is on the {color} {SIGN}?"]
        asked += [f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?" for shape in SHAPES]
    asked += [f"What color is the {shape}?" for shape in SHAPES]
    for question in asked:
        for answer in answer_words():
            yield f"USER: \n{question} ASSISTANT: {answer}"
        yield f"USER: {question} ASSISTANT:"  # of a later turn


def _clip_pipeline(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _save(tokenizer: Tokenizer, fields: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "BOS_ID",
    "CHAT_TEMPLATE",
    "CLIP_TEXT_LENGTH",
    "EOS_ID",
    "IMAGE_ID",
    "IMAGE_TOKEN",
    "PAD_ID",
    "UNKNOWN_ID",
    "answer_words",
    "save_clip_tokenizer",
    "save_llama_tokenizer",
]
