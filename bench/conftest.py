"""What the benchmarks share. A contender's result is checked before it is timed; ratios go into extra_info.

``make bench`` writes the JSON and bench/gate.py compares its ratios with the committed ones.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from timing import WARMUP_ROUNDS, interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["transformers"] = transformers.__version__


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def measure(benchmark):
    """``measure(function, *arguments)`` times calls, each until the device is done."""

    def call(function, *arguments):
        function(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def measure(function, *arguments):
        return benchmark.pedantic(call, (function, *arguments), rounds=20, warmup_rounds=2)

    return measure


@pytest.fixture
def compare(benchmark):
    """``compare({"ours": call, "a peer": call, ...})`` times calls by turns; returns the median seconds of each.

    The first contender is ours. Its time over each other's is kept as ``extra_info["ratios"]``, below 1 where we are
    faster, and guarded by bench/gate.py.
    Contenders of seconds need few rounds; ``clock`` stands in for the time of a whole call.
    """

    def compare(
        contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup_rounds: int = WARMUP_ROUNDS,
        clock: Callable[[], float] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        medians = interleaved(contenders, DEVICE, rounds, warmup_rounds, clock)
        ours, *peers = medians
        benchmark.pedantic(contenders[ours], rounds=min(3, max(1, rounds // 3)))
        benchmark.extra_info["median_us"] = {name: round(1e6 * seconds, 1) for name, seconds in medians.items()}
        benchmark.extra_info["ratios"] = {peer: round(medians[ours] / medians[peer], 4) for peer in peers}
        print("".join(f"\n{1e6 * seconds:12.1f} us  {name}" for name, seconds in medians.items()))
        return medians

    return compare
