"""SIGINT and SIGTERM as a request to stop at the next safe place."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one ends the process at once."""
    received: list[int] = []

    def on_signal(number: int, frame) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
