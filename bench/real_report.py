"""What the run on real data says: held-out figures with intervals over items, comparisons, samples, a picture."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from lab_plots import COLORS, pyplot
from lab_report import markdown, verdict

from nrt_fast.evaluate import Estimate, clustered_mean
from nrt_fast.metrics import mean

Point = dict
"""What real_data.measure returns."""
OBJECTIVES = ("nrt-ws", "sft")
MIN_ITEMS = 30  # of a source; fewer have no interval to speak of


def over_items(rows: Iterable[list[float]]) -> Estimate:
    """Mean over all tokens, with its standard error over items."""
    return clustered_mean([torch.tensor(row, dtype=torch.float64) for row in rows])


def difference(ours: list[list[float]], theirs: list[list[float]]) -> Estimate:
    """The same of a difference on the same tokens."""
    return over_items([a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True))


def marginal(point: Point) -> float:
    """Log-probability of answers under a mixture of the item's traces, nats a token."""
    return sum(point["log_marginal"]) / sum(map(len, point["log_b"]))


def shown(estimate: Estimate) -> str:
    """The mean and half of its 95% interval."""
    return f"{estimate.mean:+.3f} ± {1.96 * estimate.error:.3f}"


def chosen(records: list[dict], objective: str) -> list[dict]:
    """The runs of an objective, by seed."""
    return sorted((record for record in records if record["objective"] == objective), key=lambda r: r["seed"])


def at(record: dict, prompts: int) -> Point:
    """The measurement after so many prompts."""
    return record["points"][record["prompts"].index(prompts)]


def minutes_at(record: dict, prompts: int) -> float:
    """Time of training until then; every prompt counts alike."""
    return record["seconds"] / 60 * prompts / record["prompts"][-1]


def models(before: Point, records: list[dict]) -> list[tuple[str, str, str, Point]]:
    """(name, prompts, minutes, measurement) of every line of the table: nrt-ws at its end, sft there and at its own."""
    found = [("base", "-", "-", before)]
    equal = chosen(records, "nrt-ws")[0]["prompts"][-1]
    for objective in OBJECTIVES:
        for record in chosen(records, objective):
            last = record["prompts"][-1]
            for prompts in sorted({min(equal, last), last}):
                name, minutes = f"{objective}, seed {record['seed']}", f"{minutes_at(record, prompts):.1f}"
                found.append((name, f"{prompts:,}", minutes, at(record, prompts)))
    return found


HEAD = [
    "model", "prompts", "minutes", "log p, no trace", "log p, trace", "gain", "log p, mixture of traces",
    "trace length", "entropy", "closed",
]  # fmt: skip


def table(before: Point, records: list[dict]) -> str:
    """Held-out figures of every model."""
    rows = [HEAD]
    for name, prompts, minutes, point in models(before, records):
        log_b, log_c = over_items(point["log_b"]), over_items(point["log_c"])
        figures = f"{log_b.mean:.3f}", f"{log_c.mean:.3f}", shown(difference(point["log_c"], point["log_b"]))
        traces = f"{point['trace_length']:.1f}", f"{point['entropy']:.2f}", f"{point['delimiter_rate']:.0%}"
        rows.append([name, prompts, minutes, *figures, f"{marginal(point):.3f}", *traces])
    return markdown(rows)


def duels(before: Point, records: list[dict]) -> str:
    """Comparisons on the same items, seed by seed: a table."""
    pairs = list(zip(chosen(records, "nrt-ws"), chosen(records, "sft")))
    rows = [["nats a token", *(f"seed {ours['seed']}" for ours, _ in pairs)]]
    columns = [comparisons(before, ours, theirs) for ours, theirs in pairs]
    for name in columns[0]:
        told = (column[name] for column in columns)
        rows.append([name, *(f"{shown(d)}: {verdict((d.mean, 1.96 * d.error))}" for d in told)])
    return markdown(rows)


