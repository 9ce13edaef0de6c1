"""Draw one id per row of logits by inverting the cumulative distribution, with the exact log-probability of the id.

Two launches. The first reads each logit once and leaves a record for every block of 2,048: its peak and the sum of
exp((logit - peak) / temperature). The second, one program a row, merges the records in the order of the ids, finds the
block in which the cumulative distribution passes ``uniform * total``, reads that block once more and finds the id in
it. Per row of V logits of b bytes: (V + 2,048) b + 8 B read and 8 B written, where B = ceil(V / 2,048).

Blocks depend on V alone, so a row's draw is the same in any batch. The sum of a block is fp32, prefix sums over blocks
and within one are fp64: the uniform has 53 bits, and in fp32 ids rarer than 2^-24 would never be drawn. The log-sum-exp
stays in two parts, as in logsoftmax_gather.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 2048
NUM_WARPS = 4


@triton.jit
def sample_records_kernel(
    logits_ptr, floor_ptr, peak_ptr, total_ptr, drawn_ptr, stride_n, V, inv_temperature,
    HAS_FLOOR: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    record = row * tl.num_programs(1) + block
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row * stride_n + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, axis=0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)  # -inf - -inf would be NaN
    mass = tl.exp((x - shift) * inv_temperature)
    tl.store(peak_ptr + record, peak)
    tl.store(total_ptr + record, tl.sum(mass, axis=0))
    if HAS_FLOOR:
        tl.store(drawn_ptr + record, tl.sum(tl.where(x >= tl.load(floor_ptr + row), mass, 0.0), axis=0))


@triton.jit
def find(mass, threshold, SIZE: tl.constexpr):
    """First index at which the fp64 prefix sum of ``mass`` passes the threshold, and the sum before it.

    It has mass: not every scan's rounding is monotone, and a threshold may round up to the total. -1 without any mass.
    """
    index = tl.arange(0, SIZE)
    through = tl.cumsum(mass, axis=0)
    first = tl.min(tl.where((through > threshold) & (mass > 0), index, SIZE), axis=0)
    last = tl.max(tl.where(mass > 0, index, -1), axis=0)
    found = tl.minimum(first, last)
    return found, tl.sum(tl.where(index == found, through - mass, 0.0), axis=0)


@triton.jit
def sample_logprob_kernel(
    logits_ptr, uniform_ptr, floor_ptr, peak_ptr, total_ptr, drawn_ptr, ids_ptr, logprob_ptr,
    stride_n, uniform_stride, V, num_blocks, inv_temperature,
    GREEDY: tl.constexpr, HAS_FLOOR: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, NUM_BLOCKS)
    records = row * num_blocks + blocks
    peaks = tl.load(peak_ptr + records, mask=blocks < num_blocks, other=float("-inf"))
    totals = tl.load(total_ptr + records, mask=blocks < num_blocks, other=0.0)
    peak = tl.max(peaks, axis=0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    scale = tl.exp((peaks - shift) * inv_temperature)
    total = tl.sum(totals * scale, axis=0)

    if GREEDY:
        block = tl.min(tl.where(peaks == peak, blocks, NUM_BLOCKS), axis=0)
        rest = tl.full((), 0.0, tl.float64)
    else:
        drawn = totals
        if HAS_FLOOR:
            drawn = tl.load(drawn_ptr + records, mask=blocks < num_blocks, other=0.0)
        mass = drawn.to(tl.float64) * scale.to(tl.float64)
        threshold = tl.load(uniform_ptr + row * uniform_stride) * tl.sum(mass, axis=0)
        block, before = find(mass, threshold, NUM_BLOCKS)
        here = tl.sum(tl.where(blocks == block, scale, 0.0), axis=0).to(tl.float64)
        rest = (threshold - before) / here  # of the block's own sum
    block = tl.minimum(tl.maximum(block, 0), num_blocks - 1)  # a row that is not a distribution

    columns = tl.arange(0, BLOCK_V)
    start = block * BLOCK_V
    x = tl.load(logits_ptr + row * stride_n + start + columns, mask=columns < V - start, other=float("-inf"))
    x = x.to(tl.float32)
    if GREEDY:
        column = tl.min(tl.where(x == peak, columns, BLOCK_V), axis=0)
    else:
        block_peak = tl.max(x, axis=0)
        mass = tl.exp((x - tl.where(block_peak == float("-inf"), 0.0, block_peak)) * inv_temperature)
        if HAS_FLOOR:
            mass = tl.where(x >= tl.load(floor_ptr + row), mass, 0.0)
        column, _ = find(mass.to(tl.float64), rest, BLOCK_V)
    drawn_id = tl.where((total > 0) & (total < float("inf")), start + column, 0)
    drawn_id = tl.minimum(tl.maximum(drawn_id, 0), V - 1)
    logit = tl.load(logits_ptr + row * stride_n + drawn_id).to(tl.float32)
    logprob = (logit - shift) * inv_temperature - tl.log(total)
    tl.store(ids_ptr + row, drawn_id.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where((total > 0) & (total < float("inf")), logprob, float("nan")))


def sample_logprob(
    logits_NV: Tensor, uniform_N: Tensor, temperature: float, floor_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One id per row and its log-probability under softmax(logits / temperature), untruncated.

    Args:
        logits_NV: [N, V] fp32, fp16 or bf16; copied if its rows are not dense.
        uniform_N: [N] fp64 in [0, 1).
        temperature: 0 is greedy: the lowest of the likeliest ids, with its log-probability at temperature 1.
        floor_N: [N] fp32; only ids with a logit of at least the floor are drawn, or id 0 if there is none.

    Returns:
        (ids_N int64, logprob_N fp32); id 0 and NaN for a row that holds a NaN or +inf, or nothing above -inf.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number from 0, got {temperature}")
    N, V = logits_NV.shape
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    num_blocks = triton.cdiv(V, BLOCK_V)
    peak_NB, total_NB, drawn_NB = logits_NV.new_empty((3, N, num_blocks), dtype=torch.float32)
    ids_N = torch.empty(N, dtype=torch.int64, device=logits_NV.device)
    logprob_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    if N:
        has_floor = floor_N is not None
        floor_N = floor_N.contiguous() if has_floor else logprob_N
        inv_temperature = 1.0 / (temperature or 1.0)
        sample_records_kernel[(N, num_blocks)](
            logits_NV, floor_N, peak_NB, total_NB, drawn_NB, logits_NV.stride(0), V, inv_temperature,
            HAS_FLOOR=has_floor, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
        sample_logprob_kernel[(N,)](
            logits_NV, uniform_N, floor_N, peak_NB, total_NB, drawn_NB, ids_N, logprob_N,
            logits_NV.stride(0), uniform_N.stride(0), V, num_blocks, inv_temperature,
            GREEDY=temperature == 0, HAS_FLOOR=has_floor, NUM_BLOCKS=triton.next_power_of_2(num_blocks),
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
    return ids_N, logprob_N
