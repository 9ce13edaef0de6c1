"""Log-probability of one target per row of ``hidden weight^T``, without storing the logits.

16-bit operands on Hopper and newer: one persistent matrix-product kernel whose tiles [BLOCK_N, BLOCK_V] stay in fp32
registers. Of each tile and row it keeps a record: the peak x of the row's logits (times the inverse temperature),
sum exp(x - peak) and, for the entropy, sum exp(x - peak) (x - peak). The tile that holds the target's column keeps that
logit. A second kernel merges a row's records in the order of their columns. Tiles are cut from V alone and every sum
has a fixed order: a row's result depends neither on the other rows nor on the number of multiprocessors. There are no
locks and no atomics. FLOPs: 2 N V D. Bytes: the operands, N D and V D, and 8 N V / 256 of records, 12 with the entropy.

fp32 operands, older devices, and rows that are not multiples of 16 bytes: fp32 logits of some rows at a time by cuBLAS
and one row kernel, 8 N V bytes more. Tensor cores have no fp32 product, and without the tensor memory accelerator the
kernel's loads are not asynchronous.
"""

import torch
import triton
import triton.language as tl
from nrt_fast.triton_kernels.logsoftmax_gather import NUM_WARPS as ROW_WARPS
from nrt_fast.triton_kernels.logsoftmax_gather import block_size, load_target, row_stats
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_N, BLOCK_V, BLOCK_D = 128, 256, 64
GROUP_N = 16  # row tiles that sweep the vocabulary together: their hidden states stay in L2
NUM_STAGES, NUM_WARPS = 4, 8
MERGE_ROWS, MERGE_TILES = 16, 64
LOGITS_ROWS = 4096  # rows of fp32 logits alive at one time, at least; twice as many at most


@triton.jit
def logprob_tiles_kernel(
    hidden_desc, weight_desc, target_ptr, inv_temperature_ptr, record_ptr, x_target_ptr, N, V, D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    num_tiles_n, num_tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    record_stride = num_tiles_v.to(tl.int64) * N
    for tile in tl.range(tl.program_id(0), num_tiles_n * num_tiles_v, tl.num_programs(0), flatten=True):
        group = tile // (GROUP_N * num_tiles_v)
        rows_in_group = tl.minimum(num_tiles_n - group * GROUP_N, GROUP_N)
        place = tile % (GROUP_N * num_tiles_v)
        tile_n, tile_v = group * GROUP_N + place % rows_in_group, place // rows_in_group
        x = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            hidden = hidden_desc.load([tile_n * BLOCK_N, start])
            weight = weight_desc.load([tile_v * BLOCK_V, start])
            x = tl.dot(hidden, weight.T, x)

        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        x *= tl.load(inv_temperature_ptr + rows, mask=rows < N, other=0.0)[:, None]
        target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
        x_target = tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), axis=1)
        here = (target >= tile_v * BLOCK_V) & (target < tl.minimum(V, (tile_v + 1) * BLOCK_V))
        tl.store(x_target_ptr + rows, x_target, mask=here)

        x = tl.where(columns[None, :] < V, x, float("-inf"))
        peak = tl.max(x, axis=1)
        x -= tl.where(peak == float("-inf"), 0.0, peak)[:, None]  # -inf - -inf would be NaN
        record_ptrs = record_ptr + tile_v.to(tl.int64) * N + rows
        tl.store(record_ptrs, peak, mask=rows < N)
        tl.store(record_ptrs + record_stride, tl.sum(tl.exp(x), axis=1), mask=rows < N)
        if ENTROPY:
            weighted = tl.sum(tl.exp(x) * tl.maximum(x, -1e30), axis=1)  # exp(-inf) * -inf would be NaN
            tl.store(record_ptrs + 2 * record_stride, weighted, mask=rows < N)


