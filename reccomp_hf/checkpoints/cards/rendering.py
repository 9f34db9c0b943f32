"""Rendering model cards and writing them, never over a card that a person wrote or edited."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens
from ...measure.published import FULL_SIZE
from ..conversion_record import ConversionRecord
from ..processors import load_config
from ..tuning_record import tuned_sentence
from .content import NO_OWNER, CardFacts, pieces
from .probe import measure_tokens

TEMPLATE = Path(__file__).with_name("template.md")
TAGS = ["reccomp_hf", "token-compression"]
MARK = re.compile(r"\n<!-- Rendered by reccomp_hf\. Checksum: ([0-9a-f]{64}) -->\s*\Z")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
GENERATED_BY_TRANSFORMERS = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."


def render_card(
    source: str | os.PathLike[str] | CardFacts,
    *,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    repo: str | None = None,
    name: str | None = None,
    measure: bool | None = None,
) -> str:
    """A model card: YAML metadata for the Hub, and text.

    Args:
        source: A checkpoint folder, or [`CardFacts`] of a checkpoint that is not on this machine.
        base_model: Hub ids of the LLaVA and the CLIP that a folder was made of, the LLaVA first.
        license: Identifier of the licence on the Hub; by default the base model's, see [`license_of`]. `"other"` is
            written if it is not known.
        repo: Hub id of the card.
        name: Name of the checkpoint; by default the id's last part, or the folder's name.
        measure: Run the choice of tokens on drawn scenes, if the folder holds weights; `None` does so if the number
            of tokens depends on the image. Takes seconds to a few minutes: the language model's layers are not loaded.

    Returns:
        The card. The comment at its end holds a checksum, which tells an edited card from an unedited one.

    Raises:
        ValueError: A folder without a config of ours, an id or a licence that the Hub would refuse.
    """
    if not isinstance(source, CardFacts):
        source = folder_facts(Path(source), base_model, license, repo, name, measure)
    elif (base_model, license, repo, name, measure) != (None,) * 5:
        raise ValueError("CardFacts hold all that the card says: give source alone.")
    card = ModelCard.from_template(_metadata(source), template_path=str(TEMPLATE), **pieces(source))
    text = "\n".join(line.rstrip() for line in str(card).splitlines()).strip() + "\n"
    return f"{text}\n<!-- Rendered by reccomp_hf. Checksum: {_checksum(text)} -->\n"


def write_card(
    folder: str | os.PathLike[str],
    *,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    repo: str | None = None,
    name: str | None = None,
    measure: bool | None = None,
    force: bool = False,
) -> Path:
    """Render a folder's card into its README.md; a card that nobody edited is rendered again.

    Arguments that are not given are taken from an unedited card that is there.

    Args:
        folder: A compressed checkpoint.
        base_model: See [`render_card`].
        license: See [`render_card`].
        repo: See [`render_card`].
        name: See [`render_card`].
        measure: See [`render_card`].
        force: Replace a card that was written or edited by a person.

    Returns:
        Path of the README.md.

    Raises:
        FileExistsError: A person wrote or edited the card.
        ValueError: As for [`render_card`].
    """
    path = Path(folder) / "README.md"
    if path.exists():
        present = path.read_text(encoding="utf-8")
        if not force and not may_be_replaced(present):
            raise FileExistsError(
                f"{path} was written or edited by a person and is left unchanged. Compare it with the output of "
                "`reccomp-hf card --stdout`; move it away, or pass force=True (--force), to replace it."
            )
        if is_unedited(present):
            metadata = _read_metadata(path)
            base_model = base_model or metadata.get("base_model")
            license = license or _known_license(metadata.get("license"))
            repo = repo or repo_of(present)
    text = render_card(folder, base_model=base_model, license=license, repo=repo, name=name, measure=measure)
    staging = path.with_name(".README.md.new")
    staging.write_text(text, encoding="utf-8")
    staging.replace(path)
    return path


def is_unedited(text: str) -> bool:
    """Whether a card is as this package rendered it; the Hub's reordering of metadata is not an edit."""
    mark = MARK.search(text.replace("\r\n", "\n"))
    try:
        return mark is not None and _checksum(text) == mark[1]
    except Exception:  # invalid metadata, for which the parser raises errors of its own
        return False


def may_be_replaced(text: str) -> bool:
    """Whether no person wrote any of a card: it is empty, unedited, or the one that transformers generates."""
    return not text.strip() or is_unedited(text) or _is_generated(REGEX_YAML_BLOCK.sub("", text, count=1))


