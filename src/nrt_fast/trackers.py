"""Experiment trackers beside metrics.jsonl, imported only where asked for. None of them can stop a run.

A run that goes on goes on in the same tracker run: its name is kept in output_dir/tracker_run.json.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from nrt_fast.config import TrainConfig, split_names
from nrt_fast.metrics import replace_file
from nrt_fast.types import UserError, did_you_mean

PROJECT = "nrt-fast"
TEXT_ROWS = 16


class _Wandb:
    """wandb, and trackio, which has its interface but tells runs apart by their names."""

    def __init__(self, module, config: TrainConfig, name: str, by_id: bool):
        self.module = module
        identity = {"id": name} if by_id else {}
        module.init(project=PROJECT, name=name, resume="allow", config=asdict(config), **identity)

    def log(self, metrics: dict[str, float], step: int, completions: Sequence[dict[str, Any]]) -> None:
        if completions:
            data = [list(row.values()) for row in completions]
            metrics = metrics | {"completions": self.module.Table(columns=list(completions[0]), data=data)}
        self.module.log(metrics, step=step)

    def finish(self) -> None:
        self.module.finish()


class _TensorBoard:
    def __init__(self, module, config: TrainConfig, name: str):
        self.writer = module.SummaryWriter(str(Path(config.output_dir) / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int, completions: Sequence[dict[str, Any]]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if completions:
            self.writer.add_text("completions", _markdown(completions[:TEXT_ROWS]), step)

    def finish(self) -> None:
        self.writer.close()


_TRACKERS = {
    "trackio": ("trackio", partial(_Wandb, by_id=False)),
    "wandb": ("wandb", partial(_Wandb, by_id=True)),
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
}


def find_trackers(config: TrainConfig) -> dict[str, Any]:
    """The modules of ``report_to`` by name; nothing is written yet.

    Raises:
        UserError: an unknown name, or one that is not installed.
    """
    found = {}
    for name in split_names(config.report_to):
        if name == "none":
            continue
        if name not in _TRACKERS:
            guess = did_you_mean(name, _TRACKERS)
            raise UserError(f"report_to {name!r} is unknown; valid: {', '.join(_TRACKERS)}, none{guess}")
        try:
            found[name] = import_module(_TRACKERS[name][0])
        except ImportError:
            raise UserError(f"report_to {name}: it is not installed; pip install 'nrt-fast[trackers]'") from None
    return found


class Trackers:
    """Those of one run, started. One that fails is told, and left out from then on.

    Args:
        config: resolved.
        say: tells of a failure.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]):
        self._say, self._running = say, {}
        modules = find_trackers(config)
        run_name = _run_name(Path(config.output_dir)) if modules else ""
        for name, module in modules.items():
            self._try(name, partial(self._start, name, module, config, run_name))

    def __bool__(self) -> bool:
        return bool(self._running)

    def log(self, metrics: dict[str, float], step: int, completions: Sequence[dict[str, Any]] = ()) -> None:
        """A step's metrics, and its traces with what they earned where there are some."""
        for name, tracker in list(self._running.items()):
            self._try(name, partial(tracker.log, metrics, step, completions))

    def finish(self) -> None:
        """Close all; what was logged is handed over."""
        for name, tracker in list(self._running.items()):
            self._try(name, tracker.finish)

    def _start(self, name: str, module, config: TrainConfig, run_name: str) -> None:
        self._running[name] = _TRACKERS[name][1](module, config, run_name)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of the network, a disk, a login: each tracker has classes of its own
            self._running.pop(name, None)
            self._say(f"{name} failed and is left out from here on, metrics.jsonl has everything: {error!r}")


def _run_name(output_dir: Path) -> str:
    """The folder's name with a few random letters, the same whenever the run goes on."""
    path = output_dir / "tracker_run.json"
    if not path.exists():
        replace_file(path, json.dumps({"name": f"{output_dir.name}-{secrets.token_hex(3)}"}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))["name"]


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table; each row's text on one line."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")
