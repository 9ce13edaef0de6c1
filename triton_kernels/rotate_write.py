"""RoPE of queries and keys, and the write of keys and values to their places in the paged cache, in one launch.

Every element of q, k and v is read and written once. No gradient: this is the path of rollouts and scoring.
"""

import torch
import triton
import triton.language as tl
from nrt_fast.triton_kernels.rotate import BLOCK_H, NUM_WARPS, check_tables, dense_heads, load_angles, rotate_heads
from torch import Tensor


@triton.jit
def rotate_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pages_ptr, v_pages_ptr, page_ptr, slot_ptr, q_out_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    k_stride_page, k_stride_head, k_stride_slot, v_stride_page, v_stride_head, v_stride_slot, H, K, E_HALF,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_blocks, k_blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(K, BLOCK_H)
    if block < q_blocks + k_blocks:
        cos, sin = load_angles(cos_ptr, sin_ptr, token, E_HALF, BLOCK_E)
        if block < q_blocks:
            out_ptr = q_out_ptr + token * H * 2 * E_HALF
            q_ptr += token * q_stride_t
            rotate_heads(q_ptr, out_ptr, q_stride_h, 2 * E_HALF, cos, sin, block, H, E_HALF, BLOCK_H, BLOCK_E)
        else:
            page, slot = tl.load(page_ptr + token).to(tl.int64), tl.load(slot_ptr + token).to(tl.int64)
            out_ptr = k_pages_ptr + page * k_stride_page + slot * k_stride_slot
            k_ptr += token * k_stride_t
            block -= q_blocks
            rotate_heads(k_ptr, out_ptr, k_stride_h, k_stride_head, cos, sin, block, K, E_HALF, BLOCK_H, BLOCK_E)
    else:
        page, slot = tl.load(page_ptr + token).to(tl.int64), tl.load(slot_ptr + token).to(tl.int64)
        head = ((block - q_blocks - k_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        column = tl.arange(0, 2 * BLOCK_E)[None, :]
        mask = (head < K) & (column < 2 * E_HALF)
        v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + column, mask=mask)
        place = v_pages_ptr + page * v_stride_page + slot * v_stride_slot + head * v_stride_head + column
        tl.store(place, v, mask=mask)


def rotate_write(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor, k_pages_NKSE: Tensor,
    v_pages_NKSE: Tensor, page_T: Tensor, slot_T: Tensor,
) -> Tensor:  # fmt: skip
    """Turn q and k, write k and v at (page, slot), return the turned q; see the reference.

    Args:
        q_THE, k_TKE, v_TKE: [T, H, E], [T, K, E], [T, K, E]; a copy only where heads are not dense.
        cos_TF, sin_TF: [T, E / 2].
        k_pages_NKSE, v_pages_NKSE: [N, K, S, E] of one layer, changed in place; heads dense.
        page_T, slot_T: [T] int32 or int64, each place once.

    Returns:
        [T, H, E], dense.
    """
    check_tables(q_THE, cos_TF)
    q_THE, k_TKE, v_TKE = (dense_heads(x) for x in (q_THE, k_TKE, v_TKE))
    q_out = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    (T, H, E), K = q_THE.shape, k_TKE.shape[1]
    if k_pages_NKSE.stride(3) != 1 or v_pages_NKSE.stride(3) != 1:
        raise ValueError("k_pages_NKSE, v_pages_NKSE: their heads must be dense")
    if T and E:
        rotate_write_kernel[(T, triton.cdiv(H, BLOCK_H) + 2 * triton.cdiv(K, BLOCK_H))](
            q_THE, k_TKE, v_TKE, cos_TF.contiguous(), sin_TF.contiguous(), k_pages_NKSE, v_pages_NKSE,
            page_T.contiguous(), slot_T.contiguous(), q_out,
            *q_THE.stride()[:2], *k_TKE.stride()[:2], *v_TKE.stride()[:2],
            *k_pages_NKSE.stride()[:3], *v_pages_NKSE.stride()[:3], H, K, E // 2,
            BLOCK_H=BLOCK_H, BLOCK_E=triton.next_power_of_2(E // 2), num_warps=NUM_WARPS,
        )  # fmt: skip
    return q_out
