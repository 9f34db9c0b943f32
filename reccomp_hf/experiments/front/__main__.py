"""`python -m reccomp_hf.experiments.front demo --keep FILE` measures what the file lacks, and prints the tables.

A run that is stopped resumes, and of new methods only their settings are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...cli.output import say
from ...demo import CHECKPOINTS
from ..kept_answers import add_kept_file
from .measuring import BUDGETS, front_settings, run
from .reporting import plot_front, tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.front",
        description="Measures the accuracy of every method over the number of visual tokens.",
    )
    parser.add_argument("model", choices=CHECKPOINTS)
    add_kept_file(parser)
    parser.add_argument("--questions", type=int, default=2000, metavar="N", help="held-out questions")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write the plot")
    given = parser.parse_args(arguments)
    first, whole = run(given.model, given.questions, given.keep, front_settings())
    say(tables(first, whole, BUDGETS))
    if given.plot is not None:
        title = f"{given.model}: first words of {len(first.questions):,} questions"
        plot_front(first, BUDGETS, title).savefig(given.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
