"""Counter-based sampling: the noise of a token depends on what it is, not on when or where it is computed."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_uniform(seed: int, step: int, prompt: Tensor, trace: Tensor, position: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits, keyed by their five arguments (Philox4x32-10, Salmon et al., SC 2011).

    Args:
        seed: 64-bit key.
        step, prompt, trace, position: 32-bit counters; the tensors are int64 and broadcast together.

    Returns:
        fp64 tensor of the broadcast shape.
    """
    shape = torch.broadcast_shapes(prompt.shape, trace.shape, position.shape)
    c0, c1, c2 = (c.broadcast_to(shape) & _MASK for c in (position, trace, prompt))
    c3 = torch.full_like(c0, step & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return ((c0 >> 5).double() * 2**26 + (c1 >> 6).double()) * 2.0**-53


def _multiply(word: Tensor, by: int) -> tuple[Tensor, Tensor]:
    # int64 keeps the low 64 bits of the product; the shift is arithmetic, so the high word is masked.
    product = word * by
    return product & _MASK, (product >> 32) & _MASK


def sample_logprob(
    logits_NV: Tensor, uniform_N: Tensor, temperature: float, floor_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one id per row by inverting the cumulative distribution, with the exact log-probability of the id.

    The log-probability is that of softmax(logits / temperature) over all ids, which is what a trainer recomputes; a
    floor truncates the draw alone. An id of probability 0 is never drawn, whatever the number. A row that holds a NaN
    or +inf, or nothing above -inf, has no distribution: id 0 with a log-probability of NaN.

    Args:
        logits_NV: [N, V] fp32, fp16 or bf16.
        uniform_N: [N] fp64 in [0, 1).
        temperature: 0 is greedy: the lowest of the likeliest ids, with its log-probability at temperature 1.
        floor_N: [N] fp32; only ids with a logit of at least the floor are drawn, or id 0 if there is none.

    Returns:
        (ids_N int64, logprob_N fp32).
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number from 0, got {temperature}")
    peak_N1 = logits_NV.amax(dim=-1, keepdim=True).double()
    mass_NV = ((logits_NV.double() - peak_N1) / (temperature or 1.0)).exp()
    total_N = mass_NV.sum(dim=-1)
    if temperature == 0:
        ids_N = (logits_NV == peak_N1).int().argmax(dim=-1)
    else:
        drawn_NV = mass_NV if floor_N is None else mass_NV.where(logits_NV >= floor_N[:, None], 0.0)
        cumulative_NV = drawn_NV.cumsum(dim=-1)
        drawn_N1 = cumulative_NV[:, -1:].contiguous()
        ids_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None] * drawn_N1, right=True)
        # A threshold that rounds up to the total would fall behind the last id that has mass.
        ids_N = ids_N1.minimum(torch.searchsorted(cumulative_NV, drawn_N1)).squeeze(1)
    ids_N = ids_N.where(total_N.isfinite(), 0)
    logit_N = logits_NV.gather(1, ids_N[:, None]).double() - peak_N1
    return ids_N, (logit_N.squeeze(1) / (temperature or 1.0) - total_N.log()).float()


def sampling_floor(logits_NV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The lowest logit of each row that top-k and top-p sampling keep; logits that equal it are kept with it.

    Top-k comes first; then the likeliest ids are kept until they hold the share top_p of what top-k left. It sorts
    every row: the slow way to sample.

    Args:
        logits_NV: [N, V] fp32, fp16 or bf16.
        temperature: of the sampling; 0 counts as 1.
        top_k: ids to keep, 0 for all of them.
        top_p: share of the probability to keep, in (0, 1].

    Returns:
        floor_N: [N] fp32, for ``sample_logprob``.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected top_k >= 0 and 0 < top_p <= 1, got {top_k} and {top_p}")
    sorted_NV = logits_NV.double().sort(dim=-1, descending=True).values[:, : top_k or None]
    share_NV = (sorted_NV / (temperature or 1.0)).softmax(dim=-1)
    is_kept_NV = share_NV.cumsum(dim=-1) - share_NV < top_p
    last_N1 = is_kept_NV.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    return sorted_NV.gather(1, last_N1).squeeze(1).float()
