"""Folders and files of the tests and of the checkout."""

from pathlib import Path

import reccomp_hf

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
DATA = TESTS / "data"
ROOT = TESTS.parent
INSTALLED = Path(reccomp_hf.__file__).parents[1]  # for child processes: the package under test, wheel or checkout
README = ROOT / "README.md"
NOTEBOOKS = ROOT / "notebooks"
MODEL_CARDS = ROOT / "model_cards"
GUIDES = [
    "README.md",
    "notebooks/README.md",
    *sorted(
        str(file.relative_to(ROOT))
        for pattern in ("**/README.md", "engines/*.md")
        for file in (ROOT / "reccomp_hf").glob(pattern)
        if not (file.parent / "config.json").exists()  # the cards of the shipped checkpoints
    ),
]
"""The README and the guides beside the code, by their paths from the root."""
