"""Packed attention in plain PyTorch, segment by segment: nothing is padded, and every mask is a cut of one triangle."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout


def load() -> None:
    """Nothing beyond PyTorch."""


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``. Every segment is one call of torch's fused attention."""
    lens, prefix_lens, roots = layout.lens_S.tolist(), layout.prefix_lens_S.tolist(), layout.root_S.tolist()
    seen = layout.once(("triangle", window, q_THE.dtype), lambda: _triangle(layout, window, q_THE.dtype))
    # One split, not slices: the gradient of a slice is a tensor of all T tokens.
    q, k, v = (x.transpose(0, 1).split(lens, dim=1) for x in (q_THE, k_TKE, v_TKE))
    outputs = []
    for segment, (length, prefix_len, root) in enumerate(zip(lens, prefix_lens, roots, strict=True)):
        keys, values = k[segment], v[segment]
        if prefix_len:
            keys, values = torch.cat([k[root], keys], dim=1), torch.cat([v[root], values], dim=1)
        end = prefix_len + length
        out = F.scaled_dot_product_attention(
            q[segment][None], keys[None], values[None], attn_mask=seen[prefix_len:end, :end],
            enable_gqa=q_THE.shape[1] != k_TKE.shape[1],
        )  # fmt: skip
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _triangle(layout: PackedLayout, window: int | None, dtype: torch.dtype) -> Tensor:
    """[S, S]: 0 where a position sees another, -inf elsewhere, as long as the longest sequence."""
    size = int((layout.prefix_lens_S + layout.lens_S).max())
    back = torch.arange(size)[:, None] - torch.arange(size)
    hidden = (back < 0) | (back >= (window or size))
    return torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, float("-inf")).to(layout.device)
