"""Keys and values in pages of one storage that never moves: the prompt once per group, and what each trace added.

A sequence is a list of pages and a length. Attention reads a group's prompt in place, its partly filled last page
included, so forking a prompt to G traces copies nothing. Slots past a sequence's length are scratch: written freely,
seen by nobody, so scored answers need no undo.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from nrt_fast.arena import Arena

SCRATCH_PAGE = 0  # where rows that only fill a batch write


@dataclass
class Sequence:
    """Consecutive slots of the cache.

    Attributes:
        pages: numbers of its pages, in order.
        length: filled slots.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0


NO_PREFIX = Sequence()


@dataclass(frozen=True)
class CacheRows:
    """Rows of a batch as attention sees them, on the device: each reads its group's prefix and its own sequence.

    Attributes:
        prefix_pages_PX: [P, X] int32; X = 0 where no group has a prefix.
        prefix_lens_P: [P] int32.
        own_pages_BY: [B, Y] int32.
        own_lens_B: [B] int32, filled slots.
        group_B: [B] int64, each row's group.
        cu_rows: [P + 1] int32 offsets of each group's rows.
        max_rows: at least the rows of any group.
    """

    prefix_pages_PX: Tensor
    prefix_lens_P: Tensor
    own_pages_BY: Tensor
    own_lens_B: Tensor
    group_B: Tensor
    cu_rows: Tensor
    max_rows: int


class KVCache:
    """Pages of keys and values at a fixed address.

    Args:
        like: gives dtype and device.
        arena: memory they have in turn with something else; memory of their own where there is none.

    Attributes:
        k, v: [L, N, K, S, E], N pages of S slots; page 0 is scratch.
        page_size: S, in tokens.
        num_pages: pages that sequences can have, N - 1.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_pages: int, page_size: int, like: Tensor,
        arena: Arena | None = None,
    ):  # fmt: skip
        shape = 2, layers, num_pages + 1, kv_heads, page_size, head_dim
        self.k, self.v = arena.view(prod(shape), like.dtype).view(shape) if arena else like.new_empty(shape)
        self.page_size, self.num_pages = page_size, num_pages
        # The page that was used last is taken first: memory that no call needed is never touched.
        self._free = list(range(num_pages, SCRATCH_PAGE, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def pages_for(self, length: int) -> int:
        """Pages of a sequence of this many tokens."""
        return -(-length // self.page_size)

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence the pages that ``length`` slots take; False, and nothing, where there are not enough."""
        missing = self.pages_for(length) - len(sequence.pages)
        if missing > len(self._free):
            return False
        if missing > 0:
            sequence.pages += reversed(self._free[-missing:])
            del self._free[-missing:]
        return True

    def require(self, sequence: Sequence, length: int) -> None:
        """As ``reserve``, or ValueError."""
        if not self.reserve(sequence, length):
            raise ValueError(f"{length} tokens do not fit: {self.num_free} of {self.num_pages} pages are free")

    def drop(self, sequence: Sequence) -> None:
        """Empty a sequence; its pages are free again."""
        self._free += reversed(sequence.pages)
        sequence.pages, sequence.length = [], 0

    def rows(
        self, groups: abc.Sequence[tuple[Sequence, abc.Sequence[Sequence]]], max_rows: int = 0, columns: int = 0
    ) -> CacheRows:
        """What a batch of (prefix, rows of the group) looks like to attention; every row's pages are reserved.

        Args:
            max_rows: what CacheRows.max_rows is at least.
            columns: what the tables have at least.
        """
        own = [row for _, rows in groups for row in rows]
        sizes = [len(rows) for _, rows in groups]
        return CacheRows(
            self._table([prefix for prefix, _ in groups], columns),
            self._int32([prefix.length for prefix, _ in groups]),
            self._table(own, columns),
            self._int32([row.length for row in own]),
            self.to_device(np.repeat(np.arange(len(groups)), sizes)),
            self._int32(np.cumsum([0, *sizes])),
            max(max_rows, *sizes),
        )

    def _table(self, sequences: list[Sequence], columns: int) -> Tensor:
        columns = max(columns, *(len(sequence.pages) for sequence in sequences))
        table = np.full((len(sequences), columns), SCRATCH_PAGE, np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return self.to_device(table)

    def _int32(self, values: abc.Sequence[int] | np.ndarray) -> Tensor:
        return self.to_device(np.asarray(values, np.int32))

    def to_device(self, array: np.ndarray) -> Tensor:
        """The array as a tensor beside the pages."""
        return torch.from_numpy(array).to(self.k.device, non_blocking=True)
