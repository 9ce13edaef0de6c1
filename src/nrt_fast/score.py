"""Score the reference answers on the cache the traces were sampled with: c with the trace, b without one."""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_fast.decode import prefill
from nrt_fast.kv_cache import KVCache, Sequence
from nrt_fast.model.inference import Inference
from nrt_fast.streams import Group, in_passes
from nrt_fast.types import Scores


@torch.no_grad()
def score(
    inference: Inference, cache: KVCache, groups: list[Group], answers: list[list[int]], delimiter_id: int
) -> tuple[Scores, int]:
    """log pi(y_i | x, z, d, y_<i) of every trace and of the empty one, over the live cache.

    A row's input is what the cache still lacks of its trace (the last sampled id of a trace that was cut; all of one
    that lost its pages), the delimiter, and the answer without its last id. A whole group runs in one shape with its
    baseline, so that noise is common to both. The answers stay scratch: no length changes.

    Args:
        groups: whose streams are the traces; prompts that are not in the cache are run first.
        answers: one for each group, none empty.

    Returns:
        (Scores of the groups, tokens that went through the model).

    Raises:
        ValueError: the cache has not enough free pages.
    """
    num_tokens = prefill(inference, cache, groups)
    logprobs, baselines = [], []
    for part in in_passes((pair, _num_tokens(*pair)) for pair in zip(groups, answers, strict=True)):
        inputs = [
            [ids + [delimiter_id] + answer[:-1] for ids in [*(stream.pending for stream in group.streams), []]]
            for group, answer in part
        ]
        num_tokens += sum(len(ids) for rows in inputs for ids in rows)
        for rows in _logprobs(inference, cache, part, inputs):
            logprobs.append(rows[:-1])
            baselines.append(rows[-1])
    return Scores(logprobs, baselines), num_tokens


def _num_tokens(group: Group, answer: list[int]) -> int:
    return sum(len(stream.pending) + len(answer) for stream in group.streams) + len(answer)


def _logprobs(
    inference: Inference, cache: KVCache, part: list[tuple[Group, list[int]]], inputs: list[list[list[int]]]
) -> list[list[Tensor]]:
    """Log-probabilities of the answers in one pass: for each group, a tensor [A] for each row."""
    empty = [Sequence() for _ in part]
    work = [(group.prompt, [*(s.cached for s in group.streams), row]) for (group, _), row in zip(part, empty)]
    try:
        for (_, rows), row_inputs in zip(work, inputs, strict=True):
            for row, ids in zip(rows, row_inputs, strict=True):
                cache.require(row, row.length + len(ids))
        hidden_TD = inference.extend(cache, work, [ids for rows in inputs for ids in rows])
    finally:
        for row in empty:
            cache.drop(row)
    num_new_N = torch.tensor([len(ids) for rows in inputs for ids in rows])
    targets = [answer for (_, answer), rows in zip(part, inputs, strict=True) for _ in rows]
    num_answer_N = torch.tensor([len(answer) for answer in targets])
    logprob_A = inference.logprobs(
        hidden_TD[_last_of_rows(num_new_N, num_answer_N).to(inference.device)],
        torch.tensor([token for answer in targets for token in answer], device=inference.device),
    ).cpu()
    rows = iter(logprob_A.split(num_answer_N.tolist()))
    return [[next(rows) for _ in group] for group in inputs]


def _last_of_rows(lens_N: Tensor, wanted_N: Tensor) -> Tensor:
    """Flat positions of the last ``wanted`` tokens of each row."""
    offset = torch.arange(int(wanted_N.sum())) - (wanted_N.cumsum(0) - wanted_N).repeat_interleave(wanted_N)
    return (lens_N.cumsum(0) - wanted_N).repeat_interleave(wanted_N) + offset
