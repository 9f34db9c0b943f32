"""The code that a checkpoint carries, so that `trust_remote_code=True` loads it without this package.

Transformers copies remote code from one folder and from no folder below it, so this package's `core` is written flat:
`methods/trim.py` becomes `methods_trim_reccomp.py`. Only the module names of relative imports change, so line N of a
traceback is line N here. `save_pretrained` of configs and processors writes the files; [`write_remote_code`] completes
a folder that was made without them.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

HEAD_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")

_STEMS = {"llava_reccomp": "LlavaRecComp", "llava_next_reccomp": "LlavaNextRecComp"}
"""Model type -> start of its classes' names."""
_ENTRIES = ("configuration", "modeling_llava", "modeling_llava_next", "processing")
"""Modules that an `auto_map` names."""
_SUFFIX = "_reccomp"
_RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]+)( import .*)$")
_IMPORTED_FILE = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


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

    Writes the source files, and enters them as `auto_map` in config.json and, if it exists, in processor_config.json.

    Args:
        folder: A checkpoint of ours.

    Returns:
        The source files in the folder.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: The model type is not ours.
    """
    folder = Path(folder)
    model_type = _read(folder / "config.json").get("model_type")
    if model_type not in _STEMS:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, not {' or '.join(map(repr, _STEMS))}: it has no code of "
            "reccomp_hf to carry. Convert it first (reccomp-hf convert)."
        )
    _enter(folder / "config.json", model_auto_map(model_type))
    if (folder / "processor_config.json").exists():
        _enter(folder / "processor_config.json", processor_auto_map(model_type))
    return write_sources(folder)


def write_sources(folder: str | Path) -> list[Path]:
    """Write the source files into a folder, and remove those that an older version of this package left there.

    Returns:
        The files, sorted by name.
    """
    folder = Path(folder)
    old, sources = code_files(folder), flat_sources()
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in old:
        if path.name not in sources:
            path.unlink()
    return [folder / name for name in sorted(sources)]


def code_files(folder: Path) -> list[Path]:
    """The files of a folder that are code of ours, whatever version wrote them: the entry files and their imports."""
    found: set[Path] = set()
    new = {folder / f"{name}{_SUFFIX}.py" for name in _ENTRIES}
    while new := {file for file in new - found if file.is_file()}:
        found |= new
        new = {folder / f"{name}.py" for file in new for name in _IMPORTED_FILE.findall(_text(file))}
    return sorted(found)


@functools.cache
def flat_sources() -> dict[str, str]:
    """File name -> text of the code as a checkpoint carries it; read once a process, not to be changed."""
    here = Path(__file__).parent
    if Path(__file__).stem.endswith(_SUFFIX):  # this is a checkpoint's own copy
        return {file.name: file.read_text(encoding="utf-8") for file in here.glob(f"*{_SUFFIX}.py")}
    files = [file for file in sorted(here.rglob("*.py")) if file.name != "__init__.py"]
    modules = {file.relative_to(here).with_suffix("").parts: file for file in files}
    names = {parts: "_".join(parts) + _SUFFIX for parts in modules}
    sources = {}
    for parts, file in modules.items():
        lines = [_flat_import(line, parts, names) for line in file.read_text(encoding="utf-8").splitlines()]
        if parts[0] in _ENTRIES:
            lines += ["", "from typing import TYPE_CHECKING", "", "if TYPE_CHECKING:"]
            lines += ["    # Never executed: transformers 4.57 copies only the files that this one names."]
            lines += [f"    from .{name} import *" for other, name in sorted(names.items()) if other != parts]
        sources[f"{names[parts]}.py"] = "\n".join(lines) + "\n"
    return sources


def _flat_import(line: str, parts: tuple[str, ...], names: dict[tuple[str, ...], str]) -> str:
    """A line of the module `parts` with the module of a relative import by its flat name."""
    if (found := _RELATIVE_IMPORT.match(line)) is None:
        return line
    start, dots, module, rest = found.groups()
    target = (*parts[: len(parts) - len(dots)], *module.split("."))
    return f"{start}.{names[target]}{rest}"


def _enter(file: Path, auto_map: dict[str, str]) -> None:
    """Add entries to the `auto_map` of a JSON file; a file that has them is left untouched."""
    fields = _read(file)
    wanted = {**(fields.get("auto_map") or {}), **auto_map}
    if fields.get("auto_map") != wanted:
        text = json.dumps({**fields, "auto_map": wanted}, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(_text(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


__all__ = [
    "HEAD_CLASSES",
    "code_files",
    "flat_sources",
    "model_auto_map",
    "processor_auto_map",
    "write_remote_code",
    "write_sources",
]
