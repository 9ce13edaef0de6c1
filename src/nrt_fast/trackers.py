"""Experiment trackers, each behind ``log(metrics, step)`` and ``finish()``; imported only where asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

from nrt_fast.config import TrainConfig, split_names
from nrt_fast.types import UserError

PROJECT = "nrt-fast"


class _Wandb:
    """wandb, and trackio, which has its interface."""

    def __init__(self, module, config: TrainConfig):
        self.module = module
        module.init(project=PROJECT, name=Path(config.output_dir).name, config=asdict(config))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.module.log(metrics, step=step)

    def finish(self) -> None:
        self.module.finish()


class _TensorBoard:
    def __init__(self, module, config: TrainConfig):
        self.writer = module.SummaryWriter(str(Path(config.output_dir) / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


_TRACKERS = {
    "trackio": ("trackio", _Wandb),
    "wandb": ("wandb", _Wandb),
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
}


def find_trackers(config: TrainConfig) -> list[Callable[[TrainConfig], _Wandb | _TensorBoard]]:
    """What starts each tracker of ``report_to``; nothing is written yet.

    Raises:
        UserError: an unknown name, or one that is not installed.
    """
    found = []
    for name in split_names(config.report_to):
        if name == "none":
            continue
        if name not in _TRACKERS:
            raise UserError(f"report_to {name!r} is unknown; valid: {', '.join(_TRACKERS)}, none")
        module, tracker = _TRACKERS[name]
        try:
            found.append(partial(tracker, import_module(module)))
        except ImportError:
            raise UserError(f"report_to {name}: it is not installed; pip install 'nrt-fast[trackers]'") from None
    return found
