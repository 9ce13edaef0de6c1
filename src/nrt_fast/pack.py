"""Groups to training batches without padding: the prompt once per group, one normaliser for the whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_fast import distributed, ops
from nrt_fast.config import Objective
from nrt_fast.reference.gather_rows import copies
from nrt_fast.types import ANSWER, FORMAT, TRACE, BatchTokens, Example, LossTokens, PackedBatch, Traces


def loss_tokens(
    examples: list[Example],
    traces: Traces,
    answer_logprobs: list[list[Tensor]],
    advantage: list[Tensor],
    signal: list[bool],
    answer_weights: list[list[Tensor]],
    objective: Objective,
    delimiter_id: int,
    temperature: float,
    max_tokens_per_trace: int,
) -> LossTokens:
    """Every loss token of one optimiser step with its weight and the step's normaliser (docs/method.md, Loss).

    A trace contributes z and the sampled delimiter with its advantage, an appended delimiter with the format
    coefficient, and y* with the answer coefficient times its weight; where that is 0, y* is left out. Without traces
    (sft) there is one empty trace.

    Args:
        examples: P prompts with their answers.
        traces: [P][G].
        answer_logprobs: [P][G] tensors [A_p] of log c, which the trainer's are compared with.
        advantage, signal: of each group.
        answer_weights: [P][G] tensors [A_p].
        temperature: of the sampler; log-probs of sampled ids are taken under it.
        max_tokens_per_trace: what ``normalizer="constant"`` counts for every trace.
    """
    targets, kinds, weights, old, lengths = [], [], [], [], []
    for p, example in enumerate(examples):
        answer_ids = example.answer_ids if objective.answer_coef else []
        for g, ids in enumerate(traces.trace_ids[p]):
            end = traces.delimiter_logprobs[p][g]
            targets += [*ids, delimiter_id, *answer_ids]
            kinds += [TRACE] * len(ids) + [FORMAT if end is None else TRACE] + [ANSWER] * len(answer_ids)
            policy = float(advantage[p][g])
            weights += [policy] * len(ids) + [_format_weight(objective) if end is None else policy]
            old += [*traces.logprobs[p][g], end or 0.0]
            if answer_ids:
                weights += (objective.answer_coef * answer_weights[p][g]).tolist()
                old += answer_logprobs[p][g].tolist()
            lengths.append(len(ids) + 1 + len(answer_ids))
    kind_A, lens_N = torch.tensor(kinds, dtype=torch.int8), torch.tensor(lengths)
    num_traces_P = torch.tensor([len(group) for group in traces.trace_ids])
    signal_A = torch.tensor(signal).repeat_interleave(num_traces_P).repeat_interleave(lens_N)
    counted_A = _counted(kind_A, signal_A, objective)
    return LossTokens(
        prompt_ids=torch.tensor([token for example in examples for token in example.prompt_ids]),
        cu_prompts=_cumulative(torch.tensor([len(example.prompt_ids) for example in examples])),
        targets_A=torch.tensor(targets),
        cu_traces=_cumulative(lens_N),
        cu_groups=_cumulative(num_traces_P),
        kind_A=kind_A,
        weight_A=torch.tensor(weights, dtype=torch.float32),
        old_logprobs_A=torch.tensor(old, dtype=torch.float32),
        inv_temperature_A=torch.where(kind_A == TRACE, 1.0 / (temperature or 1.0), 1.0).float(),
        counted_A=counted_A,
        normalizer=_normalizer(counted_A, len(lens_N), objective, max_tokens_per_trace),
    )


def _format_weight(objective: Objective) -> float:
    return objective.format_coef if objective.format_term == "loss" else 0.0


def _counted(kind_A: Tensor, signal_A: Tensor, objective: Objective) -> Tensor:
    """Tokens that some term of the loss reads; a group without signal has no trace tokens."""
    trace_A = (kind_A == TRACE) & signal_A & (objective.trace_loss != "none")
    return trace_A | (kind_A == ANSWER) | ((kind_A == FORMAT) & (_format_weight(objective) != 0))


def _normalizer(counted_A: Tensor, num_traces: int, objective: Objective, max_tokens_per_trace: int) -> float:
    choices = {
        "token": int(counted_A.sum()),
        "sequence": num_traces,
        "constant": num_traces * max_tokens_per_trace,
    }
    return float(max(choices[objective.normalizer], 1))


def _cumulative(lens: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)])


def pack(tokens: LossTokens, max_tokens: int, device: torch.device) -> list[PackedBatch]:
    """Fill micro-batches of at most ``max_tokens`` tokens with whole groups, best fit first: this rank's share of them.

    The loss reads the counted tokens of a batch alone, and traces without one are left out. A group over the budget is
    split, its prompt repeated; a single trace over the budget raises it to the trace's own size.
    """
    entries_M3 = _entries(tokens, max_tokens)
    entries_M3 = entries_M3[distributed.share(_cost(tokens, entries_M3).tolist())]
    if len(entries_M3) == 0:
        return []
    cost_M = _cost(tokens, entries_M3)
    bin_M = ops.pack_bins(cost_M, max(max_tokens, int(cost_M.max())))
    arrays = _arrays(tokens, device)
    return [_batch(tokens, arrays, entries_M3[bin_M == number], device) for number in range(int(bin_M.max()) + 1)]


def _entries(tokens: LossTokens, max_tokens: int) -> Tensor:
    """[M, 3]: prompt, first trace, end trace; consecutive counted traces of a group that fit the budget together."""
    counted_A1 = _cumulative(tokens.counted_A.long())
    used_N = (counted_A1[tokens.cu_traces].diff() > 0).tolist()
    input_lens_N = (tokens.cu_traces.diff() - 1).tolist()
    prompt_lens_P, cu_groups = tokens.cu_prompts.diff().tolist(), tokens.cu_groups.tolist()
    entries: list[list[int]] = []
    for p, prompt_len in enumerate(prompt_lens_P):
        cost = max_tokens + 1  # opens the group's first entry
        for n in range(cu_groups[p], cu_groups[p + 1]):
            if not used_N[n]:
                cost = max_tokens + 1
            elif cost + input_lens_N[n] > max_tokens:
                entries.append([p, n, n + 1])
                cost = prompt_len + input_lens_N[n]
            else:
                entries[-1][2] = n + 1
                cost += input_lens_N[n]
    return torch.tensor(entries, dtype=torch.int64).view(-1, 3)


def _cost(tokens: LossTokens, entries_M3: Tensor) -> Tensor:
    prompt_M, first_M, end_M = entries_M3.unbind(1)
    trace_tokens_M = tokens.cu_traces[end_M] - tokens.cu_traces[first_M] - (end_M - first_M)
    return tokens.cu_prompts.diff()[prompt_M] + trace_tokens_M


def _arrays(tokens: LossTokens, device: torch.device) -> list[Tensor]:
    """What ``ops.pack_gather`` takes from, moved once for all batches."""
    arrays = (tokens.prompt_ids, tokens.targets_A, tokens.inv_temperature_A, tokens.weight_A, tokens.old_logprobs_A)
    return [array.to(device) for array in (*arrays, tokens.kind_A)]


def _batch(tokens: LossTokens, arrays: list[Tensor], entries_M3: Tensor, device: torch.device) -> PackedBatch:
    source_T, positions_T, cu_seqlens, hidden_A, rows_A = ops.pack_index(
        entries_M3, tokens.cu_prompts, tokens.cu_traces
    )
    counted_A = tokens.counted_A[rows_A]
    hidden_A, rows_A = hidden_A[counted_A], rows_A[counted_A]
    copies_A, cu_copies = copies(hidden_A, len(source_T))
    tokens_T, *gathered = ops.pack_gather(*arrays, source_T.to(device), rows_A.to(device))
    return PackedBatch(
        tokens_T=tokens_T,
        positions_T=positions_T.to(device),
        cu_seqlens=cu_seqlens,
        num_traces_M=entries_M3[:, 2] - entries_M3[:, 1],
        hidden_A=hidden_A.to(device),
        copies_A=copies_A.to(device),
        cu_copies=cu_copies.to(device),
        rows_A=rows_A,
        loss=BatchTokens(*gathered),
    )
