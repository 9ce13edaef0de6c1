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
    """Slots of [P, G] rows, one page of the storage each.

    Attributes:
        k, v: [L, N, K, S, E], N pages of S slots.
        pages_PG: [P, G] int32, the page of each row.
        lens_PG: [P, G] int64, filled slots, changed in place.
    """

    k: Tensor
    v: Tensor
    pages_PG: Tensor
    lens_PG: Tensor

    @classmethod
    def allocate(cls, layers: int, rows: tuple[int, int], kv_heads: int, slots: int, head_dim: int, like: Tensor):
        """Empty slots with the dtype and device of ``like``."""
        P, G = rows
        k, v = (like.new_empty(layers, P * G, kv_heads, slots, head_dim) for _ in range(2))
        pages_PG = torch.arange(P * G, dtype=torch.int32, device=like.device).view(P, G)
        return cls(k, v, pages_PG, torch.zeros(P, G, dtype=torch.int64, device=like.device))

    def advance(self, num_PG: Tensor) -> None:
        """Keep the next ``num_PG`` slots of every row."""
        self.lens_PG.add_(num_PG)

    def first(self, num_rows: int) -> Segment:
        """The first rows of every group, sharing the storage."""
        return Segment(self.k, self.v, self.pages_PG[:, :num_rows], self.lens_PG[:, :num_rows])


@dataclass(frozen=True)
class KVCache:
    """A prefilled batch of prompts.

    Attributes:
        prompt: segment with one row per group.
        own: segment with G + 1 rows per group; the last stays empty and reads the answer without a trace.
    """

    prompt: Segment
    own: Segment
