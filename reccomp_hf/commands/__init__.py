"""The commands of `reccomp-hf`: a module each, which declares itself by `register` and does its work in `run`."""

from . import convert, demo, info

COMMANDS = (demo, convert, info)
"""In the order of the help."""

__all__ = ["COMMANDS"]
