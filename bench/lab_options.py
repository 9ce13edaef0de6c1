"""What single fields change on the lab's three kinds of tasks, beside nrt-ws as it is.

    python bench/lab_options.py

Prints the tables of docs/objectives.md. Finished runs stay in build/lab, as those of objectives.py do.
"""

from lab_report import Interval, Record, chosen, course, interval, kinds_of, markdown, presets_of, shown, verdict
from lab_runs import LAB, QUICK, SEEDS, Job, make_base, run_all, write_data
from lab_tasks import KINDS

from nrt_fast.metrics import mean

PRESET = "nrt-ws"
OPTIONS = [(), (("std_floor", 0.0),), (("std_floor", 0.1),), (("max_repeated_tokens", 8),)]
HEAD = [
    "", "accuracy", "mean over the run", "difference in it", "without a trace", "gain", "trace length", "no signal",
    "repetition",
]  # fmt: skip


def jobs() -> list[Job]:
    """Every option on every kind, seed after seed, under the budget of lab-quick."""
    return [Job(kind, PRESET, seed, QUICK, options) for seed in SEEDS[:3] for kind in KINDS for options in OPTIONS]


def difference(records: list[Record], kind: str, name: str) -> Interval:
    """Mean accuracy over the run, minus that of the preset as it is, paired by seed."""
    pairs = zip(chosen(records, kind, name), chosen(records, kind, PRESET), strict=True)
    return interval([course(ours) - course(plain) for ours, plain in pairs])


def table(records: list[Record], kind: str) -> str:
    """One kind's figures, the preset as it is first."""
    rows = [HEAD]
    for name in presets_of(records):
        runs = chosen(records, kind, name)
        center, half = told = difference(records, kind, name)
        rows.append(
            [
                name,
                shown([run["after"]["accuracy"] for run in runs]),
                shown(list(map(course, runs))),
                "-" if name == PRESET else f"{center:+.3f} ± {half:.3f}: {verdict(told)}",
                shown([run["after"]["accuracy_no_trace"] for run in runs]),
                shown([run["after"]["gain"] for run in runs]),
                shown([run["after"]["trace_length"] for run in runs], 1),
                f"{mean([mean(run['steps']['no_signal']) for run in runs]):.0%}",
                f"{mean([mean(run['steps']['repetition']) for run in runs]):.1%}",
            ]
        )
    return markdown(rows)


def report(records: list[Record]) -> str:
    """Every kind's table, as markdown."""
    return "\n\n".join(f"Kind {kind}\n\n{table(records, kind)}" for kind in kinds_of(records)) + "\n"


def main() -> None:
    def say(text: str) -> None:
        print(text, flush=True)

    base, data = make_base(say), LAB / "data"
    write_data(data)
    say(report(run_all(jobs(), base, data, num_workers=2, say=say)))


if __name__ == "__main__":
    main()
