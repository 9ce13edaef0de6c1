"""Phase timings, and metrics.jsonl: one line per step, cut back on resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        path: the file, made if absent.
        last_step: lines of later steps, written after the checkpoint that a run resumes from, are cut off.
        is_writer: whether this process writes; of several that read, one does.

    Attributes:
        rows: the lines that were kept.
        last_seen: the last step that any line had, or 0; a step up to it was written, and told, before.
    """

    def __init__(self, path: Path, last_step: int, is_writer: bool = True):
        lines = [(line, json.loads(line)) for line in _complete_lines(path)]
        self.rows = [row for _, row in lines if row["step"] <= last_step]
        self.last_seen = max((row["step"] for _, row in lines), default=0)
        if is_writer:
            replace_file(path, "".join(line for line, row in lines if row["step"] <= last_step))
        self._file = (path if is_writer else Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, row: dict[str, float | int | str]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

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
    """Every complete line of a metrics file, in order."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    # A run that was killed may have left half a line.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]
