"""How every benchmark times: contenders by turns in one process, each from a cold cache, the median of the rounds.

What else the machine does then falls on all of them alike, so ratios of medians hold where the times themselves drift.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

FLUSH_BYTES = 2**30  # many times a GPU's second-level cache, and longer than a host takes to enqueue a call
WARMUP_ROUNDS = 2


class PhaseClock:
    """A clock that stands still but for one phase: for calls of which a part is timed."""

    def __init__(self, phase: str):
        self.phase, self.seconds = phase, 0.0

    def __call__(self) -> float:
        return self.seconds

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Runs while this context is open, if the phase is its own; what a GPU still does counts too."""
        start = _device_done()
        yield
        if phase == self.phase:
            self.seconds += _device_done() - start

    def throughout(self, call: Callable[[], object]) -> Callable[[], object]:
        """The same call, all of it timed."""

        def timed_call() -> object:
            with self.timed(self.phase):
                return call()

        return timed_call


def _device_done() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    contenders: dict[str, Callable[[], object]], device: str, rounds: int = 15, warmup_rounds: int = WARMUP_ROUNDS,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each contender's call; round after round, every contender once, the order turned each time.

    On a GPU by CUDA events, the second-level cache overwritten before each call; on a CPU by the clock; on both by the
    clock that is given.
    """
    time_once = _gpu_timer(device) if device == "cuda" and clock is None else _clock_timer(clock or time.perf_counter)
    names, seconds = list(contenders), {name: [] for name in contenders}
    for turn in range(-warmup_rounds, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = time_once(contenders[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _clock_timer(clock: Callable[[], float]) -> Callable[[Callable[[], object]], float]:
    def time_once(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    return time_once


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
