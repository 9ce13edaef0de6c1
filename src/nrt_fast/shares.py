"""A step's groups over the ranks: which samples which, and what came of it on all of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from nrt_fast import distributed
from nrt_fast.engine import Engine, Thoughts
from nrt_fast.metrics import mean
from nrt_fast.types import Example, Scores, Traces


def deal(examples: list[Example], engine: Engine) -> list[list[int]]:
    """Positions of each rank's examples: dealt one by one, those with the longest expected traces first.

    A group is never split, and a rank may have none. Every rank deals the same.
    """
    size = distributed.size()
    if size == 1:
        return [list(range(len(examples)))]
    lengths = engine.trace_lengths
    order = sorted(range(len(examples)), key=lambda position: -lengths.get(examples[position].uid, 0.0))
    return [order[rank::size] for rank in range(size)]


def own_share(examples: list[Example], dealt: list[list[int]]) -> list[Example]:
    """The examples that were dealt to this rank."""
    return [examples[position] for position in dealt[distributed.rank()]]


def gather_thoughts(
    mine: Thoughts, examples: list[Example], dealt: list[list[int]], num_generations: int, engine: Engine
) -> Thoughts:
    """The thoughts of all ranks, for all examples in order; the engine then expects their lengths of each.

    Args:
        mine: of this rank's examples.
        dealt: what ``deal`` gave.
    """
    if distributed.size() == 1:
        return mine
    traces, order = mine.traces, list(chain(*dealt))
    ids = _gather(chain(*traces.trace_ids), torch.int32, order, num_generations)
    # The delimiter's log-probability comes behind those of the trace, NaN where it was not sampled.
    rows = zip(chain(*traces.logprobs), chain(*traces.delimiter_logprobs), strict=True)
    rows = ([*row, torch.nan if end is None else end] for row, end in rows)
    logprobs = _gather(rows, torch.float32, order, num_generations)
    log_c = _gather(chain(*mine.scores.logprobs), torch.float32, order, num_generations)
    answers = _gather(chain(*mine.answers), torch.int32, order, num_generations + 1)
    thoughts = Thoughts(
        Traces(
            [[row.tolist() for row in group] for group in ids],
            [[row[:-1].tolist() for row in group] for group in logprobs],
            [[None if row[-1].isnan() else float(row[-1]) for row in group] for group in logprobs],
        ),
        Scores(log_c, gather_rows(mine.scores.baseline_logprobs, dealt)),
        [[row.tolist() for row in group] for group in answers],
    )
    for example, group in zip(examples, ids, strict=True):
        if group:
            engine.trace_lengths[example.uid] = mean(list(map(len, group)))
    return thoughts


def gather_rows(rows: list[Tensor], dealt: list[list[int]]) -> list[Tensor]:
    """One tensor for each example, from the ranks that the examples were dealt to, in the examples' order."""
    if distributed.size() == 1:
        return rows
    return [row for (row,) in _gather(rows, torch.float32, list(chain(*dealt)), 1)]


def _gather(rows: Iterable[list | Tensor], dtype: torch.dtype, order: list[int], group_size: int) -> list[list[Tensor]]:
    """[P][group_size] rows in the examples' order; empty groups where there are no rows."""
    own = [torch.as_tensor(row, dtype=dtype, device="cpu") for row in rows]
    gathered = distributed.gather_rows(own, dtype, "the groups of the step")
    groups: list[list[Tensor]] = [[] for _ in order]
    if gathered:
        for number, position in enumerate(order):
            groups[position] = gathered[number * group_size : (number + 1) * group_size]
    return groups
