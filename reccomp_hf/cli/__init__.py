"""The commands of `reccomp-hf`: a module each, which declares its options in `register` and works in `run`.

Only `run` imports torch, transformers and the rooms that need them, so that help and errors appear at once.
"""

from . import bench, card, convert, cost, demo, embed, eval, info, plot, predict, push, serve

COMMANDS = (demo, convert, info, plot, predict, eval, push, card, cost, bench, serve, embed)
"""In the order of the help."""

__all__ = ["COMMANDS"]
