"""The page: verdict, figures, charts, traces, time, configuration."""

from __future__ import annotations

import json
import shlex
from typing import Any

from nrt_fast.health import ALARMS
from nrt_fast.html_report.charts import draw
from nrt_fast.html_report.panels import charts_of, window_of
from nrt_fast.html_report.read import RunRecord
from nrt_fast.html_report.style import STYLE
from nrt_fast.html_report.text import NO_BREAK, shown
from nrt_fast.html_report.traces import samples_html
from nrt_fast.html_report.verdict import Verdict, gain, judge

MARK = "<!doctype html><!-- nrt-fast report -->"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TILES = {
    "gain": "held-out gain, nats a token", "hard_token_gain": "the same on hard tokens", "accuracy": "answers right",
    "accuracy_no_trace": "right without a trace", "trace_length": "trace length, tokens",
    "delimiter_rate": "traces that reach the delimiter",
}  # fmt: skip
SHARES = ("accuracy", "accuracy_no_trace", "delimiter_rate")


def render(runs: list[RunRecord]) -> str:
    """The whole page of one run, or of several in the same charts."""
    title = ", ".join(run.name for run in runs)
    verdicts = [judge(run) for run in runs]
    sections = {
        "verdict": ("", _one(runs[0], verdicts[0]) if len(runs) == 1 else _several(runs, verdicts)),
        "curves": ("Curves", _charts(runs)),
        "traces": ("Traces", _traces(runs)),
        "time": ("Time and memory", _time(runs)),
        "configuration": ("Configuration", "".join(_configuration(run, len(runs) > 1) for run in runs)),
    }
    links = "".join(f'<a href="#{key}">{name}</a>' for key, (name, _) in sections.items() if name)
    body = "".join(
        f'<section id="{key}">{f"<h2>{name}</h2>" if name else ""}{html}</section>'
        for key, (name, html) in sections.items()
    )
    return (
        f'{MARK}\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{shown(title)}: nrt-fast report</title><style>{STYLE}</style></head>"
        f'<body><header><p><b>nrt-fast</b> report</p><nav aria-label="sections">{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _one(run: RunRecord, verdict: Verdict) -> str:
    tiles = "".join(_tile(run, name, label) for name, label in TILES.items()) if run.after else ""
    return (
        f'<div class="verdict {verdict.level}"><p class="what">{_what(run)}</p><h1>{shown(verdict.headline)}</h1>'
        f"<p>{shown(verdict.text)}</p></div>{_alarms(run)}"
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
    )  # fmt: skip


def _several(runs: list[RunRecord], verdicts: list[Verdict]) -> str:
    keys = "".join(f'<li><i class="b{i}"></i>{shown(run.name)}</li>' for i, run in enumerate(runs))
    cards = "".join(
        f'<div class="verdict {verdict.level}"><p class="what"><i class="b{i}"></i>{_what(run)}</p>'
        f"<h3>{shown(verdict.headline)}</h3><p>{shown(verdict.text)}</p>{_alarms(run)}</div>"
        for i, (run, verdict) in enumerate(zip(runs, verdicts, strict=True))
    )
    return (
        f'<h1 class="runs">{len(runs)} runs</h1><ul class="legend runs">{keys}</ul><div class="cards">{cards}</div>'
        f"{_comparison(runs)}{_differences(runs)}"
    )


def _what(run: RunRecord) -> str:
    config = run.config
    data = config["dataset_name"] or "the built-in tasks"
    data = data if isinstance(data, str) else ", ".join(data)
    return shown(
        f"{run.name}: {config['model_name_or_path'] or 'the built-in model'} on {data}, objective "
        f"{config['objective']}, {run.steps:,} steps"
    )


def _alarms(run: RunRecord) -> str:
    if not run.health:
        return '<p class="quiet">No health alarm was raised.</p>'
    cards = "".join(
        f"<li><b>{shown(name)}</b> <span>steps {alarm['first_step']:,} to {alarm['last_step']:,}"
        f"{', raised at the end' if name in run.raised else ', over since'}</span>"
        f"<p>{shown(alarm['message'])}</p><p>What to change: {shown(ALARMS[name].advice)}</p></li>"
        for name, alarm in run.health.items()
    )
    return f'<ul class="alarms" aria-label="health alarms">{cards}</ul>'


def _tile(run: RunRecord, name: str, label: str) -> str:
    before, after = (_figure(means, name) for means in (run.before, run.after))
    value, _, margin = after.partition(NO_BREAK)
    small = f"<small>{NO_BREAK}{margin}</small>" if margin else ""
    return f"<div><dt>{label}</dt><dd><b>{value}{small}</b><span>before: {before}</span></dd></div>"


def _figure(means: dict[str, float], name: str) -> str:
    if name in SHARES:
        return f"{means[name]:.1%}"
    return gain(means, name) if f"{name}_error" in means else f"{means[name]:.1f}"


def _charts(runs: list[RunRecord]) -> str:
    parts, number = [], 0
    for title, charts in charts_of(runs).items():
        figures = ""
        for chart in charts:
            number += 1
            figures += draw(chart, number)
        parts.append(f'<h3 class="group">{title}</h3><div class="charts">{figures}</div>')
    window = window_of(runs)
    shaded = " A red ground: a health alarm that reads this metric was raised." if len(runs) == 1 else ""
    dashed = "" if len(runs) == 1 else " A colour is a run, a dash another metric of the same chart."
    return (
        f'<p class="note">Lines are means of the last {window} steps, bands their standard deviation, thin lines the '
        f"steps themselves; bands of held-out measurements are 95% margins over items.{shaded}{dashed} Point "
        f"at a chart, or touch it, to read its values.</p>{''.join(parts)}"
    )


def _traces(runs: list[RunRecord]) -> str:
    if len(runs) == 1:
        return samples_html(runs[0])
    return "".join(
        f"<details{' open' * (i == 0)}><summary>{shown(run.name)}</summary>{samples_html(run)}</details>"
        for i, run in enumerate(runs)
    )


def _time(runs: list[RunRecord]) -> str:
    phases = list(dict.fromkeys(phase for run in runs for phase in run.seconds))
    keys = "".join(f'<li><i class="b{i}"></i>{shown(phase)}</li>' for i, phase in enumerate(phases))
    rows, bars = [], ""
    for run in runs:
        seconds = run.seconds
        total = sum(seconds.values()) or 1.0
        parts = "".join(
            f'<i class="b{i}" style="flex:{seconds[phase] / total:.4f}"></i>'
            for i, phase in enumerate(phases)
            if seconds.get(phase)
        )
        name = f'<p class="label">{shown(run.name)}</p>' if len(runs) > 1 else ""
        bars += f'{name}<div class="bar" aria-hidden="true">{parts}</div>'
        speeds = run.tokens_per_second
        rows.append([
            run.name, *(f"{seconds.get(phase, 0):,.1f} s ({seconds.get(phase, 0) / total:.0%})" for phase in phases),
            f"{total:,.1f} s",
            ", ".join(f"{phase} {speed:,.0f}" for phase, speed in speeds.items()) or "known at the end",
            "known at the end" if run.peak_memory_gib is None else f"{run.peak_memory_gib:.2f} GiB",
        ])  # fmt: skip
    heads = ["run", *phases, "all steps", "tokens a second", "peak memory"]
    return (
        f'<ul class="legend runs">{keys}</ul>{bars}{_table(heads, rows, "figures")}<p class="note">Other: measuring '
        "held-out items along the run, and what lies between the phases. Peak memory: allocated on a GPU, resident on "
        "a CPU, of the process that finished the run.</p>"
    )


def _configuration(run: RunRecord, named: bool) -> str:
    title = f"<h3>{shown(run.name)}</h3>" if named else ""
    if run.given is None:
        given = '<p class="note">The command is known from the first checkpoint on.</p>'
    else:
        rows = [[name, _value(value)] for name, value in run.given.items()]
        table = (
            _table(["what was set", "value"], rows) if rows else "<p>Nothing was set: every field has its default.</p>"
        )
        given = f"{table}<p>The command that makes this run again:</p><pre>{shown(command(run.given))}</pre>"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    whole = _table(["field", "value"], [[name, _value(value)] for name, value in run.config.items()])
    return (
        f"{title}{given}<p>Versions: {shown(versions) or 'known when the run is finished'}.</p>"
        f"<details><summary>All fields, with what was derived</summary>{whole}</details>"
    )


def command(given: dict[str, Any]) -> str:
    """The command line of a run, quoted for a shell."""
    return " ".join(["nrt-fast train", *(f"--{name} {shlex.quote(_option(value))}" for name, value in given.items())])


def _option(value: Any) -> str:
    """A list with commas between its items, unless there are some in them."""
    if isinstance(value, list) and not any("," in str(item) for item in value):
        return ",".join(map(str, value))
    return _value(value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _comparison(runs: list[RunRecord]) -> str:
    rows = []
    for run in runs:
        both = [f"{_figure(run.before, n)} → {_figure(run.after, n)}" if run.after else "" for n in TILES]
        alarms = ", ".join(run.health) or "none"
        rows.append([run.name, f"{run.steps:,}{'' if run.finished else ' so far'}", *both, alarms])
    return _table(["run", "steps", *TILES.values(), "alarms"], rows, "figures")


def _differences(runs: list[RunRecord]) -> str:
    """The fields in which the runs' configurations differ."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.config)
        if name != "output_dir" and len({_field(run, name) for run in runs}) > 1
    ]
    if not names:
        return '<p class="note">Their configurations are the same.</p>'
    rows = [[run.name, *(_field(run, name) for name in names)] for run in runs]
    return f'<p class="label">where their configurations differ</p>{_table(["run", *names], rows)}'


def _field(run: RunRecord, name: str) -> str:
    return _value(run.config[name]) if name in run.config else "not known yet"


def _table(heads: list[str], rows: list[list[str]], kind: str = "words") -> str:
    head = "".join(f'<th scope="col">{shown(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{shown(row[0])}</th>{"".join(f"<td>{shown(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
