"""Where attention finds its keys: in a cache (extend, decode) or in the packed batch itself (training)."""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import Segment
from nrt_fast.model.config import ModelConfig
from nrt_fast.packed_attention import PackedLayout, packed_attention
from nrt_fast.types import PackedBatch


class CachedAttention:
    """Attention of extend: new keys go to their slots, then are read with everything before them."""

    def __init__(self, config: ModelConfig, num_new_PG: Tensor, own: Segment, prefix: Segment | None):
        self.own, self.prefix, self.windows = own, prefix or own, config.windows
        device = own.k.device
        (P, G), num_new_B = num_new_PG.shape, num_new_PG.flatten()
        cu_q = torch.cat([num_new_B.new_zeros(1), num_new_B.cumsum(0)])
        row_T = torch.arange(P * G).repeat_interleave(num_new_B)
        offset_T = (torch.arange(len(row_T)) - cu_q[row_T]).to(device)
        row_T = row_T.to(device)
        own_pages_B, own_lens_B = own.pages_PG.flatten(), own.lens_PG.flatten()
        self.page_T, self.slot_T = own_pages_B[row_T], own_lens_B[row_T] + offset_T
        prefix_pages_PX, prefix_lens_P = own.pages_PG[:, :0], torch.zeros(P, dtype=torch.int64, device=device)
        if prefix:
            prefix_pages_PX, prefix_lens_P = prefix.pages_PG, prefix.lens_PG[:, 0]
        self.positions_T = prefix_lens_P[row_T // G] + self.slot_T
        self.prefix_rows = prefix_pages_PX, prefix_lens_P.int()
        cu_rows = torch.arange(0, P * G + 1, G, dtype=torch.int32, device=device)
        self.own_rows = own_pages_B[:, None], own_lens_B.int(), cu_q.int().to(device), cu_rows
        self.limits = int(num_new_B.max()), G

    def __call__(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor
    ) -> Tensor:
        own_k, own_v = self.own.k[layer], self.own.v[layer]
        q_THE = ops.rotate_write(q_THE, k_TKE, v_TKE, cos_TF, sin_TF, own_k, own_v, self.page_T, self.slot_T)
        return ops.prefix_attention(
            q_THE, self.prefix.k[layer], self.prefix.v[layer], *self.prefix_rows, own_k, own_v, *self.own_rows,
            *self.limits, self.windows[layer],
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
