"""The element-wise pieces of a decoder layer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean and the division in fp32 (arXiv 1910.07467)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding of [T, heads, E], halves paired as in Hugging Face checkpoints (arXiv 2104.09864)."""
    first, second = x_THE.chunk(2, dim=-1)
    return x_THE * cos_TE[:, None] + torch.cat([-second, first], dim=-1) * sin_TE[:, None]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up
