"""A Space of the Hugging Face Hub that shows the page: a folder with all that it needs."""

from __future__ import annotations

import shutil
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ...demo import CHECKPOINTS

_PACKAGE = Path(__file__).parents[2]
_NAME = _PACKAGE.name
FILES = ("app.py", "requirements.txt", "README.md")
"""Names of the files that are written."""
_LEFT_OUT = ("__pycache__", "*.pyc", "experiments")

_APP = '''"""The page of {model}: what a compressed LLaVA reads of a picture."""

import os
import sys

from {name}.cli.main import main

HOST = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # on the Hub: reachable through its proxy
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")

if __name__ == "__main__":
    sys.exit(main(["app", {model!r}, "--host", HOST, "--port", PORT]))
'''

_CARD = """---
title: What a compressed LLaVA reads
emoji: 🔎
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
short_description: The patches that a LLaVA reads for your question
{models}tags:
- llava
- visual-token-compression
---

# What a compressed LLaVA reads

Ask `{model}` about a picture under two settings, and see which patches it read, its answers, tokens and times.
The method is Recoverable Compression (Chen et al., AAAI 2025, https://arxiv.org/abs/2409.01179).

Written by `reccomp-hf app {model} --space`. {source} `python app.py` runs it on your machine.
"""
_COPIED = (
    "`reccomp_hf/` is a copy of the package, so that nothing but its requirements is installed; delete it and add "
    "`reccomp_hf[app]` to `requirements.txt` to install a release instead."
)
_INSTALLED = "`requirements.txt` names the package itself."


def write_space(folder: Path, model: str, package: str | None = None) -> list[str]:
    """Write a Space into a new or empty folder.

    Args:
        folder: The folder.
        model: A shipped checkpoint or a Hub id: the Space downloads it.
        package: The line of `requirements.txt` that installs this package; by default the Space gets a copy of it.

    Returns:
        The names of what was written.

    Raises:
        ValueError: The folder holds something, or the model is a folder of this machine.
        PackageNotFoundError: A requirement is not installed, gradio perhaps.
    """
    if Path(model).expanduser().is_dir():
        raise ValueError(
            f"{model} is a folder of this machine, which a Space cannot read: push it with `reccomp-hf push {model} "
            "OWNER/NAME`, and name OWNER/NAME here."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name another one.")
    lines = requirements(package)
    folder.mkdir(parents=True, exist_ok=True)
    written = list(FILES)
    if package is None:
        others = [name for name in CHECKPOINTS if name != model]
        shutil.copytree(_PACKAGE, folder / _NAME, ignore=shutil.ignore_patterns(*_LEFT_OUT, *others))
        written.append(f"{_NAME}/")
    models = "" if model in CHECKPOINTS else f"models:\n- {model}\n"
    source = _COPIED if package is None else _INSTALLED
    card = _CARD.format(model=model, models=models, gradio=version("gradio"), source=source)
    for name, text in zip(FILES, (_APP.format(model=model, name=_NAME), "\n".join(lines) + "\n", card), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    return written


def requirements(package: str | None = None) -> list[str]:
    """Lines of `requirements.txt`: everything that the page needs, in the version that is installed here."""
    needed = [Requirement(line) for line in requires(_NAME) or ()]
    names = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in dict.fromkeys([*names, "gradio"])]
    return [*pins, *([package] if package else [])]


__all__ = ["FILES", "requirements", "write_space"]
