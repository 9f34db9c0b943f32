"""The commands of `reccomp-hf`: a module each, which declares its options in `register` and works in `run`.

Only `run` imports torch, transformers and the rooms that need them, so that help and errors appear at once.
"""

from . import app, ask, bench, card, convert, cost, demo, embed, eval, info, plot, predict, push, serve, tune

GROUPS = {
    "try": (demo, plot),
    "make": (convert, info, card, push),
    "measure": (eval, tune, cost, bench),
    "use": (ask, predict, embed),
    "serve": (serve, app),
}
"""The commands by purpose, in the order of the help."""

COMMANDS = tuple(command for group in GROUPS.values() for command in group)

__all__ = ["COMMANDS", "GROUPS"]
