"""AdamW whose fp32 master weights are kept as a bf16 weight and a 16-bit remainder."""

import torch
from torch import Tensor


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
    step: int,
) -> None:
    """One decoupled-weight-decay Adam step in fp32, in place (arXiv 1711.05101).

    Args:
        weight: [n] fp32, or bf16 with a remainder.
        remainder: [n] int16, the low half of the fp32 master weight whose high half is ``weight``; None for fp32.
        grad, first, second: [n] fp32.
        step: counts from 1.
    """
    beta1, beta2 = betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = (second / (1 - beta2**step)).sqrt_().add_(eps).reciprocal_().mul_(first).mul_(-lr / (1 - beta1**step))
    if remainder is None:
        weight.mul_(1 - lr * weight_decay).add_(update)
    else:
        split_master(join_master(weight, remainder).mul_(1 - lr * weight_decay).add_(update), weight, remainder)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """fp32 master from its rounded bf16 half and the signed 16-bit remainder."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write a finite fp32 master as the nearest bf16 (ties away from zero) and what is left; exact both ways."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))
