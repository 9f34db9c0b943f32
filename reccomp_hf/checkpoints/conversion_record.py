"""The record of a conversion, which a checkpoint carries as `conversion.json`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.configuration import TokenRecoveryConfig
from .json_files import read_json, write_json

FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class ConversionRecord:
    """How `convert` made a checkpoint.

    `save_pretrained` does not write it, so a model that was trained further and saved elsewhere does not claim to be
    the result of a conversion.

    Attributes:
        preset: Name of the preset.
        fields: Fields of the `token_recovery` section that were given besides.
        llava: Hub id of the LLaVA, with its revision if one was named; `None` for a folder or a model in memory.
        clip: As `llava`, for the CLIP; the one that was found for `"auto"`.
        visual_only: Whether the checkpoint was made without a CLIP.
        dtype: Dtype that the weights were cast to; `None` if they were not.
        force: Whether a CLIP with an unrelated vision tower was accepted.
        proof: The checks that passed before the folder was created, as a sentence.
    """

    preset: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    llava: str | None = None
    clip: str | None = None
    visual_only: bool = False
    dtype: str | None = None
    force: bool = False
    proof: str = ""

    @classmethod
    def read(cls, folder: Path) -> ConversionRecord | None:
        """The record of a checkpoint folder; `None` without one, and for a file of that name with other contents."""
        try:
            record = cls(**read_json(folder / FILE))
        except (FileNotFoundError, TypeError, ValueError):
            return None
        return record if isinstance(record.fields, dict) else None

    def write(self, folder: Path) -> None:
        """Write the record into a checkpoint folder."""
        write_json(folder / FILE, dataclasses.asdict(self))

    def describes(self, section: TokenRecoveryConfig) -> bool:
        """Whether a section is still the one that the conversion wrote."""
        try:
            converted = TokenRecoveryConfig.from_preset(self.preset, **self.fields)
        except (TypeError, ValueError):  # of a method that is not registered here, or edited by hand
            return False
        return converted.overridable() == section.overridable()

    def command(self, output: str, sources: Sequence[str] = ()) -> list[str]:
        """The words of the command that repeats the conversion.

        Args:
            output: Name of the folder to write.
            sources: Hub ids of the LLaVA and the CLIP, for sources that the record does not name.
        """
        llava, clip = (*sources, *("LLAVA", "CLIP")[len(sources) :])[:2]
        words = ["reccomp-hf", "convert", self.llava or llava]
        words += [] if self.visual_only else [self.clip or clip]
        words += [output, f"--preset {self.preset}"]
        words += [f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in self.fields.items()]
        words += ["--visual-only"] if self.visual_only else []
        words += [f"--dtype {self.dtype}"] if self.dtype else []
        return words + (["--force"] if self.force else [])


__all__ = ["ConversionRecord"]
