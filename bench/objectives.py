"""Does it learn, and which objective? Every preset on three kinds of tasks, under one budget, with several seeds.

    python bench/objectives.py            all presets, five seeds; writes docs/objectives.md's tables and pictures
    python bench/objectives.py --quick    three presets, two seeds, fewer steps; exit code 1 if it does not learn

Finished runs stay in build/lab, and are not made again unless something that decides their result has changed.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lab_plots import draw
from lab_report import NEEDED, Record, differences, duel, kinds_of, presets_of, report
from lab_runs import ALL_PRESETS, FULL, LAB, QUICK, ROOT, SEEDS, jobs, make_base, run_all, write_data

from nrt_fast.metrics import replace_file

DOCS = ROOT / "docs"
BEGIN, END = "<!-- lab: begin -->", "<!-- lab: end -->"
QUICK_PRESETS, QUICK_SEEDS = ["sft", "nrt-ws", "jepo"], SEEDS[:2]


def problems(records: list[Record]) -> list[str]:
    """What must not be, a line each: thinking that does not pay where it is needed."""
    lines = []
    for kind in NEEDED:
        lost = [f"{d:+.3f}" for d in differences(records, kind, "nrt-ws", "sft") if d <= 0]
        if lost:
            lines.append(f"kind {kind}: nrt-ws does not beat sft with every seed: accuracy {', '.join(lost)}")
    return lines


def costs(records: list[Record]) -> list[str]:
    """Presets that kind C tells to be worse than sft, a line each."""
    rivals = [preset for preset in presets_of(records) if preset != "sft"]
    told = {preset: duel(records, "C", preset, "sft") for preset in rivals}
    return [f"kind C: {preset} is worse than sft: {text}" for preset, (text, word) in told.items() if word == "worse"]


def put_between(text: str, generated: str) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the text needs the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{generated}\n{END}{after}"


def publish(records: list[Record], page: Path) -> None:
    """Write the tables into the page, and the pictures beside it."""
    pictures = draw(records, page.parent)
    parts = [report(records), *(f"![kind {kind}]({path.name})" for kind, path in zip(kinds_of(records), pictures))]
    replace_file(page, put_between(page.read_text(encoding="utf-8"), "\n\n".join(map(str.strip, parts)) + "\n"))


def run_lab(quick: bool, num_workers: int, say: Callable[[str], None]) -> int:
    """Everything; returns the exit code."""
    todo = jobs(QUICK_PRESETS, QUICK_SEEDS, QUICK) if quick else jobs(ALL_PRESETS, SEEDS, FULL)
    base, data = make_base(say), LAB / "data"
    write_data(data)
    records = run_all(todo, base, data, num_workers, say)
    say(report(records))
    if not quick:
        publish(records, DOCS / "objectives.md")
        return 0
    failed = problems(records)
    for line in failed + costs(records):
        say(line)
    say("failed" if failed else "nrt-ws beats sft on kinds A and B with every seed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="three presets, two seeds, fewer steps; tells by exit code"
    )
    parser.add_argument("--num_workers", type=int, default=min(2, os.cpu_count()), help="runs side by side")
    arguments = parser.parse_args()
    return run_lab(arguments.quick, arguments.num_workers, lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
