"""``nrt-fast report``: runs' folders to one HTML file."""

from __future__ import annotations

from pathlib import Path

from nrt_fast.config import ReportConfig
from nrt_fast.html_report import MARK, read_run, render
from nrt_fast.metrics import replace_file
from nrt_fast.types import UserError

NAME = "report.html"


def report(config: ReportConfig) -> Path:
    """Write the page and say where it is; returns its path.

    A report can be made again from its run at any time, so an earlier one is replaced; any other file is not.

    Raises:
        UserError: a folder that is no run, or a file that is no report or cannot be written; nothing is written then.
    """
    config.check()
    runs = [read_run(run) for run in config.folders]
    own = Path(config.folders[0]) / NAME if len(runs) == 1 else Path(NAME)
    path = Path(config.output_file or own).expanduser()
    if path.exists() and not _is_report(path):
        raise UserError(f"output_file {path} is there and no report of nrt-fast; choose another")
    page = render(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(f"{path} shows {', '.join(run.name for run in runs)}: open it in a browser")
    return path


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(MARK)) == MARK
    except (OSError, UnicodeDecodeError):
        return False
