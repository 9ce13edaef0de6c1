"""Packed attention in plain PyTorch: nothing is padded, and every mask is a cut of a few that the batch shares.

A short group is one call over all of its tokens, most of them hidden from each other: there the call is what costs. A
long group takes a call a segment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nrt_fast.packed_attention.layout import PackedLayout

MAX_DENSE_TOKENS = 384  # of a group in one call


def load() -> None:
    """Nothing beyond PyTorch."""


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """See ``packed_attention``. Every call is one of torch's fused attention."""
    runs, masks = layout.once(("plain", window, q_THE.dtype), lambda: _plan(layout, window, q_THE.dtype))
    # One split, not slices: the gradient of a slice is a tensor of all T tokens.
    q, k, v = (x.transpose(0, 1).split([run[0] for run in runs], dim=1) for x in (q_THE, k_TKE, v_TKE))
    outputs = []
    for number, ((_, prefix), mask) in enumerate(zip(runs, masks, strict=True)):
        keys, values = k[number], v[number]
        if prefix is not None:
            keys, values = torch.cat([k[prefix], keys], dim=1), torch.cat([v[prefix], values], dim=1)
        out = F.scaled_dot_product_attention(
            q[number][None], keys[None], values[None], attn_mask=mask, enable_gqa=q_THE.shape[1] != k_TKE.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _plan(
    layout: PackedLayout, window: int | None, dtype: torch.dtype
) -> tuple[list[tuple[int, int | None]], list[Tensor]]:
    """Runs of tokens, each with the number of the run that holds its prefix or None, and the mask of each."""
    lens, prefix_lens, roots = layout.lens_S.tolist(), layout.prefix_lens_S.tolist(), layout.root_S.tolist()
    triangle = _triangle(layout, window, dtype)
    runs, masks = [], []
    first = 0
    while first < len(lens):
        end = next((s for s in range(first + 1, len(lens)) if roots[s] != first), len(lens))
        if sum(lens[first:end]) <= MAX_DENSE_TOKENS:
            runs.append((sum(lens[first:end]), None))
            masks.append(_dense(triangle, lens[first:end]))
        else:
            prompt_run = len(runs)
            for s in range(first, end):
                runs.append((lens[s], prompt_run if prefix_lens[s] else None))
                masks.append(triangle[prefix_lens[s] : prefix_lens[s] + lens[s], : prefix_lens[s] + lens[s]])
        first = end
    return runs, masks


def _triangle(layout: PackedLayout, window: int | None, dtype: torch.dtype) -> Tensor:
    """[S, S]: 0 where a position sees another, -inf elsewhere, as long as the longest sequence."""
    size = int((layout.prefix_lens_S + layout.lens_S).max())
    back = torch.arange(size)[:, None] - torch.arange(size)
    hidden = (back < 0) | (back >= (window or size))
    return torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, float("-inf")).to(layout.device)


def _dense(triangle: Tensor, lens: list[int]) -> Tensor:
    """[n, n] for a group's prompt and traces: a trace sees the prompt and itself."""
    prompt, size = lens[0], sum(lens)
    mask = triangle.new_full((size, size), float("-inf"))
    mask[:prompt, :prompt] = triangle[:prompt, :prompt]
    start = prompt
    for length in lens[1:]:
        end = start + length
        seen = triangle[prompt : prompt + length]
        mask[start:end, :prompt], mask[start:end, start:end] = seen[:, :prompt], seen[:, prompt : prompt + length]
        start = end
    return mask
