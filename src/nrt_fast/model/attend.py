"""Where attention finds its keys: in a cache (extend, decode) or in the packed batch itself (training)."""

from __future__ import annotations

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.kv_cache import Segment
from nrt_fast.model.config import ModelConfig
from nrt_fast.types import PackedBatch


class Rows:
    """Rows of flat tokens as a rectangle: [T, ...] to [N, width, ...].

    Args:
        starts_N, lens_N: [N] int64 on the CPU, where each row's tokens stand.
        device: of the tokens.
    """

    def __init__(self, starts_N: Tensor, lens_N: Tensor, device: torch.device):
        self.num_rows, self.width = len(lens_N), int(lens_N.max())
        slot = torch.arange(self.width)
        filled = slot < lens_N[:, None]
        # Cells past a row's end repeat some token: finite, and read by nobody.
        last = max(int((starts_N + lens_N).max()) - 1, 0)
        token = (starts_N[:, None] + torch.where(filled, slot, 0)).clamp(max=last)
        self.filled_cells = filled.flatten().nonzero().squeeze(1)
        self.filled_tokens = token[filled]
        self.is_dense = len(self.filled_cells) == filled.numel() and bool((token.flatten().diff() == 1).all())
        self.start, self.tokens = int(starts_N[0]), token.flatten().to(device)

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] to [N, width, ...]."""
        cells = x_T.narrow(0, self.start, len(self.tokens)) if self.is_dense else x_T.index_select(0, self.tokens)
        return cells.view(self.num_rows, self.width, *x_T.shape[1:])


def cells_of_tokens(rows: list[Rows], num_tokens: int, device: torch.device) -> Tensor:
    """[T] int64: where each token stands among the flattened cells of several rectangles laid end to end."""
    cells = torch.empty(num_tokens, dtype=torch.int64)
    offset = 0
    for rectangle in rows:
        cells[rectangle.filled_tokens] = offset + rectangle.filled_cells
        offset += rectangle.num_rows * rectangle.width
    return cells.to(device)


class CachedAttention:
    """Attention of extend: new keys go to their slots, then are read with everything before them."""

    def __init__(self, config: ModelConfig, num_new_PG: Tensor, own: Segment, prefix: Segment | None):
        self.own, self.prefix, self.windows = own, prefix, config.windows
        device = own.k.device
        (P, G), num_new_N = num_new_PG.shape, num_new_PG.flatten()
        starts_N = num_new_N.cumsum(0) - num_new_N
        self.rows = Rows(starts_N, num_new_N, device)
        row_T = torch.arange(P * G).repeat_interleave(num_new_N)
        offset_T = (torch.arange(len(row_T)) - starts_N[row_T]).to(device)
        row_T = row_T.to(device)
        self.group_T, self.trace_T = row_T // G, row_T % G
        self.slot_T = own.lens_PG.flatten()[row_T] + offset_T
        self.cells = None if self.rows.is_dense else cells_of_tokens([self.rows], len(row_T), device)
        self.num_slots = min(int(own.lens_PG.max()) + self.rows.width, own.k.shape[4])
        prefix_lens_P = prefix.lens_PG[:, 0] if prefix else torch.zeros(P, dtype=torch.int64, device=device)
        prefix_slots = prefix.k.shape[4] if prefix else 0
        self.positions_T = prefix_lens_P[self.group_T] + self.slot_T
        self.visible = {
            window: ops.visibility(prefix_lens_P, own.lens_PG, self.rows.width, prefix_slots, self.num_slots, window)
            for window in set(config.windows)
        }

    def __call__(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        own_k, own_v = self.own.k[layer], self.own.v[layer]
        own_k[self.group_T, self.trace_T, :, self.slot_T] = k_TKE
        own_v[self.group_T, self.trace_T, :, self.slot_T] = v_TKE
        own_k, own_v = own_k[:, :, :, : self.num_slots], own_v[:, :, :, : self.num_slots]
        prefix_k, prefix_v = (own_k[:, 0, :, :0],) * 2
        if self.prefix:
            prefix_k, prefix_v = self.prefix.k[layer, :, 0], self.prefix.v[layer, :, 0]
        q = self.rows.pad(q_THE).view(*own_k.shape[:2], self.rows.width, *q_THE.shape[1:])
        attention = ops.prefix_attention if self.rows.width == 1 else ops.joined_attention
        out = attention(q, prefix_k, prefix_v, own_k, own_v, self.visible[self.windows[layer]])
        cells = out.flatten(0, 2)
        return cells if self.cells is None else cells.index_select(0, self.cells)


class PackedAttention:
    """Attention of packed groups: a prompt sees itself, a trace sees its prompt and itself."""

    def __init__(self, config: ModelConfig, batch: PackedBatch):
        self.windows = config.windows
        device = batch.tokens_T.device
        cu_seqlens, num_traces_M = batch.cu_seqlens.long().cpu(), batch.num_traces_M.cpu()
        starts_S, lens_S = cu_seqlens[:-1], cu_seqlens.diff()
        self.num_groups, self.num_traces = len(num_traces_M), int(num_traces_M.max())
        # Segments of group m: its prompt, its traces, and empty ones up to the widest group.
        segment_MG = (num_traces_M + 1).cumsum(0)[:, None] - num_traces_M[:, None] + torch.arange(self.num_traces)
        is_trace = torch.arange(self.num_traces) < num_traces_M[:, None]
        prompt_M, segment_N = segment_MG[:, 0] - 1, segment_MG.clamp(max=len(lens_S) - 1).flatten()
        self.prompts = Rows(starts_S[prompt_M], lens_S[prompt_M], device)
        self.traces = Rows(starts_S[segment_N], lens_S[segment_N] * is_trace.flatten(), device)
        self.cells = cells_of_tokens([self.prompts, self.traces], len(batch.tokens_T), device)
        lens_M = lens_S[prompt_M].to(device)
        none_M = torch.zeros_like(lens_M)
        none_MG = none_M[:, None].expand(-1, self.num_traces)
        width_p, width_t = self.prompts.width, self.traces.width
        self.visible = {
            window: (
                ops.visibility(none_M, none_M[:, None], width_p, 0, width_p, window),
                ops.visibility(lens_M, none_MG, width_t, width_p, width_t, window),
            )
            for window in set(config.windows)
        }

    def __call__(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        see_prompt, see_trace = self.visible[self.windows[layer]]
        q_prompt, k_prompt, v_prompt = (self._groups(self.prompts, x, 1) for x in (q_THE, k_TKE, v_TKE))
        q_trace, k_trace, v_trace = (self._groups(self.traces, x, self.num_traces) for x in (q_THE, k_TKE, v_TKE))
        k_prompt, v_prompt, k_trace, v_trace = (x.transpose(2, 3) for x in (k_prompt, v_prompt, k_trace, v_trace))
        nothing = k_prompt[:, 0, :, :0]
        prompt = ops.joined_attention(q_prompt, nothing, nothing, k_prompt, v_prompt, see_prompt)
        trace = ops.joined_attention(q_trace, k_prompt[:, 0], v_prompt[:, 0], k_trace, v_trace, see_trace)
        return torch.cat([prompt.flatten(0, 2), trace.flatten(0, 2)]).index_select(0, self.cells)

    def _groups(self, rows: Rows, x: Tensor, num_rows: int) -> Tensor:
        return rows.pad(x).view(self.num_groups, num_rows, rows.width, *x.shape[1:])
