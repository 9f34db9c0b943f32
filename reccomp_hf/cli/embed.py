"""`reccomp-hf embed`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_checkpoint, add_command, add_cuda_graph, add_model_options, count, section_fields
from .output import say

if TYPE_CHECKING:
    from ..data.rows import Picture, Rows
    from ..engines.embedding import ImageEmbeds

INDEX = "index.jsonl"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A checked row.

    Attributes:
        where: Place in the data, for messages.
        id: The data's id, or the row's number.
        question: Question, not empty.
        picture: Image, not opened yet.
    """

    where: str
    id: str | int
    question: str
    picture: Picture


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from ..checkpoints.convert import check_output
    from ..checkpoints.loading import load_encoder
    from ..checkpoints.quiet import quiet
    from ..checkpoints.work_folder import work_folder
    from ..data.rows import open_rows

    output = Path(arguments.output).expanduser()
    check_output(output)
    rows = _read(open_rows(arguments.data, arguments.limit))
    with quiet(progress_bars=sys.stderr.isatty()):
        source = (arguments.model, section_fields(arguments), arguments.device, arguments.dtype)
        model, processor = load_encoder(*source, cuda_graph=arguments.cuda_graph)
        with work_folder(output) as work:
            staging = work / output.name
            staging.mkdir()
            counts = _write(staging, rows, model, processor, arguments.batch_size)
            staging.replace(output)
    width, section = model.config.get_text_config().hidden_size, model.config.token_recovery
    mean = sum(after for after, _ in counts) / len(counts)
    of = sum(before for _, before in counts) / len(counts)
    files, dtype = f"{len(rows)} file{'s' if len(rows) > 1 else ''}", str(model.dtype).removeprefix("torch.")
    tokens = f"{mean:.1f} of {of:.1f} tokens on average"
    say(f"Wrote {output}: {files} of (tokens, {width}) in {dtype}, {tokens}, and {INDEX}.")
    if section.position_ids == "original":
        say(
            "These settings keep every token's own position (`places`). An engine that numbers tokens consecutively "
            "reads them as with position_ids 'compact'; to measure that, use --set position_ids=compact."
        )


def _read(rows: Rows) -> list[_Row]:
    """Check all rows, and the headers of their images, before any work is done.

    Raises:
        ValueError: A row lacks a column, or an id is repeated.
    """
    from ..data.rows import check_unique_id, id_of, picture_of, question_of

    rows.require("image", "question")
    read: list[_Row] = []
    first: dict[str | int, int] = {}
    for number in range(len(rows)):
        where = rows.where(number)
        try:
            row = rows[number]
            question = question_of(row.get("question"))
            row_id = number if row.get("id") is None else id_of(row["id"])
            picture = picture_of(row.get("image"), rows.base)
            if picture.size() is None:
                picture.open()  # says what is wrong
            check_unique_id(row_id, number, first, rows)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        read.append(_Row(where, row_id, question, picture))
    return read


def _write(folder: Path, rows: list[_Row], model: Any, processor: Any, batch_size: int) -> list[tuple[int, int]]:
    """Write a file for each row, and the index; returns tokens after and before."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    from ..engines.embedding import embed_images

    digits, counts = max(5, len(str(len(rows)))), []
    with (
        tqdm(total=len(rows), desc="images", file=sys.stderr, disable=None) as bar,
        (folder / INDEX).open("w", encoding="utf-8") as index,
    ):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            results = embed_images(model, processor, [_open(row) for row in batch], [row.question for row in batch])
            for number, (row, result) in enumerate(zip(batch, results, strict=True), start=start):
                file = f"{number:0{digits}d}.safetensors"
                save_file(_tensors(result), folder / file)
                counts.append((len(result.embeds), result.placeholders))
                facts = {"id": row.id, "file": file, "tokens": counts[-1][0], "placeholders": counts[-1][1]}
                facts |= {"image": row.picture.name, "question": row.question}
                index.write(json.dumps(facts, ensure_ascii=False) + "\n")
            bar.update(len(batch))
    return counts


def _open(row: _Row) -> Any:
    try:
        return row.picture.open()
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _tensors(result: ImageEmbeds) -> dict[str, Any]:
    places = {} if result.places is None else {"places": result.places.contiguous()}
    return {"image_embeds": result.embeds.contiguous(), **places}


def register(commands: Any) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        run,
        "write compressed image embeddings, for serving engines",
        "Compresses the image of every row by its question and writes the tokens that the language model would\n"
        "read, `image_embeds` of (tokens, width), a safetensors file for each row and an index.jsonl. The layers of\n"
        "the language model are not loaded. All rows are checked first, a bad one ends the command, and the folder\n"
        "is created when it is complete. reccomp_hf.image_embeds_part turns the embeddings into a message part for\n"
        "vLLM's server (--enable-mm-embeds).",
        " ./llava-reccomp questions.jsonl embeds --set position_ids=compact",
        " demo questions.jsonl embeds --budget dynamic --dtype bfloat16",
    )
    add_checkpoint(command)
    command.add_argument(
        "data",
        metavar="DATA",
        help="JSON lines with image, question and perhaps id; a Parquet file; or a folder of the datasets library",
    )
    command.add_argument("output", metavar="OUTPUT", help="folder to write; it must not exist, or be empty")
    command.add_argument("--limit", type=count, metavar="N", help="the first N rows (default: all)")
    command.add_argument("--batch-size", type=count, default=16, metavar="N", help="images per batch")
    add_model_options(command)
    add_cuda_graph(command)


__all__ = ["register", "run"]
