"""One step of decoding, on the device alone: from the last id of every row to its next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import CacheRows, KVCache
from nrt_fast.model.inference import Inference


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn and what ends a stream.

    Attributes:
        max_length: ids sampled at most; the delimiter counts.
        temperature: 0 is greedy.
        delimiter_id: ends a stream and is not part of it; None: there is none.
        eos_ids: end a stream and stay its last id.
        max_repeated: a stream ends when its last ``max_repeated`` ids each equal the id one cycle before, for some
            cycle of at most 32 ids; 0: repetition ends nothing.
        seed, step: key of the noise, together with the prompt's uid, the stream's number and the id's position.
    """

    max_length: int
    temperature: float
    delimiter_id: int | None
    eos_ids: tuple[int, ...]
    max_repeated: int = 0
    seed: int = 0
    step: int = 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end a stream."""
        return self.eos_ids if self.delimiter_id is None else (self.delimiter_id, *self.eos_ids)


@dataclass(frozen=True)
class Batch:
    """Streams on the device, one a row; ``step`` changes it in place and asks it nothing.

    Attributes:
        rows: where they are in the cache.
        tokens_B: [B] int64, the last id of each, which is not in the cache yet.
        is_live_B: [B] bool; rows that are over run along, and write to the slot past their end.
        num_left_B: [B] int64, ids that may still be sampled.
        uniform_BC: [B, C] fp64, the noise of the chunk's C steps.
        column_1: [1] int64, the next step of the chunk.
        stop_ids: [number of stop ids] int64.
        ids_BC, logprob_BC: [B, C] int64 and fp32, what was sampled.
        last_BW: [B, W] int64, the last ids of each as the repetition guard reads them; W = 0 without one.
    """

    rows: CacheRows
    tokens_B: Tensor
    is_live_B: Tensor
    num_left_B: Tensor
    uniform_BC: Tensor
    column_1: Tensor
    stop_ids: Tensor
    ids_BC: Tensor
    logprob_BC: Tensor
    last_BW: Tensor


def step(inference: Inference, cache: KVCache, batch: Batch, sampling: Sampling) -> None:
    """One id more for every live row, its log-probability, and what it ends."""
    hidden_BD = inference.decode(cache, batch.rows, batch.tokens_B)
    batch.rows.own_lens_B.add_(batch.is_live_B)
    uniform_B = batch.uniform_BC.index_select(1, batch.column_1).squeeze(1)
    ids_B, logprob_B = ops.sample_logprob(inference.logits(hidden_BD), uniform_B, sampling.temperature)
    record(batch, ids_B, logprob_B, sampling.max_repeated)


def record(batch: Batch, ids_B: Tensor, logprob_B: Tensor, max_repeated: int) -> None:
    """Note sampled ids, and which rows they end."""
    batch.ids_BC.index_copy_(1, batch.column_1, ids_B[:, None])
    batch.logprob_BC.index_copy_(1, batch.column_1, logprob_B[:, None])
    batch.column_1.add_(1)
    batch.tokens_B.copy_(torch.where(batch.is_live_B, ids_B, batch.tokens_B))
    batch.num_left_B.sub_(batch.is_live_B.long())
    goes_on_B = (batch.num_left_B > 0) & (ids_B[:, None] != batch.stop_ids).all(1)
    if max_repeated:
        batch.last_BW.copy_(torch.cat([batch.last_BW[:, 1:], ids_B[:, None]], dim=1))
        goes_on_B &= ~repeats(batch.last_BW, max_repeated)
    batch.is_live_B.logical_and_(goes_on_B)


def repeats(last_BW: Tensor, max_repeated: int) -> Tensor:
    """[B] bool: the last ``max_repeated`` ids equal those a cycle before, for a cycle of 1 to W - max_repeated ids."""
    windows_BCR = last_BW.unfold(1, max_repeated, 1)
    return (windows_BCR[:, :-1] == windows_BCR[:, -1:]).all(2).any(1)
