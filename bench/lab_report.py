"""What the lab's runs say: means with intervals over seeds, tables, and which of the claims hold."""

import math
from collections.abc import Iterable

from lab_tasks import KINDS

from nrt_fast.metrics import mean

T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""
NEEDED = ("A", "B")
"""Kinds whose answers thinking makes likelier."""
RIVALS = ["jepo", "verifree", "rlpr", "sft"]
OURS = "nrt-ws"
SHRUNK, STILL = 0.5, 0.05
"""A run's traces collapsed if they end shorter than this share of their first length; entropy under STILL is told."""

Record = dict
Interval = tuple[float, float]
"""(mean, half width of its 95% interval)."""


def interval(values: list[float]) -> Interval:
    """Mean over seeds with its 95% t-interval; of a single value the half width is infinite."""
    center, degrees = mean(values), len(values) - 1
    if degrees == 0:
        return center, math.inf
    deviation = math.sqrt(sum((value - center) ** 2 for value in values) / degrees)
    return center, T_95[degrees - 1] * deviation / math.sqrt(len(values))


def verdict(difference: Interval) -> str:
    """What an interval of paired differences tells."""
    center, half = difference
    return "better" if center - half > 0 else "worse" if center + half < 0 else "not told apart"


def chosen(records: list[Record], kind: str, preset: str) -> list[Record]:
    """A preset's runs on one kind, by seed."""
    found = [record for record in records if (record["kind"], record["preset"]) == (kind, preset)]
    return sorted(found, key=lambda record: record["seed"])


def differences(records: list[Record], kind: str, preset: str, other: str) -> list[float]:
    """Held-out accuracy after training, preset minus other, paired by seed."""
    ours, theirs = chosen(records, kind, preset), chosen(records, kind, other)
    if [record["seed"] for record in ours] != [record["seed"] for record in theirs]:
        raise ValueError(f"{kind}: {preset} and {other} were run with different seeds")
    return [a["after"]["accuracy"] - b["after"]["accuracy"] for a, b in zip(ours, theirs)]


def presets_of(records: list[Record]) -> list[str]:
    """The presets that were run, in the order in which they were."""
    return list(dict.fromkeys(record["preset"] for record in records))


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds that were run, in the order of their names."""
    return [kind for kind in KINDS if any(record["kind"] == kind for record in records)]


def course(record: Record) -> float:
    """Held-out accuracy, mean over the run's measurements: of two that end alike, the faster has more."""
    return mean(record["curve"]["accuracy"])


def collapsed(record: Record) -> bool:
    """Whether held-out traces ended shorter than half of what they were."""
    lengths = record["curve"]["trace_length"]
    return lengths[-1] < SHRUNK * lengths[0]


def still(record: Record) -> bool:
    """Whether held-out traces ended with hardly any entropy."""
    return record["curve"]["entropy"][-1] < STILL


# tables ---------------------------------------------------------------------------------------------------------------


def shown(values: list[float], digits: int = 2) -> str:
    """mean ± half width; of one value the mean alone."""
    center, half = interval(values)
    return f"{center:.{digits}f}" + ("" if math.isinf(half) else f" ± {half:.{digits}f}")


