"""The benchmarks' gate: this run's ratios against the committed ones.

    python bench/gate.py RUN.json              exit code 1 if something became slower
    python bench/gate.py RUN.json --write      make this run the committed one

RUN.json is pytest-benchmark's. A ratio is our time over a peer's (or over the bare matrix product's) from one run; it
may rise to THRESHOLD times the committed value. Every kind of processor has committed figures of its own, since a ratio
on one tells little of another (docs/LOG.md). Absolute times are compared where cores and versions agree too, with
ABSOLUTE_THRESHOLD.
"""

import argparse
import json
import sys
from pathlib import Path

THRESHOLD = 1.25
ABSOLUTE_THRESHOLD = 1.6
COMMITTED = Path(__file__).parent / "results/cpu.json"
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what a processor of one name may have or lack


def summary(run: dict) -> dict:
    """What is kept of pytest-benchmark's JSON: the machine, and of each benchmark its ratios and our median."""
    machine, benchmarks = run["machine_info"], {}
    for entry in run["benchmarks"]:
        if ratios := entry["extra_info"].get("ratios"):
            medians = entry["extra_info"]["median_us"]
            benchmarks[entry["fullname"]] = {"ratios": ratios, "median_us": next(iter(medians.values()))}
    names = ("brand_raw", "count")
    return {
        "machine": {name: machine["cpu"].get(name) for name in names}
        | {package: machine.get(package) for package in ("torch", "transformers")},
        "benchmarks": dict(sorted(benchmarks.items())),
    }


def processor(run: dict) -> str:
    """The kind of processor that pytest-benchmark's JSON is from."""
    cpu = run["machine_info"]["cpu"]
    return " ".join([cpu["brand_raw"], *(flag for flag in MATRIX_FLAGS if flag in cpu.get("flags", []))])


def compare(run: dict, committed: dict) -> list[str]:
    """What is worse in this run than in the committed one, a line each; both are summaries."""
    same_machine, problems = run["machine"] == committed["machine"], []
    for name, before in committed["benchmarks"].items():
        now = run["benchmarks"].get(name)
        if now is None:
            problems.append(f"{name}: not in this run")
            continue
        for peer, ratio in before["ratios"].items():
            if now["ratios"].get(peer, ratio) > THRESHOLD * ratio:  # a peer may not be installed here
                problems.append(f"{name}: {now['ratios'][peer]:.3f} of {peer}, committed {ratio:.3f}")
        if same_machine and now["median_us"] > ABSOLUTE_THRESHOLD * before["median_us"]:
            problems.append(f"{name}: {now['median_us']:.0f} us, committed {before['median_us']:.0f} us")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--committed", type=Path, default=COMMITTED)
    parser.add_argument("--write", action="store_true", help="make this run the committed one")
    arguments = parser.parse_args()
    whole = json.loads(arguments.run.read_text())
    name, run = processor(whole), summary(whole)
    by_processor = json.loads(arguments.committed.read_text()) if arguments.committed.exists() else {}
    if arguments.write:
        arguments.committed.parent.mkdir(exist_ok=True)
        arguments.committed.write_text(json.dumps(by_processor | {name: run}, indent=1, sort_keys=True) + "\n")
        return 0
    if name not in by_processor:
        there = "; ".join(by_processor) or "none"
        print(f"no figures of {name} in {arguments.committed} ({there}): `make bench-baseline` on main adds them")
        return 1
    committed = by_processor[name]
    problems = compare(run, committed)
    for new in sorted(run["benchmarks"].keys() - committed["benchmarks"].keys()):
        print(f"new, not guarded before `make bench-baseline`: {new}")
    for problem in problems:
        print(f"slower: {problem}")
    print(f"{len(committed['benchmarks'])} benchmarks guarded on {name}, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
