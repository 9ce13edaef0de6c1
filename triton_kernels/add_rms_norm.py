"""Residual add and RMSNorm in one pass: ``sum = x + residual`` and ``normed = weight * (sum / rms(sum))``.

Rounds where Hugging Face rounds: the sum, the normed value before the weight, the result; all between is fp32. Per
element of b bytes, forward reads 2 b and writes 2 b; backward reads 3 b (both upstream gradients and the sum) and
writes b, which is the gradient of x and of the residual alike. The weight's gradient takes two stages without atomics:
every program leaves its rows' sum in fp32, then a second kernel adds those in a fixed order. A program works on whole
rows held in registers, several where rows are short. rms_norm is the same kernels without the residual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # elements a program holds at once, or one row where that is longer
NUM_PARTIALS = 256  # programs of the backward: two a streaming multiprocessor; fixed, so that sums never change


@triton.jit
def tile_offsets(tile, stride_outer, stride_inner, num_rows, INNER, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns of a tile of [outer, INNER, D]: strided offsets, dense ones, row numbers, what exists."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    strided = row // INNER * stride_outer + row % INNER * stride_inner
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    return strided[:, None] + column[None, :], (row * D)[:, None] + column[None, :], row, mask


@triton.jit
def add_rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, rstd_ptr,
    x_outer, x_inner, residual_outer, residual_inner, num_rows, INNER, D,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    offset, dense, row, mask = tile_offsets(tile, x_outer, x_inner, num_rows, INNER, D, ROWS, BLOCK_D)
    column = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        offset, _, _, _ = tile_offsets(tile, residual_outer, residual_inner, num_rows, INNER, D, ROWS, BLOCK_D)
        total = (x + tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + dense, total, mask=mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    normed = (x * rstd[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(normed_ptr + dense, weight[None, :] * normed, mask=mask)


@triton.jit
def add_rms_norm_bwd_kernel(
    sum_ptr, weight_ptr, rstd_ptr, grad_normed_ptr, grad_sum_ptr, grad_ptr, partial_ptr,
    sum_outer, sum_inner, normed_outer, normed_inner, more_outer, more_inner, num_rows, INNER, D,
    HAS_GRAD_SUM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    partial = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        offset, dense, row, mask = tile_offsets(tile, sum_outer, sum_inner, num_rows, INNER, D, ROWS, BLOCK_D)
        x = tl.load(sum_ptr + offset, mask=mask, other=0.0)
        dtype = x.dtype
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        x = x.to(tl.float32) * rstd
        offset, _, _, _ = tile_offsets(tile, normed_outer, normed_inner, num_rows, INNER, D, ROWS, BLOCK_D)
        grad_normed = tl.load(grad_normed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        partial += grad_normed * x.to(dtype).to(tl.float32)
        scaled = grad_normed * weight[None, :]
        grad = rstd * (scaled - x * (tl.sum(scaled * x, axis=1) / D)[:, None])
        if HAS_GRAD_SUM:
            offset, _, _, _ = tile_offsets(tile, more_outer, more_inner, num_rows, INNER, D, ROWS, BLOCK_D)
            grad += tl.load(grad_sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + dense, grad, mask=mask)
    tl.store(partial_ptr + program.to(tl.int64) * D + column, tl.sum(partial, axis=0), mask=column < D)


@triton.jit
def sum_partials_kernel(partial_ptr, out_ptr, num_partials, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        mask = (row < num_partials)[:, None] & (column < D)[None, :]
        total += tl.load(partial_ptr + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < D)


def add_rms_norm_fwd(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, sum, rstd): the sum is x itself where there is no residual; rstd is [rows] fp32."""
    D = x.shape[-1]
    if weight_D.shape != (D,):
        raise ValueError(f"weight_D: expected shape [{D}], the last axis of x, got {list(weight_D.shape)}")
    x_rows, weight_D = as_rows(x), weight_D.contiguous()
    num_rows, inner = x_rows.shape[:2].numel(), x_rows.shape[1]
    normed = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight_D.dtype), device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_rows = x_rows if residual is None else as_rows(residual)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows, block_d, num_warps = blocks(D)
    if x.numel():
        add_rms_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
            x_rows, residual_rows, weight_D, normed, total, rstd,
            *x_rows.stride()[:2], *residual_rows.stride()[:2], num_rows, inner, D,
            EPS=eps, HAS_RESIDUAL=residual is not None, ROWS=rows, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return normed, total, rstd


def add_rms_norm_bwd(
    total: Tensor, weight_D: Tensor, rstd: Tensor, grad_normed: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum, dense and in its dtype, and of the weight."""
    D = total.shape[-1]
    total_rows, normed_rows, weight_D = as_rows(total), as_rows(grad_normed), weight_D.contiguous()
    sum_rows = normed_rows if grad_sum is None else as_rows(grad_sum)
    num_rows, inner = total_rows.shape[:2].numel(), total_rows.shape[1]
    grad = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if not total.numel():
        return grad, torch.zeros_like(weight_D)
    grad_weight_D = torch.empty(D, dtype=weight_D.dtype, device=weight_D.device)
    rows, block_d, num_warps = blocks(D)
    num_partials = min(triton.cdiv(num_rows, rows), NUM_PARTIALS)
    partial = torch.empty(num_partials, D, dtype=torch.float32, device=total.device)
    add_rms_norm_bwd_kernel[(num_partials,)](
        total_rows, weight_D, rstd, normed_rows, sum_rows, grad, partial,
        *total_rows.stride()[:2], *normed_rows.stride()[:2], *sum_rows.stride()[:2], num_rows, inner, D,
        HAS_GRAD_SUM=grad_sum is not None, ROWS=rows, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    sum_partials_kernel[(triton.cdiv(D, 64),)](partial, grad_weight_D, num_partials, D, BLOCK_P=32, BLOCK_D=64)
    return grad, grad_weight_D


def as_rows(x: Tensor) -> Tensor:
    """[..., D] as [outer, inner, D] with dense rows; only a tensor whose rows are not dense is copied."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x.unsqueeze(-2) if x.ndim < 3 else x
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def blocks(D: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps: 16 elements a thread."""
    block_d = triton.next_power_of_2(D)
    rows = max(TILE // block_d, 1)
    return rows, block_d, min(max(rows * block_d // 512, 4), 32)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, residual_TD, weight_D, eps):
        normed_TD, sum_TD, rstd = add_rms_norm_fwd(x_TD, residual_TD, weight_D, eps)
        ctx.save_for_backward(sum_TD, weight_D, rstd)
        ctx.set_materialize_grads(False)
        return normed_TD, sum_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_normed_TD, grad_sum_TD):
        if grad_normed_TD is None:
            return grad_sum_TD, grad_sum_TD, None, None
        grad_TD, grad_weight_D = add_rms_norm_bwd(*ctx.saved_tensors, grad_normed_TD, grad_sum_TD)
        return grad_TD, grad_TD, grad_weight_D, None


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``; see the reference.

    Args:
        x_TD, residual_TD: [T, D] fp32, fp16 or bf16, one dtype; any strides.
        weight_D: [D].

    Returns:
        normed_TD, sum_TD: [T, D], dense.
    """
    return _AddRmsNorm.apply(x_TD, residual_TD, weight_D, eps)
