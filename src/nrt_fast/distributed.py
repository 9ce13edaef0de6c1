"""Several processes as one: who this one is, what all of them know and decide alike, flat tensors in slices.

The processes are torchrun's, on one machine or many (docs/distributed.md). With one process every function here returns
what it was given. Numbers of the host go through gloo, those on a GPU through NCCL. Ranks call the same functions in
the same order.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nrt_fast.types import UserError
from nrt_fast.watch import SILENCE_S, Watch


class RankError(UserError):
    """A rank failed; the message begins with which."""


class _Job:
    """This process among others.

    Attributes:
        rank, size: which of how many.
        alone: while the first rank does something for all.
        measured: seconds and bytes since ``take_measured``, as metrics.
        at_end: what the first rank does when the others may leave.
    """

    def __init__(self, watch: Watch, timeout_s: float):
        self.rank, self.size = watch.rank, watch.size
        self.watch, self.timeout_s, self.alone = watch, timeout_s, False
        self.measured: Counter[str] = Counter()
        self.at_end: list[Callable[[], Any]] = []


_job: _Job | None = None
# torch 2.13 has new names for the two.
_gather_even = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_even = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size() -> int:
    """Processes that work together; 1 inside ``on_first``."""
    return 1 if _job is None or _job.alone else _job.size


def rank() -> int:
    """This one of them, from 0."""
    return 0 if _job is None else _job.rank


def is_first() -> bool:
    """Whether this is the rank that writes, prints and reports."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line once, not once for each rank."""
    if is_first():
        print(text)


@contextmanager
def joined(timeout_s: float, device: str = "auto") -> Iterator[None]:
    """Work together with the other processes that torchrun started; nothing of it with one process.

    Args:
        timeout_s: longest that a rank waits for another before it says which one did not come.
        device: as in the configuration; each rank of a host has the GPU of its number there.

    Raises:
        RankError: this or another rank failed, died or hangs.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpus, timeout = device != "cpu" and torch.cuda.is_available(), timedelta(seconds=timeout_s)
    store, own, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
    store = _met(store, own, num_ranks, timeout_s)
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=num_ranks, timeout=timeout)
    signs = dist.PrefixStore("nrt_fast", store.clone())
    signs.set_timeout(timedelta(seconds=SILENCE_S))
    _job = _Job(Watch(signs, own, num_ranks), timeout_s)
    at_end = _job.at_end
    try:
        if on_gpus:
            _take_gpu(device)
        yield
        any_of(False)  # nobody leaves while another still works
        dist.destroy_process_group()
    except BaseException as error:
        _tell(error)
        if isinstance(error, UserError) and not isinstance(error, RankError):
            raise RankError(f"rank {own}: {error}") from error
        raise
    finally:
        _job.watch.stop()
        _job = None
    for call in at_end:  # a single process now, which waits for nobody and is watched by nobody
        call()


def _met(store, own: int, num_ranks: int, timeout_s: float):
    """The store under a name of this start alone: torchrun's outlives the ranks, and has what earlier ones left there.

    Each rank says hello with a word that nobody has used; the first answers those it sees until all have its answer.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if own > 0:
        store.set(f"hello/{own}", word)
        name = store.get(f"welcome/{word}").decode()
        store.add(f"{name}/met", 1)
        return dist.PrefixStore(name, store)
    while store.add(f"{word}/met", 0) < num_ranks - 1:
        for other in range(1, num_ranks):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", word)
        if time.monotonic() > end:
            raise UserError(f"not all of {num_ranks} processes came within {timeout_s:g} s")
        time.sleep(0.02)
    return dist.PrefixStore(word, store)


def _take_gpu(device: str) -> None:
    if ":" in device:
        raise UserError(f"device {device} is one GPU for several processes; leave it out, each rank has its own")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this host has no GPU: torch sees {torch.cuda.device_count()} here")
    torch.cuda.set_device(local)


def _tell(error: BaseException) -> None:
    """Let the other ranks know why this one ends."""
    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    _job.watch.stop()
    with suppress(RuntimeError):  # the store's host may be what was lost
        _job.watch.fail(told if isinstance(error, RankError) else f"rank {_job.rank}: {told}")


@contextmanager
def _together(doing: str) -> Iterator[None]:
    """What all ranks do at one time; whose fault it is if it fails."""
    _job.watch.enter(doing)
    started = time.perf_counter()
    try:
        yield
        _job.measured["comm/wait_s"] += time.perf_counter() - started
    except RuntimeError as error:  # gloo's and NCCL's name of a rank that is gone or late
        try:
            reason = _job.watch.why(error, _job.timeout_s)
        except RuntimeError:
            reason = f"rank {_job.rank}: a rank is gone, and the host of the rendezvous does not answer"
        raise RankError(reason) from error


# What all ranks know


def gather_rows(rows: list[Tensor], dtype: torch.dtype, doing: str) -> list[Tensor]:
    """The rows of all ranks, rank after rank: CPU tensors [n_i] of a dtype; a rank may have none."""
    if size() == 1:
        return rows
    lengths = _gather(torch.tensor([len(row) for row in rows], dtype=torch.int64), doing)
    return list(_gather(torch.cat([torch.empty(0, dtype=dtype), *rows]), doing).split(lengths.tolist()))


def _gather(values: Tensor, doing: str) -> Tensor:
    """[n] of each rank, whose n differ, as one tensor."""
    with _together(doing):
        num = torch.empty(size(), dtype=torch.int64)
        _gather_even(num, torch.tensor([len(values)]))
        most = int(num.max())
        padded = values.new_zeros(size() * most)
        own = values.new_zeros(most)
        own[: len(values)] = values
        if most:
            _gather_even(padded, own)
    _count("host", padded)
    return torch.cat([part[:n] for part, n in zip(padded.view(size(), most), num.tolist(), strict=True)])


