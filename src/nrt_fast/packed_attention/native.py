"""Packed attention in C++: one call forward and one back, keys read in place, nothing stored of a query and a key."""

from torch import Tensor

from nrt_fast import ops
from nrt_fast.packed_attention.layout import PackedLayout


def load() -> None:
    """ImportError unless the extension was built."""
    if reason := ops.missing("native"):
        raise ImportError(reason)


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``."""
    from nrt_fast import backward

    return backward.packed_attention(q_THE, k_TKE, v_TKE, layout.starts_S, layout.lens_S, layout.root_S, window)
