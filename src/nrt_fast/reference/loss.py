"""Per-token losses of one packed batch (docs/method.md, Loss). Each is differentiable in the log-probability."""

import torch
from torch import Tensor


def cispo(logprob_A: Tensor, ratio_A: Tensor, advantage_A: Tensor, low: float, high: float) -> Tensor:
    """-A sg(clamp(ratio)) log pi, 0 where the ratio has left the range on the side A pushes to (arXiv 2506.13585)."""
    ratio_A = ratio_A.detach()
    gone_A = ((advantage_A > 0) & (ratio_A > high)) | ((advantage_A < 0) & (ratio_A < low))
    return -advantage_A * torch.where(gone_A, 0.0, ratio_A.clamp(low, high)) * logprob_A


def ppo(logprob_A: Tensor, ratio_A: Tensor, advantage_A: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio A, clamp(ratio) A) (arXiv 1707.06347)."""
    return -torch.minimum(ratio_A * advantage_A, ratio_A.clamp(low, high) * advantage_A)


def reinforce(logprob_A: Tensor, ratio_A: Tensor, advantage_A: Tensor, low: float, high: float) -> Tensor:
    """-A log pi."""
    return -advantage_A * logprob_A


def kl_estimate(logprob_A: Tensor, reference_A: Tensor) -> Tensor:
    """exp(ref - log pi) - (ref - log pi) - 1: unbiased and never negative (Schulman's k3)."""
    difference = reference_A - logprob_A
    return difference.exp() - difference - 1.0
