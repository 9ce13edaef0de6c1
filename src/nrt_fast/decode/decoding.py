"""Decoding in lockstep: streams go on by one id at a time, whatever group they belong to."""

from __future__ import annotations

from collections import abc

import numpy as np
import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.decode.graphs import StepGraphs
from nrt_fast.decode.step import Batch, Sampling, record, step
from nrt_fast.kv_cache import NO_PREFIX, SCRATCH_PAGE, KVCache, Sequence
from nrt_fast.model.inference import Inference
from nrt_fast.streams import Group, Stream, in_passes

Work = list[tuple[Group, list[Stream]]]
"""Streams to go on with, a group's together."""

LONGEST_CYCLE = 32
"""Ids; a longer cycle is not taken for repetition."""

BUCKETS = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 256, 32), *range(256, 1025, 64))
"""Rows of the batches that CUDA graphs are captured for."""


@torch.no_grad()
def prefill(inference: Inference, cache: KVCache, groups: list[Group]) -> int:
    """Run the prompts that the cache lacks, those that it had to drop among them; returns their tokens.

    Raises:
        ValueError: the cache has not enough free pages.
    """
    missing = [group for group in groups if not group.prompt.length]
    for group in missing:
        cache.require(group.prompt, len(group.prompt_ids))
    for part in in_passes((group, len(group.prompt_ids)) for group in missing):
        rows, inputs = [(NO_PREFIX, [group.prompt]) for group in part], [group.prompt_ids for group in part]
        for group, hidden_D in zip(part, _last_hidden(inference, cache, rows, inputs), strict=True):
            group.prompt.length, group.hidden_D = len(group.prompt_ids), hidden_D
    return sum(len(group.prompt_ids) for group in missing)


def _last_hidden(inference: Inference, cache: KVCache, rows: list, inputs: list[list[int]]) -> Tensor:
    """``extend``, of which only each row's last hidden state is kept: [B, D]."""
    return inference.extend(cache, rows, inputs)[np.cumsum([len(ids) for ids in inputs]) - 1]


def bucket_of(num_rows: int) -> int:
    """The smallest bucket that holds so many rows."""
    return next((size for size in BUCKETS if size >= num_rows), num_rows)


