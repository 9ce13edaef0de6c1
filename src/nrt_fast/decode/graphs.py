"""The decode step as a CUDA graph, one for each batch bucket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nrt_fast.decode.step import Batch, Sampling, step
from nrt_fast.kv_cache import KVCache
from nrt_fast.model.inference import Inference

MAX_STEPS = 8
"""Steps between two looks of the host: an ended row wastes half of them on average, a look costs about as much."""


@dataclass(frozen=True)
class Captured:
    """A graph and the tensors it reads and writes."""

    batch: Batch
    replay: Callable[[], None]


class StepGraphs:
    """Graphs of one model's step on one cache, captured when a bucket is first needed.

    A graph holds addresses and Python numbers. What changes between replays is in the tensors of its batch; what it
    baked in is its key; and if a parameter has moved since (it should not), all graphs are dropped, with their pool.

    Args:
        capture: makes ``replay`` from a function that runs the step; CUDA's by default.
    """

    def __init__(
        self, inference: Inference, cache: KVCache,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ):  # fmt: skip
        self.inference, self.cache = inference, cache
        self._new_capture = CudaCapture if capture is None else lambda: capture
        self._capture = self._new_capture()
        self._graphs: dict[tuple, Captured] = {}
        self._addresses = inference.addresses()

    def replay(self, batch: Batch, sampling: Sampling, num_steps: int) -> Batch:
        """Run steps on a batch; returns the batch that holds the results until the next replay."""
        batch = _with_room(batch)
        key = (_shape(batch), batch.rows.max_rows, sampling.temperature, sampling.max_repeated)
        if key not in self._graphs:
            self._graphs[key] = self._captured(batch, sampling)
        captured = self._graphs[key]
        _copy(batch, captured.batch)
        for _ in range(num_steps):
            captured.replay()
        return captured.batch

    def check(self) -> None:
        """Forget all graphs if a parameter is not where it was when they were captured."""
        addresses = self.inference.addresses()
        if addresses != self._addresses:
            self._graphs.clear()
            self._capture = self._new_capture()  # a pool ends with its last graph, and its handle is of no use then
            self._addresses = addresses

    def _captured(self, batch: Batch, sampling: Sampling) -> Captured:
        static = _clone(batch)
        replay = self._capture(lambda: step(self.inference, self.cache, static, sampling))
        return Captured(static, replay)


class CudaCapture:
    """Captures a function into a CUDA graph; all graphs share one memory pool, since only one runs at a time."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # The first runs compile kernels and allocate workspaces, which a capture may not.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


def _tensors(batch: Batch) -> list[Tensor]:
    return [
        value
        for part in (batch, batch.rows)
        for f in fields(part)
        if isinstance(value := getattr(part, f.name), Tensor)
    ]


def _shape(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in _tensors(batch))


def _copy(source: Batch, target: Batch) -> None:
    for old, new in zip(_tensors(source), _tensors(target), strict=True):
        new.copy_(old)


def _clone(batch: Batch) -> Batch:
    def cloned(part):
        copies = {f.name: getattr(part, f.name) for f in fields(part)}
        return replace(part, **{name: x.clone() for name, x in copies.items() if isinstance(x, Tensor)})

    return replace(cloned(batch), rows=cloned(batch.rows))


def _with_room(batch: Batch) -> Batch:
    """The batch in one of few shapes: as many groups as rows, tables as wide as a power of two, full chunks."""
    rows, B = batch.rows, len(batch.tokens_B)
    num_empty = B - len(rows.prefix_lens_P)
    return replace(
        batch,
        rows=replace(
            rows,
            prefix_pages_PX=F.pad(_widened(rows.prefix_pages_PX), (0, 0, 0, num_empty)),
            prefix_lens_P=F.pad(rows.prefix_lens_P, (0, num_empty)),
            own_pages_BY=_widened(rows.own_pages_BY),
            cu_rows=F.pad(rows.cu_rows, (0, num_empty), value=B),
        ),
        **{
            name: F.pad(tensor, (0, MAX_STEPS - tensor.shape[1]))
            for name in ("uniform_BC", "ids_BC", "logprob_BC")
            for tensor in [getattr(batch, name)]
        },
    )


def _widened(table: Tensor) -> Tensor:
    columns = 1 << max(table.shape[1] - 1, 0).bit_length()
    return F.pad(table, (0, columns - table.shape[1]))
