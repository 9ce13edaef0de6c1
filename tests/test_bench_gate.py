"""The benchmarks' gate: what it calls slower, and what it leaves alone."""

import copy
import json
import subprocess
import sys

import gate
import pytest

COMMITTED = {
    "machine": {"brand_raw": "a processor", "count": 2, "torch": "2.13.0"},
    "benchmarks": {"bench/test_x.py::test_x": {"ratios": {"peer": 0.5, "bare GEMM": 1.2}, "median_us": 100.0}},
}


def run_with(ratios=None, median_us=100.0, torch="2.13.0"):
    run = copy.deepcopy(COMMITTED)
    run["machine"]["torch"] = torch
    run["benchmarks"]["bench/test_x.py::test_x"] |= {"median_us": median_us}
    run["benchmarks"]["bench/test_x.py::test_x"]["ratios"] |= ratios or {}
    return run


@pytest.mark.parametrize(
    ("run", "num_problems"),
    [
        (run_with(), 0),
        (run_with({"peer": 0.6}), 0),
        (run_with({"peer": 0.7}), 1),
        (run_with({"peer": 0.7, "bare GEMM": 2.0}), 2),
        (run_with({"peer": 0.1}), 0),
        (run_with(median_us=1000.0), 1),
        (run_with(median_us=1000.0, torch="2.11.0"), 0),
        (COMMITTED | {"benchmarks": {}}, 1),
    ],
    ids=["same", "within", "ratio", "both ratios", "faster", "absolute", "another machine", "missing"],
)
def test_only_what_is_slower_is_a_problem(run, num_problems):
    assert len(gate.compare(run, COMMITTED)) == num_problems


def test_a_peer_that_is_not_installed_is_no_problem():
    run = run_with()
    del run["benchmarks"]["bench/test_x.py::test_x"]["ratios"]["peer"]
    assert gate.compare(run, COMMITTED) == []


def test_the_command_writes_and_then_guards(tmp_path):
    def pytest_benchmark_json(ratio, flags=("avx2", "avx512_bf16")):
        entry = {"fullname": "bench/test_x.py::test_x"}
        entry["extra_info"] = {"ratios": {"peer": ratio}, "median_us": {"ours": 7.0, "peer": 7.0 / ratio}}
        cpu = {"brand_raw": "a processor", "count": 2, "flags": ["sse4_2", *flags]}
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"machine_info": {"cpu": cpu, "torch": "2.13.0"}, "benchmarks": [entry]}))
        return path

    def run_gate(ratio, *options, **machine):
        run = pytest_benchmark_json(ratio, **machine)
        command = [sys.executable, gate.__file__, run, "--committed", tmp_path / "committed"]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False)

    assert "make bench-baseline" in run_gate(0.5).stdout
    assert run_gate(0.5, "--write").returncode == 0
    assert run_gate(0.5).returncode == 0
    slower = run_gate(0.9)
    assert slower.returncode == 1
    assert "0.900 of peer, committed 0.500" in slower.stdout
    other = {"flags": ("avx2", "avx512_bf16", "amx_bf16")}  # of the same name
    unknown = run_gate(0.9, **other)
    assert unknown.returncode == 1
    assert "no figures of a processor avx2 avx512_bf16 amx_bf16" in unknown.stdout
    assert run_gate(0.9, "--write", **other).returncode == 0
    assert run_gate(0.9, **other).returncode == 0
    assert run_gate(0.9).returncode == 1