class Decoding:
    """The one way streams go on: whole steps for many of them, with the host looking in between.

    On CUDA a batch is filled up to a bucket and its steps are replays of one graph, so the host looks only when a chunk
    of steps is over. On a CPU a batch has the rows it needs, and a chunk ends early when a stream does.

    Args:
        inference, cache: of one model.
        sampling: of all streams.
        graphs: replays steps; None runs them one by one.
    """

    def __init__(self, inference: Inference, cache: KVCache, sampling: Sampling, graphs: StepGraphs | None = None):
        self.inference, self.cache, self.sampling, self.graphs = inference, cache, sampling, graphs

    @torch.no_grad()
    def start(self, work: Work) -> None:
        """Feed what the cache lacks of each stream, and sample one id. Prompts are in the cache, pages are reserved."""
        pending = [(group, stream) for group, streams in work for stream in streams if stream.pending]
        hidden = self._feed(pending)
        streams = [(group, stream) for group, streams in work for stream in streams]
        hidden_BD = torch.stack([next(hidden) if stream.pending else group.hidden_D for group, stream in streams])
        batch = self._batch(work, 1, lambda num_rows: num_rows)
        ids_B, logprob_B = ops.sample_logprob(
            self.inference.logits(hidden_BD), batch.uniform_BC[:, 0], self.sampling.temperature
        )
        record(batch, ids_B, logprob_B, self.sampling.max_repeated)
        for _, stream in streams:
            stream.cached.length = len(stream.ids)
        self._collect(batch, [stream for _, stream in streams])

    def _feed(self, pending: list[tuple[Group, Stream]]) -> abc.Iterator[Tensor]:
        """[D] final hidden state of each stream's last pending id."""
        for part in in_passes(((group, stream), len(stream.pending)) for group, stream in pending):
            rows = [(group.prompt, [stream.cached]) for group, stream in part]
            yield from _last_hidden(self.inference, self.cache, rows, [stream.pending for _, stream in part])

    @torch.no_grad()
    def run(self, work: Work, num_steps: int) -> int:
        """Sample up to ``num_steps`` ids more for each stream; each was started, and has pages for as many.

        Returns:
            Steps that were run.
        """
        streams = [stream for _, streams in work for stream in streams]
        if self.graphs is not None:
            batch = self.graphs.replay(self._batch(work, num_steps, bucket_of), self.sampling, num_steps)
        else:
            batch = self._batch(work, num_steps, lambda num_rows: num_rows)
            for _ in range(num_steps):
                step(self.inference, self.cache, batch, self.sampling)
                if not batch.is_live_B.all():
                    num_steps = int(batch.column_1)
                    break
        for stream, num_new in zip(streams, self._collect(batch, streams), strict=True):
            stream.cached.length += num_new
        return num_steps

    def _batch(self, work: Work, num_steps: int, bucket: abc.Callable[[int], int]) -> Batch:
        """The streams as they are now, filled up with rows that are over and that only the scratch page knows."""
        streams = [(group, stream) for group, streams in work for stream in streams]
        num_padding = bucket(len(streams)) - len(streams)
        padding = [(NO_PREFIX, [Sequence([SCRATCH_PAGE])])] * num_padding
        rows = [(group.prompt, [stream.cached for stream in streams]) for group, streams in work]

        def int64(values: list[int], fill: int) -> Tensor:
            return self.cache.to_device(np.array(values + [fill] * num_padding, np.int64))

        sampled_B = int64([stream.num_sampled for _, stream in streams], 0)
        uniform_BC = ops.philox_uniform(
            self.sampling.seed,
            self.sampling.step,
            int64([group.uid for group, _ in streams], 0)[:, None],
            int64([stream.number for _, stream in streams], 0)[:, None],
            sampled_B[:, None] + torch.arange(num_steps, device=sampled_B.device),
        )
        num_left_B = self.sampling.max_length - sampled_B
        num_left_B[len(streams) :] = 0
        return Batch(
            rows=self.cache.rows(rows + padding, max_rows=max(len(group.streams) for group, _ in work)),
            tokens_B=int64([stream.ids[-1] if stream.ids else 0 for _, stream in streams], 0),
            is_live_B=num_left_B > 0,
            num_left_B=num_left_B,
            uniform_BC=uniform_BC,
            column_1=torch.zeros(1, dtype=torch.int64, device=sampled_B.device),
            stop_ids=self.cache.to_device(np.array(self.sampling.stop_ids, np.int64)),
            ids_BC=torch.empty(uniform_BC.shape, dtype=torch.int64, device=sampled_B.device),
            logprob_BC=torch.empty(uniform_BC.shape, device=sampled_B.device),
            last_BW=self.cache.to_device(self._last_ids([stream for _, stream in streams], num_padding)),
        )

    def _last_ids(self, streams: list[Stream], num_padding: int) -> np.ndarray:
        width = self.sampling.max_repeated and self.sampling.max_repeated + LONGEST_CYCLE
        # No two entries in front of a stream's first id are equal.
        last = np.tile(-1 - np.arange(width), (len(streams) + num_padding, 1))
        for row, stream in zip(last, streams, strict=False):
            ids = stream.ids[max(stream.first, len(stream.ids) - width) :]
            row[width - len(ids) :] = ids
        return last

    def _collect(self, batch: Batch, streams: list[Stream]) -> list[int]:
        """Hand out what a batch sampled; how many ids each stream got, the delimiter included."""
        left_before = [self.sampling.max_length - stream.num_sampled for stream in streams]
        results = (batch.ids_BC, batch.logprob_BC, batch.num_left_B, batch.is_live_B)
        ids, logprobs, left, is_live = (x.tolist() for x in results)
        num_new = [before - after for before, after in zip(left_before, left, strict=False)]
        for row, (stream, num) in enumerate(zip(streams, num_new, strict=True)):
            stream.ids += ids[row][:num]
            stream.logprobs += logprobs[row][:num]
            stream.is_over = not is_live[row]
            if stream.ids[-1] == self.sampling.delimiter_id:
                stream.ids.pop()
                stream.end = stream.logprobs.pop()
        return num_new
