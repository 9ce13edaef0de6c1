"""The order in which rows are trained on: seeded, weighted, endless, and resumable from a few counts."""

from typing import Any

import numpy as np

from nrt_fast.types import UserError


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on the key alone: int64 [size]."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)


class _Walk:
    """Endless walk over one pool of rows: a fresh permutation for each pass."""

    def __init__(self, start: int, size: int, key: tuple[int, ...]):
        self.start, self.size, self.key = start, size, key
        self.drawn = 0
        self._epoch, self._rows = -1, np.empty(0, dtype=np.int64)

    def __next__(self) -> int:
        epoch, offset = divmod(self.drawn, self.size)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, permutation(self.size, *self.key, epoch)
        self.drawn += 1
        return self.start + int(self._rows[offset])


class Order:
    """Endless order over the rows of several data sets that lie one after another.

    Without weights every row comes once in each pass, all data sets mixed. With weights the data sets take turns, the
    one furthest behind its share first, and each is walked through on its own. The order is a function of the seed and
    of the number of rows drawn so far, so any position is reached without walking to it.

    Args:
        num_per_dataset: rows of each data set.
        weights: positive share of each data set, in any unit; None for one pass over everything.
        seed: not negative.

    Raises:
        UserError: weights that do not fit, or a data set without rows.
    """

    def __init__(self, num_per_dataset: list[int], weights: list[float] | None = None, seed: int = 0):
        if weights is not None and len(weights) != len(num_per_dataset):
            raise UserError(f"dataset_weights has {len(weights)} numbers for {len(num_per_dataset)} data sets")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"dataset_weights should all be above 0, not {weights}")
        sizes = num_per_dataset if weights is not None else [sum(num_per_dataset)]
        if min(sizes, default=0) < 1:
            raise UserError(f"a data set has no rows left to train on (rows: {num_per_dataset})")
        self._walks = [_Walk(sum(sizes[:pool]), size, (seed, pool)) for pool, size in enumerate(sizes)]
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
        """Draw the next rows, as indices into the concatenated data sets."""
        return [next(self._walks[self._next_pool()]) for _ in range(num_rows)]

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain lists of integers."""
        return {"sizes": [walk.size for walk in self._walks], "drawn": [walk.drawn for walk in self._walks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: the data sets are not those of the saved position.
        """
        sizes = [walk.size for walk in self._walks]
        if state["sizes"] != sizes:
            raise UserError(f"the data changed since the checkpoint: {state['sizes']} rows then, {sizes} now")
        for walk, drawn in zip(self._walks, state["drawn"], strict=True):
            walk.drawn = drawn

    def _next_pool(self) -> int:
        """The data set that is furthest behind its share."""
        if len(self._walks) == 1:
            return 0
        drawn = np.array([walk.drawn for walk in self._walks], dtype=np.float64)
        return int(np.argmax(self._shares * (drawn.sum() + 1) - drawn))
