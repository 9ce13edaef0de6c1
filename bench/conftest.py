"""How the benchmarks time: warm, device-synchronised, and only after the contender's result was checked."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
