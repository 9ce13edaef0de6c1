"""Alarms: the known ways in which training on likelihood rewards fails, told while the run goes on.

Each compares the mean of the last WINDOW steps with that of the run's first WINDOW, or with a bound that no healthy run
reaches (docs/health.md has the table). Nothing is judged before WINDOW steps. What is raised depends on the rows of
metrics.jsonl alone, so a resumed run reads them again and tells what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

WINDOW = 8  # steps
SHORTER = 0.5  # of the first traces' length; arXiv 2602.03979 saw traces shrink to 5-17 tokens
LESS_ENTROPY = 0.1  # of the first; entropy falls in every run that learns, hence the look at the gain
REPEATED = 0.3  # share of a trace's 4-grams that stood in it before; prose has a few percent
FEW_DELIMITERS = 0.2
COPIED = 0.5  # share of the traces that hold all of a long answer
SWAMPED = 30.0  # gradient of the answer term over that of the trace term
NO_SIGNAL = 0.95  # share of the groups; a solved task reaches 0.8 and still learns
SIGNIFICANT = 3.0  # standard errors of a difference
DRIFT = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}  # nats; bf16 engines report 0.01-0.02, stale weights 0.2


class Window:
    """Means and standard errors of some steps' metrics, by name.

    Args:
        rows: of consecutive steps; a metric that one of them lacks is not there.
    """

    def __init__(self, rows: list[dict[str, Any]]):
        self._rows = rows

    def __contains__(self, name: str) -> bool:
        return all(name in row for row in self._rows)

    def __getitem__(self, name: str) -> float:
        return fmean(row[name] for row in self._rows)

    def stderr(self, name: str) -> float:
        return stdev(row[name] for row in self._rows) / math.sqrt(len(self._rows))


@dataclass(frozen=True)
class Alarm:
    """One failure.

    Attributes:
        reads: the metrics it needs; silent where there are none.
        finds: of the first and the last window and the run's dtype: what happened, with its figures; None: all is well.
        advice: what to change.
    """

    reads: tuple[str, ...]
    finds: Callable[[Window, Window, str], str | None]
    advice: str


def _falls(first: Window, now: Window, name: str) -> bool:
    """Whether the metric is lower than it was by more than noise."""
    return now[name] < first[name] - SIGNIFICANT * math.hypot(first.stderr(name), now.stderr(name))


def _rises(first: Window, now: Window, name: str) -> bool:
    return now[name] > first[name] + SIGNIFICANT * math.hypot(first.stderr(name), now.stderr(name))


def _length_collapse(first: Window, now: Window, dtype: str) -> str | None:
    was, length = first[LENGTH], now[LENGTH]
    if length >= SHORTER * was:
        return None
    return f"traces shrank from {was:.1f} to {length:.1f} tokens, gain {first[GAIN]:.3f} to {now[GAIN]:.3f}"


def _entropy_collapse(first: Window, now: Window, dtype: str) -> str | None:
    was, entropy = first[ENTROPY], now[ENTROPY]
    if entropy >= LESS_ENTROPY * was or _rises(first, now, GAIN):
        return None
    return f"trace entropy fell from {was:.3f} to {entropy:.3f} nats a token, and the gain did not rise"


def _repetition(first: Window, now: Window, dtype: str) -> str | None:
    if now[REPETITION] <= REPEATED:
        return None
    return f"{now[REPETITION]:.0%} of the traces' 4-grams are repeated"


def _no_delimiter(first: Window, now: Window, dtype: str) -> str | None:
    if now[DELIMITERS] >= FEW_DELIMITERS:
        return None
    return f"{now[DELIMITERS]:.0%} of the traces reach the delimiter, {first[DELIMITERS]:.0%} at first"


def _answer_copied(first: Window, now: Window, dtype: str) -> str | None:
    if now[COPIES] <= COPIED:
        return None
    return f"{now[COPIES]:.0%} of the traces hold the whole reference answer, {first[COPIES]:.0%} at first"


def _answer_swamps_trace(first: Window, now: Window, dtype: str) -> str | None:
    trace, answer = now[TRACE_GRADIENT], now[ANSWER_GRADIENT]
    if not trace or answer <= SWAMPED * trace:
        return None
    return f"the answer term's gradient is {answer / trace:.0f} times the trace term's"


def _no_signal(first: Window, now: Window, dtype: str) -> str | None:
    if now[SILENT] <= NO_SIGNAL:
        return None
    return f"{now[SILENT]:.0%} of the groups have no signal: all traces of a prompt earn the same"


def _gain_falls(first: Window, now: Window, dtype: str) -> str | None:
    if not (_falls(first, now, GAIN) and _rises(first, now, BASELINE)):
        return None
    return (
        f"gain fell from {first[GAIN]:.3f} to {now[GAIN]:.3f} nats a token while log p(answer) without a trace rose "
        f"from {first[BASELINE]:.3f} to {now[BASELINE]:.3f}: answers are memorised, not reasoned"
    )


def _drift(first: Window, now: Window, dtype: str) -> str | None:
    if now[DIFFERENCE] <= DRIFT[dtype]:
        return None
    return f"sampler and trainer differ by {now[DIFFERENCE]:.2g} nats a token; {DRIFT[dtype]:g} is much in {dtype}"


LENGTH, ENTROPY, GAIN, BASELINE = "completions/mean_length", "entropy", "nrt/gain", "nrt/logp_no_trace"
REPETITION, DELIMITERS, COPIES = "nrt/repetition", "nrt/delimiter_rate", "nrt/answer_copied"
TRACE_GRADIENT, ANSWER_GRADIENT = "nrt/grad_trace", "nrt/grad_answer"
SILENT, DIFFERENCE = "nrt/frac_no_signal", "nrt/dlogp_mean"

ALARMS = {
    "length_collapse": Alarm(
        (LENGTH, GAIN), _length_collapse,
        "weigh hard tokens (objective nrt-ws), lower answer_coef or learning_rate, raise entropy_coef",
    ),
    "entropy_collapse": Alarm(
        (ENTROPY, GAIN), _entropy_collapse, "lower learning_rate, raise temperature, entropy_coef or num_generations"
    ),
    "repetition": Alarm(
        (REPETITION,), _repetition, "cut loops with max_repeated_tokens, lower max_trace_length, raise temperature"
    ),
    "no_delimiter": Alarm(
        (DELIMITERS,), _no_delimiter, "raise max_trace_length or format_coef; start from a model that ends its traces"
    ),
    "answer_copied": Alarm(
        (COPIES,), _answer_copied,
        "see that the prompt does not hold the answer; lower max_trace_length; weigh hard tokens (objective nrt-ws)",
    ),
    "answer_swamps_trace": Alarm(
        (TRACE_GRADIENT, ANSWER_GRADIENT), _answer_swamps_trace,
        "lower answer_coef; answer_weight derived leaves easy tokens out",
    ),
    "no_signal": Alarm(
        (SILENT,), _no_signal,
        "raise num_generations or temperature, lower std_floor; or stop: the task may be solved",
    ),
    "gain_falls": Alarm(
        (GAIN, BASELINE), _gain_falls, "lower answer_coef or the epochs"
    ),
    "drift": Alarm(
        (DIFFERENCE,), _drift, "set dtype to float32 to see whether it is rounding; else please report it"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """An alarm that was raised or ended at a step."""

    name: str
    raised: bool
    message: str

    def __str__(self) -> str:
        if not self.raised:
            return f"health: {self.name} is over: {self.message}"
        return f"health: {self.name}: {self.message}; {ALARMS[self.name].advice}"


class Health:
    """The alarms of one run.

    Args:
        dtype: of the weights.
        rows: of the steps so far.

    Attributes:
        raised: of every alarm that was ever raised: first_step, last_step, message (of its latest step).
    """

    def __init__(self, dtype: str, rows: Iterable[dict[str, Any]] = ()):
        self._dtype, self._first, self._last = dtype, [], []
        self._now: set[str] = set()
        self.raised: dict[str, dict[str, Any]] = {}
        for row in rows:
            self.step(row)

    def step(self, row: dict[str, Any]) -> list[Change]:
        """Judge one more step; what changed by it. ``row`` gets ``health/<name>`` of each alarm that is raised."""
        if len(self._first) < WINDOW:
            self._first.append(row)
        self._last = [*self._last, row][-WINDOW:]
        changes = []
        if len(self._last) == WINDOW:
            for name, alarm in ALARMS.items():
                changes += self._judge(name, alarm, row["step"])
        row |= {f"health/{name}": 1.0 for name in ALARMS if name in self._now}
        return changes

    def _judge(self, name: str, alarm: Alarm, step: int) -> list[Change]:
        first, now = Window(self._first), Window(self._last)
        readable = all(metric in window for metric in alarm.reads for window in (first, now))
        message = alarm.finds(first, now, self._dtype) if readable else None
        if message is None:
            if name not in self._now:
                return []
            self._now.remove(name)
            return [Change(name, False, f"after step {self.raised[name]['last_step']}")]
        since = self.raised.get(name, {"first_step": step})["first_step"]
        self.raised[name] = {"first_step": since, "last_step": step, "message": message}
        if name in self._now:
            return []
        self._now.add(name)
        return [Change(name, True, message)]
