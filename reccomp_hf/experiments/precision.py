"""Quantised weights against full precision: choice of tokens, answers and size of the weights.

`python -m reccomp_hf.experiments.precision demo` prints the table. TorchAO and bitsandbytes have to be installed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..measure.evaluation.report import EvaluationReport
from ..measure.evaluation.running import DEFAULT_BATCH_SIZE, evaluate
from ..measure.evaluation.samples import Sample, demo_samples, encode_samples
from ..measure.evaluation.settings import OFF, Setting, parse_settings
from ..measure.tables import markdown_table
from .finetuning import DEFAULT_SETTING

FULL = "float32"
PRECISIONS = (FULL, "bfloat16", "int8", "int4", "bnb-int8", "bnb-nf4")
"""Names that `load_in` accepts; with quantised weights everything else is bfloat16."""

GROUP_SIZE = 32
"""Weights that share a scale in `int4`; it must divide the width of every projection."""

DEFAULT_SETTINGS = f"{DEFAULT_SETTING},paper:0.1"


def quantization_config(precision: str) -> Any:
    """The `quantization_config` of a precision for `from_pretrained`; `None` if nothing is quantised.

    Raises:
        ValueError: The name is unknown.
        ImportError: The library is not installed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}; write one of {', '.join(PRECISIONS)}.")
    if precision == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "bnb-nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if precision in ("int8", "int4"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        if precision == "int8":
            return TorchAoConfig(Int8WeightOnlyConfig())
        four_bits = torch.int4  # type: ignore[attr-defined]
        # Int4WeightOnlyConfig has no kernels for a CPU; this one keeps a weight in a byte.
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(GROUP_SIZE)))
    return None


def load_in(folder: str | Path, precision: str) -> Any:
    """Load a compressed checkpoint in a precision of `PRECISIONS`, in eval mode."""
    from transformers import AutoModelForImageTextToText

    quantized = quantization_config(precision)
    options = {} if quantized is None else {"quantization_config": quantized}
    dtype = torch.float32 if precision == FULL else torch.bfloat16
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options).eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored, scales and zero points included."""
    stored = {id(part): part for tensor in _weights(model) for part in _parts(tensor)}
    return sum(part.numel() * part.element_size() for part in stored.values())


def _weights(model: nn.Module) -> Iterator[Any]:
    for weight in [*model.parameters(), *model.buffers()]:
        yield weight
        yield getattr(weight, "SCB", None)  # scales of bitsandbytes' 8-bit weights
        state = getattr(weight, "quant_state", None)  # of its 4-bit weights
        while state is not None:
            yield from (state.absmax, state.code)
            state = state.state2


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors of a quantised one."""
    if tensor is None:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


@torch.no_grad()
def kept_patches(model: Any, processor: Any, samples: Sequence[Sample], setting: Setting) -> Tensor:
    """Mask of the patches that a model keeps for every question: (questions, patches) bool."""
    rows: list[Tensor] = []
    for start in range(0, len(samples), DEFAULT_BATCH_SIZE):
        batch = samples[start : start + DEFAULT_BATCH_SIZE]
        inputs = encode_samples(processor, batch).to(model.device, model.dtype)
        rows += [record.kept_mask.cpu() for record in model.recover(**inputs, token_recovery=setting.fields)]
    return torch.cat(rows)


def overlap(ours: Tensor, theirs: Tensor) -> npt.NDArray[np.float64]:
    """Share of `theirs` that is also in `ours`, for every row; both are (R, N) bool."""
    return ((ours & theirs).sum(-1) / theirs.sum(-1)).double().numpy()


