"""Keys and values of a batch of groups: the prompt once per group, and what each trace added to it.

Every way of appending tokens (prefill, decode, scoring) writes to a segment's own slots and may read a prefix segment
in place. Slots past a row's length are scratch: written freely, seen by nobody, so scored answers need no undo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Slots of [P, G] rows.

    Attributes:
        k, v: [L, P, G, K, S, E], zero where never written (a masked slot must be finite).
        lens_PG: [P, G] int64, filled slots, changed in place.
    """

    k: Tensor
    v: Tensor
    lens_PG: Tensor

    @classmethod
    def allocate(cls, layers: int, rows: tuple[int, int], kv_heads: int, slots: int, head_dim: int, like: Tensor):
        """Empty slots with the dtype and device of ``like``."""
        shape = (layers, *rows, kv_heads, slots, head_dim)
        lens = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), lens)

    def advance(self, num_PG: Tensor) -> None:
        """Keep the next ``num_PG`` slots of every row."""
        self.lens_PG.add_(num_PG)

    def first(self, num_rows: int) -> Segment:
        """The first rows of every group, sharing the storage."""
        return Segment(self.k[:, :, :num_rows], self.v[:, :, :num_rows], self.lens_PG[:, :num_rows])


@dataclass(frozen=True)
class KVCache:
    """A prefilled batch of prompts.

    Attributes:
        prompt: segment with one row per group.
        own: segment with G + 1 rows per group; the last stays empty and reads the answer without a trace.
    """

    prompt: Segment
    own: Segment
