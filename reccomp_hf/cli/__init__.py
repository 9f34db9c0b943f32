"""The commands of `reccomp-hf`: a module each, which declares itself by `register` and does its work in `run`."""

from . import bench, card, convert, cost, demo, embed, eval, info, plot, predict, push, serve

COMMANDS = (demo, convert, info, plot, predict, eval, push, card, cost, bench, serve, embed)
"""In the order of the help."""

__all__ = ["COMMANDS"]
