"""`python -m reccomp_hf.experiments.selection` times the choice of tokens alone, on one CPU thread."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ...cli.options import HelpFormatter, add_json_file, count, output_image
from ...cli.output import say, write_results
from . import choosing, scaling
from .plotting import plot_choosing, plot_scaling
from .reporting import choosing_text, scaling_text


def main(argv: Sequence[str] | None = None) -> int:
    """Time the choice of tokens and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.selection",
        description="Times the choice of tokens alone, on one CPU thread: recover_tokens against loops with\n"
        "scikit-learn, then every method, at (576, 1024); or with --scaling over growing inputs.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--scaling", action="store_true", help="time recover_tokens over batch, tiles and patches")
    rounds = f"rounds of turns (default: {choosing.ROUNDS}, with --scaling {scaling.ROUNDS})"
    parser.add_argument("--repeats", type=count, metavar="N", help=rounds)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds of the process, for a machine with other work"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the inputs")
    add_json_file(parser)
    parser.add_argument("--plot", type=output_image, metavar="FILE", help="draw the results")
    arguments = parser.parse_args(argv)
    options = {} if arguments.repeats is None else {"rounds": arguments.repeats}
    options |= {"cpu_time": arguments.cpu_time, "seed": arguments.seed}
    if arguments.scaling:
        facts = scaling.measure_scaling(**options)
        say(scaling_text(facts))
        write_results(arguments, lambda: facts, lambda: plot_scaling(facts))
    else:
        facts = choosing.compare_choosing(**options)
        say(choosing_text(facts))
        write_results(arguments, lambda: facts, lambda: plot_choosing(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
