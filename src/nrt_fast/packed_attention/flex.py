"""Packed attention by FlexAttention: a block mask over the packed tokens, keys read in place.

Compiled on CUDA. On a CPU it runs uncompiled, forward only (torch has no backward there), which serves the tests.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout


def load() -> None:
    """ImportError unless this torch has FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: F401


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``. Building the mask takes some [T, T] tensors of bool, once a batch."""
    mask = layout.once(("flex", window), lambda: _mask(layout, window))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_TKE, v_TKE))
    flex_attention = _flex_attention(compiled=q_THE.device.type == "cuda")
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q_THE.shape[1] != k_TKE.shape[1])
    return out[0].transpose(0, 1)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # For any number of tokens at once; it keeps heads and their width static by itself.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _mask(layout: PackedLayout, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    segment_T, root_T, position_T = layout.tokens()
    oldest_T = position_T - (window or 0)

    # Compared, never subtracted: what it makes of all pairs is bool. What changes with a batch is in tensors.
    def sees(b, h, query, key):
        near = (segment_T[key] == segment_T[query]) | (segment_T[key] == root_T[query])
        return near & (position_T[key] <= position_T[query])

    def sees_near(b, h, query, key):
        return sees(b, h, query, key) & (position_T[key] > oldest_T[query])

    T, mask = layout.num_tokens, sees if window is None else sees_near
    return create_block_mask(mask, None, None, T, T, device=layout.device)