@triton.jit(do_not_specialize=["num_tiles"])  # Triton makes a number of 1 a Python int, which has no ``to``
def logprob_merge_kernel(
    record_ptr, target_ptr, logprob_ptr, logsumexp_ptr, entropy_ptr, N, V, num_tiles,
    MERGE_ROWS: tl.constexpr, MERGE_TILES: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    record_stride = num_tiles.to(tl.int64) * N
    peak = tl.full((MERGE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((MERGE_ROWS,), tl.float32)
    weighted = tl.zeros((MERGE_ROWS,), tl.float32)
    for start in range(0, num_tiles, MERGE_TILES):
        tiles = start + tl.arange(0, MERGE_TILES)
        there = (tiles < num_tiles)[:, None] & (rows < N)[None, :]
        record_ptrs = record_ptr + tiles.to(tl.int64)[:, None] * N + rows[None, :]
        tile_peak = tl.load(record_ptrs, mask=there, other=float("-inf"))
        tile_total = tl.load(record_ptrs + record_stride, mask=there, other=0.0)
        new_peak = tl.maximum(peak, tl.max(tile_peak, axis=0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        drop, tile_drop = tl.maximum(peak - shift, -1e30), tl.maximum(tile_peak - shift[None, :], -1e30)
        if ENTROPY:
            tile_weighted = tl.load(record_ptrs + 2 * record_stride, mask=there, other=0.0)
            weighted = tl.exp(drop) * (weighted + drop * total)
            weighted += tl.sum(tl.exp(tile_drop) * (tile_weighted + tile_drop * tile_total), axis=0)
        total = total * tl.exp(drop) + tl.sum(tile_total * tl.exp(tile_drop), axis=0)
        peak = new_peak
    total = tl.where(rows < N, total, 1.0)
    logsum = tl.log(total)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    x_target = tl.load(logprob_ptr + rows, mask=(rows < N) & (target >= 0) & (target < V), other=float("nan"))
    tl.store(logprob_ptr + rows, (x_target - peak) - logsum, mask=rows < N)
    tl.store(logsumexp_ptr + rows, peak + logsum, mask=rows < N)
    if ENTROPY:
        tl.store(entropy_ptr + rows, logsum - weighted / total, mask=rows < N)


@triton.jit
def logprob_rows_kernel(
    logits_ptr, target_ptr, inv_temperature_ptr, logprob_ptr, logsumexp_ptr, entropy_ptr, V,
    BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    inv_temperature = tl.load(inv_temperature_ptr + row)
    peak, total, weighted = row_stats(logits_ptr, inv_temperature, V, BLOCK_V, ENTROPY)
    logsum = tl.log(total)
    x_target = load_target(logits_ptr, tl.load(target_ptr + row), inv_temperature, V)
    tl.store(logprob_ptr + row, (x_target - peak) - logsum)
    tl.store(logsumexp_ptr + row, peak + logsum)
    if ENTROPY:
        tl.store(entropy_ptr + row, logsum - weighted / total)


def matmul_fp32(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, accumulate: bool = False) -> None:
    """``out = a b``, or ``out += a b``, summed in fp32 and not rounded: out is fp32 whatever the operands are."""
    if a_NK.is_cuda and a_NK.dtype != torch.float32:
        torch.addmm(out_NM, a_NK, b_KM, beta=int(accumulate), out_dtype=torch.float32, out=out_NM)
    else:  # PyTorch has that product on CUDA alone; the interpreter's tensors are on the CPU
        out_NM.addmm_(a_NK.float(), b_KM.float(), beta=int(accumulate))


def chunks_of_rows(N: int) -> list[slice]:
    """Equal chunks of at least LOGITS_ROWS rows, fewer only if there are no more."""
    num_chunks = max(1, N // LOGITS_ROWS)
    return [slice(N * i // num_chunks, N * (i + 1) // num_chunks) for i in range(num_chunks)]


def check_dtypes(hidden_ND: Tensor, weight_VD: Tensor) -> None:
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden and weight: expected fp32 or bf16 both, got {hidden_ND.dtype} and {weight_VD.dtype}")


def rows_of_16_bytes(x: Tensor) -> Tensor:
    """The tensor, or a copy, such that the tensor memory accelerator can address it."""
    unit = 16 // x.element_size()
    aligned = x.stride(0) >= x.shape[1] and x.stride(0) % unit == 0 and x.storage_offset() % unit == 0
    return x if x.stride(1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Whether Triton compiles for Hopper or newer; the interpreter reads like it."""
    return device.type == "cpu" or driver.active.get_current_target().arch >= 90


def num_programs(device: torch.device, num_tiles: int) -> int:
    """One per multiprocessor; the result does not depend on it."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    return min(count, num_tiles)


def logprob_stats(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, log-sum-exp and, if asked for, entropy; all [N] fp32."""
    check_dtypes(hidden_ND, weight_VD)
    (N, D), V, device = hidden_ND.shape, len(weight_VD), hidden_ND.device
    if inv_temperature_N is None:
        inv_temperature_N = torch.ones(N, device=device)
    target_N, inv_temperature_N = target_N.contiguous(), inv_temperature_N.contiguous()
    stats = torch.empty(3, N, dtype=torch.float32, device=device).unbind()
    if N == 0:
        return stats
    if hidden_ND.dtype == torch.float32 or D % 8 or not has_tensor_memory_accelerator(device):
        _from_logits(hidden_ND, weight_VD, target_N, inv_temperature_N, *stats, entropy)
        return stats
    num_tiles_v = triton.cdiv(V, BLOCK_V)
    record = torch.empty(3 if entropy else 2, num_tiles_v, N, dtype=torch.float32, device=device)
    grid = num_programs(device, triton.cdiv(N, BLOCK_N) * num_tiles_v)
    logprob_tiles_kernel[(grid,)](
        TensorDescriptor.from_tensor(rows_of_16_bytes(hidden_ND), [BLOCK_N, BLOCK_D]),
        TensorDescriptor.from_tensor(rows_of_16_bytes(weight_VD), [BLOCK_V, BLOCK_D]),
        target_N, inv_temperature_N, record, stats[0], N, V, D,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, GROUP_N=GROUP_N, ENTROPY=entropy,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    logprob_merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
        record, target_N, *stats, N, V, num_tiles_v,
        MERGE_ROWS=MERGE_ROWS, MERGE_TILES=MERGE_TILES, ENTROPY=entropy, num_warps=4,
    )  # fmt: skip
    return stats


def _from_logits(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor, logprob_N: Tensor,
    logsumexp_N: Tensor, entropy_N: Tensor, entropy: bool,
) -> None:  # fmt: skip
    V, chunks = len(weight_VD), chunks_of_rows(len(hidden_ND))
    scratch_NV = hidden_ND.new_empty(max(rows.stop - rows.start for rows in chunks), V, dtype=torch.float32)
    for rows in chunks:
        hidden, logits = hidden_ND[rows], scratch_NV[: rows.stop - rows.start]
        matmul_fp32(hidden, weight_VD.T, logits)
        logprob_rows_kernel[(len(hidden),)](
            logits, target_N[rows], inv_temperature_N[rows], logprob_N[rows], logsumexp_N[rows], entropy_N[rows], V,
            BLOCK_V=block_size(V), ENTROPY=entropy, num_warps=ROW_WARPS,
        )  # fmt: skip


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None
) -> Tensor:
    """``log softmax(inv_temperature * hidden weight^T)[target]`` of every row, [N] fp32, not differentiable.

    Args:
        hidden_ND, weight_VD: fp32, fp16 or bf16, of one dtype; copied if their rows are not dense.
        target_N: [N] int64.
        inv_temperature_N: [N] fp32; 1 if absent.
    """
    return logprob_stats(hidden_ND, weight_VD, target_N, inv_temperature_N, entropy=False)[0]
