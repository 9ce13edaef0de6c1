"""``silu(gate) * up`` over the fused projection [gate | up], forward and backward.

Per element of the result, of b bytes: forward reads 2 b and writes b; backward reads 3 b and writes 2 b, both halves of
one gradient. fp32 arithmetic, one rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK_F = 1024
NUM_WARPS = 4


@triton.jit
def swiglu_fwd_kernel(gate_up_ptr, out_ptr, stride_t, stride_half, F, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_ptr = gate_up_ptr + row * stride_t + column
    gate = tl.load(gate_ptr, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + stride_half, mask=column < F, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=column < F)


@triton.jit
def swiglu_bwd_kernel(
    gate_up_ptr, grad_ptr, grad_gate_up_ptr, stride_t, stride_half, grad_stride_t, F, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_ptr = gate_up_ptr + row * stride_t + column
    gate = tl.load(gate_ptr, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + stride_half, mask=column < F, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride_t + column, mask=column < F, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate_ptr = grad_gate_up_ptr + row * 2 * F + column
    tl.store(grad_gate_ptr, grad * up * (sigmoid + silu * (1 - sigmoid)), mask=column < F)
    tl.store(grad_gate_ptr + F, grad * silu, mask=column < F)


def _grid(T: int, F: int) -> tuple[tuple[int, int], int]:
    block_f = min(triton.next_power_of_2(F), MAX_BLOCK_F)
    return (T, triton.cdiv(F, block_f)), block_f


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F):
        T, _, F = gate_up_T2F.shape
        out_TF = torch.empty(T, F, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
        if out_TF.numel():
            grid, block_f = _grid(T, F)
            swiglu_fwd_kernel[grid](
                gate_up_T2F, out_TF, *gate_up_T2F.stride()[:2], F, BLOCK_F=block_f, num_warps=NUM_WARPS
            )
        ctx.save_for_backward(gate_up_T2F)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TF):
        (gate_up_T2F,) = ctx.saved_tensors
        T, _, F = gate_up_T2F.shape
        grad_TF = grad_TF if grad_TF.stride(1) == 1 else grad_TF.contiguous()
        grad_T2F = torch.empty(T, 2, F, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
        if grad_T2F.numel():
            grid, block_f = _grid(T, F)
            swiglu_bwd_kernel[grid](
                gate_up_T2F, grad_TF, grad_T2F, *gate_up_T2F.stride()[:2], grad_TF.stride(0), F,
                BLOCK_F=block_f, num_warps=NUM_WARPS,
            )  # fmt: skip
        return grad_T2F


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up_T2F: [T, 2, F] fp32, fp16 or bf16, gate first; copied if its rows are not dense.

    Returns:
        [T, F], dense.
    """
    return _Swiglu.apply(gate_up_T2F if gate_up_T2F.stride(2) == 1 else gate_up_T2F.contiguous())
