"""What a folder needs to load without this package: our source files, and the `auto_map` that names them.

`save_pretrained` of models, configs and processors writes both, by transformers' own means; [`write_remote_code`]
completes a folder that was written without a model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

HEAD_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")

# Model type -> what the names of its classes start with.
_STEMS = {"llava_reccomp": "LlavaRecComp", "llava_next_reccomp": "LlavaNextRecComp"}


def model_auto_map(model_type: str) -> dict[str, str]:
    """The `auto_map` of config.json for one of our model types; empty for any other."""
    if model_type not in _STEMS:
        return {}
    stem, modeling = _STEMS[model_type], f"modeling_{model_type}"
    return {
        "AutoConfig": f"configuration_reccomp.{stem}Config",
        "AutoModel": f"{modeling}.{stem}Model",
        **dict.fromkeys(HEAD_CLASSES, f"{modeling}.{stem}ForConditionalGeneration"),
    }


def processor_auto_map(model_type: str) -> dict[str, str]:
    """The `auto_map` of processor_config.json for one of our model types."""
    return {"AutoProcessor": f"processing_reccomp.{_STEMS[model_type]}Processor"}


def write_remote_code(folder: str | Path) -> list[Path]:
    """Complete a checkpoint folder so that `trust_remote_code=True` loads it without this package.

    Copies the source files, and enters them as `auto_map` in config.json and, where there is one, in
    processor_config.json. Older copies of our files are replaced; everything else in the folder stays as it is.

    Returns:
        The source files in the folder.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: Its model type is not ours.
    """
    folder = Path(folder)
    model_type = _read(folder / "config.json").get("model_type")
    if model_type not in _STEMS:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, not {' or '.join(map(repr, _STEMS))}: it has no code of "
            "reccomp_hf to carry. Convert it first (reccomp-hf convert)."
        )
    modules = [f"modeling_{model_type}"]
    _enter(folder / "config.json", model_auto_map(model_type))
    if (folder / "processor_config.json").exists():
        modules.append("processing_reccomp")
        _enter(folder / "processor_config.json", processor_auto_map(model_type))
    return [Path(shutil.copyfile(source, folder / source.name)) for source in _sources(modules)]


def _sources(modules: list[str]) -> list[Path]:
    """The source files of some modules and of all that they import, found as transformers finds them."""
    here = Path(__file__).parent
    roots = [here / f"{module}.py" for module in modules]
    needed = [Path(file) for root in roots for file in get_relative_import_files(root)]
    return sorted({*roots, *needed})


def _enter(file: Path, auto_map: dict[str, str]) -> None:
    """Add entries to the `auto_map` of a JSON file, which is not touched where they are there."""
    fields = _read(file)
    wanted = {**(fields.get("auto_map") or {}), **auto_map}
    if fields.get("auto_map") != wanted:
        text = json.dumps({**fields, "auto_map": wanted}, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


__all__ = ["HEAD_CLASSES", "model_auto_map", "processor_auto_map", "write_remote_code"]
