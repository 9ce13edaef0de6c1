"""Where attention finds its keys: in a cache (extend, decode) or in the packed batch itself (training)."""

from __future__ import annotations

from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import CacheRows, KVCache
from nrt_fast.model.config import ModelConfig
from nrt_fast.packed_attention import PackedLayout, packed_attention
from nrt_fast.types import PackedBatch


class CachedAttention:
    """Attention of extend and decode: new keys go to their slots, then are read with everything before them.

    Args:
        row_T, offset_T: [T] int64, the row of each new token and its place among the row's new ones.
        cu_q: [B + 1] int32 offsets of the rows' new tokens.
        max_q: at least the new tokens of any row.
    """

    def __init__(
        self, config: ModelConfig, cache: KVCache, rows: CacheRows, row_T: Tensor, offset_T: Tensor, cu_q: Tensor,
        max_q: int,
    ):  # fmt: skip
        self.windows, self.cache, self.rows, self.cu_q, self.max_q = config.windows, cache, rows, cu_q, max_q
        place_T = rows.own_lens_B[row_T] + offset_T
        self.page_T = rows.own_pages_BY[row_T, place_T // cache.page_size]
        self.slot_T = place_T % cache.page_size
        self.positions_T = rows.prefix_lens_P[rows.group_B[row_T]] + place_T

    def __call__(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor
    ) -> Tensor:
        rows, k, v = self.rows, self.cache.k[layer], self.cache.v[layer]
        q_THE = ops.rotate_write(q_THE, k_TKE, v_TKE, cos_TF, sin_TF, k, v, self.page_T, self.slot_T)
        return ops.prefix_attention(
            q_THE, k, v, rows.prefix_pages_PX, rows.prefix_lens_P, k, v, rows.own_pages_BY, rows.own_lens_B, self.cu_q,
            rows.cu_rows, self.max_q, rows.max_rows, self.windows[layer],
        )  # fmt: skip


class PackedAttention:
    """Attention of packed groups: a prompt sees itself, a trace sees its prompt and itself."""

    def __init__(self, config: ModelConfig, batch: PackedBatch):
        self.windows = config.windows
        self.layout = PackedLayout(batch.cu_seqlens, batch.num_traces_M, batch.tokens_T.device)

    def __call__(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor
    ) -> Tensor:
        q_THE, k_TKE = ops.rotate(q_THE, k_TKE, cos_TF, sin_TF)
        return packed_attention(q_THE, k_TKE, v_TKE, self.layout, self.windows[layer])
