"""Execute the notebooks and write their outputs back: `python tests/support/run_notebooks.py [NOTEBOOK...]`.

The printed text is compared with that of a fresh run, so it must not depend on the machine.
A cell whose text does (a loss, a time) has the tag `varies`.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from paths import NOTEBOOKS
from PIL import Image
from torchao_noise import without_torchao
from traitlets.config import Config

VARIES = "varies"
_TIMEOUT = 900  # seconds of a cell: a hang ends, a busy machine does not
_QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm says so in every kernel without ipywidgets


def paths() -> list[Path]:
    """All notebooks."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> Any:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def execute(path: Path) -> Any:
    """The notebook with the outputs of a run in a fresh kernel; an error in a cell raises."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=_TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),  # no network, not even ours
        )
        client.execute(cwd=str(NOTEBOOKS), env={**os.environ, **_QUIET, "IPYTHONDIR": folder})  # nobody's own start-up
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_torchao(output)]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _with_palette(output["data"]["image/png"])
    return notebook


def printed(cell: Any) -> list[tuple[str, str]]:
    """Per output of a cell: its kind, and its text unless that varies."""
    outputs = []
    for output in cell.outputs:
        kind = "+".join([output.output_type, output.get("name", ""), *sorted(output.get("data", {}))])
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        outputs.append((kind, "" if VARIES in cell.metadata.get("tags", []) else text))
    return outputs


def _is_torchao(output: Any) -> bool:
    return output.get("name") == "stderr" and not without_torchao(output.text)


def _with_palette(picture: str) -> str:
    """A PNG picture in 256 colours, which takes a quarter of the room."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or paths():
        nbformat.write(execute(path), path)
