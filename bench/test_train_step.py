"""The training pass on 64 ragged traces beside the same loss over padded rows; memory in fresh processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_peers import DTYPES
from train_peers import contenders

SHAPES = {"256-6-4096": 5, "512-8-32000": 2}  # rounds


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def relative_errors(ours, theirs):
    return [float((ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()) for name in theirs]


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu_suite.py has the sizes of a GPU")
@pytest.mark.benchmark(group="training pass, ragged")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_training_pass(shape, dtype, compare):
    calls = contenders(shape, dtype)
    (loss, gradients), (padded_loss, padded_gradients) = calls["packed"](), calls["padded, 64 rows"]()
    if dtype == torch.float32:
        assert loss == pytest.approx(padded_loss, rel=1e-4)
        assert max(relative_errors(gradients, padded_gradients)) < 1e-4
    else:  # no further from fp32 than the peer is
        exact_loss, exact = contenders(shape, torch.float32)["padded, 8 rows"]()
        assert max(abs(loss - exact_loss), abs(padded_loss - exact_loss)) < 0.05
        ours, theirs = (relative_errors(found, exact) for found in (gradients, padded_gradients))
        assert max(ours) < 2 * max(theirs)
    compare(calls, rounds=SHAPES[shape], warmup_rounds=0)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_at_most_half(shape, dtype):
    def grown(contender):
        script = Path(__file__).with_name("train_peers.py")
        command = [sys.executable, str(script), contender, shape, dtype]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    ours, padded = grown("ours"), grown("padded")
    print(f"\n{ours / 2**20:.0f} MiB packed, {padded / 2**20:.0f} MiB padded")
    assert ours <= padded / 2
