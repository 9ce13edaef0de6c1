"""Results as JSON lines, written as they come: what is in the file when a command is interrupted is whole and stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from nrt_fast.checkpoint import told_when_full
from nrt_fast.types import UserError


class JsonLines:
    """A file of one JSON object a line; a context manager. A file that nothing was written to does not stay.

    Args:
        path: a file that does not exist yet; standard output if None.

    Raises:
        UserError: the file exists, or cannot be made.
    """

    def __init__(self, path: str | None):
        self.path = Path(path or "standard output").expanduser()
        self._file: TextIO = sys.stdout
        if path is None:
            return
        if self.path.exists():
            raise UserError(f"output_file {path} is there already; choose another")
        with told_when_full(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc) -> None:
        if self._file is not sys.stdout:
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        with told_when_full(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()


def how_ended(ids: list[int], delimiter_logprob: float | None, eos_ids: tuple[int, ...], max_length: int) -> str:
    """What ended a trace: delimiter, eos, limit or repetition."""
    if delimiter_logprob is not None:
        return "delimiter"
    if ids and ids[-1] in eos_ids:
        return "eos"
    return "limit" if len(ids) >= max_length else "repetition"
