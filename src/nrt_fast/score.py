"""Score the reference answers on the cache the traces were sampled with: c with the trace, b without one."""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import KVCache
from nrt_fast.model import Model
from nrt_fast.types import Scores


@torch.no_grad()
def score(
    model: Model, cache: KVCache, pending: list[list[list[int]]], answers: list[list[int]], delimiter_id: int
) -> Scores:
    """log pi(y_i | x, z, d, y_<i) of every trace and of the empty one, in one pass over the live cache.

    A row's input is what the cache still lacks of its trace, the delimiter, and the answer without its last id. A whole
    group runs in one shape with its baseline, so that noise is common to both (method section 7). The cache's lengths
    do not change: the answer's slots are scratch.

    Args:
        cache: prompts, and G + 1 rows each of which the last is the empty trace.
        pending: [P][G + 1] ids of each trace that are not in the cache yet.
        answers: P lists of ids, none empty.
    """
    inputs = [
        [ids + [delimiter_id] + answer[:-1] for ids in group] for group, answer in zip(pending, answers, strict=True)
    ]
    device = model.embed.device
    hidden_TD, num_new_PG = model.extend_rows(inputs, cache)
    num_answer_PG = torch.tensor([[len(answer)] for answer in answers]).expand_as(num_new_PG)
    logprob_A = ops.linear_logprob(
        hidden_TD[_last_of_rows(num_new_PG.flatten(), num_answer_PG.flatten()).to(device)],
        model.head,
        torch.tensor([token for answer, group in zip(answers, inputs, strict=True) for token in answer * len(group)],
                     device=device),
    ).cpu()  # fmt: skip
    rows = iter(logprob_A.split(num_answer_PG.flatten().tolist()))
    groups = [[next(rows) for _ in group] for group in inputs]
    return Scores([group[:-1] for group in groups], [group[-1] for group in groups])


def _last_of_rows(lens_N: Tensor, wanted_N: Tensor) -> Tensor:
    """Flat positions of the last ``wanted`` tokens of each row."""
    offset = torch.arange(int(wanted_N.sum())) - (wanted_N.cumsum(0) - wanted_N).repeat_interleave(wanted_N)
    return (lens_N.cumsum(0) - wanted_N).repeat_interleave(wanted_N) + offset


def baseline_logprobs(
    model: Model, prompts: list[list[int]], answers: list[list[int]], delimiter_id: int
) -> list[Tensor]:
    """log b of each prompt under other weights (frozen or averaged): prefill, then the empty trace alone."""
    cache, _ = model.prefill(prompts, 1, 1 + max(map(len, answers)))
    return score(model, cache, [[[]] for _ in prompts], answers, delimiter_id).baseline_logprobs
