"""The compile lane's result: every kernel compiles for every target without spills, and the committed table is true.

compile_lane.py, a process of its own, measures; compile_cases.py says how to add a case.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from nrt_fast import ops

pytest.importorskip("triton", reason="the lane compiles Triton kernels")
TABLE = Path(__file__).parents[1] / "bench/results/kernels.json"
TARGETS = ("sm_80", "sm_90", "sm_100")
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # of one block
REGENERATE = "the kernels changed: look at the difference, then `make kernels` writes the table"


@pytest.fixture(scope="module")
def lane():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_lane.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def reports(lane):
    """(kernel and specialisation, target, kernel, report) of everything that was launched."""
    return [
        (f"{row['kernel']}({row['specialisation']}), {target}", target, row["kernel"], row[target])
        for row in lane["rows"]
        for target in TARGETS
        if target in row
    ]


@pytest.fixture(scope="module")
def compiled(reports):
    return [report for report in reports if "error" not in report[-1]]


def test_every_triton_op_has_a_case_and_every_case_runs(lane):
    assert lane["case_errors"] == {}
    registered = {name for name, twins in ops._twins.items() if "triton" in twins}
    for target in TARGETS:  # an op may launch other kernels on another target, but some
        launched = {row["op"] for row in lane["rows"] if target in row}
        assert registered - launched == set(), f"{target}: add cases to tests/compile_cases.py"
    assert lane["never_launched"] == [], "kernels that no case of tests/compile_cases.py launches"


def test_every_kernel_compiles(reports):
    assert {name: report["error"] for name, _, _, report in reports if "error" in report} == {}


def test_no_kernel_spills_registers(compiled):
    assert {name: report["spill_bytes"] for name, _, _, report in compiled if report["spill_bytes"]} == {}


def test_shared_memory_fits_the_device(compiled):
    too_much = {name: r["shared_bytes"] for name, sm, _, r in compiled if r["shared_bytes"] > MAX_SHARED_BYTES[sm]}
    assert too_much == {}


def test_matrix_products_use_wgmma_on_hopper(lane):
    """But for those of the starter's few rows, fewer than wgmma has."""
    real = [row for row in lane["rows"] if any(not model.startswith("starter") for model in row["models"])]
    slow = {row["kernel"] for row in real if (r := row.get("sm_90", {})).get("dot") and r["matrix_unit"] != "wgmma"}
    assert slow == set(lane["no_wgmma_kernels"])


def test_python_floats_became_no_fp64(lane, compiled):
    """A trap: a float literal of Python is fp64 in a kernel unless something says otherwise."""
    doubles = {kernel for _, _, kernel, report in compiled if report["fp64"]}
    assert doubles == set(lane["fp64_kernels"]), "kernels with fp64, and those that declare it in compile_cases.py"


def test_the_committed_table_is_what_the_compiler_makes(lane):
    committed = json.loads(TABLE.read_text())
    if committed["triton"] != version("triton"):
        pytest.skip(f"the table was written with triton {committed['triton']}, this is {version('triton')}")
    key = lambda row: (row["kernel"], row["specialisation"], row["num_warps"], row["num_stages"])  # noqa: E731
    ours, theirs = ({key(row): row for row in table["rows"]} for table in (lane, committed))
    changed = {row for row in ours.keys() | theirs.keys() if ours.get(row) != theirs.get(row)}
    assert changed == set(), REGENERATE
