"""Model cards: rendered from what a checkpoint is, written once, and never over what a person wrote."""

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
from transformers import AutoConfig

from ...core.configuration import TokenRecoveryConfig
from ...core.counting import fixed_tokens
from ...measure.published import FULL_SIZE
from .content import NO_OWNER, CardFacts, pieces

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
    """A model card: YAML metadata as the Hub takes it, and text.

    Args:
        source: A checkpoint folder, or [`CardFacts`] for one that is not at hand.
        base_model: Hub ids of the LLaVA and the CLIP that a folder was made of, the LLaVA first.
        license: The licence's identifier on the Hub; by default the base model's, see [`license_of`]. `"other"` is
            written where it is not known.
        repo: The Hub id that the card will stand at.
        name: The checkpoint's name; by default the id's last part, or the folder's.
        measure: Run the choice of tokens on drawn scenes, if the folder holds weights; `None` does so where the
            number of tokens depends on the picture. Takes seconds to a few minutes: the vision tower and the text
            encoder are loaded, the language model is not.

    Returns:
        The card. The comment at its end holds a checksum, by which an edited card is told from an unedited one.

    Raises:
        ValueError: A folder without a config of ours, an id or a licence that the Hub would not take.
    """
    if not isinstance(source, CardFacts):
        source = folder_facts(Path(source), base_model, license, repo, name, measure)
    elif (base_model, license, repo, name, measure) != (None,) * 5:
        raise ValueError("Whatever a card of CardFacts says stands in them: give source alone.")
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
    """Render a folder's card into its README.md; a card that nobody edited is refreshed.

    What is not given is taken from the card that is there, if it is one of ours.

    Args:
        folder: A checkpoint of ours.
        base_model: See [`render_card`].
        license: See [`render_card`].
        repo: See [`render_card`].
        name: See [`render_card`].
        measure: See [`render_card`].
        force: Replace a card that is not ours or was edited.

    Returns:
        The README.md.

    Raises:
        FileExistsError: There is a card that a person wrote or edited.
        ValueError: As for [`render_card`].
    """
    path = Path(folder) / "README.md"
    if path.exists():
        present = path.read_text(encoding="utf-8")
        if not force and not may_be_replaced(present):
            raise FileExistsError(
                f"{path} was written or edited by a person and is left as it is. Compare it with what "
                "`reccomp-hf card --stdout` prints; move it away, or pass force=True (--force), to have a new one."
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
    """Whether a card is one of ours, as it was rendered; the Hub's own reordering of metadata is no edit."""
    mark = MARK.search(text.replace("\r\n", "\n"))
    try:
        return mark is not None and _checksum(text) == mark[1]
    except Exception:  # metadata that somebody broke, for which the parser has errors of its own
        return False


def may_be_replaced(text: str) -> bool:
    """Whether nobody's work is in a card: it is empty, ours and unedited, or the one that transformers generates."""
    return not text.strip() or is_unedited(text) or _is_generated(REGEX_YAML_BLOCK.sub("", text, count=1))


def license_of(source: str | os.PathLike[str]) -> str | None:
    """The licence that a base model's card names, `None` if there is none.

    Args:
        source: A folder with a README.md, or a Hub id whose README.md is in the Hub client's cache or which is one of
            [`FULL_SIZE`]; nothing is downloaded.
    """
    name = os.fspath(source)
    readme: Any = Path(source) / "README.md"
    if not readme.is_file() and name.count("/") == 1:
        with contextlib.suppress(ValueError):  # no id that a repository can have
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
    """What a card says about a checkpoint folder, see [`render_card`]."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.")
    from .probe import measure_tokens

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(getattr(config, "token_recovery", None), TokenRecoveryConfig):
        raise ValueError(f"{folder} is no compressed LLaVA: its model_type is {config.model_type!r}.")
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
    )


def _metadata(facts: CardFacts) -> ModelCardData:
    """The YAML block, checked as far as that goes without the Hub."""
    for name in (*facts.base_model, *filter(None, [facts.repo])):
        _check_id(name)
    if facts.license is not None and not LICENSE.fullmatch(facts.license):
        raise ValueError(f"license must be an identifier of the Hub such as 'apache-2.0', got {facts.license!r}.")
    fields: dict[str, Any] = {"license": facts.license or "other"}
    if facts.license is None:  # the Hub wants a name beside "other"
        fields["license_name"] = "base-model"
        if facts.base_model:
            fields["license_link"] = f"https://huggingface.co/{facts.base_model[0]}"
    fields |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if facts.base_model:
        fields["base_model"] = list(facts.base_model)
    if len(facts.base_model) > 1:
        # The Hub knows finetune, adapter, merge and quantized. Two checkpoints' weights side by side, none of them
        # trained further, come nearest to a merge; a visual-only model has one base, and none of the four fits.
        fields["base_model_relation"] = "merge"
    return ModelCardData(**fields, tags=list(TAGS))


def _check_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is no id that a repository on the Hub can have: {error}") from error
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no full id on the Hub: write owner/name.")


def _checksum(text: str) -> str:
    """Of metadata and body, the mark left out; how the metadata is laid out does not matter."""
    card = ModelCard(MARK.sub("\n", text.replace("\r\n", "\n")))
    content = json.dumps([card.data.to_dict(), card.text.strip()], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _read_metadata(readme: Path) -> dict[str, Any]:
    """A card's metadata; empty where there is none, or none that can be read."""
    try:
        return metadata_load(readme) or {}
    except Exception:  # no YAML, or no mapping: the parser has errors of its own
        return {}


def _is_generated(body: str) -> bool:
    """Whether a card's text is the one that `push_to_hub` of transformers makes of the Hub's empty template."""
    description = f"{GENERATED_BY_TRANSFORMERS} This model card has been automatically generated."
    blank = ModelCard.from_template(ModelCardData(), model_description=description).text
    return body.split() == blank.split()


def _known_license(value: Any) -> str | None:
    """A licence that says something: "other", lists and what is no identifier do not."""
    fits = isinstance(value, str) and LICENSE.fullmatch(value) is not None
    return value if fits and value not in ("other", "unknown") else None


def repo_of(card: str) -> str | None:
    """The Hub id that one of our cards names."""
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
