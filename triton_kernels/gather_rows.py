"""Rows of a tensor, some of them several times, with a gradient that adds every row's copies in fp32, in their order.

PyTorch's gradient adds with atomics in the tensor's own dtype, in an order that changes from run to run. Here each row
reads its copies and is written once: (R + T) K E elements backward; forward is PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK_C = 1024
NUM_WARPS = 4


@triton.jit
def gather_rows_bwd_kernel(grad_ptr, copies_ptr, cu_copies_ptr, out_ptr, C, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(cu_copies_ptr + row), tl.load(cu_copies_ptr + row + 1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for place in range(start, end):
        copy = tl.load(copies_ptr + place)
        total += tl.load(grad_ptr + copy * C + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + column, total, mask=column < C)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TKE, index_R, copies_R, cu_copies):
        ctx.save_for_backward(copies_R, cu_copies)
        ctx.shape = x_TKE.shape
        return x_TKE.index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RKE):
        copies_R, cu_copies = ctx.saved_tensors
        grad_TKE = torch.empty(ctx.shape, dtype=grad_RKE.dtype, device=grad_RKE.device)
        T, C = ctx.shape[0], ctx.shape[1:].numel()
        if T and C:
            block_c = min(triton.next_power_of_2(C), MAX_BLOCK_C)
            gather_rows_bwd_kernel[(T, triton.cdiv(C, block_c))](
                grad_RKE.contiguous(), copies_R, cu_copies, grad_TKE, C, BLOCK_C=block_c, num_warps=NUM_WARPS
            )
        return grad_TKE, None, None, None


def gather_rows(x_TKE: Tensor, index_R: Tensor, copies_R: Tensor, cu_copies: Tensor) -> Tensor:
    """``x[index]``; see the reference.

    Args:
        x_TKE: [T, K, E] fp32, fp16 or bf16, any strides.
        index_R, copies_R: [R] int64, dense.
        cu_copies: [T + 1] int64, dense.

    Returns:
        [R, K, E], dense.
    """
    return _GatherRows.apply(x_TKE, index_R, copies_R, cu_copies)
