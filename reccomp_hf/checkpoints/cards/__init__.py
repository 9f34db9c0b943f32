"""Model cards: rendered from a checkpoint's files, and never written over a person's work."""

from .rendering import (
    CardFacts,
    folder_facts,
    is_unedited,
    license_of,
    may_be_replaced,
    render_card,
    repo_of,
    write_card,
)

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
