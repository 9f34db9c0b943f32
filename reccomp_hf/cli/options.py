"""Options: how a command is declared, the options that several commands share, and how their values are read.

Nothing here imports torch or transformers until a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import ipaddress
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..core.settings import FIELDS, PRESETS, did_you_mean, is_budget
from .choices import CHECKPOINTS, DTYPES, DYNAMIC

IMAGE_ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".webp")


class Unset(enum.Enum):
    """The type of `UNSET`."""

    UNSET = enum.auto()


UNSET = Unset.UNSET
"""Value of `--budget` where it is not given; `None` is the dynamic budget."""

Budget: TypeAlias = int | float | Unset | None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the description's own lines, and with the default of every option that has one worth printing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], UNSET) or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


# ---- declaring -----------------------------------------------------------------------------------------------------


def add_command(commands: Any, run: Callable[..., None], summary: str, description: str, *examples: str) -> Any:
    """Declare a command, named after the module of `run`, and return its parser."""
    name = run.__module__.rpartition(".")[2]
    command = commands.add_parser(
        name,
        description=description,
        epilog="\n".join(["example:", *(f"  reccomp-hf {name}{example}" for example in examples)]),
        formatter_class=HelpFormatter,
    )
    debug = "show the traceback of an error"
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    command.set_defaults(run=run, prog=command.prog, summary=summary, format_help=command.format_help)
    return command


def add_checkpoint(parser: Any, name: str = "model", **options: Any) -> None:
    """Declare the checkpoint to load, by position or as `--model`."""
    shipped = " or ".join(CHECKPOINTS)
    parser.add_argument(
        name, metavar="MODEL", help=f"a compressed checkpoint: a folder, a Hub id, {shipped}", **options
    )


def add_preset(parser: Any, default: str | None = None, text: str = "settings to start from") -> None:
    """Declare `--preset`."""
    parser.add_argument("--preset", choices=PRESETS, default=default, help=text)


def add_budget(parser: Any, text: str = "tokens per image, a share of its patches, or dynamic") -> None:
    """Declare `--budget`; its value is `UNSET` if it is not given."""
    parser.add_argument("--budget", type=budget, default=UNSET, metavar="N|SHARE|dynamic", help=text)


def add_settings(parser: Any, text: str = "one field of the token_recovery section; may be repeated") -> None:
    """Declare `--set`, a list of pairs."""
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help=text)


def add_device(parser: Any) -> None:
    """Declare `--device`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def add_dtype(parser: Any, default: str = "float32 on a CPU, elsewhere as stored") -> None:
    """Declare `--dtype`."""
    parser.add_argument("--dtype", choices=DTYPES, help=f"data type of the weights (default: {default})")


def add_cuda_graph(parser: Any) -> None:
    """Declare `--cuda-graph`."""
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay prefills as CUDA graphs, which are recorded once per shape; needs a fixed budget",
    )


def add_address(parser: Any, port: int) -> None:
    """Declare `--host` and `--port` of a server."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 127.0.0.1 is reachable from this machine only"
    )
    parser.add_argument("--port", type=int, default=port, metavar="N", help="port to listen on, 0 for a free one")


def add_section(parser: Any, text: str = "in place of --preset") -> None:
    """Declare `--section`, a file that `reccomp-hf tune` wrote, or a config.json."""
    source = "file with a token_recovery section, from `reccomp-hf tune` or a config.json"
    parser.add_argument("--section", metavar="FILE", help=f"{source} ({text})")


def add_model_options(parser: Any) -> None:
    """Declare how a checkpoint is loaded, and which of its settings are replaced, see [`section_fields`]."""
    add_preset(parser, text="settings to start from (default: the checkpoint's own)")
    add_section(parser)
    add_budget(parser)
    add_settings(parser)
    add_device(parser)
    add_dtype(parser)


def add_answer_options(parser: Any, batch_size: int, max_new_tokens: int) -> None:
    """Declare how questions are answered in batches."""
    parser.add_argument("--batch-size", type=count, default=batch_size, metavar="N", help="questions per batch")
    parser.add_argument(
        "--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help="tokens of the longest answer"
    )
    parser.add_argument(
        "--instruction", default="", metavar="TEXT", help="text to put below each question; CLIP does not read it"
    )


def add_json_file(parser: Any) -> None:
    """Declare `--json FILE`, see [`write_results`]."""
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results as JSON")


# ---- reading values, for argparse ----------------------------------------------------------------------------------


def budget(text: str) -> int | float | None:
    """Read a number of tokens, a share of them or "dynamic"."""
    if text == DYNAMIC:
        return None
    for number in (int, float):
        with contextlib.suppress(ValueError):
            if is_budget(number(text)):
                return number(text)
    raise argparse.ArgumentTypeError(f"expected a number of tokens, a share of them or 'dynamic', got {text!r}")


def setting(text: str) -> tuple[str, Any]:
    """Read `field=value` as a pair; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected field=value, got {text!r}")
    if name not in FIELDS:
        hint = did_you_mean(name, FIELDS, f"known fields are {', '.join(FIELDS)}")
        raise argparse.ArgumentTypeError(f"unknown token_recovery field {name!r}; {hint}")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


