"""Attention of new tokens over a paged cache whose groups of rows share a prefix: the op of decode and of scoring.

The prefix is read once for all queries of a group, not once a row: per layer and step, decode of B rows in P groups
reads 2 K E b (P prefix + B own) bytes of keys and values, b bytes an element, against 2 K E b B (prefix + own).

One program takes one work item: a group's prefix or a row's own keys, one key head, one tile of query rows (tokens
times the query heads of that key head), and CHUNK keys. It leaves a partial result: fp32 total, peak and sum of an
online softmax in base 2. A second kernel merges each query's partial results in the order of their keys. The chunks are
aligned to slot 0 and of one size, so the split does not depend on the batch; nothing is atomic. With more than
MAX_SPLIT_QUERIES queries a row there are programs enough without chunks, and scratch would grow: prefix and own keys
are then one chunk each, and without a prefix the first kernel writes the result itself.

Grids come from the tables' columns, max_q and max_rows: nothing is read back from the device, so the launches can live
in a CUDA graph; programs without work store a peak of -inf and leave. Keys that no query of a tile sees are not loaded,
so what they hold does not matter. Rows need no alignment, but are loaded 16 bytes at a time only where E b and the
tensors' addresses are multiples of 16, as Triton's specialisation finds out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  # keys of a partial result
MAX_SPLIT_QUERIES = 8
BLOCK_N = 32  # keys of a tile, half of it for heads wider than 128: more would spill registers on sm_80
MAX_BLOCK_M = 64  # query rows of a tile; tl.dot needs 16
MERGED_ROWS = 8
LOG2_E = 1.4426950408889634


@triton.jit
def _page_offsets(pages_ptr, start, slot_N, hi, K, PAGE, E: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the slots of a tile lie, for key head 0; a tile within one page needs one look at the table."""
    if ALIGNED:
        page = tl.load(pages_ptr + start // PAGE).to(tl.int64)
        return page * K * PAGE * E + (slot_N % PAGE) * E
    page_N = tl.load(pages_ptr + slot_N // PAGE, mask=slot_N < hi, other=0).to(tl.int64)
    return page_N * K * PAGE * E + (slot_N % PAGE) * E


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, pages_ptr, total_ptr, peak_ptr, sum_ptr, token_M, head_M, valid_M, oldest_M, newest_M, lo, hi,
    kv_head, chunk, T, K, PAGE, stride_t, stride_h, scale_log2, E: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Query row m sees slots oldest[m]..newest[m]; of those, lo..hi are this chunk's."""
    row_M = token_M.to(tl.int64) * (K * R) + head_M  # of the result [T, H, E]
    partial_M = row_M + chunk.to(tl.int64) * T * (K * R)
    lo = tl.maximum(lo, tl.min(tl.where(valid_M, oldest_M, 2147483647), axis=0) // BLOCK_N * BLOCK_N)
    hi = tl.minimum(hi, tl.max(tl.where(valid_M, newest_M, -1), axis=0) + 1)
    peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if lo >= hi:
        if not DIRECT:
            tl.store(peak_ptr + partial_M, peak_M, mask=valid_M)
    else:
        e = tl.arange(0, BLOCK_E)
        q_offsets = token_M.to(tl.int64)[:, None] * stride_t + head_M[:, None] * stride_h + e[None, :]
        q_ME = tl.load(q_ptr + q_offsets, mask=valid_M[:, None] & (e < E)[None, :], other=0.0)
        sum_M = tl.zeros([BLOCK_M], tl.float32)
        total_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        k_ptr += kv_head * PAGE * E
        v_ptr += kv_head * PAGE * E
        for start in range(lo, hi, BLOCK_N):
            slot_N = start + tl.arange(0, BLOCK_N)
            offsets = _page_offsets(pages_ptr, start, slot_N, hi, K, PAGE, E, ALIGNED)[:, None] + e[None, :]
            exists = (slot_N < hi)[:, None] & (e < E)[None, :]
            k_NE = tl.load(k_ptr + offsets, mask=exists, other=0.0)
            scores_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee") * scale_log2
            visible = (slot_N[None, :] >= oldest_M[:, None]) & (slot_N[None, :] <= newest_M[:, None])
            scores_MN = tl.where(visible, scores_MN, float("-inf"))
            new_peak_M = tl.maximum(peak_M, tl.max(scores_MN, axis=1))
            shift_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)  # -inf - -inf would be NaN
            weight_MN = tl.exp2(scores_MN - shift_M[:, None])
            rescale_M = tl.exp2(peak_M - shift_M)
            sum_M = sum_M * rescale_M + tl.sum(weight_MN, axis=1)
            v_NE = tl.load(v_ptr + offsets, mask=exists, other=0.0)
            total_ME = total_ME * rescale_M[:, None]
            total_ME += tl.dot(weight_MN.to(v_NE.dtype), v_NE, input_precision="ieee")
            peak_M = new_peak_M
        written = valid_M[:, None] & (e < E)[None, :]
        if DIRECT:
            sum_M = tl.where(valid_M, sum_M, 1.0)
            tl.store(total_ptr + row_M[:, None] * E + e[None, :], total_ME / sum_M[:, None], mask=written)
        else:
            tl.store(total_ptr + partial_M[:, None] * E + e[None, :], total_ME, mask=written)
            tl.store(peak_ptr + partial_M, peak_M, mask=valid_M)
            tl.store(sum_ptr + partial_M, sum_M, mask=valid_M)


@triton.jit
def _prefix_item(
    item, q_ptr, k_ptr, v_ptr, pages_ptr, lens_ptr, own_lens_ptr, cu_q_ptr, cu_rows_ptr, total_ptr, peak_ptr, sum_ptr,
    scale_log2, window, T, K, X, S, stride_t, stride_h, tiles, chunks, chunk_keys, E: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """A tile of all the queries of a group, over a chunk of its prefix."""
    kv_head, tile, chunk, group = item % K, item // K % tiles, item // K // tiles % chunks, item // K // tiles // chunks
    first_row, end_row = tl.load(cu_rows_ptr + group), tl.load(cu_rows_ptr + group + 1)
    first_token, end_token = tl.load(cu_q_ptr + first_row), tl.load(cu_q_ptr + end_row)
    if first_token + tile * BLOCK_M // R < end_token:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token_M = first_token + m // R
        length = tl.load(lens_ptr + group)
        oldest_M = tl.zeros([BLOCK_M], tl.int32)
        if WINDOWED:
            own_slot_M = tl.zeros([BLOCK_M], tl.int32)
            for row in range(first_row, end_row):  # a token's row is the last one that starts at or before it
                start = tl.load(cu_q_ptr + row)
                slot_M = tl.load(own_lens_ptr + row) + token_M - start
                own_slot_M = tl.where(token_M >= start, slot_M, own_slot_M)
            oldest_M = tl.maximum(length + own_slot_M + 1 - window, 0)
        _attend(
            q_ptr, k_ptr, v_ptr, pages_ptr + group * X, total_ptr, peak_ptr, sum_ptr, token_M, kv_head * R + m % R,
            token_M < end_token, oldest_M, tl.full([BLOCK_M], 0, tl.int32) + (length - 1), chunk * chunk_keys,
            tl.minimum((chunk + 1) * chunk_keys, length), kv_head, chunk, T, K, S, stride_t, stride_h, scale_log2,
            E, R, BLOCK_M, BLOCK_N, BLOCK_E, ALIGNED, False,
        )  # fmt: skip


@triton.jit
def _own_item(
    item, q_ptr, k_ptr, v_ptr, pages_ptr, lens_ptr, cu_q_ptr, total_ptr, peak_ptr, sum_ptr, scale_log2, window, T, K, Y,
    Z, stride_t, stride_h, tiles, first_chunk, chunks, chunk_keys, E: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, WINDOWED: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """A tile of a row's queries, over a chunk of its own keys."""
    kv_head, tile, chunk, row = item % K, item // K % tiles, item // K // tiles % chunks, item // K // tiles // chunks
    first_token, end_token = tl.load(cu_q_ptr + row), tl.load(cu_q_ptr + row + 1)
    if first_token + tile * BLOCK_M // R < end_token:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token_M = first_token + m // R
        newest_M = tl.load(lens_ptr + row) + m // R
        oldest_M = tl.zeros([BLOCK_M], tl.int32)
        if WINDOWED:
            oldest_M = tl.maximum(newest_M + 1 - window, 0)
        _attend(
            q_ptr, k_ptr, v_ptr, pages_ptr + row * Y, total_ptr, peak_ptr, sum_ptr, token_M, kv_head * R + m % R,
            token_M < end_token, oldest_M, newest_M, chunk * chunk_keys, (chunk + 1) * chunk_keys, kv_head,
            first_chunk + chunk, T, K, Z, stride_t, stride_h, scale_log2,
            E, R, BLOCK_M, BLOCK_N, BLOCK_E, ALIGNED, DIRECT,
        )  # fmt: skip


@triton.jit
def prefix_attention_chunk_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, prefix_pages_ptr, prefix_lens_ptr, own_k_ptr, own_v_ptr, own_pages_ptr,
    own_lens_ptr, cu_q_ptr, cu_rows_ptr, total_ptr, peak_ptr, sum_ptr, scale_log2, window, T, K, X, S, Y, Z,
    stride_t, stride_h, num_prefix_items, prefix_tiles, prefix_chunks, prefix_chunk, own_tiles, own_chunks, own_chunk,
    E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PREFIX_BLOCK_M: tl.constexpr,
    OWN_BLOCK_M: tl.constexpr, PREFIX_ALIGNED: tl.constexpr, OWN_ALIGNED: tl.constexpr, WINDOWED: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if DIRECT:
        _own_item(
            item, q_ptr, own_k_ptr, own_v_ptr, own_pages_ptr, own_lens_ptr, cu_q_ptr, total_ptr, peak_ptr, sum_ptr,
            scale_log2, window, T, K, Y, Z, stride_t, stride_h, own_tiles, prefix_chunks, own_chunks, own_chunk,
            E, R, OWN_BLOCK_M, BLOCK_N, BLOCK_E, OWN_ALIGNED, WINDOWED, DIRECT,
        )  # fmt: skip
    elif item < num_prefix_items:
        _prefix_item(
            item, q_ptr, prefix_k_ptr, prefix_v_ptr, prefix_pages_ptr, prefix_lens_ptr, own_lens_ptr, cu_q_ptr,
            cu_rows_ptr, total_ptr, peak_ptr, sum_ptr, scale_log2, window, T, K, X, S, stride_t, stride_h, prefix_tiles,
            prefix_chunks, prefix_chunk, E, R, PREFIX_BLOCK_M, BLOCK_N, BLOCK_E, PREFIX_ALIGNED, WINDOWED,
        )  # fmt: skip
    else:
        _own_item(
            item - num_prefix_items, q_ptr, own_k_ptr, own_v_ptr, own_pages_ptr, own_lens_ptr, cu_q_ptr, total_ptr,
            peak_ptr, sum_ptr, scale_log2, window, T, K, Y, Z, stride_t, stride_h, own_tiles, prefix_chunks, own_chunks,
            own_chunk, E, R, OWN_BLOCK_M, BLOCK_N, BLOCK_E, OWN_ALIGNED, WINDOWED, DIRECT,
        )  # fmt: skip


@triton.jit
def prefix_attention_merge_kernel(
    total_ptr, peak_ptr, sum_ptr, out_ptr, num_rows, num_chunks, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    valid_R = row_R < num_rows
    peak_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    total_RE = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    partial_R = row_R.to(tl.int64)
    for _ in range(num_chunks):
        chunk_peak_R = tl.load(peak_ptr + partial_R, mask=valid_R, other=float("-inf"))
        seen_R = chunk_peak_R != float("-inf")
        new_peak_R = tl.maximum(peak_R, chunk_peak_R)
        shift_R = tl.where(new_peak_R == float("-inf"), 0.0, new_peak_R)
        rescale_R, chunk_rescale_R = tl.exp2(peak_R - shift_R), tl.exp2(chunk_peak_R - shift_R)
        sum_R = sum_R * rescale_R + tl.load(sum_ptr + partial_R, mask=seen_R, other=0.0) * chunk_rescale_R
        chunk_total_RE = tl.load(
            total_ptr + partial_R[:, None] * E + e[None, :], mask=seen_R[:, None] & (e < E)[None, :], other=0.0
        )
        total_RE = total_RE * rescale_R[:, None] + chunk_total_RE * chunk_rescale_R[:, None]
        peak_R = new_peak_R
        partial_R += num_rows
    out_offsets = row_R.to(tl.int64)[:, None] * E + e[None, :]
    sum_R = tl.where(valid_R, sum_R, 1.0)
    tl.store(out_ptr + out_offsets, total_RE / sum_R[:, None], mask=valid_R[:, None] & (e < E)[None, :])


def prefix_attention(
    q_THE: Tensor, prefix_k_NKSE: Tensor, prefix_v_NKSE: Tensor, prefix_pages_PX: Tensor, prefix_lens_P: Tensor,
    own_k_MKZE: Tensor, own_v_MKZE: Tensor, own_pages_BY: Tensor, own_lens_B: Tensor, cu_q: Tensor, cu_rows: Tensor,
    max_q: int, max_rows: int, window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v over a group's prefix and a row's own keys; see the reference for the arguments."""
    (T, H, E), (P, X), (B, Y) = q_THE.shape, prefix_pages_PX.shape, own_pages_BY.shape
    K, S, Z = own_k_MKZE.shape[1], prefix_k_NKSE.shape[2], own_k_MKZE.shape[2]
    _check(q_THE, (prefix_k_NKSE, prefix_v_NKSE, own_k_MKZE, own_v_MKZE), cu_q, cu_rows, B, P, window)
    if q_THE.stride(2) != 1:
        q_THE = q_THE.contiguous()
    out_THE = torch.empty(T, H, E, dtype=q_THE.dtype, device=q_THE.device)
    if T == 0:
        return out_THE
    R, split = H // K, max_q <= MAX_SPLIT_QUERIES
    prefix_chunk, own_chunk = (CHUNK, CHUNK) if split else (max(X * S, 1), Y * Z)
    prefix_chunks, own_chunks = triton.cdiv(X * S, prefix_chunk), triton.cdiv(Y * Z, own_chunk)
    prefix_block_m, own_block_m = _block_m(max_rows * max_q * R), _block_m(max_q * R)
    prefix_tiles = triton.cdiv(max_rows * max_q * R, prefix_block_m)
    own_tiles = triton.cdiv(max_q * R, own_block_m)
    num_prefix_items, num_own_items = P * prefix_chunks * prefix_tiles * K, B * own_chunks * own_tiles * K
    num_chunks = prefix_chunks + own_chunks
    direct = num_chunks == 1
    block_e = max(16, triton.next_power_of_2(E))
    block_n = BLOCK_N if block_e <= 128 else BLOCK_N // 2
    total, peak, sums = out_THE, out_THE, out_THE
    if not direct:
        total = torch.empty(num_chunks, T, H, E, dtype=torch.float32, device=q_THE.device)
        peak, sums = torch.empty(2, num_chunks, T, H, dtype=torch.float32, device=q_THE.device)
    prefix_attention_chunk_kernel[(num_prefix_items + num_own_items,)](
        q_THE, prefix_k_NKSE, prefix_v_NKSE, prefix_pages_PX.contiguous(), prefix_lens_P.contiguous(), own_k_MKZE,
        own_v_MKZE, own_pages_BY.contiguous(), own_lens_B.contiguous(), cu_q.contiguous(), cu_rows.contiguous(), total,
        peak, sums, (E**-0.5 if scale is None else scale) * LOG2_E, window or 0, T, K, X, S, Y, Z, q_THE.stride(0),
        q_THE.stride(1), num_prefix_items, prefix_tiles, prefix_chunks, prefix_chunk, own_tiles, own_chunks, own_chunk,
        E=E, R=R, BLOCK_E=block_e, BLOCK_N=block_n, PREFIX_BLOCK_M=prefix_block_m, OWN_BLOCK_M=own_block_m,
        PREFIX_ALIGNED=S % block_n == 0, OWN_ALIGNED=Z % block_n == 0, WINDOWED=window is not None, DIRECT=direct,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if not direct:
        prefix_attention_merge_kernel[(triton.cdiv(T * H, MERGED_ROWS),)](
            total, peak, sums, out_THE, T * H, num_chunks, E=E, BLOCK_E=block_e, BLOCK_R=MERGED_ROWS, num_warps=4
        )
    return out_THE


def _block_m(num_rows: int) -> int:
    return min(max(16, triton.next_power_of_2(num_rows)), MAX_BLOCK_M)


def _check(
    q_THE: Tensor, caches: tuple[Tensor, ...], cu_q: Tensor, cu_rows: Tensor, B: int, P: int, window: int | None
) -> None:
    H, K = q_THE.shape[1], caches[0].shape[1]
    if H % K or len(cu_q) != B + 1 or len(cu_rows) != P + 1 or (window is not None and window < 1):
        raise ValueError(
            f"expected query heads in multiples of {K}, {B + 1} offsets cu_q, {P + 1} offsets cu_rows and a window of "
            f"at least 1; got {H}, {len(cu_q)}, {len(cu_rows)} and {window}"
        )
    if not all(cache.is_contiguous() and cache.dtype == q_THE.dtype for cache in caches):
        raise ValueError(f"expected contiguous caches of {q_THE.dtype}")
