"""What held-out items say: greedy answers, accuracy, and the gain of thinking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import KVCache
from nrt_fast.metrics import mean
from nrt_fast.model import Model
from nrt_fast.types import Example, Scores, Traces

HARD_SHARE = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out items, traces sampled at temperature 1 and answers greedy.

    Attributes:
        accuracy: share of answers that equal the reference id by id.
        accuracy_no_trace: the same after an empty trace.
        gain: nats per answer token, mean of log c - log b.
        hard_token_gain: the same over hard tokens: those the data declares, else the top tenth by -log b.
        hard_token_logp: mean log c of hard tokens.
        trace_length: tokens, without the delimiter.
        entropy: nats per sampled token, as -log pi of the samples.
        delimiter_rate: share of traces that end with the delimiter.
        num_items: held-out items.
    """

    accuracy: float
    accuracy_no_trace: float
    gain: float
    hard_token_gain: float
    hard_token_logp: float
    trace_length: float
    entropy: float
    delimiter_rate: float
    num_items: int


@torch.no_grad()
def greedy_answers(
    model: Model, cache: KVCache, pending: list[list[list[int]]], delimiter_id: int, eos_id: int, max_length: int
) -> list[list[list[int]]]:
    """Greedy answer of every row of the cache, the empty trace included: [P][G + 1] ids, closed by EOS or cut.

    The answers' keys and values stay in the cache.
    """
    device = model.embed.device
    hidden_TD, num_new_PG = model.extend_rows([[ids + [delimiter_id] for ids in group] for group in pending], cache)
    cache.own.advance(num_new_PG.to(device))
    hidden_ND = hidden_TD[(num_new_PG.flatten().cumsum(0) - 1).to(device)]
    one_PG, answers = torch.ones_like(num_new_PG), []
    live_N = torch.ones(num_new_PG.numel(), dtype=torch.bool, device=device)
    for _ in range(max_length):
        ids_N = ops.linear_logits(hidden_ND, model.head).argmax(dim=-1)
        answers.append(torch.where(live_N, ids_N, eos_id))
        live_N = live_N & (ids_N != eos_id)
        if not live_N.any() or len(answers) == max_length:
            break
        hidden_ND = model.extend(ids_N, one_PG, cache.own, cache.prompt)
        cache.own.advance(live_N.view_as(cache.own.lens_PG))
    rows = iter([_until(row, eos_id) for row in torch.stack(answers, 1).tolist()])
    return [[next(rows) for _ in group] for group in pending]


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def summarise(examples: list[Example], traces: Traces, scores: Scores, answers: list[list[list[int]]]) -> HeldOut:
    """Reduce one evaluation to its means. Without traces (sft) the empty trace stands for them."""
    gains, hard_gains, hard_logps = [], [], []
    hard = hard_positions(examples, scores.baseline_logprobs)
    for hard_A, group, log_b in zip(hard, scores.logprobs, scores.baseline_logprobs, strict=True):
        for log_c in group or [log_b]:
            gains.append(log_c - log_b)
            hard_gains.append((log_c - log_b)[hard_A])
            hard_logps.append(log_c[hard_A])
    pairs = list(zip(examples, answers, strict=True))
    lengths = [float(len(ids)) for group in traces.trace_ids for ids in group]
    ends = [end for group in traces.delimiter_logprobs for end in group]
    sampled = [logp for group in traces.logprobs for row in group for logp in row]
    return HeldOut(
        accuracy=mean([row == e.answer_ids for e, group in pairs for row in group[:-1] or group]),
        accuracy_no_trace=mean([group[-1] == e.answer_ids for e, group in pairs]),
        gain=mean(torch.cat(gains).tolist()),
        hard_token_gain=mean(torch.cat(hard_gains).tolist()),
        hard_token_logp=mean(torch.cat(hard_logps).tolist()),
        trace_length=mean(lengths),
        entropy=-mean([*sampled, *(end for end in ends if end is not None)]),
        delimiter_rate=mean([end is not None for end in ends]),
        num_items=len(examples),
    )


def hard_positions(examples: list[Example], baseline_logprobs: list[Tensor]) -> list[Tensor]:
    """Positions of each answer's hard tokens: those that the data declares, else the top tenth of all by -log b."""
    if all(example.hard_positions is not None for example in examples):
        return [torch.tensor(example.hard_positions, dtype=torch.int64) for example in examples]
    threshold = torch.cat(baseline_logprobs).quantile(HARD_SHARE)
    return [(log_b <= threshold).nonzero().squeeze(1) for log_b in baseline_logprobs]
