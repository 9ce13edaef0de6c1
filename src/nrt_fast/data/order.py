"""The order in which rows are trained on: seeded, weighted, endless, and resumable from a few numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nrt_fast.types import UserError


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on the key alone: int64 [size]."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)


class _Walk:
    """Endless walk over one pool of rows: a fresh permutation for each pass.

    Attributes:
        drawn: rows handed out.
        put_off: rows of this pass that came while the step had them already; they are the next ones.
    """

    def __init__(self, start: int, size: int, key: tuple[int, ...]):
        self.start, self.size, self.key = start, size, key
        self.drawn, self.put_off = 0, []
        self._epoch, self._rows = -1, np.empty(0, dtype=np.int64)

    def draw(self, taken: set[int]) -> int:
        """The next row that is not taken by the step yet; a pool smaller than the step begins again."""
        if len(taken) == self.size:
            taken.clear()
        if waiting := [row for row in self.put_off if row not in taken]:
            row = waiting[0]
            self.put_off.remove(row)
        else:
            while (row := self._next_of_pass()) in taken:
                self.put_off.append(row)
        self.drawn += 1
        taken.add(row)
        return row

    def _next_of_pass(self) -> int:
        epoch, offset = divmod(self.drawn + len(self.put_off), self.size)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, permutation(self.size, *self.key, epoch)
        return self.start + int(self._rows[offset])


class Order:
    """Endless order over the rows of several data sets that lie one after another.

    Without weights every row comes once in each pass, all data sets mixed. With weights the data sets take turns, the
    one furthest behind its share first, and each is walked through on its own. A step has no row twice, unless a data
    set has fewer rows than the step draws of it: where a pass ends in a step, rows of the next one that the step has
    already wait for the step after it. Any position is reached without walking to it.

    Args:
        num_per_dataset: rows of each data set.
        weights: positive share of each data set, in any unit; None for one pass over everything.
        seed: not negative.
        digests: (name, hash of its rows) of each data set, by which a saved position knows its data again.

    Raises:
        UserError: weights that do not fit, or a data set without rows.
    """

    def __init__(
        self, num_per_dataset: list[int], weights: list[float] | None = None, seed: int = 0,
        digests: Sequence[tuple[str, str]] = (),
    ):  # fmt: skip
        if weights is not None and len(weights) != len(num_per_dataset):
            raise UserError(f"dataset_weights has {len(weights)} numbers for {len(num_per_dataset)} data sets")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"dataset_weights should all be above 0, not {weights}")
        sizes = num_per_dataset if weights is not None else [sum(num_per_dataset)]
        if min(sizes, default=0) < 1:
            raise UserError(f"a data set has no rows left to train on (rows: {num_per_dataset})")
        self._walks = [_Walk(sum(sizes[:pool]), size, (seed, pool)) for pool, size in enumerate(sizes)]
        self._digests = list(digests)
        self._shares = np.array(weights or [1.0], dtype=np.float64)
        self._shares /= self._shares.sum()

    @property
    def position(self) -> int:
        """Rows drawn so far."""
        return sum(walk.drawn for walk in self._walks)

    @property
    def epoch(self) -> float:
        """Rows drawn so far, in units of all rows."""
        return self.position / sum(walk.size for walk in self._walks)

    def take(self, num_rows: int) -> list[int]:
        """Draw the rows of the next step, as indices into the concatenated data sets."""
        taken: list[set[int]] = [set() for _ in self._walks]
        pools = (self._next_pool() for _ in range(num_rows))
        return [self._walks[pool].draw(taken[pool]) for pool in pools]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in, as plain lists."""
        return {
            "sizes": [walk.size for walk in self._walks],
            "drawn": [walk.drawn for walk in self._walks],
            "put_off": [list(walk.put_off) for walk in self._walks],
            "sha256": [digest for _, digest in self._digests],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: the data sets are not those of the saved position.
        """
        sizes, now = [walk.size for walk in self._walks], [digest for _, digest in self._digests]
        then = state.get("sha256", now)  # checkpoints of older versions know the sizes alone
        if state["sizes"] != sizes or then != now:
            known = then if len(then) == len(now) else [None] * len(now)
            changed = [name for (name, digest), before in zip(self._digests, known) if digest != before]
            where = f" in {', '.join(changed)}" if changed else ""
            raise UserError(
                f"the data changed since the checkpoint{where}: {state['sizes']} rows then, {sizes} now; "
                "valid: the data as it was, or another output_dir to start anew"
            )
        put_off = state.get("put_off", [[]] * len(sizes))
        for walk, drawn, rows in zip(self._walks, state["drawn"], put_off, strict=True):
            walk.drawn, walk.put_off = drawn, list(rows)

    def _next_pool(self) -> int:
        """The data set that is furthest behind its share."""
        if len(self._walks) == 1:
            return 0
        drawn = np.array([walk.drawn for walk in self._walks], dtype=np.float64)
        return int(np.argmax(self._shares * (drawn.sum() + 1) - drawn))