def comparisons(before: Point, ours: dict, theirs: dict) -> dict[str, Estimate]:
    """What of nrt-ws is compared with what, on the same tokens."""
    after, equal, last = ours["points"][-1], at(theirs, ours["prompts"][-1]), theirs["points"][-1]
    best = max(theirs["points"], key=lambda point: over_items(point["log_b"]).mean)
    return {
        "nrt-ws with traces, minus the base without": difference(after["log_c"], before["log_b"]),
        "nrt-ws without a trace, minus the base without": difference(after["log_b"], before["log_b"]),
        "nrt-ws with traces, minus sft after as many prompts": difference(after["log_c"], equal["log_b"]),
        "nrt-ws without a trace, minus sft after as many prompts": difference(after["log_b"], equal["log_b"]),
        "nrt-ws with traces, minus sft at its end": difference(after["log_c"], last["log_b"]),
        "nrt-ws with traces, minus sft at its best": difference(after["log_c"], best["log_b"]),
    }


def by_source(before: Point, records: list[dict]) -> str:
    """Gain of the base and of nrt-ws, and its distance to sft, source by source: a table of the first seed."""
    ours, theirs = chosen(records, "nrt-ws")[0], chosen(records, "sft")[0]
    after, sft = ours["points"][-1], at(theirs, ours["prompts"][-1])
    rows = [["source", "items", "gain before", "gain after", "nrt-ws with traces, minus sft"]]
    for source, num_items in sorted(Counter(before["source"]).items()):
        if num_items < MIN_ITEMS:
            continue

        def of(point: Point, name: str, source: str = source) -> list[list[float]]:
            return [row for row, its in zip(point[name], point["source"]) if its == source]

        gains = (shown(difference(of(point, "log_c"), of(point, "log_b"))) for point in (before, after))
        rows.append([source, str(num_items), *gains, shown(difference(of(after, "log_c"), of(sft, "log_b")))])
    return markdown(rows)


def samples(before: Point, records: list[dict]) -> str:
    """Held-out traces of the first seed, before and after."""
    parts = []
    for old, new in zip(before["samples"], chosen(records, "nrt-ws")[0]["points"][-1]["samples"]):
        lines = [f"{old['source']}: {old['question']}", f"reference: {old['answer']}"]
        for when, sample in (("before", old), (" after", new)):
            told = f"log b {sample['log_b']:.2f}, log c {sample['log_c']:.2f}"
            lines.append(f"   {when}: {sample['trace'] or '(nothing)'}  | {told}")
        parts.append("\n".join(lines))
    return "```\n" + "\n\n".join(parts) + "\n```"


def alarms(records: list[dict]) -> str:
    """The alarms that the runs raised."""
    raised = [f"{r['objective']}, seed {r['seed']}: {', '.join(r['alarms'])}" for r in records if r["alarms"]]
    return f"Alarms (health.md): {'; '.join(raised) or 'none'}."


def report(before: Point, outlined: Point, records: list[dict]) -> str:
    """Everything, as markdown; ``outlined`` has log_b and log_c of the base behind outlines of the references."""
    ceiling = shown(difference(outlined["log_c"], outlined["log_b"]))
    told = f"An outline of the reference's own rarest words would change the base's log p by {ceiling} nats a token."
    parts = [
        table(before, records), told, alarms(records),
        "### Comparisons", duels(before, records),
        "### By source, seed 1", by_source(before, records),
        "### Samples, seed 1", samples(before, records), "![curves](results.svg)",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


PANELS = {
    "log p of the answer": lambda point: over_items(point["log_c"]).mean,
    "gain, nats a token": lambda point: difference(point["log_c"], point["log_b"]).mean,
    "trace length, tokens": lambda point: point["trace_length"],
    "entropy, nats a token": lambda point: point["entropy"],
}


def draw(before: Point, records: list[dict], path: Path) -> None:
    """Held-out figures over the time of the runs, means over seeds; dashed: without a trace."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.1), layout="constrained")
    for objective in OBJECTIVES:
        runs, color = chosen(records, objective), COLORS[objective]
        columns = [[before], *zip(*(run["points"] for run in runs))]
        minutes = [mean([minutes_at(run, prompts) for run in runs]) for prompts in [0, *runs[0]["prompts"]]]
        for axis, figure_of in zip(axes, PANELS.values()):
            values = [mean(list(map(figure_of, column))) for column in columns]
            axis.plot(minutes, values, color=color, lw=2, label=f"{objective}, with traces")
        values = [mean([over_items(point["log_b"]).mean for point in column]) for column in columns]
        axes[0].plot(minutes, values, "--", color=color, lw=2, label=f"{objective}, without a trace")
    for axis, title in zip(axes, PANELS):
        axis.set(title=title, xlabel="minutes of training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
