"""Model cards: rendered from what a checkpoint is, written once, and never over what a person wrote."""

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
