"""Rotary position embedding of queries and keys in one launch, forward and backward.

With halves (a, b) of a head and its token's cos and sin: ``(a cos - b sin, b cos + a sin)``; backward turns the other
way. Every element is read and written once, in either direction; the tables are read once a block of heads. fp32
arithmetic, one rounding. Queries and keys are read where they stand in the fused projection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_H = 8  # heads a program turns
NUM_WARPS = 2


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, stride_h, out_stride_h, cos, sin, block, num_heads, E_HALF, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Turn a block of one token's heads."""
    head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = (head < num_heads) & (column < E_HALF)
    x_ptr += head * stride_h + column
    out_ptr += head * out_stride_h + column
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + E_HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr, first * cos - second * sin, mask=mask)
    tl.store(out_ptr + E_HALF, second * cos + first * sin, mask=mask)


@triton.jit
def load_angles(cos_ptr, sin_ptr, token, E_HALF, BLOCK_E: tl.constexpr):
    """[1, BLOCK_E] fp32 cosines and sines of one token."""
    column = tl.arange(0, BLOCK_E)[None, :]
    offset = token * E_HALF + column
    cos = tl.load(cos_ptr + offset, mask=column < E_HALF, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + offset, mask=column < E_HALF, other=0.0).to(tl.float32)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h, H, K, E_HALF,
    BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, E_HALF, BLOCK_E)
    if BACKWARD:
        sin = -sin
    q_blocks = tl.cdiv(H, BLOCK_H)
    E = 2 * E_HALF
    if block < q_blocks:
        q_ptr += token * q_stride_t
        rotate_heads(q_ptr, q_out_ptr + token * H * E, q_stride_h, E, cos, sin, block, H, E_HALF, BLOCK_H, BLOCK_E)
    else:
        block -= q_blocks
        k_ptr += token * k_stride_t
        rotate_heads(k_ptr, k_out_ptr + token * K * E, k_stride_h, E, cos, sin, block, K, E_HALF, BLOCK_H, BLOCK_E)


def dense_heads(x_THE: Tensor) -> Tensor:
    """The tensor itself, or a copy if its heads are not dense."""
    return x_THE if x_THE.stride(2) == 1 else x_THE.contiguous()


def check_tables(q_THE: Tensor, cos_TF: Tensor) -> None:
    """Raise ValueError unless the tables have a column for each pair of a head's halves."""
    if q_THE.shape[2] != 2 * cos_TF.shape[1]:
        raise ValueError(f"cos_TF: expected F={q_THE.shape[2] / 2:g}, half a head of q_THE, got {cos_TF.shape[1]}")


def _turn(q_THE: Tensor, k_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    q_THE, k_TKE = dense_heads(q_THE), dense_heads(k_TKE)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THE, k_TKE))
    (T, H, E), K = q_THE.shape, k_TKE.shape[1]
    if T and E:
        rotate_kernel[(T, triton.cdiv(H, BLOCK_H) + triton.cdiv(K, BLOCK_H))](
            q_THE, k_TKE, cos_TF, sin_TF, q_out, k_out, *q_THE.stride()[:2], *k_TKE.stride()[:2], H, K, E // 2,
            BACKWARD=backward, BLOCK_H=BLOCK_H, BLOCK_E=triton.next_power_of_2(E // 2), num_warps=NUM_WARPS,
        )  # fmt: skip
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THE, k_TKE, cos_TF, sin_TF):
        ctx.save_for_backward(cos_TF, sin_TF)
        return _turn(q_THE, k_TKE, cos_TF, sin_TF, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q_THE, grad_k_TKE):
        return *_turn(grad_q_THE, grad_k_TKE, *ctx.saved_tensors, backward=True), None, None


def rotate(q_THE: Tensor, k_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their tokens' angles; see the reference.

    Args:
        q_THE, k_TKE: [T, H, E] and [T, K, E] fp32, fp16 or bf16; a copy only where heads are not dense.
        cos_TF, sin_TF: [T, E / 2]; they get no gradient.

    Returns:
        [T, H, E], [T, K, E], dense.
    """
    check_tables(q_THE, cos_TF)
    return _Rotate.apply(q_THE, k_TKE, cos_TF.contiguous(), sin_TF.contiguous())
