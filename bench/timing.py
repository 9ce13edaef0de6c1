"""How every benchmark times: contenders by turns in one process, each from a cold cache, the median of the rounds.

What else the machine does then falls on all of them alike, so ratios of medians hold where the times themselves drift.
"""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**30  # many times a GPU's second-level cache, and longer than a host takes to enqueue a call
WARMUP_ROUNDS = 2


def interleaved(contenders: dict[str, Callable[[], object]], device: str, rounds: int = 15) -> dict[str, float]:
    """Median seconds of each contender's call; round after round, every contender once, the order turned each time.

    On a GPU by CUDA events, the second-level cache overwritten before each call; on a CPU by the clock.
    """
    time_once = _gpu_timer(device) if device == "cuda" else _cpu_timer
    names, seconds = list(contenders), {name: [] for name in contenders}
    for turn in range(-WARMUP_ROUNDS, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = time_once(contenders[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _cpu_timer(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_timer(device: str) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_once(call: Callable[[], object]) -> float:
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return time_once


def copy_bandwidth(device: str, num_bytes: int = 2**28) -> float:
    """Bytes read plus bytes written, per second, of a large copy: what a memory-bound kernel can reach at best."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / interleaved({"copy": lambda: target.copy_(source)}, device)["copy"]
