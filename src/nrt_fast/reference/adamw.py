"""AdamW whose fp32 master weights are kept as a bf16 weight and a 16-bit remainder, and the norm that clips it."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""8-bit moments: weights that share a scale, the largest magnitude among them."""


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
    first_absmax: Tensor | None = None,
    second_absmax: Tensor | None = None,
) -> None:
    """One decoupled-weight-decay Adam step in fp32, in place (arXiv 1711.05101); it uses up the gradient.

    Moments of fewer bits are rounded to one of their two neighbours at random, so that their mean is exact: rounding
    to the nearest would lose every change that is smaller than half a spacing, for ever. The noise is a hash of index
    and step, so the same step gives the same bits.

    Args:
        weight: [n] fp32, or bf16 with a remainder.
        remainder: [n] int16, the low half of the fp32 master weight whose high half is ``weight``; None for fp32.
        grad: [n] fp32; 0 on return.
        first, second: [n] both fp32, both bf16, or int8 and uint8 codes.
        num_decayed: weights before this offset decay.
        step: counts from 1.
        grad_scale: [1] fp32, the factor of the gradient; if it is NaN, nothing but the gradient changes.
        first_absmax, second_absmax: [ceil(n / 256)] fp32, the scales of codes; None for other moments.
    """
    if not grad_scale.isnan():
        beta1, beta2 = betas
        grad.mul_(grad_scale)
        m, v = load_moment(first, first_absmax), load_moment(second, second_absmax)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (v / (1 - beta2**step)).sqrt_().add_(eps).reciprocal_().mul_(m).mul_(-lr / (1 - beta1**step))
        master = weight if remainder is None else join_master(weight, remainder)
        master[:num_decayed].mul_(1 - lr * weight_decay)
        master.add_(update)
        if remainder is not None:
            split_master(master, weight, remainder)
        if first.dtype != torch.float32:
            noise = rounding_noise(len(grad), step, grad.device)
            store_moment(m, first, first_absmax, noise & 0xFFFF)
            store_moment(v, second, second_absmax, noise >> 16)
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


def load_moment(stored: Tensor, absmax: Tensor | None) -> Tensor:
    """A moment in fp32; one that is kept in fp32 itself.

    A code of int8 stands for absmax (code / 127)^2 with the code's sign, one of uint8 for absmax (code / 255)^4: small
    magnitudes have more codes than large ones. A second moment is a square, so its fourth root is to the size of
    gradients what the square root of a first moment is.
    """
    if absmax is None:
        return stored.float()
    if stored.dtype == torch.int8:
        unit = stored.float() * (1 / 127)
        return _spread(absmax, stored) * (unit * unit.abs())
    return _spread(absmax, stored) * (stored.float() * (1 / 255)).pow(4)


def store_moment(moment: Tensor, stored: Tensor, absmax: Tensor | None, noise: Tensor) -> None:
    """Write a moment as bf16 or, with ``absmax``, as codes: one of its two neighbours at random, the mean is exact.

    A second moment above 0 keeps the code 1 at least: at 0 the next update would be divided by epsilon.

    Args:
        noise: [n] 16 random bits of each.
    """
    if absmax is None:
        stored.copy_(((moment.view(torch.int32) + noise.int()) >> 16).to(torch.int16).view(torch.bfloat16))
        return
    magnitude = moment.abs()
    absmax.copy_(F.pad(magnitude, (0, -len(moment) % BLOCK)).view(-1, BLOCK).amax(1))
    inverse = _spread(torch.where(absmax > 1e-37, 1 / absmax, 0.0), stored)
    most, exponent, least = (127, 2, 0) if stored.dtype == torch.int8 else (255, 4, 1)
    power = magnitude * (inverse * float(most) ** exponent)
    low = power.pow(1 / exponent).floor().clamp(least, most - 1)
    below, above = low.pow(exponent), (low + 1).pow(exponent)
    code = low + ((noise.float() + 0.5) * 2**-16 * (above - below) < power - below)
    stored.copy_(torch.where(magnitude > 0, code * moment.sign(), 0.0))


def _spread(absmax: Tensor, stored: Tensor) -> Tensor:
    """[n] each number's scale."""
    return absmax.repeat_interleave(BLOCK)[: len(stored)]


def rounding_noise(size: int, step: int, device: torch.device) -> Tensor:
    """[size] int64 of 32 random bits: the finaliser of MurmurHash3 (Appleby) on the index, moved by the step."""
    bits = (torch.arange(size, device=device) ^ (step * 0x9E3779B9)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
