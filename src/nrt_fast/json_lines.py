"""Results as JSON lines, written as they come: what is in the file when a command is interrupted is whole and stays."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
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
        self._num_bytes = 0  # of whole lines
        if path is None:
            return
        if self.path.exists():
            raise UserError(f"output_file {path} is there already; choose another")
        with told_when_full(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc) -> None:
        if self._file is sys.stdout:
            return
        with told_when_full(self.path) if kind is None else suppress(OSError):  # what is raised already tells why
            try:
                self._file.close()  # writes what the disk refused once more
            finally:
                os.truncate(self.path, self._num_bytes)
                if not self._num_bytes:
                    self.path.unlink()

    def write(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        with told_when_full(self.path):
            line = json.dumps(row, ensure_ascii=False) + "\n"
            self._file.write(line)
            self._file.flush()
        self._num_bytes += len(line.encode())


def how_ended(ids: list[int], delimiter_logprob: float | None, eos_ids: tuple[int, ...], max_length: int) -> str:
    """What ended a trace: delimiter, eos, limit or repetition."""
    if delimiter_logprob is not None:
        return "delimiter"
    if ids and ids[-1] in eos_ids:
        return "eos"
    return "limit" if len(ids) >= max_length else "repetition"
