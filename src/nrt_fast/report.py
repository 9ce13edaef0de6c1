"""What the user sees: a live panel on a terminal, plain lines elsewhere, and a before/after table at the end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nrt_fast import distributed
from nrt_fast.config import TrainConfig
from nrt_fast.data import show_example
from nrt_fast.health import ALARMS
from nrt_fast.trackers import Trackers
from nrt_fast.types import Sample

if TYPE_CHECKING:
    from nrt_fast.run import Run

COLUMNS = {
    "reward": "reward",
    "held-out gain": "eval/gain",
    "trace length": "completions/mean_length",
    "entropy": "entropy",
    "delimiter": "nrt/delimiter_rate",
    "no signal": "nrt/frac_no_signal",
    "tokens/s": "perf/tokens_per_second",
}
SPARK = "▁▂▃▄▅▆▇█"
NUM_SHOWN = 3


class Report:
    """Console and trackers of one run; a context manager. Of several ranks the first has them, the others say nothing.

    Args:
        config: resolved.
        told_steps: that the trackers know from before the run was stopped; they are computed again, with the same
            results, and not told again.
    """

    def __init__(self, config: TrainConfig, told_steps: int = 0):
        self.config, self.told_steps = config, told_steps
        self.console = Console(highlight=False, quiet=not distributed.is_first())
        told = config if distributed.is_first() else replace(config, report_to="none")
        self.trackers = Trackers(told, self.say)
        self.history: dict[str, list[float]] = {label: [] for label in COLUMNS}
        self.started, self.done = time.perf_counter(), 0
        self.bar = Progress(BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.task = self.bar.add_task("steps", total=config.max_steps)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exc) -> None:
        self.live.stop()
        self.trackers.finish()

    def start(self, run: Run, step: int = 0) -> None:
        """Say what was read, decided and chosen, and where a resumed run goes on; show one example's boundaries."""
        config, shape, objective = self.config, run.model.config, run.objective
        added = ", added" if run.delimiter.added else ""
        adapter = f", {run.model.trained.flat.numel():,} of its adapter's" if config.use_peft else ""
        for line in (
            *run.data.lines,
            f"model: {shape.model_type}, {run.model.weights.flat.numel():,} parameters{adapter}, {config.dtype} "
            f"on {config.device}; delimiter {run.delimiter.text} (id {run.delimiter.id}{added})",
            f"objective: {config.objective} (reward {objective.reward}, baseline {objective.baseline}, clip "
            f"{objective.reward_clip}, advantage {objective.advantage}, trace loss {objective.trace_loss}, "
            f"answer {objective.answer_coef:g} x {objective.answer_weight}, format {objective.format_coef:g})",
            f"limits: prompt {config.max_prompt_length}, trace {config.max_trace_length}, answer "
            f"{config.max_answer_length} tokens; {config.prompts_per_step} prompts x {config.num_generations} traces "
            f"a step",
            f"run: {config.max_steps} steps over {len(run.data.train):,} rows, {len(run.data.heldout):,} held out, "
            f"learning rate {config.learning_rate:g}, output in {config.output_dir}",
        ):
            self.say(line)
        if step:
            self.say(f"resumed: going on after step {step}")
        self.say(show_example(run.data.train[0], run.tokenizer, run.delimiter, config.max_trace_length))

    def step(self, row: dict[str, Any], completions: Callable[[], Sequence[dict[str, Any]]] = tuple) -> None:
        """Show one step every ``logging_steps``; hand it to the trackers, with its traces where they were kept."""
        if self.trackers and row["step"] > self.told_steps:
            self.trackers.log({key: value for key, value in row.items() if key != "step"}, row["step"], completions())
        for label, name in COLUMNS.items():
            if name in row:
                self.history[label].append(row[name])
        self.done += 1
        self.bar.update(self.task, completed=row["step"])
        if row["step"] % self.config.logging_steps and row["step"] != self.config.max_steps:
            return
        if self.console.is_terminal:
            self.live.start()
            self.live.update(self._panel(), refresh=True)
        else:
            self.say(self._line(row))

    def say(self, text: str | Text) -> None:
        """Print one line of text."""
        # Text of data and models is shown as it is: no markup, no breaks that were not there.
        self.console.print(text, markup=False, soft_wrap=True)

    def _line(self, row: dict[str, Any]) -> str:
        figures = "  ".join(f"{label} {row[name]:.4g}" for label, name in COLUMNS.items() if name in row)
        pace = (time.perf_counter() - self.started) / self.done
        eta = pace * (self.config.max_steps - row["step"])
        return f"step {row['step']}/{self.config.max_steps}  {figures}  eta {eta:.0f}s"

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for label, values in self.history.items():
            if values:
                table.add_row(label, f"{values[-1]:.4g}", Text(_spark(values), "cyan"))
        return Panel(Group(table, self.bar), title=f"nrt-fast: {self.config.objective}", title_align="left")

    def stopped(self, step: int, stopped_on: list[str]) -> None:
        """Say that the run was stopped, by which alarms if by any, and saved."""
        self.live.stop()
        why = f" on {', '.join(stopped_on)}" if stopped_on else ""
        self.say(f"stopped{why} after step {step}, saved; the same command goes on from there")

    def finish(self, summary: dict[str, Any], before: list[Sample], after: list[Sample]) -> None:
        """The before/after table, and the same held-out items before and after."""
        self.live.stop()
        if summary["after"]:
            self.console.print(_summary_table(summary))
        for old, new in list(zip(before, after, strict=True))[:NUM_SHOWN]:
            self.say(Text.assemble("\n", (old.question, "bold"), f"   (reference: {old.reference})"))
            for label, sample in (("before", old), ("after", new)):
                self.say(Text.assemble(f"  {label:>6}: {sample.trace} ", ("|", "magenta"), f" {sample.answer}"))
        for name, alarm in summary["health"].items():
            steps = f"steps {alarm['first_step']} to {alarm['last_step']}"
            self.say(f"health: {name}, {steps}: {alarm['message']}; {ALARMS[name].advice}")
        self.say(
            f"\n{summary['steps']} steps, {summary['train_seconds']:.0f} s of training; model in "
            f"{self.config.output_dir}/final, figures in {self.config.output_dir}/summary.json; "
            f"nrt-fast report {shlex.quote(self.config.output_dir)} draws them"
        )


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"{summary['after']['num_items']:,} held-out items, traces sampled, answers greedy (± standard error)"
    )
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in summary["after"]:
        if name != "num_items" and not name.endswith("_error"):
            table.add_row(name.replace("_", " "), *(figure(summary[when], name) for when in ("before", "after")))
    return table


def figure(means: dict[str, float], name: str) -> str:
    """A mean, with its standard error where it has one."""
    error = means.get(f"{name}_error")
    return f"{means[name]:.3f}" if error is None else f"{means[name]:.3f} ± {error:.3f}"


def _spark(values: list[float], width: int = 48) -> str:
    """The last values as a row of bars."""
    values = values[-width:]
    low, high = min(values), max(values)
    return "".join(SPARK[int((v - low) / (high - low or 1.0) * (len(SPARK) - 1))] for v in values)
