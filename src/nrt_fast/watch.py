"""Signs of life: each rank tells the others that it lives and how far it is, and ends when one of them does not.

What waits for a lost rank waits in C++, where no exception reaches it; so a thread of its own ends the process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

PERIOD_S = 1.0  # between two signs
SILENCE_S = 30.0  # without one, a rank is lost
LOST = "failed"  # the store's key that tells why the job ends


class Watch:
    """The signs of one rank, in a store that all have: key ``alive/<rank>``, a count and where the rank is.

    Each rank watches the next one, so that any number of ranks costs each of them the same.

    Args:
        store: a connection to torch's key-value store that nothing else uses.
        rank, size: of this process, and how many there are.
    """

    def __init__(self, store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.host = socket.gethostname()
        self.place, self.doing = 0, "joining"
        self._count = 0
        self._over = threading.Event()
        self._sign()
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="watch")
        self._thread.start()

    def enter(self, doing: str) -> None:
        """Say what this rank now waits for together with all others."""
        self.place, self.doing = self.place + 1, doing

    def stop(self) -> None:
        """Give no more signs. A thread that Python's end finds inside the store would abort the process."""
        self._over.set()
        self._thread.join(SILENCE_S / 10)

    def fail(self, reason: str) -> None:
        """Tell all ranks why the job ends; the first to say so is heard."""
        self.store.compare_set(LOST, "", reason)

    def why(self, error: Exception, timeout_s: float) -> str:
        """Whose fault an error is that this rank had while it waited for the others."""
        before, heard_until = self._signs(), time.monotonic() + SILENCE_S / 10
        while time.monotonic() < heard_until:
            if self.store.check([LOST]):
                return self.store.get(LOST).decode()
            time.sleep(PERIOD_S / 10)
        now = self._signs()
        if silent := [rank for rank in now if now[rank]["count"] == before[rank]["count"] and rank != self.rank]:
            return f"{_told(silent, now)} gives no sign of life: it was killed, or its host was lost"
        if late := [rank for rank in now if now[rank]["place"] < self.place]:
            doing = now[late[0]]["doing"]
            return f"{_told(late, now)} did not come to {self.doing} within {timeout_s:g} s; its last was {doing}"
        return f"rank {self.rank}: {' '.join(str(error).split())}"

    def _go_on(self) -> None:
        neighbour, count, changed = (self.rank + 1) % self.size, -1, time.monotonic()
        while not self._over.wait(PERIOD_S):
            try:
                self._sign()
                if self.store.check([LOST]):
                    self._end(self.store.get(LOST).decode())
                sign = self._read(neighbour)
                if sign["count"] != count:
                    count, changed = sign["count"], time.monotonic()
                elif time.monotonic() > changed + SILENCE_S:
                    told = _told([neighbour], {neighbour: sign})
                    self.fail(f"{told} has given no sign of life for {SILENCE_S:g} s: its host is lost, or stopped")
            except RuntimeError as error:  # torch's name of a store that does not answer
                self._end(f"the host of the rendezvous does not answer ({str(error).splitlines()[0]})")

    def _end(self, reason: str) -> None:
        if not self._over.is_set():  # else the main thread is on its way out, and tells it
            print("nrt-fast: error:", reason, file=sys.stderr, flush=True)
            os._exit(2)

    def _sign(self) -> None:
        self._count += 1
        sign = {"count": self._count, "place": self.place, "doing": self.doing, "host": self.host}
        self.store.set(f"alive/{self.rank}", json.dumps(sign))

    def _read(self, rank: int) -> dict:
        return json.loads(self.store.get(f"alive/{rank}"))

    def _signs(self) -> dict[int, dict]:
        return {rank: self._read(rank) for rank in range(self.size)}


def _told(ranks: list[int], signs: dict[int, dict]) -> str:
    names = [f"rank {rank} on {signs[rank]['host']}" for rank in ranks[:4]]
    return ", ".join(names) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