def license_of(source: str | os.PathLike[str]) -> str | None:
    """The licence in a base model's card; `None` if it is not known.

    Args:
        source: A folder with a README.md, or a Hub id whose README.md is in the Hub client's cache or that is one of
            [`FULL_SIZE`]; nothing is downloaded.
    """
    name = os.fspath(source)
    readme: Any = Path(source) / "README.md"
    if not readme.is_file() and name.count("/") == 1:
        with contextlib.suppress(ValueError):  # not a valid id
            readme = try_to_load_from_cache(name, "README.md")
    found = None
    if isinstance(readme, str | os.PathLike) and Path(readme).is_file():
        found = _known_license(_read_metadata(Path(readme)).get("license"))
    return found or {entry.base_model: entry.license for entry in FULL_SIZE.values()}.get(name)


def folder_facts(
    folder: Path,
    base_model: Sequence[str] | None = None,
    license: str | None = None,
    repo: str | None = None,
    name: str | None = None,
    measure: bool | None = None,
) -> CardFacts:
    """The facts of a checkpoint folder's card, see [`render_card`]."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json.")
    config = load_config(folder)
    if not isinstance(getattr(config, "token_recovery", None), TokenRecoveryConfig):
        raise ValueError(f"{folder} is not a compressed LLaVA: its model_type is {config.model_type!r}.")
    bases = tuple([base_model] if isinstance(base_model, str) else base_model or ())
    if measure is None:
        measure = config.token_recovery.enabled and fixed_tokens(config, config.token_recovery) is None
    return CardFacts(
        name=name or (repo.rpartition("/")[2] if repo else folder.resolve().name),
        config=config,
        base_model=bases,
        license=license or (license_of(bases[0]) if bases else None),
        repo=repo,
        counts=measure_tokens(folder) if measure else None,
        record=ConversionRecord.read(folder),
        tuned=tuned_sentence(folder, config.token_recovery),
    )


def _metadata(facts: CardFacts) -> ModelCardData:
    """The YAML block, checked as far as possible without the Hub."""
    for name in (*facts.base_model, *filter(None, [facts.repo])):
        _check_id(name)
    if facts.license is not None and not LICENSE.fullmatch(facts.license):
        raise ValueError(f"license must be an identifier of the Hub such as 'apache-2.0', got {facts.license!r}.")
    fields: dict[str, Any] = {"license": facts.license or "other"}
    if facts.license is None:  # the Hub requires a name with "other"
        fields["license_name"] = "base-model"
        if facts.base_model:
            fields["license_link"] = f"https://huggingface.co/{facts.base_model[0]}"
    fields |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if facts.base_model:
        fields["base_model"] = list(facts.base_model)
    if len(facts.base_model) > 1:
        # The Hub knows finetune, adapter, merge and quantized. Weights of two checkpoints, neither trained further,
        # are closest to a merge; a visual-only model has one base, and none of the four fits.
        fields["base_model_relation"] = "merge"
    return ModelCardData(**fields, tags=list(TAGS))


def _check_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a valid id of a repository on the Hub: {error}") from error
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is not a full id on the Hub: write owner/name.")


def _checksum(text: str) -> str:
    """Checksum of the metadata, however it is laid out, and the body without the mark."""
    card = ModelCard(MARK.sub("\n", text.replace("\r\n", "\n")))
    content = json.dumps([card.data.to_dict(), card.text.strip()], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _read_metadata(readme: Path) -> dict[str, Any]:
    """A card's metadata; empty if there is none, or if it cannot be read."""
    try:
        return metadata_load(readme) or {}
    except Exception:  # not YAML, or not a mapping: the parser raises errors of its own
        return {}


def _is_generated(body: str) -> bool:
    """Whether a card's text is the one that `push_to_hub` of transformers makes from the Hub's empty template."""
    description = f"{GENERATED_BY_TRANSFORMERS} This model card has been automatically generated."
    blank = ModelCard.from_template(ModelCardData(), model_description=description).text
    return body.split() == blank.split()


def _known_license(value: Any) -> str | None:
    """The identifier of a licence; `None` for "other", "unknown", lists and other values."""
    fits = isinstance(value, str) and LICENSE.fullmatch(value) is not None
    return value if fits and value not in ("other", "unknown") else None


def repo_of(card: str) -> str | None:
    """The Hub id in a card that this package rendered; `None` if it has none."""
    found = re.search(r'from_pretrained\("([^"]+)"', card)
    return None if found is None or found[1].startswith(f"{NO_OWNER}/") else found[1]


__all__ = [
    "CardFacts",
    "folder_facts",
    "is_unedited",
    "license_of",
    "may_be_replaced",
    "render_card",
    "repo_of",
    "write_card",
]
