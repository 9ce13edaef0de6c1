"""Packed attention by xformers, each trace's keys gathered behind its prompt's."""

from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout, aligned


def load() -> None:
    """ImportError unless xformers is here with kernels for this torch."""
    from xformers.ops import fmha

    if not fmha.flash.FwOp.is_available():
        raise ImportError("xformers has no kernels for this torch")


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``. Keys are repeated for every query head: the backward knows no grouped heads."""
    from xformers import ops as xops

    sequences = layout.sequences()
    repeats = q_THE.shape[1] // k_TKE.shape[1]
    k, v = (sequences.keys(x).repeat_interleave(repeats, dim=1)[None] for x in (k_TKE, v_TKE))
    mask = layout.once(("xformers", window), lambda: _mask(layout, window))
    out_THE = xops.memory_efficient_attention(aligned(q_THE)[None], k, v, attn_bias=mask)[0]
    if out_THE.requires_grad:
        out_THE.register_hook(aligned)
    return out_THE


def _mask(layout: PackedLayout, window: int | None):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    sequences = layout.sequences()
    mask = BlockDiagonalMask.from_seqlens(sequences.query_lens, sequences.key_lens, device=layout.device)
    if window is None:
        return mask.make_causal_from_bottomright()
    return mask.make_local_attention_from_bottomright(window)
