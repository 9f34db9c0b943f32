"""The lines a run has written so far, in a folder next to its output, until the output is complete.

Every process of every run appends to a file of its own, and nothing that was written is changed later: a process that
outlives its run does no harm, and a line that a kill cut off is ignored. The fingerprint is the first file in the
folder and the last to leave it. The output appears in one piece.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

FINGERPRINT = "run.json"

_TEXT: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"}

Write = Callable[[Iterable[str]], None]


class Parts:
    """The folder of an output.

    Attributes:
        output: The file that the run writes.
        folder: `OUTPUT.parts`.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.folder = self.output.with_name(self.output.name + ".parts")

    @property
    def finished(self) -> bool:
        """Whether the output exists; a folder next to it remains from a run that was killed while removing it."""
        return self.output.exists()

    def check_output(self, overwrite: bool) -> None:
        """Refuse to write over a finished output.

        Raises:
            FileExistsError: The output is finished.
        """
        if self.finished and not self.folder.exists() and not overwrite:
            raise FileExistsError(
                f"{self.output} is finished and was left unchanged: name another file, or start over with --overwrite."
            )

    def prepare(self, fingerprint: dict[str, Any], overwrite: bool) -> None:
        """Make the folder for a run, or check that a run can resume from it.

        Args:
            fingerprint: Everything that the answers depend on, as JSON values.
            overwrite: Start over.

        Raises:
            FileExistsError: The output is finished.
            ValueError: The folder has another fingerprint.
        """
        self.check_output(overwrite)
        fingerprint = json.loads(json.dumps(fingerprint))
        if overwrite:
            self._remove_folder()
            self.output.unlink(missing_ok=True)
        path = self.folder / FINGERPRINT
        begun = any(file.stat().st_size for file in self._files())
        if begun and not path.exists():
            raise ValueError(f"{self.folder} lacks its {FINGERPRINT}: start over with --overwrite.")
        if path.exists() and (begun or self.finished):
            self._compare(json.loads(path.read_text(encoding="utf-8")), fingerprint)
        elif not self.finished:  # without any answers, other settings may replace those of the folder
            self.folder.mkdir(exist_ok=True)
            self._replace(path, [json.dumps(fingerprint, indent=2) + "\n"])

    def lines(self) -> dict[int, str]:
        """The complete lines of all files, by row."""
        lines: dict[int, str] = {}
        for path in self._files():
            *complete, _ = path.read_bytes().split(b"\n")  # text after the last line end was cut off
            for line in complete:
                lines.setdefault(self._row_of(line, path), line.decode("utf-8") + "\n")
        return lines

    @contextlib.contextmanager
    def writer(self, process: int) -> Iterator[Write]:
        """A new file for a process; every call hands its lines to the operating system before it returns."""
        with (self.folder / f"part-{process:05d}-{uuid.uuid4().hex}.jsonl").open("x", **_TEXT) as file:

            def write(lines: Iterable[str]) -> None:
                file.write("".join(lines))
                file.flush()

            yield write

    def join(self, count: int) -> list[str]:
        """Put the output together from its `count` rows, and remove the folder; returns its lines.

        Raises:
            RuntimeError: A row is missing.
        """
        if not self.finished:
            lines = self.lines()
            missing = count - len(lines)
            if missing:
                raise RuntimeError(
                    f"{missing} of {count} rows are not in {self.folder}: something removed them. Run the "
                    "same command again."
                )
            self._replace(self.output, [lines[row] for row in range(count)])
        self._remove_folder()
        return self.output.read_text(encoding="utf-8").split("\n")[:-1]

    def finish(self, lines: Iterable[str]) -> None:
        """Write an output that was made of the rows, and remove the folder.

        Raises:
            FileExistsError: Another run has finished the output meanwhile, with other contents.
        """
        text = "".join(lines)
        if not self.finished:
            self._replace(self.output, [text])
        elif self.output.read_text(encoding="utf-8") != text:
            raise FileExistsError(
                f"{self.output} was written by another run meanwhile and was left unchanged: name another file."
            )
        self._remove_folder()

    def _row_of(self, line: bytes, path: Path) -> int:
        try:
            return json.loads(line)["row"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged at {line[:40]!r}: start over with --overwrite.") from error

    def _compare(self, stored: dict[str, Any], given: dict[str, Any]) -> None:
        differing = [name for name in {**stored, **given} if stored.get(name) != given.get(name)]
        if "rows" in differing and "images" in differing:
            differing.remove("images")  # of other rows
        if differing:
            name = differing[0]
            values = f"{stored.get(name)!r} there, {given.get(name)!r} here"
            others = f", and in {', '.join(differing[1:])}" if len(differing) > 1 else ""
            raise ValueError(
                f"{self.folder} holds answers of another run, which differs in {name} ({values}){others}. Resume with "
                "the settings of that run, name another output, or start over with --overwrite."
            )

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def _replace(self, path: Path, lines: Iterable[str]) -> None:
        """Write a file atomically."""
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        with temporary.open("x", **_TEXT) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _remove_folder(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)


__all__ = ["Parts", "Write"]
