"""bench/gpu_suite.py at tiny shapes on the CPU: every section runs, and no failure hides or costs the others."""

import json
import subprocess
import sys
import time

import gpu_engine
import gpu_sections
import gpu_suite
import gpu_train
import pytest
import torch
from engine_peers import LLAMA_1B, LLAMA_8B
from timing import PhaseClock, interleaved

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


def test_a_peer_that_hangs_has_the_time_of_its_section(suite):
    def section(suite):
        suite.compare("speed", {"ours": lambda: None}, {"peer": lambda: time.sleep(30)})
        time.sleep(30)

    start = time.monotonic()
    suite.run("section", section, seconds=1)
    assert time.monotonic() - start < 5
    assert [r["kind"] for r in suite.records] == ["error", "note"]
    assert "TimeoutError: took longer than 1 s" in suite.records[0]["text"]


def test_a_failed_check_of_something_else_does_not_cost_the_timing(suite):
    def section(suite):
        suite.check("pass: gradients", torch.ones(3), torch.zeros(3), torch.zeros(3))
        assert suite.compare("pass", {"ours": lambda: None}) == {}
        assert set(suite.compare("other pass", {"ours": lambda: None})) == {"ours"}

    suite.run("section", section, seconds=5)
    assert [r["kind"] for r in suite.records] == ["check", "note", "time", "note"]


def test_a_pass_that_fails_its_check_does_not_cost_the_others(suite, monkeypatch):
    monkeypatch.setattr(gpu_train, "pass_flops", lambda *_: 1.0)
    monkeypatch.setattr(gpu_train, "check_finite", lambda suite, name, call: suite.check_equal(
        f"{name}: finite gradients", torch.tensor("selective" not in name), torch.tensor(True)))  # fmt: skip
    suite.run("train_8b", gpu_sections.SECTIONS["train_8b"][0], seconds=60)
    assert [r["name"].split()[-1] for r in suite.records if r["kind"] == "speed"] == ["none", "full"]
    assert [r["kind"] for r in suite.records if r["kind"] == "error"] == []


class Replaced(BaseException):
    """What becomes of a process that is replaced by another."""


def test_a_dead_context_costs_its_own_section_alone(tmp_path, monkeypatch):
    """A stand-in: after such an error every later call of CUDA raises too, in the same process."""
    out, alive, ran = tmp_path / "results.json", [True], []

    def section(name, kills):
        def run(suite):
            ran.append(name)
            suite.record(kind="note", name=name, text="ran")
            if kills:
                alive.clear()
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run, 5

    def release(suite):
        if not alive:
            raise RuntimeError("CUDA error: still so")

    def execv(path, arguments):
        alive.append(True)
        monkeypatch.setattr(sys, "argv", arguments[1:])
        raise Replaced

    sections = {"first": section("first", False), "second": section("second", True), "third": section("third", False)}
    monkeypatch.setattr(gpu_sections, "SECTIONS", sections)
    monkeypatch.setattr(gpu_suite.Suite, "release", release)
    monkeypatch.setattr(gpu_suite.os, "execv", execv)
    monkeypatch.setattr(sys, "argv", [gpu_suite.__file__, "--device", "cpu", "--quick", "--out", str(out)])
    with pytest.raises(Replaced):
        gpu_suite.main()
    records = json.loads(out.read_text())["records"]
    assert [r["section"] for r in records if r["kind"] == "error"] == ["second", "second"]
    assert gpu_suite.main() == 1
    records = json.loads(out.read_text())["records"]
    assert ran == ["first", "second", "third"] == [r["name"] for r in records if r.get("text") == "ran"]


def test_a_peer_that_fails_is_noted(suite):
    def build():
        raise ImportError("no module named peer")

    assert set(suite.compare("speed", {"ours": lambda: None}, {"peer": build})) == {"ours"}
    assert suite.records[0]["text"] == "ImportError: no module named peer"


def test_speed_is_told_with_its_share_of_the_roofline(suite):
    suite.section = "engine"
    suite.record_speed("256 traces", {"decode": 12_000.0, "generate": 1500.0}, 24_000.0)
    table = gpu_suite.table(suite.records)
    assert "engine: 256 traces, 50.0% of 24,000 tokens/s\n        12,000 tokens/s  decode" in table


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [(64, 1024, 4.92), (128, 1024, 6.71), (256, 1024, 11.04), (64, 350, 3.74), (256, 350, 6.33), (512, 350, 12.66)],
)
def test_roofline_of_llama_8b(batch, context, milliseconds):
    """On an H200, by hand: 15.0 GB of weights, 128 KiB of keys and values a token."""
    seconds = gpu_engine.decode_roofline(LLAMA_8B, batch, context, *gpu_engine.PEAKS["H200"])
    assert round(1e3 * seconds, 2) == milliseconds


def test_weights_that_a_token_reads(make_module):
    """All parameters but the embedding's, which a tied head reads again."""
    assert gpu_engine.weights_read(LLAMA_1B) == 1_235_814_400  # as published, its head being its embedding
    module = make_module("llama", **gpu_engine.TINY)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert gpu_engine.weights_read(gpu_engine.TINY) == parameters - module.model.embed_tokens.weight.numel()


def test_a_phase_clock_times_its_phase_alone():
    clock = PhaseClock("score")

    def call():
        for phase in ("rollout", "score", "rollout"):
            with clock.timed(phase):
                time.sleep(0.03 if phase == "score" else 0.1)

    seconds = interleaved({"call": call, "all": clock.throughout(lambda: time.sleep(0.2))}, "cpu", 1, 0, clock)
    assert 0.03 <= seconds["call"] < 0.1
    assert seconds["all"] >= 0.2
