"""Where the segments of packed groups stand, and what backends derive from that, once a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.reference.gather_rows import copies

R = TypeVar("R")


class Sequences(NamedTuple):
    """Every segment as a sequence of queries over keys of its own: its prompt's, then its own.

    Attributes:
        index_R: [R] int64, the packed token of each key.
        copies_R, cu_copies: [R] and [T + 1] int64, the keys of each packed token.
        query_lens, key_lens: of each sequence, on the host; a query at the end of either is the same token.
        cu_queries, cu_keys: int32 prefix sums of them, on the device.
    """

    index_R: Tensor
    copies_R: Tensor
    cu_copies: Tensor
    query_lens: list[int]
    key_lens: list[int]
    cu_queries: Tensor
    cu_keys: Tensor

    def keys(self, x_TKE: Tensor) -> Tensor:
        """[R, K, E]: every sequence's keys, or its values, one sequence after the other."""
        return ops.gather_rows(x_TKE, self.index_R, self.copies_R, self.cu_copies)


class PackedLayout:
    """The segments of packed groups: of each group its prompt, then its traces; empty ones are left out.

    Args:
        cu_seqlens: [segments + 1] int32, where segments start.
        num_traces_M: [M] int64, traces of each group.
        device: of the tokens.

    Attributes:
        starts_S, lens_S: [S] int64 on the CPU, where each segment stands.
        root_S: [S] int64 on the CPU, the segment of its prompt; a prompt's own number for a prompt.
        prefix_lens_S: [S] int64 on the CPU, the tokens that stand before a segment's own: its prompt's, or none.
    """

    def __init__(self, cu_seqlens: Tensor, num_traces_M: Tensor, device: torch.device):
        self.device = device
        cu_seqlens, num_segments_M = cu_seqlens.long().cpu(), num_traces_M.cpu() + 1
        lens = cu_seqlens.diff()
        root = (num_segments_M.cumsum(0) - num_segments_M).repeat_interleave(num_segments_M)
        if not lens[root].all():
            raise ValueError("a group's prompt is empty")
        filled = lens > 0
        number = filled.cumsum(0) - 1
        self.num_tokens = int(cu_seqlens[-1])
        self.starts_S, self.lens_S = cu_seqlens[:-1][filled], lens[filled]
        self.root_S = number[root][filled]
        is_prompt = self.root_S == torch.arange(len(self.root_S))
        self.prefix_lens_S = torch.where(is_prompt, 0, self.lens_S[self.root_S])
        self._built: dict[Hashable, object] = {}

    def once(self, key: Hashable, build: Callable[[], R]) -> R:
        """What ``build`` returns, built when it is first asked for."""
        if key not in self._built:
            self._built[key] = build()
        return self._built[key]

    def sequences(self) -> Sequences:
        """The segments as sequences with keys of their own."""
        return self.once("sequences", self._sequences)

    def _sequences(self) -> Sequences:
        key_lens_S = self.prefix_lens_S + self.lens_S
        cu_keys = _prefix_sums(key_lens_S)
        segment_R = torch.arange(len(key_lens_S)).repeat_interleave(key_lens_S)
        key_R = torch.arange(int(cu_keys[-1])) - cu_keys[segment_R]
        own_R = key_R - self.prefix_lens_S[segment_R]
        root_R = self.root_S[segment_R]
        index_R = torch.where(own_R < 0, self.starts_S[root_R] + key_R, self.starts_S[segment_R] + own_R)
        return Sequences(
            *(x.to(self.device) for x in (index_R, *copies(index_R, self.num_tokens))),
            self.lens_S.tolist(),
            key_lens_S.tolist(),
            _prefix_sums(self.lens_S).int().to(self.device),
            cu_keys.int().to(self.device),
        )

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """[T] int64 each, on the device: a token's segment, that of its prompt, and its position."""
        return self.once("tokens", self._tokens)

    def _tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        segment_T = torch.arange(len(self.lens_S)).repeat_interleave(self.lens_S)
        position_T = torch.arange(self.num_tokens) + (self.prefix_lens_S - self.starts_S)[segment_T]
        return tuple(x.to(self.device) for x in (segment_T, self.root_S[segment_T], position_T))


def _prefix_sums(lens: Tensor) -> Tensor:
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)])


def aligned(x: Tensor) -> Tensor:
    """The tensor itself, or a copy of it unless every row starts at a multiple of 16 bytes, as flash kernels assume."""
    offsets = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    fits = x.stride(-1) == 1 and all(offset % 16 == 0 for offset in offsets)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
