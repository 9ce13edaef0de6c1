"""What a run's folder says: its metrics, and its summary where it is finished, else its newest checkpoint's state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nrt_fast.health import ALARMS, Health
from nrt_fast.metrics import read_metrics
from nrt_fast.types import Sample, UserError

MEANS = {
    "num_items", "gain", "gain_error", "hard_token_gain", "hard_token_gain_error", "accuracy", "accuracy_no_trace",
    "trace_length", "delimiter_rate",
}  # fmt: skip

CONFIG = {"objective", "model_name_or_path", "dataset_name"}


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: of its folder.
        rows: of metrics.jsonl, one for each step.
        finished: whether all its steps are done and summary.json is theirs.
        config: resolved; of a run without a checkpoint, the fields that decide its result.
        given: the fields that its user set; None where there is no checkpoint yet.
        before, after: held-out means; empty where they are not known or nothing was held out.
        samples: held-out items (before, after).
        health: what was ever raised, as in summary.json.
        versions, tokens_per_second, peak_memory_gib: of a finished run.
    """

    name: str
    rows: list[dict[str, Any]]
    finished: bool
    config: dict[str, Any]
    given: dict[str, Any] | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    health: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.rows[-1]["step"]

    @property
    def raised(self) -> list[str]:
        """The alarms that its last step still raises."""
        return [name for name in ALARMS if f"health/{name}" in self.rows[-1]]

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of all steps by phase; "other" is measuring held-out items, and what lies between the phases."""
        phases: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith("perf/") and name.endswith("_s"):
                    phase = name.removeprefix("perf/").removesuffix("_s")
                    phases[phase] = phases.get(phase, 0.0) + value
        total = sum(row.get("step_time", 0.0) for row in self.rows)
        return phases | {"other": max(0.0, total - sum(phases.values()))}


def read_run(path: str) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: it is no run's folder, has no step yet, or one of its files is damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{path} holds no run: there is no metrics.jsonl in it; the output_dir of a run is expected")
    rows = _read_rows(folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path} has no step yet: metrics.jsonl has no whole line")
    name = folder.resolve().name
    try:
        if (folder / "summary.json").exists():
            summary = _read_object(folder / "summary.json")
            if summary["steps"] == rows[-1]["step"]:
                return _finished(name, rows, summary, _read_object(folder / "samples.json"))
        state = _newest_state(folder)
        return _unfinished(name, rows, _read_object(folder / "run.json"), state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as expected ({error!r}); was it written by another nrt-fast?") from error


def _finished(name: str, rows: list[dict], summary: dict[str, Any], samples: dict[str, list]) -> RunRecord:
    _check_means(summary["before"], summary["after"])
    _check_names(summary["health"].keys(), ALARMS)
    _check_names(CONFIG, summary["config"])
    taken = ("config", "given", "before", "after", "health", "versions", "tokens_per_second", "peak_memory_gib")
    both = _samples(samples["before"]), _samples(samples["after"])
    return RunRecord(name, rows, True, samples=both, **{key: summary[key] for key in taken})


def _unfinished(name: str, rows: list[dict], identity: dict[str, Any], state: dict[str, Any] | None) -> RunRecord:
    health = Health(identity["dtype"], [dict(row) for row in rows]).raised
    if state is None:
        _check_names(CONFIG, identity)
        return RunRecord(name, rows, False, identity, health=health)
    progress = state["progress"]
    _check_means(progress["before"])
    _check_names(CONFIG, state["config"])
    return RunRecord(
        name, rows, False, state["config"], state["given"], before=progress["before"],
        samples=(_samples(progress["samples"]), []), health=health,
    )  # fmt: skip


def _check_means(*measured: dict[str, float]) -> None:
    for means in measured:
        if means:
            _check_names(MEANS, means)


def _check_names(names: Iterable[str], known: Iterable[str]) -> None:
    if missing := set(names) - set(known):
        raise KeyError(min(missing))


def _samples(items: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(**item) for item in items]


def _newest_state(folder: Path) -> dict[str, Any] | None:
    """State of the checkpoint with the highest step. Its weights are nothing to a report, so no hash is computed."""
    found = [
        (int(match[1]), path / "trainer_state.json")
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    ]
    return _read_object(max(found)[1]) if found else None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    for number, row in enumerate(rows, 1):
        if wrong := [name for name, value in row.items() if not isinstance(value, (int, float))]:
            raise UserError(f"{path}, line {number}: {wrong[0]} is {row[wrong[0]]!r}; a number is expected")
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