def count(text: str) -> int:
    """Read a number that must be at least 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")


def host_name(text: str) -> str:
    """Read the name or address of a host; with a scheme, a port or a path it would fit no request."""
    name = text.strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", text):
        raise argparse.ArgumentTypeError(f"expected a host, without scheme, port or path, got {text!r}")
    return text


def counts(text: str) -> tuple[int, ...]:
    """Read numbers of at least 1, separated by commas; repeated ones count once."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected counts separated by commas as in 1,4,16, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def budgets(text: str) -> tuple[int | float | str, ...]:
    """Read budgets separated by commas, the dynamic one as `DYNAMIC`; repeated ones count once."""
    found: list[int | float | str] = []
    for part in text.split(","):
        try:
            found.append(part if part == DYNAMIC else int(part) if part.isdecimal() else float(part))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected tokens, shares or dynamic, separated by commas as in dynamic,64,0.1, got {text!r}"
            ) from None
    return tuple(dict.fromkeys(found))


def image_size(text: str) -> tuple[int, int]:
    """Read `WIDTHxHEIGHT`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected width x height as in 640x480, got {text!r}")
    return int(found[1]), int(found[2])


def output_file(path: str) -> str:
    """Read the name of a file to write, whose folder must exist."""
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file")
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {path} does not exist")
    return path


def output_image(path: str) -> str:
    """Read the name of an image file to write, whose ending must name a format."""
    if not Path(path).is_dir() and not path.lower().endswith(IMAGE_ENDINGS):
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(IMAGE_ENDINGS)}, got {path!r}")
    return output_file(path)


# ---- using values --------------------------------------------------------------------------------------------------


def section_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `token_recovery` that `--preset` or `--section`, `--budget` and `--set` replace.

    Raises:
        ValueError: Both of the first two, or a file without a section.
        OSError: The file cannot be read.
    """
    fields = start_fields(arguments)
    if arguments.budget is not UNSET:
        fields["budget"] = arguments.budget
    return fields | dict(arguments.set)


def start_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `token_recovery` that `--preset` or `--section` name; none without these options.

    Raises:
        ValueError: Both options, or a file without a section.
        OSError: The file cannot be read.
    """
    preset = getattr(arguments, "preset", None)  # not every command has it
    if preset and arguments.section:
        raise ValueError("--preset and --section both name settings to start from: give one of them.")
    if arguments.section:
        return file_fields(arguments.section)
    return preset_fields(preset) if preset else {}


def preset_fields(preset: str, **overrides: Any) -> dict[str, Any]:
    """All fields of a preset except `text_encoder_config`, which belongs to the weights.

    Raises:
        ValueError: An unknown preset, or a value that does not fit.
    """
    from ..core.configuration import TokenRecoveryConfig

    return TokenRecoveryConfig.from_preset(preset, **overrides).overridable()


def file_fields(path: str) -> dict[str, Any]:
    """All fields of the section in a file, except `text_encoder_config`, which belongs to the weights.

    Raises:
        ValueError: The file holds no section, or one that is not valid.
        OSError: The file cannot be read.
    """
    from ..core.configuration import TokenRecoveryConfig

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    section = content.get("token_recovery") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path} holds no section: expected an object with the key token_recovery.")
    try:
        return TokenRecoveryConfig.from_value(section).overridable()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_not_overwritten(source: str | None, outputs: Sequence[str | None]) -> None:
    """Refuse to write over the input.

    Raises:
        ValueError: An output is the source.
    """
    for output in filter(None, outputs):
        if source is not None and Path(source).exists() and Path(output).exists() and Path(output).samefile(source):
            raise ValueError(f"{output} is the input and would be overwritten: name another file to write.")


__all__ = [
    "UNSET",
    "Budget",
    "HelpFormatter",
    "Unset",
    "add_address",
    "add_answer_options",
    "add_budget",
    "add_checkpoint",
    "add_command",
    "add_device",
    "add_dtype",
    "add_json_file",
    "add_model_options",
    "add_preset",
    "add_section",
    "add_settings",
    "budget",
    "budgets",
    "check_not_overwritten",
    "count",
    "counts",
    "file_fields",
    "host_name",
    "image_size",
    "output_file",
    "output_image",
    "preset_fields",
    "section_fields",
    "setting",
    "start_fields",
]
