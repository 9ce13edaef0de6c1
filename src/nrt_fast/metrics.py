"""Phase timings, and metrics.jsonl: one line per step, cut back on resume."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrt_fast.types import UserError

logger = logging.getLogger(__name__)


class Timer:
    """Seconds spent in each phase since the last ``take``."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds so far by phase; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class MetricsFile:
    """Append-only JSON lines, each with a ``step``.

    Args:
        path: the file, made if absent. Broken lines at its end, which a power loss may leave, are told and cut off.
        last_step: lines of later steps, written after the checkpoint that a run resumes from, are cut off.
        is_writer: whether this process writes; of several that read, one does.

    Attributes:
        rows: the lines that were kept.
        last_seen: the last step that any line had, or 0; a step up to it was written, and told, before.

    Raises:
        UserError: a line before the last good one is broken; names file and line.
    """

    def __init__(self, path: Path, last_step: int, is_writer: bool = True):
        lines, num_broken = _read(path)
        if num_broken and is_writer:
            logger.warning("%s is broken from line %d on, which is dropped", path, len(lines) + 1)
        self.rows = [row for _, row in lines if row["step"] <= last_step]
        self.last_seen = max((row["step"] for _, row in lines), default=0)
        if is_writer:
            replace_file(path, "".join(f"{line}\n" for line, row in lines if row["step"] <= last_step))
        self._file = (path if is_writer else Path(os.devnull)).open("a", encoding="utf-8")
        self._is_writer = is_writer

    def write(self, row: dict[str, float | int | str]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint that is there has the lines of its steps."""
        if self._is_writer:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is lost without it."""
        self._file.close()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that replaces ``path`` once it is whole: a crash leaves either the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a whole file so that a crash leaves either the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mean(values: list) -> float:
    """Arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def read_metrics(path: Path) -> list[dict]:
    """Every complete line of a metrics file, in order; broken ones at its end are left out.

    Raises:
        UserError: a line before the last good one is broken; names file and line.
    """
    return [row for _, row in _read(path)[0]]


def _read(path: Path) -> tuple[list[tuple[str, dict]], int]:
    """(line, row) up to the last good line, and how many lines behind it are broken."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1]  # a run that was killed may have left half a line
    rows = [_row(line) for line in lines]
    num_good = max((number for number, row in enumerate(rows, 1) if row is not None), default=0)
    if None in rows[:num_good]:
        number = rows.index(None) + 1
        raise UserError(f"{path}, line {number} is broken, and later lines are not: JSON with a step is expected")
    return list(zip(lines[:num_good], rows[:num_good], strict=True)), len(rows) - num_good


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
