"""linear_logprob beside the bare matrix product and everything else that computes it; and the memory it takes."""

import functools
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from linear_logprob_peers import DTYPES, make_inputs, peers

from nrt_fast import ops

CLEAR_PEAK = Path("/proc/self/clear_refs")


def check(logprob, hidden, weight, target, rows=128):
    """On some rows; the bound is that of bf16 operands, 16-bit logits excepted: those are up to 0.06 off."""
    exact = (hidden[:rows].double() @ weight.double().T).log_softmax(dim=1).gather(1, target[:rows, None]).squeeze(1)
    torch.testing.assert_close(logprob[:rows].double(), exact, rtol=0, atol=1e-4)


@pytest.mark.benchmark(group="linear_logprob")
@pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=str)
@torch.no_grad()
def test_linear_logprob(dtype, device, compare):
    hidden, weight, _ = inputs = make_inputs(device, dtype)
    check(ops.linear_logprob(*inputs), *inputs)
    out = torch.empty(len(hidden), len(weight), dtype=dtype, device=device)
    compare(
        {
            "linear_logprob": functools.partial(ops.linear_logprob, *inputs),
            "bare matrix product": functools.partial(torch.mm, hidden, weight.T, out=out),
        }
    )


@pytest.mark.benchmark(group="linear_logprob beside its peers")
@pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=str)
@torch.no_grad()
def test_peers(dtype, device, compare):
    inputs = make_inputs(device, dtype)
    ours = {"linear_logprob": functools.partial(ops.linear_logprob, *inputs)}
    stats = {"linear_logprob_stats": functools.partial(ops.linear_logprob_stats, *inputs)}
    compare(ours | stats | peers(*inputs), rounds=5)


def peak_bytes(device):
    """The most memory held since the last call of reset_peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_PEAK.write_text("5")


@pytest.mark.skipif(DEVICE == "cpu" and not CLEAR_PEAK.exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=str)
def test_memory(dtype, device):
    """At most 64 MiB above the inputs; the logits would take 250."""
    inputs = make_inputs(device, dtype)
    ops.linear_logprob(inputs[0][:64], inputs[1], inputs[2][:64])  # code and thread pools
    reset_peak(device)
    before = peak_bytes(device)
    ops.linear_logprob(*inputs)
    assert peak_bytes(device) - before <= 64 * 2**20
