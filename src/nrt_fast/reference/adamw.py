"""AdamW whose fp32 master weights are kept as a bf16 weight and a 16-bit remainder, and the norm that clips it."""

import torch
from torch import Tensor


def grad_norm(grad: Tensor) -> Tensor:
    """Euclidean norm of a flat fp32 gradient, fp32 of shape []."""
    return torch.linalg.vector_norm(grad)


def adamw(
    weight: Tensor,
    remainder: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    num_decayed: int,
    step: int,
    grad_scale: Tensor,
) -> None:
    """One decoupled-weight-decay Adam step in fp32, in place (arXiv 1711.05101); it uses up the gradient.

    Args:
        weight: [n] fp32, or bf16 with a remainder.
        remainder: [n] int16, the low half of the fp32 master weight whose high half is ``weight``; None for fp32.
        grad: [n] fp32; 0 on return.
        first, second: [n] fp32.
        num_decayed: weights before this offset decay.
        step: counts from 1.
        grad_scale: [1] fp32, the factor of the gradient; if it is NaN, nothing but the gradient changes.
    """
    if not grad_scale.isnan():
        beta1, beta2 = betas
        grad.mul_(grad_scale)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (second / (1 - beta2**step)).sqrt_().add_(eps).reciprocal_().mul_(first).mul_(-lr / (1 - beta1**step))
        master = weight if remainder is None else join_master(weight, remainder)
        master[:num_decayed].mul_(1 - lr * weight_decay)
        master.add_(update)
        if remainder is not None:
            split_master(master, weight, remainder)
    grad.zero_()


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 master from its rounded bf16 half and the signed 16-bit remainder."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write a finite fp32 master as the nearest bf16 (ties away from zero) and what is left; exact both ways."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))
