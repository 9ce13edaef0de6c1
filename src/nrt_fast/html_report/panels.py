"""Which metrics are drawn, in which charts, and how to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nrt_fast.health import ALARMS
from nrt_fast.html_report.charts import Chart, Line, smooth, thinned
from nrt_fast.html_report.read import RunRecord
from nrt_fast.html_report.verdict import MARGIN

SHORT, LONG = 5, 50  # steps of a moving mean
HELD_OUT = {"all tokens": "gain", "hard tokens": "hard_token_gain"}
ACCURACY = {"with a trace": "accuracy", "without a trace": "accuracy_no_trace"}


@dataclass(frozen=True)
class Panel:
    """A chart of training metrics: by label, their names in metrics.jsonl."""

    title: str
    text: str
    unit: str
    metrics: dict[str, str]
    scale: Literal["linear", "log", "share"] = "linear"


REWARD = Panel("Reward", "What the sampled traces earn; it should rise.", "reward", {"reward": "reward"})
PANELS = {
    "What are the traces like?": [
        Panel(
            "Trace length", "A fall to a few tokens is the known collapse.", "tokens",
            {"mean length": "completions/mean_length"},
        ),
        Panel(
            "Traces that reach the delimiter", "The others are cut at the limit, or end in an EOS.", "share of traces",
            {"delimiter rate": "nrt/delimiter_rate"}, "share",
        ),
        Panel(
            "Repetition and copying", "4-grams that stood in the trace before; the answer's 3-grams said in the trace.",
            "share", {"repeated": "nrt/repetition", "of the answer": "nrt/answer_overlap"}, "share",
        ),
    ],
    "What is there to learn?": [
        Panel(
            "log p of the reference answer",
            "Training prompts. The lines should part: if both rise together, answers are memorised.",
            "nats a token", {"with a trace": "nrt/answer_logp", "without a trace": "nrt/logp_no_trace"},
        ),
        Panel(
            "Groups without a signal",
            "All traces of a prompt earn the same, and teach nothing. At 100% training stands still, or is done.",
            "share of groups", {"no signal": "nrt/frac_no_signal"}, "share",
        ),
        Panel(
            "Entropy", "Of trace tokens. It falls as habits form; near 0 without a gain, nothing is explored any more.",
            "nats a token", {"entropy": "entropy"},
        ),
    ],
    "What moves the weights?": [
        Panel(
            "Gradient of the terms", "The answer's should not be far above the trace's: it would learn answers only.",
            "norm by the chosen tokens' logits", {"trace": "nrt/grad_trace", "answer": "nrt/grad_answer"}, "log",
        ),
        Panel(
            "Terms of the loss", "The answer's falls as answers become likely; the trace's level means little.", "loss",
            {"trace": "loss/trace", "answer": "loss/answer", "delimiter": "loss/format", "KL": "loss/kl",
             "entropy": "loss/entropy"},
        ),
        Panel("Gradient norm", "Of all weights, before clipping.", "norm", {"gradient norm": "grad_norm"}),
    ],
    "Does the machine work?": [
        Panel(
            "Sampler against trainer", "Difference of their log-probabilities of the same trace tokens: rounding only.",
            "nats a token", {"mean |Δ log p|": "nrt/dlogp_mean", "largest": "nrt/dlogp_max"}, "log",
        ),
        Panel("Learning rate", "After warm-up and schedule.", "per step", {"learning rate": "learning_rate"}),
        Panel(
            "Speed", "Tokens trained on, over the time of sampling, scoring and training.", "tokens a second",
            {"tokens a second": "perf/tokens_per_second"},
        ),
    ],
}  # fmt: skip


def window_of(runs: list[RunRecord]) -> int:
    """Steps of the moving means: a twentieth of the longest run."""
    return min(LONG, max(SHORT, max(len(run.rows) for run in runs) // 20))


def charts_of(runs: list[RunRecord]) -> dict[str, list[Chart]]:
    """The charts by their heading; one that no run has metrics for is left out."""
    window = window_of(runs)
    groups = {
        "Does thinking help?": [
            _chart(REWARD, runs, window),
            _held_out(
                runs, "Held-out gain of thinking", "What a trace adds to log p of reference answers never trained on.",
                "nats a token", HELD_OUT, "linear",
            ),
            _held_out(
                runs, "Held-out answers that are right", "Greedy answers equal to the reference, id by id.",
                "share of items", ACCURACY, "share",
            ),
        ]
    }  # fmt: skip
    groups |= {title: [_chart(panel, runs, window) for panel in panels] for title, panels in PANELS.items()}
    return {title: kept for title, charts in groups.items() if (kept := [chart for chart in charts if chart.lines])}


def _chart(panel: Panel, runs: list[RunRecord], window: int) -> Chart:
    lines = []
    for number, run in enumerate(runs):
        for index, (label, name) in enumerate(panel.metrics.items()):
            rows = [row for row in run.rows if name in row]
            x, y = [row["step"] for row in rows], [row[name] for row in rows]
            if not rows or (len(panel.metrics) > 1 and not any(y)):
                continue  # a term that the objective does not have
            style = _style(number, index, len(runs)) | {"label": _label(run, label, panel.metrics, runs)}
            if panel.metrics == {"learning rate": "learning_rate"}:
                lines.append(Line(**style, **dict(zip("xy", thinned(x, y), strict=True))))
            else:
                lines.append(smooth(x, y, window, log=panel.scale == "log", **style))
    return Chart(panel.title, panel.text, panel.unit, lines, panel.scale, _shaded(panel, runs))


def _held_out(
    runs: list[RunRecord], title: str, text: str, unit: str, metrics: dict[str, str], scale: Literal["linear", "share"]
) -> Chart:
    """Measurements of the first held-out items along the run, and of all of them before and after it."""
    lines, partial = [], ""
    for number, run in enumerate(runs):
        measured = [(row["step"], row) for row in run.rows if "eval/gain" in row and row["step"] != run.steps]
        if run.after == {} and "eval/gain" in run.rows[-1]:
            measured.append((run.steps, run.rows[-1]))
        means = [(step, {k.removeprefix("eval/"): v for k, v in row.items()}) for step, row in measured]
        if means and run.before and means[0][1]["num_items"] != run.before["num_items"]:
            partial = f" Between the ends, only the first {means[0][1]['num_items']:,} items are measured."
        means = [(0, run.before)] * bool(run.before) + means + [(run.steps, run.after)] * bool(run.after)
        for index, (label, name) in enumerate(metrics.items()):
            if not means or (scale == "share" and not any(m[name] for _, m in means)):
                continue
            x, y = [step for step, _ in means], [m[name] for _, m in means]
            errors = [MARGIN * _error(m, name) for _, m in means]
            low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
            style = _style(number, index, len(runs)) | {"label": _label(run, label, metrics, runs), "marks": True}
            lines.append(Line(x=x, y=y, low=low, high=high, **style))
    return Chart(title, text + partial, unit, lines, scale)


def _error(means: dict[str, float], name: str) -> float:
    """Standard error of a mean over items; of a share, the binomial's."""
    if f"{name}_error" in means:
        return means[f"{name}_error"]
    return math.sqrt(means[name] * (1 - means[name]) / means["num_items"])


def _style(run: int, metric: int, num_runs: int) -> dict[str, int]:
    """One run: a colour for each metric. Several: a colour for each run, a dash for each metric."""
    return {"color": metric, "dash": 0} if num_runs == 1 else {"color": run, "dash": metric}


def _label(run: RunRecord, label: str, metrics: dict[str, str], runs: list[RunRecord]) -> str:
    if len(runs) == 1:
        return label
    return run.name if len(metrics) == 1 else f"{run.name}, {label}"


def _shaded(panel: Panel, runs: list[RunRecord]) -> list[tuple[float, float]]:
    """Steps at which an alarm that reads one of the panel's metrics was raised; of a single run."""
    spans: list[tuple[float, float]] = []
    names = {f"health/{name}" for name, alarm in ALARMS.items() if set(alarm.reads) & set(panel.metrics.values())}
    for row in runs[0].rows if len(runs) == 1 else []:
        if not names & row.keys():
            continue
        step = row["step"]
        if spans and spans[-1][1] == step - 1:
            spans[-1] = spans[-1][0], step
        else:
            spans.append((step, step))
    return spans