def three(runs: list[Record], name: str, digits: int) -> str:
    """A held-out figure before, in the middle and after."""
    curves = [run["curve"][name] for run in runs]
    return " → ".join(
        f"{mean([values[at(len(values))] for values in curves]):.{digits}f}"
        for at in (lambda n: 0, lambda n: n // 2, lambda n: n - 1)
    )


def markdown(rows: Iterable[list[str]]) -> str:
    """A table of rows, the first its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


HEAD = [
    "preset", "accuracy", "mean over the run", "without a trace", "gain", "on hard tokens", "trace length", "entropy",
    "no signal",
]  # fmt: skip


def table(records: list[Record], kind: str) -> str:
    """One kind's table: before training, then every preset, best accuracy first."""
    presets = presets_of(records)
    first = [run["before"] for preset in presets if preset != "sft" for run in chosen(records, kind, preset)]
    rows = [HEAD, ["before", *plain(first)]]
    for preset in sorted(
        presets, key=lambda preset: -mean([r["after"]["accuracy"] for r in chosen(records, kind, preset)])
    ):
        runs = chosen(records, kind, preset)
        after = [run["after"] for run in runs]
        accuracy = shown([a["accuracy"] for a in after])
        if preset == "sft":
            rows.append([preset, accuracy, shown(list(map(course, runs))), accuracy, *["-"] * 5])
            rows.append(["sft, made to think", *plain([run["with_trace"] for run in runs])])
            continue
        rows.append(
            [
                preset,
                accuracy,
                shown(list(map(course, runs))),
                shown([a["accuracy_no_trace"] for a in after]),
                shown([a["gain"] for a in after]),
                shown([a["hard_token_gain"] for a in after]),
                three(runs, "trace_length", 1),
                three(runs, "entropy", 2),
                f"{mean([mean(run['steps']['no_signal']) for run in runs]):.0%}",
            ]
        )
    return markdown(rows)


def plain(measured: list[dict]) -> list[str]:
    """A row of held-out means that no run made."""
    figures = {name: mean([m[name] for m in measured]) for name in measured[0]}
    return [
        f"{figures['accuracy']:.2f}", "-", f"{figures['accuracy_no_trace']:.2f}", f"{figures['gain']:.2f}",
        f"{figures['hard_token_gain']:.2f}", f"{figures['trace_length']:.1f}", f"{figures['entropy']:.2f}", "-",
    ]  # fmt: skip


# claims ---------------------------------------------------------------------------------------------------------------


def duel(records: list[Record], kind: str, preset: str, other: str) -> tuple[str, str]:
    """(the difference with its interval, the verdict)."""
    center, half = interval(differences(records, kind, preset, other))
    return f"{center:+.3f} ± {half:.3f}", verdict((center, half))


def duels(records: list[Record]) -> str:
    """Table of ours against its rivals on every kind."""
    rivals = [rival for rival in RIVALS if rival in presets_of(records)]
    rows = [["accuracy, " + OURS + " minus", *rivals]]
    for kind in kinds_of(records):
        rows.append([kind, *("{}: {}".format(*duel(records, kind, OURS, rival)) for rival in rivals)])
    return markdown(rows)


def claims(records: list[Record]) -> list[str]:
    """Which claims hold here, a line each."""
    return [*beats(records), *keeps_thinking(records), no_worse_than_sft(records)]


def beats(records: list[Record]) -> list[str]:
    """The paper's claim, which kinds A and B decide: ours is better than each rival."""
    lines = []
    for rival in [rival for rival in RIVALS if rival in presets_of(records)]:
        told = {kind: duel(records, kind, OURS, rival)[1] for kind in kinds_of(records)}
        won = [told[kind] == "better" for kind in NEEDED if kind in told]
        state = "holds" if all(won) else "holds in part" if any(won) else "does not hold"
        lines.append(
            f"{OURS} beats {rival} where thinking is needed: {state} ("
            + ", ".join(f"{k} {word}" for k, word in told.items())
            + ")"
        )
    return lines


def keeps_thinking(records: list[Record]) -> list[str]:
    """Whose traces shrink to under half of their length, and whose lose their entropy."""
    lines = []
    for kind in kinds_of(records):
        for name, test in (
            ("traces end under half of their first length", collapsed),
            (f"entropy ends under {STILL}", still),
        ):
            counts = {
                p: (sum(map(test, runs)), len(runs))
                for p in presets_of(records)
                if p != "sft"
                for runs in [chosen(records, kind, p)]
            }
            hit = ", ".join(f"{preset} ({n} of {total} seeds)" for preset, (n, total) in counts.items() if n)
            lines.append(f"{kind}: {name}: {hit or 'no preset'}")
    return lines


def no_worse_than_sft(records: list[Record]) -> str:
    """Kind C: what thinking costs where it cannot help."""
    worse = [
        f"{preset} ({duel(records, 'C', preset, 'sft')[0]})"
        for preset in presets_of(records)
        if preset != "sft" and duel(records, "C", preset, "sft")[1] == "worse"
    ]
    return "C: worse than sft: " + (", ".join(worse) or "no preset")


def report(records: list[Record]) -> str:
    """Everything, as markdown."""
    seeds = sorted({record["seed"] for record in records})
    budget = records[0]["budget"]
    told = ", ".join(f"{name} {value}" for name, value in budget.items())
    parts = [f"{len(records)} runs, seeds {', '.join(map(str, seeds))}; each: {told}."]
    for kind in kinds_of(records):
        parts += [f"### Kind {kind}", table(records, kind)]
    parts += ["### Claims", duels(records), "\n".join(f"* {line}" for line in claims(records))]
    return "\n\n".join(parts) + "\n"
