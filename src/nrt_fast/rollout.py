"""Sample G traces for each prompt, and keep the cache they were sampled with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import KVCache
from nrt_fast.model import Model
from nrt_fast.types import Traces


@dataclass(frozen=True)
class Sampling:
    """How traces are drawn and what ends them.

    Attributes:
        num_generations: G, traces per prompt; 0 samples nothing.
        max_trace_length: ids sampled at most, the delimiter among them.
        temperature: 0 is greedy.
        delimiter_id: ends a trace and is not part of it.
        eos_ids: end a trace and stay its last id.
        seed: key of the noise.
    """

    num_generations: int
    max_trace_length: int
    temperature: float
    delimiter_id: int
    eos_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class LiveRollout:
    """Traces with their cache.

    Attributes:
        traces: what was sampled.
        cache: prompts and traces; the last row of each group is the empty trace.
        pending: [P][G + 1] ids that are part of the trace but not yet in the cache.
    """

    traces: Traces
    cache: KVCache
    pending: list[list[list[int]]]


@torch.no_grad()
def rollout(
    model: Model, prompts: list[list[int]], uids: list[int], sampling: Sampling, step: int, answer_slots: int
) -> LiveRollout:
    """Prefill each prompt once, then decode G traces of each until all have ended.

    A token's noise is keyed by (seed, step, uid of the prompt, trace, position), so a trace depends neither on its
    neighbours nor on the order of the prompts (method section 1).

    Args:
        model: in any mode; nothing is trained here.
        prompts: P lists of ids.
        uids: P distinct numbers that key the noise.
        sampling: see Sampling.
        step: of the run.
        answer_slots: room kept behind each trace for what is scored or decoded there.
    """
    G = sampling.num_generations
    cache, hidden_PD = model.prefill(prompts, G + 1, sampling.max_trace_length + answer_slots)
    if G == 0:
        nothing = [[] for _ in prompts]
        return LiveRollout(Traces(nothing, nothing, nothing), cache, [[[]] for _ in prompts])
    traces = _collect(*_decode(model, hidden_PD, cache, uids, sampling, step), G, sampling.delimiter_id)
    # The last id of a trace that did not end with the delimiter was sampled, but never fed.
    pending = [
        [ids[-1:] if end is None else [] for ids, end in zip(group, ends, strict=True)] + [[]]
        for group, ends in zip(traces.trace_ids, traces.delimiter_logprobs, strict=True)
    ]
    return LiveRollout(traces, cache, pending)


def _decode(
    model: Model, hidden_PD: Tensor, cache: KVCache, uids: list[int], sampling: Sampling, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probs [N, Z], and how many of them each row sampled, on the CPU."""
    device, P, G = hidden_PD.device, len(uids), sampling.num_generations
    own = cache.own.first(G)
    num_new_PG = torch.ones(P, G, dtype=torch.int64)
    stops = torch.tensor([sampling.delimiter_id, *sampling.eos_ids], device=device)
    uniform_NZ = ops.philox_uniform(
        sampling.seed,
        step,
        torch.tensor(uids, device=device)[:, None, None],
        torch.arange(G, device=device)[:, None],
        torch.arange(sampling.max_trace_length, device=device),
    ).flatten(0, 1)
    hidden_ND = hidden_PD.repeat_interleave(G, dim=0)
    live_N = torch.ones(P * G, dtype=torch.bool, device=device)
    num_sampled_N = torch.zeros(P * G, dtype=torch.int64, device=device)
    ids, logprobs = [], []
    for position in range(sampling.max_trace_length):
        logits_NV = ops.linear_logits(hidden_ND, model.head)
        ids_N, logprob_N = ops.sample_logprob(logits_NV, uniform_NZ[:, position], sampling.temperature)
        ids.append(ids_N)
        logprobs.append(logprob_N)
        num_sampled_N += live_N
        live_N = live_N & ~torch.isin(ids_N, stops)
        if position == sampling.max_trace_length - 1 or not live_N.any():
            break
        # Rows that have ended run along; what they write stays past their length.
        hidden_ND = model.extend(ids_N, num_new_PG, own, cache.prompt)
        own.advance(live_N.view(P, G))
    return torch.stack(ids, 1).cpu(), torch.stack(logprobs, 1).cpu(), num_sampled_N.cpu()


def _collect(ids_NZ: Tensor, logprobs_NZ: Tensor, num_sampled_N: Tensor, num_rows: int, delimiter_id: int) -> Traces:
    trace_ids, logprobs, delimiter_logprobs = [], [], []
    for ids, row, num in zip(ids_NZ.tolist(), logprobs_NZ.tolist(), num_sampled_N.tolist(), strict=True):
        length = num - (ids[num - 1] == delimiter_id)
        trace_ids.append(ids[:length])
        logprobs.append(row[:length])
        delimiter_logprobs.append(row[length] if length < num else None)

    def groups(rows: list) -> list[list]:
        return [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]

    return Traces(groups(trace_ids), groups(logprobs), groups(delimiter_logprobs))
