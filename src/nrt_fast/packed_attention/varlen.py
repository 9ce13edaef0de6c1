"""Packed attention by torch's own variable-length flash attention, each trace's keys gathered behind its prompt's."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout, aligned

MAX_HEAD = 256


def load() -> None:
    """ImportError unless this torch has a variable-length attention with windows, which came with 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:
        raise ImportError(f"varlen_attn of torch {torch.__version__} has no windows; 2.11 has")


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``. The causal mask ends in the bottom right corner: a trace sees all of its prompt."""
    from torch.nn.attention import varlen

    E = q_THE.shape[2]
    if E % 8 or E > MAX_HEAD:
        raise ValueError(f"varlen attention takes heads of a multiple of 8 up to {MAX_HEAD}, not of {E}")
    sequences = layout.sequences()
    out_THE = varlen.varlen_attn(
        aligned(q_THE), sequences.keys(k_TKE), sequences.keys(v_TKE), sequences.cu_queries, sequences.cu_keys,
        max(sequences.query_lens), max(sequences.key_lens),
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": q_THE.shape[1] != k_TKE.shape[1]} if _must_be_told(varlen.varlen_attn) else {}),
    )  # fmt: skip
    if out_THE.requires_grad:
        out_THE.register_hook(aligned)
    return out_THE


@functools.cache
def _must_be_told(varlen_attn: Callable) -> bool:
    """Whether it asks if queries share key heads; torch 2.11 sees that by itself."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters
