"""Where the tests find files: their own data, and the checkout's texts."""

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
DATA = TESTS / "data"
ROOT = TESTS.parent
README = ROOT / "README.md"
NOTEBOOKS = ROOT / "notebooks"
MODEL_CARDS = ROOT / "model_cards"
