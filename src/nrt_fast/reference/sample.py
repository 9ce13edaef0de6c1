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


def sample_logprob(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one id per row by inverting the cumulative distribution, with the exact log-probability of the id.

    Args:
        logits_NV: [N, V] fp32.
        uniform_N: [N] fp64 in [0, 1).
        temperature: 0 is greedy, and its log-probability is that of temperature 1.

    Returns:
        (ids_N int64, logprob_N fp32 under the distribution that was sampled from).
    """
    logprobs = torch.log_softmax(logits_NV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids = logits_NV.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        threshold = uniform_N[:, None] * cumulative[:, -1:]
        # A threshold that rounds up to the total would fall off the end.
        ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=logits_NV.shape[1] - 1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)
