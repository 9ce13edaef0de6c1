"""Packing of prompt groups into micro-batches without padding."""

from bisect import bisect_left, insort

import torch
from torch import Tensor


def pack_bins(cost_M: Tensor, budget: int) -> Tensor:
    """Best-fit-decreasing bin packing of host tensors, deterministic.

    Costs are taken from the largest to the smallest (in order among equals), each into the open bin with the least room
    that suffices, the lowest-numbered one among equals.

    Args:
        cost_M: [M] int64, each in 1..budget.
        budget: what a bin holds.

    Returns:
        bin_M: [M] int64, counted from 0 in order of opening.

    Raises:
        ValueError: a cost is outside 1..budget.
    """
    costs = cost_M.tolist()
    bins = [0] * len(costs)
    open_bins: list[tuple[int, int]] = []  # (room, bin), sorted
    num_bins = 0
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if not 1 <= costs[i] <= budget:
            raise ValueError(f"cost_M[{i}] = {costs[i]}: expected 1 <= cost <= budget = {budget}")
        best = bisect_left(open_bins, (costs[i], 0))
        if best < len(open_bins):
            room, bins[i] = open_bins.pop(best)
        else:
            room, bins[i] = budget, num_bins
            num_bins += 1
        insort(open_bins, (room - costs[i], bins[i]))
    return torch.tensor(bins, dtype=torch.int64)


def pack_index(
    entries_M3: Tensor, cu_prompts: Tensor, cu_traces: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index arrays of one packed batch of host tensors: entry after entry, a prompt once and then its traces.

    A trace's inputs are its loss tokens without the last one. The first loss token of every trace is predicted by the
    hidden state of the prompt's last token, the others by the trace's own inputs.

    Args:
        entries_M3: [M, 3] int64: prompt, first trace, end trace; no part is empty.
        cu_prompts: [P + 1] int64 token offsets.
        cu_traces: [N + 1] int64 offsets of loss tokens.

    Returns:
        source_T: int64 into ``cat(prompt_ids, targets_A)``, where each packed token comes from.
        positions_T: int64; every trace goes on from the end of its prompt.
        cu_seqlens: int32 segments: a prompt, its traces, the next prompt, ...
        hidden_A: int64 into T, the hidden state that predicts each loss token.
        rows_A: int64, the loss token's place in ``targets_A``.

    Raises:
        ValueError: offsets that decrease or do not start at 0; an entry out of range; an empty prompt or trace.
    """
    prompt_offsets, trace_offsets = cu_prompts.tolist(), cu_traces.tolist()
    _check_offsets("cu_prompts", prompt_offsets)
    _check_offsets("cu_traces", trace_offsets)
    source, positions, hidden, rows, cu_seqlens = [], [], [], [], [0]

    def append_segment(start: int, position: int, length: int) -> None:
        source.extend(range(start, start + length))
        positions.extend(range(position, position + length))
        cu_seqlens.append(len(source))

    for i, (prompt, first, end) in enumerate(entries_M3.tolist()):
        _check_entry(f"entries_M3[{i}]", prompt, first, end, prompt_offsets, trace_offsets)
        prompt_length = prompt_offsets[prompt + 1] - prompt_offsets[prompt]
        append_segment(prompt_offsets[prompt], 0, prompt_length)
        prompt_end = len(source) - 1
        for trace in range(first, end):
            row, row_end = trace_offsets[trace], trace_offsets[trace + 1]
            hidden += [prompt_end, *range(len(source), len(source) + row_end - row - 1)]
            rows += range(row, row_end)
            append_segment(prompt_offsets[-1] + row, prompt_length, row_end - row - 1)

    source_T, positions_T, hidden_A, rows_A = (
        torch.tensor(values, dtype=torch.int64) for values in (source, positions, hidden, rows)
    )
    return source_T, positions_T, torch.tensor(cu_seqlens, dtype=torch.int32), hidden_A, rows_A


def pack_gather(
    prompt_ids_U: Tensor, targets_A: Tensor, inv_temperature_A: Tensor, weight_A: Tensor, old_logprobs_A: Tensor,
    kind_A: Tensor, source_T: Tensor, rows_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a packed batch takes from the step's arrays, on any device: ``pack_index`` says from where.

    Args:
        prompt_ids_U: [U] int64, the step's prompts.
        targets_A, inv_temperature_A, weight_A, old_logprobs_A, kind_A: of the step's loss tokens; int64, fp32, fp32,
            fp32, int8.
        source_T: [T] int64 into ``cat(prompt_ids, targets)``.
        rows_B: [B] int64 into the loss tokens.

    Returns:
        tokens_T: [T] int64 input ids; and of the batch's loss tokens targets_B, inv_temperature_B, weight_B,
        old_logprobs_B, kind_B.

    Raises:
        ValueError: on the host, an index out of range; on a GPU the device traps.
    """
    if source_T.device.type == "cpu":
        _check_range("source_T", source_T, len(prompt_ids_U) + len(targets_A))
        _check_range("rows_B", rows_B, len(targets_A))
    per_token = (targets_A, inv_temperature_A, weight_A, old_logprobs_A, kind_A)
    return torch.cat([prompt_ids_U, targets_A])[source_T], *(values_A[rows_B] for values_A in per_token)


def _check_range(name: str, index: Tensor, end: int) -> None:
    for position in ((index < 0) | (index >= end)).nonzero()[:1].flatten().tolist():
        raise ValueError(f"{name}[{position}] = {index[position]}: expected 0 <= index < {end}")


def _check_offsets(name: str, offsets: list[int]) -> None:
    if not offsets:
        raise ValueError(f"{name} is empty: expected at least the offset 0")
    if offsets[0] != 0:
        raise ValueError(f"{name}[0] = {offsets[0]}: expected 0")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(f"{name}[{i}] = {offsets[i]}: expected at least {offsets[i - 1]}")


def _check_entry(
    where: str, prompt: int, first: int, end: int, prompt_offsets: list[int], trace_offsets: list[int]
) -> None:
    num_prompts, num_traces = len(prompt_offsets) - 1, len(trace_offsets) - 1
    if not 0 <= prompt < num_prompts:
        raise ValueError(f"{where}: prompt {prompt}, expected 0 <= prompt < {num_prompts}")
    if not 0 <= first < end <= num_traces:
        raise ValueError(f"{where}: traces {first} to {end}, expected 0 <= first < end <= {num_traces}")
    if prompt_offsets[prompt] == prompt_offsets[prompt + 1]:
        raise ValueError(f"{where}: prompt {prompt} is empty, expected at least one token")
    for trace in range(first, end):
        if trace_offsets[trace] == trace_offsets[trace + 1]:
            raise ValueError(f"{where}: trace {trace} is empty, expected at least one loss token")
