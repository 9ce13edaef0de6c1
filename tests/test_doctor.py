"""The doctor: what it says of a healthy machine, and that it sees an op that is not exact."""

import re

import pytest
import torch

from nrt_fast import cli, doctor, ops, packed_attention
from nrt_fast.doctor import self_test
from nrt_fast.doctor.self_test import Finding, compare
from nrt_fast.reference.layers import rms_norm
from nrt_fast.reference.sample import philox_uniform

needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))


@pytest.fixture(scope="module")
def examined():
    return self_test.examine_ops("cpu")


@pytest.fixture
def sick(monkeypatch, examined):
    """A doctor whose self-test finds one op off."""
    found = examined | {"swiglu": Finding(error=0.25, allowed=1e-5, speedup=2.0)}
    monkeypatch.setattr(doctor, "examine_ops", lambda device: found)


@needs_extension
def test_a_step_calls_all_that_matters_and_all_is_exact(examined):
    expected = {
        "rms_norm", "add_rms_norm", "swiglu", "rotate", "rotate_write", "prefix_attention", "panel_linear",
        "sample_logprob", "linear_logprob", "linear_logprob_loss", "aggregate_rewards", "pack_gather", "adamw",
    }  # fmt: skip
    assert expected <= examined.keys()
    assert [op for op, finding in examined.items() if not finding.exact] == []
    assert all(finding.speedup > 0 for finding in examined.values())


def test_ops_are_themselves_again_afterwards(examined):
    before = ops._implementation
    with ops.watch(lambda op, chosen, reference, *args: (op, chosen is reference)):
        assert ops.cispo(torch.zeros(1), torch.ones(1), torch.ones(1), 0.8, 1.2) == ("cispo", True)
    assert ops._implementation is before


def test_an_op_that_runs_as_the_reference_is_told_with_the_reason():
    with torch.no_grad():
        reasons, chosen = ops.obstacles("cpu"), ops.backend()
    for op, why in reasons.items():
        assert (chosen[f"{op}/cpu"] == "reference") == ("native" in why), op
    assert reasons["cispo"] == {"native": "there is no such implementation"}
    on_cuda = packed_attention.obstacles("cuda", torch.float32)
    assert on_cuda["varlen"] == "it does not compute in torch.float32"


WEIGHT = torch.linspace(-1, 1, 7)
X = torch.linspace(-3, 3, 35).view(5, 7)


@pytest.mark.parametrize(
    ("wrong", "exact"),
    [
        (rms_norm, True),
        (lambda x, w, eps: rms_norm(x, w, eps) * (1 + 1e-6), True),  # rounding
        (lambda x, w, eps: rms_norm(x, w, eps) * 1.01, False),
        (lambda x, w, eps: rms_norm(x, w.detach(), eps) + 0 * w.sum(), False),  # right, but for a gradient
        (lambda x, w, eps: rms_norm(x, w, eps) * float("nan"), False),
        (lambda x, w, eps: rms_norm(x, w, eps) + 0 * x.zero_().sum(), False),  # writes to what it should read
    ],
)
def test_what_is_wrong_is_seen(wrong, exact):
    args = (X.clone(), WEIGHT.clone().requires_grad_(), 1e-6)
    assert compare("rms_norm", wrong, rms_norm, args, {}).exact is exact


def test_whole_numbers_are_compared_one_by_one():
    def shifted(seed, step, prompt, trace, position):
        return position + 1

    def same(seed, step, prompt, trace, position):
        return position

    args = (0, 0, torch.tensor([1]), torch.tensor([2]), torch.tensor([3]))
    assert compare("x", same, same, args, {}).exact
    assert compare("x", shifted, same, args, {}).error == float("inf")
    assert compare("philox_uniform", philox_uniform, philox_uniform, args, {}).error == 0


def test_adamw_is_compared_on_whole_weights():
    from nrt_fast.reference.adamw import adamw

    n, moments = 8, (torch.zeros(8), torch.zeros(8))
    args = (torch.ones(n).bfloat16(), torch.zeros(n, dtype=torch.int16), torch.ones(n), *moments)
    args = (*args, 0.1, (0.9, 0.95), 1e-8, 0.01, n, 1, torch.ones(1))

    def lazy(weight, *rest):
        adamw(weight.clone(), *rest)

    assert compare("adamw", adamw, adamw, args, {}).exact
    assert not compare("adamw", lazy, adamw, args, {}).exact


def test_a_healthy_report(monkeypatch, examined, capsys):
    monkeypatch.setattr(doctor, "examine_ops", lambda device: examined)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__}" in told and "nrt-fast 0" in told
    assert "extra peft: peft " in told
    if ops.missing("native") is None:
        assert re.search(r"rms_norm +│ C\+\+ +│ yes +│ +[\d.]+ x", told)
        assert "without C++, there is no such implementation: cispo" in told
    assert f"all {len(examined) + 1} are exact" in told


def test_an_inexact_op_is_told_and_fails(sick, capsys):
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "INEXACT: swiglu is 0.25 off; 1e-05 would be rounding" in told
    assert "are exact" not in told


def test_a_device_that_is_not_there(capsys):
    assert cli.main(["doctor", "--device", "cuda:99"]) == 2
    assert "torch sees" in capsys.readouterr().err
