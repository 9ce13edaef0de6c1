"""bench/gpu_suite.py at tiny shapes on the CPU: every section runs, and no failure hides or costs the others."""

import json
import subprocess
import sys
import time

import gpu_suite
import pytest
import torch

from nrt_fast import ops

UNCHECKED = {"linear_logits", "joined_attention", "visibility", "trace_rewards", "clip_reward", "group_advantages",
             "cispo", "ppo", "reinforce", "kl_estimate", "sampling_floor"}  # plain PyTorch everywhere  # fmt: skip


@pytest.fixture
def suite():
    return gpu_suite.Suite("cpu", quick=True)


def test_every_section_checks_and_times(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, gpu_suite.__file__, "--device", "cpu", "--quick", "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    report = json.loads(out.read_text())
    assert report["versions"]["torch"] == torch.__version__
    sections = {}
    for record in report["records"]:
        sections.setdefault(record["section"], set()).add(record["kind"])
    assert {"error", "check", "time"} & sections.pop("ceilings") == {"time"}
    for name, kinds in sections.items():
        assert {"error", "check", "time"} & kinds == {"check", "time"}, name


def test_every_op_with_a_kernel_is_in_a_section():
    with open(gpu_suite.ROOT / "bench/gpu_sections.py") as file:
        source = file.read()
    kernels = {name for name, twins in ops._twins.items() if {"triton", "cuda"} & set(twins)}
    missing = {name for name in kernels if f"ops.{name}" not in source}
    assert missing <= {"gather_rows"}, "gather_rows is checked inside packed attention"


def test_a_failed_check_is_not_timed_and_fails_the_run(suite):
    def section(suite):
        suite.check("wrong", torch.ones(3), torch.zeros(3), torch.zeros(3))
        suite.compare("speed", {"ours": lambda: None})

    suite.run("section", section, seconds=5)
    assert [r["kind"] for r in suite.records] == ["check", "note", "note"]
    assert "FAILED section: wrong: error 1" in gpu_suite.table(suite.records)


def test_nan_never_passes(suite):
    suite.check("nan", torch.tensor([float("nan")]), torch.zeros(1), torch.zeros(1))
    assert suite.records[-1]["passed"] is False


def test_what_a_section_raises_is_recorded(suite):
    def section(suite):
        raise RuntimeError("no such kernel")

    suite.run("section", section, seconds=5)
    assert "ERROR section: RuntimeError: no such kernel" in gpu_suite.table(suite.records)


def test_a_section_that_hangs_is_left(suite):
    suite.run("section", lambda suite: time.sleep(30), seconds=1)
    assert "TimeoutError: took longer than 1 s" in gpu_suite.table(suite.records)


def test_a_peer_that_fails_is_noted(suite):
    def build():
        raise ImportError("no module named peer")

    assert set(suite.compare("speed", {"ours": lambda: None}, {"peer": build})) == {"ours"}
    assert suite.records[0]["text"] == "ImportError: no module named peer"
