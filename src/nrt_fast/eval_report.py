"""What held-out items say in figures, each with its standard error over items: a table, one line, lm-eval's JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table

from nrt_fast.evaluate import Estimate, clustered_mean
from nrt_fast.grading import Grade, maj_at, pass_at
from nrt_fast.score_report import MIN_ITEMS, Scored, summarise

LM_EVAL_NAMES = {"exact": "exact_match", "normalised": "exact_match_normalised", "math": "math_verify"}
HIGHER_IS_BETTER = {"gain": True, "hard_gain": True, "helped": True, "trace_length": None, "delimiter_rate": None}


class Graded(NamedTuple):
    """One item by one metric: the answers after its traces, and whether that after the empty one is right."""

    after_traces: Grade
    no_trace: bool


@dataclass(frozen=True)
class Accuracy:
    """Shares of answers that are right by one metric.

    Attributes:
        with_trace, no_trace: greedy answers after the traces, and after the empty one.
        difference: of the two, paired by item.
        maj, pass_: by k: the most frequent of k answers is right; one of k answers is. Empty with one trace an item.
    """

    with_trace: Estimate
    no_trace: Estimate
    difference: Estimate
    maj: dict[int, Estimate]
    pass_: dict[int, Estimate]


@dataclass(frozen=True)
class EvalSummary:
    """An evaluation in figures.

    Attributes:
        num_items, num_traces: evaluated.
        gain: nats per answer token, log c - log b.
        hard_gain: the same over hard tokens, as in ``score_report.Summary``.
        helped: share of traces that raise the likelihood of their answer.
        trace_length: tokens, without the delimiter.
        delimiter_rate: share of traces that end with it.
        accuracy: by metric.
    """

    num_items: int
    num_traces: int
    gain: Estimate
    hard_gain: Estimate
    helped: Estimate
    trace_length: Estimate
    delimiter_rate: Estimate
    accuracy: dict[str, Accuracy]


def summarise_eval(scored: Scored, graded: dict[str, list[Graded]]) -> EvalSummary:
    """The figures of at least one item; gains are those of ``score``."""
    summary, traces = summarise(scored), scored.traces
    helped = [
        [float((log_c - log_b).sum() > 0) for log_c in group]
        for group, log_b in zip(scored.scores.logprobs, scored.scores.baseline_logprobs, strict=True)
    ]
    return EvalSummary(
        num_items=summary.num_items,
        num_traces=summary.num_traces,
        gain=summary.gain,
        hard_gain=summary.hard_gain,
        helped=_over_items(helped),
        trace_length=_over_items([[float(len(ids)) for ids in group] for group in traces.trace_ids]),
        delimiter_rate=_over_items([[float(end is not None) for end in g] for g in traces.delimiter_logprobs]),
        accuracy={metric: _accuracy(items) for metric, items in graded.items()},
    )


def _accuracy(items: list[Graded]) -> Accuracy:
    G = len(items[0].after_traces.right)
    ks = sorted({*(2**n for n in range(G.bit_length())), G}) if G > 1 else []
    shares = [sum(item.after_traces.right) / G for item in items]
    return Accuracy(
        with_trace=_over_items([[share] for share in shares]),
        no_trace=_over_items([[float(item.no_trace)] for item in items]),
        difference=_over_items([[share - item.no_trace] for share, item in zip(shares, items, strict=True)]),
        maj={k: _over_items([[maj_at(item.after_traces, k)] for item in items]) for k in ks},
        pass_={k: _over_items([[pass_at(G, sum(item.after_traces.right), k)] for item in items]) for k in ks},
    )


def _over_items(values: list[list[float]]) -> Estimate:
    return clustered_mean([torch.tensor(item, dtype=torch.float64) for item in values])


def tables(summary: EvalSummary) -> list[Table]:
    """The figures for people."""
    title = f"{summary.num_items:,} items, {summary.num_traces:,} traces (± standard error over items)"
    figures = Table(title=title, title_justify="left", show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, estimate, form in (
        ("gain of thinking, nats a token", summary.gain, "+.4f"),
        ("the same on hard tokens", summary.hard_gain, "+.4f"),
        ("traces that help", summary.helped, ".1%"),
        ("trace length, tokens", summary.trace_length, ".1f"),
        ("traces closed by the delimiter", summary.delimiter_rate, ".1%"),
    ):
        figures.add_row(name, _with_error(estimate, form))
    columns = ("with a trace", "without a trace", "difference, points")
    accuracy = _table("Accuracy of greedy answers", ("metric", *columns))
    for metric, row in summary.accuracy.items():
        points = Estimate(100 * row.difference.mean, 100 * row.difference.error)
        cells = ((row.with_trace, ".1%"), (row.no_trace, ".1%"), (points, "+.1f"))
        accuracy.add_row(metric, *(_with_error(*cell) for cell in cells))
    if summary.num_traces == summary.num_items:
        return [figures, accuracy]
    names = [f"{metric} {kind}" for metric in summary.accuracy for kind in ("maj@k", "pass@k")]
    several = _table("Of k traces: their majority is right, one of them is", ("k", *names))
    for k in next(iter(summary.accuracy.values())).maj:
        cells = (column[k] for row in summary.accuracy.values() for column in (row.maj, row.pass_))
        several.add_row(str(k), *(_with_error(cell, ".1%") for cell in cells))
    return [figures, accuracy, several]


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _with_error(estimate: Estimate, form: str) -> str:
    return f"{estimate.mean:{form}} ± {estimate.error:{form.removeprefix('+')}}"


def verdict(summary: EvalSummary) -> str:
    """Whether answers after thinking are right more often on these items, in words; the margin is twice the error."""
    if summary.num_items < MIN_ITEMS:
        return f"{summary.num_items} items are too few to tell whether thinking helps; evaluate at least {MIN_ITEMS}."
    metric, row = next(iter(summary.accuracy.items()))
    change, margin = 100 * row.difference.mean, 200 * row.difference.error
    size = f"{row.no_trace.mean:.1%} to {row.with_trace.mean:.1%}, {change:+.1f} ± {margin:.1f} points, 95%"
    if abs(change) <= margin:
        told = "These items do not tell whether thinking makes more answers right"
    else:
        told = f"On these items thinking makes {'more' if change > 0 else 'fewer'} answers right"
    gain = f"{summary.gain.mean:+.3f} ± {2 * summary.gain.error:.3f}"
    return f"{told} ({metric}: {size}); the reference answers' log-probabilities change by {gain} nats a token."


def task_metrics(summary: EvalSummary) -> dict[str, float | str]:
    """The figures as lm-eval names them: "metric,filter" and "metric_stderr,filter"; N/A where there is none."""
    estimates = {(name, "none"): getattr(summary, name) for name in HIGHER_IS_BETTER}
    for metric, row in summary.accuracy.items():
        name = LM_EVAL_NAMES[metric]
        estimates |= {(name, "none"): row.with_trace, (name, "no-trace"): row.no_trace}
        estimates |= {(name, "difference"): row.difference}
        estimates |= {(name, f"maj@{k}"): estimate for k, estimate in row.maj.items()}
        estimates |= {(name, f"pass@{k}"): estimate for k, estimate in row.pass_.items()}
    figures = {}
    for (name, how), estimate in estimates.items():
        figures |= {f"{name},{how}": _json(estimate.mean), f"{name}_stderr,{how}": _json(estimate.error)}
    return figures


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else "N/A"


def results(task: str, summary: EvalSummary, num_original: int, about: dict[str, Any]) -> dict[str, Any]:
    """results.json: what lm-eval writes, of one task.

    Args:
        num_original: items that there were to evaluate.
        about: "config" and what else describes the run.
    """
    names = [LM_EVAL_NAMES[metric] for metric in summary.accuracy]
    metrics = HIGHER_IS_BETTER | dict.fromkeys(names, True)
    generation = about["config"]["gen_kwargs"]
    return {
        "results": {task: {"name": task, "alias": task, "sample_len": summary.num_items, **task_metrics(summary)}},
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "dataset_path": about["config"]["nrt_fast"]["dataset_name"],
                "output_type": "generate_until",
                "repeats": summary.num_traces // summary.num_items,
                "num_fewshot": 0,
                "metric_list": [{"metric": name, "aggregation": "mean"} for name in metrics],
                "generation_kwargs": generation,
            }
        },
        "versions": {task: about["nrt_fast_version"]},
        "n-shot": {task: 0},
        "higher_is_better": {task: metrics},
        "n-samples": {task: {"original": num_original, "effective": summary.num_items}},
        **about,
    }
