"""Log-probabilities of given targets from hidden states."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20  # fp32 logits alive at one time


def linear_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """fp32 logits [N, V]; the operands keep their values, and the logit is never rounded to their dtype."""
    return hidden_ND.float() @ weight_VD.float().T


def linear_logprob_stats(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(logits * inv_temperature).

    Logits are made and remade chunk by chunk, forward and backward, so [N, V] never stands in memory whole.

    Args:
        hidden_ND: [N, D] final hidden states.
        weight_VD: [V, D] head.
        target_N: [N] int64.
        inv_temperature_N: [N] fp32.

    Returns:
        (logprob_N, entropy_N), fp32, natural logs, differentiable in hidden_ND and weight_VD.
    """
    rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    if hidden_ND.shape[0] <= rows:
        return _chunk(hidden_ND, weight_VD, target_N, inv_temperature_N)
    chunks = zip(hidden_ND.split(rows), target_N.split(rows), inv_temperature_N.split(rows), strict=True)
    parts = [checkpoint(_chunk, h, weight_VD, t, i, use_reentrant=False) for h, t, i in chunks]
    logprob, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprob, entropy


def _chunk(hidden: Tensor, weight: Tensor, target: Tensor, inv_temperature: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(linear_logits(hidden, weight) * inv_temperature[:, None], dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(1, target[:, None]).squeeze(1), entropy


def linear_logprob(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Log-probability of each target at temperature 1, [N] fp32; logits chunk by chunk, no gradient."""
    rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
    parts = [
        torch.log_softmax(linear_logits(h, weight_VD), dim=-1).gather(1, t[:, None]).squeeze(1)
        for h, t in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.cat(parts)