@dataclasses.dataclass
class PrecisionReport:
    """Every precision under every setting on the same questions.

    Attributes:
        answers: Answers of all runs, named "PRECISION, SETTING"; the reference is full precision without compression.
        overlaps: By run, the share of full precision's patches that is kept too, for every question.
        megabytes: Size of the weights by precision.
    """

    answers: EvaluationReport
    overlaps: dict[str, npt.NDArray[np.float64]]
    megabytes: dict[str, float]

    def setting_agreement(self, name: str) -> float:
        """Share of a run's answers that equal full precision's under the same setting."""
        reference = f"{FULL}, {name.split(', ', 1)[1]}"
        return dataclasses.replace(self.answers, reference=reference).agreement(name).value

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        facts = {name: {"mean": float(row.mean()), "min": float(row.min())} for name, row in self.overlaps.items()}
        return {"megabytes": self.megabytes, "overlaps": facts, **self.answers.to_dict()}

    def markdown(self) -> str:
        """A row for every run."""
        head = ["precision", "weights, MB", "setting", "accuracy [95 %]", "agrees with float32, all tokens"]
        rows = [[*head, "same setting", "same patches, mean", "least"]]
        for name in self.answers.results:
            precision, setting = name.split(", ", 1)
            shares = self.overlaps.get(name)
            same = ["-", "-"] if shares is None else [f"{shares.mean():.3f}", f"{shares.min():.2f}"]
            agrees = [f"{self.answers.agreement(name).value:.3f}", f"{self.setting_agreement(name):.3f}"]
            accuracy = str(self.answers.accuracy(name))
            rows.append([precision, f"{self.megabytes[precision]:.2f}", setting, accuracy, *agrees, *same])
        return "\n".join(markdown_table(rows))


def compare(
    folder: str | Path,
    processor: Any,
    samples: Sequence[Sample],
    settings: Sequence[Setting],
    precisions: Sequence[str] = PRECISIONS,
) -> PrecisionReport:
    """Load a checkpoint in every precision and ask it all questions.

    Args:
        folder: Folder of a compressed checkpoint.
        processor: The checkpoint's processor.
        samples: Questions and answers, see `demo_samples`.
        settings: Settings of compression; the uncompressed model always runs too.
        precisions: Names of `PRECISIONS`; full precision always runs first.

    Raises:
        ValueError: A precision is unknown.
        ImportError: A library is not installed.
    """
    for precision in precisions:  # before any work
        quantization_config(precision)
    report: EvaluationReport | None = None
    overlaps: dict[str, npt.NDArray[np.float64]] = {}
    megabytes: dict[str, float] = {}
    full: dict[str, Tensor] = {}
    for precision in dict.fromkeys((FULL, *precisions)):
        model = load_in(folder, precision)
        megabytes[precision] = weight_bytes(model) / 1e6
        found = evaluate(model, processor, samples, settings, max_new_tokens=4)
        for setting in settings:
            if not setting.is_off:
                kept = kept_patches(model, processor, samples, setting)
                overlaps[f"{precision}, {setting.name}"] = overlap(kept, full.setdefault(setting.name, kept))
        results = {f"{precision}, {name}": result for name, result in found.results.items()}
        report = dataclasses.replace(
            found, results={} if report is None else report.results, reference=f"{FULL}, {OFF}"
        )
        report.results |= results
    assert report is not None
    return PrecisionReport(report, overlaps, megabytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print the table."""
    from transformers import AutoProcessor

    from ..checkpoints.info import folder_of
    from ..checkpoints.quiet import quiet
    from ..cli.options import HelpFormatter, add_checkpoint, add_json_file, count
    from ..cli.output import say, write_results

    parser = argparse.ArgumentParser(
        prog="python -m reccomp_hf.experiments.precision",
        formatter_class=HelpFormatter,
        description="Asks a checkpoint in several precisions the demo's held-out questions and prints the table.",
    )
    add_checkpoint(parser)
    parser.add_argument("--settings", default=DEFAULT_SETTINGS, metavar="LIST", help="settings separated by commas")
    parser.add_argument(
        "--precisions", default=",".join(PRECISIONS), metavar="LIST", help="precisions separated by commas"
    )
    parser.add_argument("--limit", type=count, default=600, metavar="N", help="held-out questions")
    add_json_file(parser)
    arguments = parser.parse_args(argv)
    settings, samples = parse_settings(arguments.settings), demo_samples(arguments.limit)
    folder = folder_of(arguments.model)
    with quiet():
        processor = AutoProcessor.from_pretrained(folder)
        report = compare(folder, processor, samples, settings, arguments.precisions.split(","))
    say(f"{arguments.model}: {len(samples)} questions on {len({sample.picture for sample in samples})} scenes", "")
    say(report.markdown())
    write_results(arguments, lambda: {"model": arguments.model, **report.to_dict()})
    return 0


__all__ = ["PRECISIONS", "PrecisionReport", "compare", "kept_patches", "load_in", "overlap", "weight_bytes"]

if __name__ == "__main__":
    raise SystemExit(main())
