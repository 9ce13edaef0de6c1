"""What held-out items say: greedy answers, accuracy, and the gain of thinking."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nrt_fast.data import text_of_each
from nrt_fast.decode import MAX_STEPS, Decoding, prefill
from nrt_fast.metrics import mean
from nrt_fast.streams import Group, Stream
from nrt_fast.types import Example, Sample, Scores, Traces

HARD_SHARE = 0.1


class Estimate(NamedTuple):
    """A mean, and its standard error over items (NaN of fewer than two)."""

    mean: float
    error: float


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out items, traces sampled at temperature 1 and answers greedy.

    Attributes:
        accuracy: share of answers that equal the reference id by id.
        accuracy_no_trace: the same after an empty trace.
        gain: nats per answer token, mean of log c - log b.
        hard_token_gain: the same over hard tokens: those the data declares, else the top tenth by -log b.
        gain_error, hard_token_gain_error: standard errors of both over items; 0 where fewer than two have such tokens.
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
    gain_error: float
    hard_token_gain_error: float
    hard_token_logp: float
    trace_length: float
    entropy: float
    delimiter_rate: float
    num_items: int


def greedy_answers(decoding: Decoding, groups: list[Group], delimiter_id: int) -> list[list[list[int]]]:
    """Greedy answer after every trace and after the empty one: [groups][G + 1] ids, closed by EOS or cut.

    The answers' keys and values are appended to the traces'; what the cache had to drop is run again.

    Args:
        decoding: greedy, ends at EOS.

    Raises:
        ValueError: the cache has not enough free pages.
    """
    cache, length, work = decoding.cache, decoding.sampling.max_length, []
    try:
        prefill(decoding.inference, cache, groups)
        for group in groups:
            streams = [
                Stream(number, [*stream.ids, delimiter_id], len(stream.ids) + 1, stream.cached)
                for number, stream in enumerate([*group.streams, Stream(len(group.streams))])
            ]
            work.append((replace(group, streams=streams), streams))
            for stream in streams:
                cache.require(stream.cached, len(stream.ids) + length)
        decoding.start(work)
        while live := [(group, rows) for group, streams in work if (rows := [s for s in streams if not s.is_over])]:
            decoding.run(live, min(MAX_STEPS, length))
    finally:
        for _, streams in work:
            cache.drop(streams[-1].cached)
    return [[stream.ids[stream.first :] for stream in streams] for _, streams in work]


def summarise(examples: list[Example], traces: Traces, scores: Scores, answers: list[list[list[int]]]) -> HeldOut:
    """Reduce one evaluation to its means. Without traces (sft) the empty trace stands for them."""
    gains, hard_gains, hard_logps = [], [], []
    hard = hard_positions(examples, scores.baseline_logprobs)
    for hard_A, group, log_b in zip(hard, scores.logprobs, scores.baseline_logprobs, strict=True):
        log_c_GA = torch.stack(group or [log_b])
        gains.append(log_c_GA - log_b)
        hard_gains.append((log_c_GA - log_b)[:, hard_A])
        hard_logps.append(log_c_GA[:, hard_A])
    pairs = list(zip(examples, answers, strict=True))
    lengths = [float(len(ids)) for group in traces.trace_ids for ids in group]
    ends = [end for group in traces.delimiter_logprobs for end in group]
    sampled = [logp for group in traces.logprobs for row in group for logp in row]
    return HeldOut(
        accuracy=mean([row == e.answer_ids for e, group in pairs for row in group[:-1] or group]),
        accuracy_no_trace=mean([group[-1] == e.answer_ids for e, group in pairs]),
        gain=_mean_of_all(gains),
        hard_token_gain=_mean_of_all(hard_gains),
        gain_error=_error(gains),
        hard_token_gain_error=_error(hard_gains),
        hard_token_logp=_mean_of_all(hard_logps),
        trace_length=mean(lengths),
        entropy=-mean([*sampled, *(end for end in ends if end is not None)]),
        delimiter_rate=mean([end is not None for end in ends]),
        num_items=len(examples),
    )


def _mean_of_all(values: list[Tensor]) -> float:
    return mean(torch.cat([item.flatten() for item in values]).tolist())


def _error(values: list[Tensor]) -> float:
    error = clustered_mean(values).error
    return 0.0 if math.isnan(error) else error


def clustered_mean(values: list[Tensor]) -> Estimate:
    """Mean of all values of all items, with a standard error that takes the values of one item for dependent.

    It is the linearised variance of a ratio of sums: what varies from item to item is the item.
    """
    sums = torch.tensor([float(item.sum()) for item in values], dtype=torch.float64)
    counts = torch.tensor([float(item.numel()) for item in values], dtype=torch.float64)
    if counts.sum() == 0:
        return Estimate(math.nan, math.nan)
    ratio, P = sums.sum() / counts.sum(), len(values)
    if P < 2:
        return Estimate(float(ratio), math.nan)
    residual = (sums - ratio * counts).square().sum() * P / (P - 1)
    return Estimate(float(ratio), float(residual.sqrt() / counts.sum()))


def samples(
    examples: list[Example], traces: Traces, scores: Scores, answers: list[list[list[int]]], tokenizer, num_samples: int
) -> list[Sample]:
    """The first items with what was measured on them. Without traces (sft) the empty one stands for them."""
    hard = hard_positions(examples, scores.baseline_logprobs)
    return [
        Sample(
            question=example.question,
            trace=tokenizer.decode(trace_ids),
            answer=tokenizer.decode(answers[index][0], skip_special_tokens=True),
            reference=example.answer,
            trace_tokens=text_of_each(trace_ids, tokenizer),
            trace_logprobs=_rounded((traces.logprobs[index] or [[]])[0]),
            reference_tokens=text_of_each(example.answer_ids, tokenizer),
            log_b=_rounded(scores.baseline_logprobs[index].tolist()),
            log_c=_rounded((scores.logprobs[index] or [scores.baseline_logprobs[index]])[0].tolist()),
            hard_positions=hard[index].tolist(),
        )
        for index, example in enumerate(examples[:num_samples])
        for trace_ids in (traces.trace_ids[index] or [[]])[:1]
    ]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]


def hard_positions(examples: list[Example], baseline_logprobs: list[Tensor]) -> list[Tensor]:
    """Positions of each answer's hard tokens: those that the data declares, else the top tenth of all by -log b."""
    if all(example.hard_positions is not None for example in examples):
        return [torch.tensor(example.hard_positions, dtype=torch.int64) for example in examples]
    threshold = _quantile(torch.cat(baseline_logprobs), HARD_SHARE)
    return [(log_b <= threshold).nonzero().squeeze(1) for log_b in baseline_logprobs]


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile, bit for bit, without its limit of 2^24 values."""
    rank = torch.tensor(share, dtype=values.dtype) * (len(values) - 1)
    low, high = (values.kthvalue(int(end) + 1).values for end in (rank.floor(), rank.ceil()))
    return low.lerp(high, rank - rank.floor())
