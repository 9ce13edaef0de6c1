"""Attention of new tokens over a paged cache: one formula behind prefill, decode and scoring."""

import torch
from torch import Tensor


def prefix_attention(
    q_THE: Tensor, prefix_k_NKSE: Tensor, prefix_v_NKSE: Tensor, prefix_pages_PX: Tensor, prefix_lens_P: Tensor,
    own_k_MKZE: Tensor, own_v_MKZE: Tensor, own_pages_BY: Tensor, own_lens_B: Tensor, cu_q: Tensor, cu_rows: Tensor,
    max_q: int, max_rows: int, window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v of new tokens over their group's prefix and their own row, both in a paged cache.

    Groups of rows share a prefix: the traces of a prompt. Query i of row b stands at position
    prefix_len + own_lens_B[b] + i; it sees the prefix, the row's keys before it, and itself, whose keys and values are
    in the cache already. Slot s of a sequence is slot s % page size of page table[s // page size]; table entries and
    slots past a sequence's end are not read. The prefix and the rows may lie in one storage or in two; a contiguous
    cache is one whose pages are as long as its rows.

    Args:
        q_THE: [T, H, E] fp32, bf16 or fp16 (fp64 here alone), row after row, the rows of a group together.
        prefix_k_NKSE, prefix_v_NKSE: [N, K, S, E] N pages of S slots, dtype of q. Grouped-query: H is a multiple of K.
        prefix_pages_PX: [P, X] int32 pages of each group's prefix; X = 0: there is none.
        prefix_lens_P: [P] int32 filled slots.
        own_k_MKZE, own_v_MKZE: [M, K, Z, E] M pages of Z slots.
        own_pages_BY: [B, Y] int32 pages of each row.
        own_lens_B: [B] int32 keys of each row before its first query.
        cu_q: [B + 1] int32 offsets of each row's queries in T; a row may have none.
        cu_rows: [P + 1] int32 offsets of each group's rows in B.
        max_q, max_rows: at least the queries of any row and the rows of any group; they size grids without asking the
            device.
        window: positions that a query sees, itself included; None: all.
        scale: of the scores, E**-0.5 unless given.

    Returns:
        [T, H, E], dtype of q; arithmetic in fp32, or in fp64 where q is.
    """
    (T, H, E), B, K, device = q_THE.shape, len(own_lens_B), own_k_MKZE.shape[1], q_THE.device
    if H % K or len(cu_q) != B + 1 or len(cu_rows) != len(prefix_lens_P) + 1 or (window is not None and window < 1):
        raise ValueError(
            f"expected query heads in multiples of {K}, {B + 1} offsets cu_q, {len(prefix_lens_P) + 1} offsets cu_rows "
            f"and a window of at least 1; got {H}, {len(cu_q)}, {len(cu_rows)} and {window}"
        )
    dtype = torch.float64 if q_THE.dtype == torch.float64 else torch.float32
    rows, tokens = torch.arange(B, device=device), torch.arange(T, device=device)
    group_B = torch.searchsorted(cu_rows, rows, right=True) - 1
    row_T = torch.searchsorted(cu_q, tokens, right=True) - 1
    query_T = tokens - cu_q[row_T]
    q_BQHE = q_THE.new_zeros(B, max_q, H, E, dtype=dtype)
    q_BQHE[row_T, query_T] = q_THE.to(dtype)
    q_BKME = q_BQHE.view(B, max_q, K, H // K, E).transpose(1, 2).flatten(2, 3)  # M: queries times heads of a key

    prefix_lens_B1, own_lens_B1 = prefix_lens_P[group_B, None], own_lens_B[:, None]
    (prefix_k, prefix_v), (own_k, own_v) = (
        [_sequences(pages, table, lens) for pages in caches]
        for caches, table, lens in (
            ((prefix_k_NKSE, prefix_v_NKSE), prefix_pages_PX[group_B], prefix_lens_B1),
            ((own_k_MKZE, own_v_MKZE), own_pages_BY, own_lens_B1 + cu_q.diff()[:, None]),
        )
    )
    k_BKSE, v_BKSE = torch.cat([prefix_k, own_k], dim=2).to(dtype), torch.cat([prefix_v, own_v], dim=2).to(dtype)
    prefix_slot = torch.arange(prefix_k.shape[2], device=device)
    own_slot = torch.arange(own_k.shape[2], device=device)
    position_BS = torch.cat([prefix_slot.expand(B, -1), prefix_lens_B1 + own_slot], dim=1)
    exists_BS = torch.cat([prefix_slot < prefix_lens_B1, (own_slot >= 0).expand(B, -1)], dim=1)
    query_BQ1 = (prefix_lens_B1 + own_lens_B1 + torch.arange(max_q, device=device))[..., None]
    visible_BQS = exists_BS[:, None] & (position_BS[:, None] <= query_BQ1)
    if window is not None:
        visible_BQS &= position_BS[:, None] > query_BQ1 - window

    scores_BKMS = (q_BKME * (E**-0.5 if scale is None else scale)) @ k_BKSE.transpose(-1, -2)
    visible_B1MS = visible_BQS.repeat_interleave(H // K, dim=1)[:, None]
    weights_BKMS = scores_BKMS.masked_fill(~visible_B1MS, float("-inf")).softmax(dim=-1)
    out_BQHE = (weights_BKMS @ v_BKSE).view(B, K, max_q, H // K, E).transpose(1, 2).reshape(B, max_q, H, E)
    return out_BQHE[row_T, query_T].to(q_THE.dtype)


def _sequences(pages_NKSE: Tensor, table_BX: Tensor, lens_B1: Tensor) -> Tensor:
    """[B, K, X S, E]: the pages of each sequence, zero past its length."""
    (B, X), S = table_BX.shape, pages_NKSE.shape[2]
    filled_BS = torch.arange(X * S, device=table_BX.device) < lens_B1
    used_BX = filled_BS.view(B, X, S)[..., 0]
    slots_BKSE = pages_NKSE[torch.where(used_BX, table_BX, 0).long()].transpose(1, 2).flatten(2, 3)
    return torch.where(filled_BS[:, None, :, None], slots_BKSE, 0)
