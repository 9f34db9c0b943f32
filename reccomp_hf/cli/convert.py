"""`reccomp-hf convert`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import DTYPES
from .options import add_command, add_preset, add_section, add_settings, start_fields
from .output import line, say, section_lines

if TYPE_CHECKING:
    from ..checkpoints.conversion.plan import Plan, Source
    from ..checkpoints.hub import Pushed


DEFAULT_PRESET = "paper"


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from ..checkpoints.conversion.plan import plan_conversion
    from ..checkpoints.conversion_record import ConversionRecord
    from ..checkpoints.convert import check_output, convert, plan_processor, section_of
    from ..checkpoints.info import describe
    from ..checkpoints.quiet import quiet
    from ..core.configuration import overridden

    if arguments.push is None and (arguments.private or arguments.revision):
        option = "--private" if arguments.private else "--revision"
        raise ValueError(f"{option} says how to push, but nothing is pushed: add --push REPO, or leave it out.")
    if arguments.push is not None:
        validate_repo_id(arguments.push)
    preset, overrides = arguments.preset or DEFAULT_PRESET, dict(arguments.set)
    if arguments.section:
        overrides = overridden(start_fields(arguments), overrides)
    section = section_of(preset, overrides)  # before anything is loaded
    output = Path(arguments.output).expanduser()
    check_output(output)
    clip = None if arguments.visual_only else arguments.clip or "auto"
    with quiet(progress_bars=sys.stderr.isatty()), _sigterm_interrupts():
        if arguments.dry_run:
            plan = plan_conversion(arguments.llava, clip, section, dtype=arguments.dtype)
            plan_processor(plan)
            say(*_plan_lines(plan, output, arguments))
            return
        settings = {"dtype": arguments.dtype, "force": arguments.force, "repo": arguments.push}
        folder = convert(arguments.llava, clip, output, preset, **settings, **overrides)
        facts, record = describe(folder, str(folder)), ConversionRecord.read(folder)
    say(
        f"Wrote {folder} ({f'section of {arguments.section}' if arguments.section else f'preset {preset}'}).",
        *section_lines(facts),
        *_share_hint(facts),
        *([] if record is None else [line("proven", record.proof)]),
        "",
    )
    name, place = str(folder), repr(str(folder))
    if arguments.push is not None:
        pushed = _push(folder, arguments)
        say(f"Pushed to {pushed.url}")
        name, place = pushed.repo, repr(pushed.repo)
        if arguments.revision is not None:
            name, place = f"{name}@{pushed.branch}", f"{place}, revision={pushed.branch!r}"
    say(
        f"Next: reccomp-hf info {name}, or in Python",
        "  import reccomp_hf, transformers",
        f"  model = transformers.AutoModelForImageTextToText.from_pretrained({place})",
    )


def _push(folder: Path, arguments: argparse.Namespace) -> Pushed:
    from ..checkpoints.hub import push
    from ..checkpoints.quiet import quiet

    private = True if arguments.private else None
    try:
        with quiet(progress_bars=sys.stderr.isatty()):
            return push(folder, arguments.push, private=private, revision=arguments.revision)
    except (OSError, ValueError) as error:
        command = ["reccomp-hf push", str(folder), arguments.push, *(["--private"] if private else [])]
        command += ["--revision", arguments.revision] if arguments.revision else []
        raise type(error)(f"{error} {folder} is complete; what remains is `{' '.join(command)}`.") from error


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let a SIGTERM raise `KeyboardInterrupt`, so that temporary files are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan_lines(plan: Plan, output: Path, arguments: argparse.Namespace) -> list[str]:
    """The plan of a dry run, in lines."""
    from ..checkpoints.info import describe

    with tempfile.TemporaryDirectory() as folder:
        plan.config.save_pretrained(folder)
        facts = describe(Path(folder), str(output))
    text, size = plan.llava.config.text_config, plan.llava.nbytes(plan.dtype)
    if plan.clip is None:
        clip = "none"
    else:
        size += plan.clip.nbytes(plan.dtype)
        clip = f"{_source(plan.clip)}{', guessed from the vision tower' if plan.guessed else ''}"
    layers = f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}"
    known = all(source is None or source.headers is not None for source in (plan.llava, plan.clip))
    headers = "the keys and shapes of the weights, " if known else ""
    return [
        "Plan (a dry run: nothing is written):",
        line("llava", f"{_source(plan.llava)}; {layers}"),
        line("clip", clip),
        line("output", f"{output}{f', {_bytes(size)}' if known else ''}"),
        line("dtype", plan.dtype or "unchanged"),
        *section_lines(facts),
        *_share_hint(facts),
        *([] if arguments.push is None else [line("push", arguments.push)]),
        line("checked", f"settings, sizes, {headers}and the processor"),
    ]


def _share_hint(facts: dict[str, Any]) -> list[str]:
    """Advice where a count that suits 576 patches is a large share of a small grid."""
    before, after = facts["tokens_per_image"]["before"], facts["tokens_per_image"]["after"]
    budget = facts["token_recovery"]["budget"]
    if before is None or not isinstance(budget, int) or after is None or after <= before / 4:
        return []
    text = f"{after} of {before} tokens are {after / before:.0%} of an image; --set budget=0.11 keeps about a tenth"
    return [line("hint", text)]


def _source(source: Source) -> str:
    if source.headers is None:
        return f"{source.name}, whose weights are not safetensors or not downloaded: they are read when converting"
    files = len({header.file for header in source.headers.values()})
    size = sum(header.nbytes() for header in source.headers.values())
    dtypes = ", ".join(sorted({header.dtype for header in source.headers.values()}))
    return f"{source.name}, {_bytes(size)} of {dtypes} in {files} file{'s' if files > 1 else ''}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "make a compressed model from a LLaVA and its CLIP",
        "Writes a folder that transformers loads as a compressed LLaVA. Nothing is trained, and weights keep\n"
        "their dtype. LLAVA and CLIP are folders, Hub ids or org/name@revision; OUTPUT must not exist, or be\n"
        "empty. Weights are copied file by file, so a model of any size needs little memory, and the result is\n"
        "verified against its sources before the folder is created.",
        " llava-hf/llava-1.5-7b-hf llava-reccomp --preset balanced",
        " llava-hf/llava-1.5-7b-hf openai/clip-vit-large-patch14-336 llava-reccomp --push me/llava-reccomp",
        " ./llava ./clip ./llava-reccomp --set budget=64 --set text_share=0.25 --dry-run",
    )
    command.add_argument("llava", metavar="LLAVA", help="a LLaVA-1.5 or LLaVA-NeXT in transformers' format")
    command.add_argument(
        "clip", metavar="CLIP", nargs="?", help="the CLIP of its vision tower (default: guessed by the tower's sizes)"
    )
    command.add_argument("output", metavar="OUTPUT", help="folder to write")
    add_preset(command, text=f"settings to start from (default: {DEFAULT_PRESET})")
    add_section(command)
    add_settings(
        command, "one field of the token_recovery section, its value as JSON or a plain word; may be repeated"
    )
    command.add_argument("--visual-only", action="store_true", help="no text encoder; CLIP is neither needed nor read")
    command.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: they keep their dtype)")
    command.add_argument("--force", action="store_true", help="accept a CLIP with an unrelated vision tower")
    command.add_argument("--dry-run", action="store_true", help="check, print the plan, and write nothing")
    command.add_argument("--push", metavar="REPO", help="push the result to this repository on the Hub")
    command.add_argument("--private", action="store_true", help="with --push: make a new repository private")
    command.add_argument("--revision", metavar="BRANCH", help="with --push: the branch to push to")


__all__ = ["register", "run"]