def union(values: Tensor, doing: str) -> Tensor:
    """Every rank's numbers, each of which one rank knows and the others have as NaN; NaN where no rank knows."""
    if size() == 1:
        return values
    known = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    with _together(doing):
        dist.all_reduce(known, dist.ReduceOp.MAX)
    _count("host", known)
    return known.where(known != -math.inf, math.nan)


def total(values: dict[str, float], doing: str) -> dict[str, float]:
    """The sum of each value over all ranks; their names are the same everywhere."""
    if size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    with _together(doing):
        dist.all_reduce(sums)
    _count("host", sums)
    return dict(zip(values, sums.tolist(), strict=True))


def least(value: int) -> int:
    """The smallest of all ranks' values."""
    return min(on_all(lambda: value, "the least"))


def any_of(flag: object) -> bool:
    """Whether it is true on some rank: what all of them then act on."""
    return any(on_all(lambda: bool(flag), "a decision"))


def on_all(call: Callable[[], Any], doing: str) -> list[Any]:
    """What the call returns on each rank, as JSON has it, on all of them.

    Raises:
        UserError: it raised one somewhere; the same on every rank.
    """
    if size() == 1:
        return [call()]
    outcomes = [json.loads(row.numpy().tobytes()) for row in gather_rows([_outcome(call)], torch.uint8, doing)]
    for number, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise RankError(f"rank {number}: {outcome['error']}")
    return [outcome["value"] for outcome in outcomes]


def on_first(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the first rank does for all: they get what it returns, as JSON has it, or its UserError.

    Inside the call the first rank is a single process.
    """
    if size() == 1:
        return call(*arguments)

    def alone() -> Any:
        if not is_first():
            return None
        _job.alone = True
        try:
            return call(*arguments)
        finally:
            _job.alone = False

    return on_all(alone, call.__name__.strip("_"))[0]


def at_end(call: Callable[..., Any], *arguments: Any) -> None:
    """Have the first rank do what takes longer than a rank waits for another: when all have left ``joined``."""
    if size() == 1:
        call(*arguments)
    elif is_first():
        _job.at_end.append(partial(call, *arguments))


def _outcome(call: Callable[[], Any]) -> Tensor:
    try:
        outcome = {"value": call()}
    except UserError as error:
        outcome = {"error": str(error)}
    return torch.frombuffer(bytearray(json.dumps(outcome, default=str).encode()), dtype=torch.uint8)


# Work in shares


def share(costs: list[int]) -> list[int]:
    """The positions that are this rank's: each goes to the rank with the least so far, the most costly first.

    Longest processing time first is within a third of the best (Graham 1969), and every rank finds the same.
    """
    if size() == 1:
        return list(range(len(costs)))
    loads, own = [(0, number) for number in range(size())], []
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[position], number))
        if number == rank():
            own.append(position)
    return sorted(own)


def each(call: Callable[[Any], float], items: list[Any]) -> list[float]:
    """The call's value for every item, which all ranks have; each computes those of its share."""
    if size() == 1:
        return list(map(call, items))
    own = torch.tensor([call(item) for item in items[rank() :: size()]], dtype=torch.float64)
    values = torch.empty(len(items), dtype=torch.float64)
    for number, part in enumerate(gather_rows([own], torch.float64, "the metrics")):
        values[number :: size()] = part
    return values.tolist()


# Flat tensors in slices


def own_slice(num_elements: int, block: int) -> slice:
    """The part of a flat tensor that this rank keeps: the ranks' are equal, and the last has what is left besides.

    Args:
        block: each part begins at a multiple of it.
    """
    step = _step(num_elements, block)
    is_last = rank() == size() - 1
    return slice(rank() * step, num_elements if is_last else (rank() + 1) * step)


def _step(num_elements: int, block: int) -> int:
    return num_elements // size() // block * block


def _parts(flat: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: what the ranks have equal slices of, this rank's slice of it, and what the last rank has besides."""
    step = _step(len(flat), block)
    even, rest = flat[: step * size()], flat[step * size() :]
    return even, even[rank() * step : (rank() + 1) * step], rest


def reduce_scatter(flat: Tensor, block: int) -> None:
    """Sum a flat tensor over all ranks, in place; each has the sum in its own slice, and anything elsewhere."""
    if size() == 1:
        return
    even, own, rest = _parts(flat, block)
    with _together("the gradients"):
        if len(even):
            _scatter_even(own, even)
        if len(rest):
            dist.all_reduce(rest)
    _count("gradients", flat)


def all_gather(flat: Tensor, block: int) -> None:
    """Fill a flat tensor, in place, from every rank's own slice of it."""
    if size() == 1:
        return
    even, own, rest = _parts(flat, block)
    with _together("the weights"):
        if len(even):
            _gather_even(even, own)
        if len(rest):
            dist.broadcast(rest, size() - 1)
    _count("weights", flat)


def norm(own: Tensor) -> Tensor:
    """Norm over all ranks from that of each one's part, [] fp32."""
    if size() == 1:
        return own
    square = own.square()
    with _together("the gradient norm"):
        dist.all_reduce(square)
    return square.sqrt()


def _count(what: str, values: Tensor) -> None:
    _job.measured[f"comm/{what}_bytes"] += values.nbytes


def take_measured() -> dict[str, float]:
    """What was summed and gathered since the last call, as metrics; nothing with one process.

    comm/gradients_bytes, comm/weights_bytes, comm/host_bytes: what was summed, or is there when all have it, once;
    a rank sends and receives (N - 1) / N of it. comm/wait_s: seconds in which this rank waited for the others.
    """
    if _job is None:
        return {}
    measured, _job.measured = dict(_job.measured), Counter()
    return measured
