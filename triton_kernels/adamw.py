"""One step of AdamW over one flat tensor, with an exact fp32 master of bf16 weights; clips and clears the gradient.

One launch, every element read and written once: per weight 16 + 16 B with fp32 moments (bf16 weight and remainder, or
fp32 weight), 12 + 12 B with bf16 moments, 10 + 10 B with 8-bit ones (and 8 B a block of 256 each way), counting 4 B for
the cleared gradient. With g = grad_scale grad, b1 and b2 the betas:

    first  += (1 - b1) (g - first)
    second  = b2 second + (1 - b2) g g
    master  = master (1 - lr weight_decay) - lr / (1 - b1^step) first / (sqrt(second / (1 - b2^step)) + eps)

in fp32, with exact square root and division: both are free, memory is the limit. A program owns whole blocks of 256, so
their scales need no second launch. Moments of fewer bits are rounded at random, by a hash of index and step; a Philox
number a weight would take longer than its memory. Everything that depends on the step or the learning rate is an
argument that is not specialised, so no value of them compiles anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(256)  # weights that share a scale
# Blocks of a program: a load of 16 bytes takes 4 or 8 weights of a thread, and a warp has a whole block of codes.
ROWS = {torch.float32: 2, torch.bfloat16: 4, torch.int8: 4}
NUM_WARPS = 4
KINDS = (
    (torch.float32, torch.float32, True, True), (torch.bfloat16, torch.bfloat16, True, True),
    (torch.int8, torch.uint8, False, False),
)  # fmt: skip


@triton.jit
def noise_of(index, key):
    """32 random bits: the finaliser of MurmurHash3 on the index, moved by the step's key."""
    bits = index.to(tl.uint32) ^ key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    bits = (bits ^ (bits >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def load_moment(ptr, absmax_ptr, index, block, mask, size, IS_SQUARE: tl.constexpr):
    """A moment in fp32; codes stand for absmax (code / 127)^2 with the code's sign, or absmax (code / 255)^4."""
    moment = tl.load(ptr + index, mask=mask, other=0)
    if absmax_ptr is not None:
        absmax = tl.load(absmax_ptr + block, mask=block * BLOCK < size, other=0.0)[:, None]
        unit = moment.to(tl.float32) * (1 / 255 if IS_SQUARE else 1 / 127)
        moment = absmax * (unit * unit * unit * unit if IS_SQUARE else unit * tl.abs(unit))
    elif ptr.dtype.element_ty == tl.int16:  # the bits of a bf16
        moment = (moment.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return moment


@triton.jit
def store_moment(ptr, absmax_ptr, moment, noise, index, block, mask, size, IS_SQUARE: tl.constexpr):
    """Write a moment; where it must be rounded, to one of its two neighbours at random, so that the mean is exact."""
    if absmax_ptr is not None:
        magnitude = tl.abs(moment)
        absmax = tl.max(magnitude, axis=1)
        tl.store(absmax_ptr + block, absmax, mask=block * BLOCK < size)
        inverse = tl.where(absmax > 1e-37, tl.div_rn(1.0, absmax), 0.0)[:, None]
        uniform = (noise.to(tl.float32) + 0.5) * (2.0**-16)
        # The code below: its square, or fourth power, is at most that of the exact code. Roots need not be exact.
        if IS_SQUARE:  # above 0 it keeps the code 1 at least: at 0 the next update would be divided by epsilon
            power = magnitude * (inverse * 255.0**4)
            low = tl.minimum(tl.maximum(tl.floor(tl.sqrt(tl.sqrt(power))), 1.0), 254.0)
            below, above = low * low * low * low, (low + 1) * (low + 1) * (low + 1) * (low + 1)
        else:
            power = magnitude * (inverse * 127.0**2)
            low = tl.minimum(tl.floor(tl.sqrt(power)), 126.0)
            below, above = low * low, (low + 1) * (low + 1)
        code = low + tl.where(uniform * (above - below) < power - below, 1.0, 0.0)
        if IS_SQUARE:
            code = tl.where(magnitude > 0, code, 0.0)
        moment = tl.where(moment < 0, -code, code).to(tl.int32).to(ptr.dtype.element_ty)
    elif ptr.dtype.element_ty == tl.int16:
        moment = ((moment.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16).to(tl.int16)
    tl.store(ptr + index, moment, mask=mask)


@triton.jit(do_not_specialize=["num_decayed", "key"])
def adamw_kernel(
    weight_ptr, remainder_ptr, grad_ptr, first_ptr, second_ptr, grad_scale_ptr, first_absmax_ptr, second_absmax_ptr,
    size, num_decayed, key, rate, decay, eps, take1, keep2, take2, inv_bias2, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    grad_scale = tl.load(grad_scale_ptr)
    end = tl.where(grad_scale == grad_scale, size, 0)  # nothing changes if it is NaN
    mask = index < end
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0) * grad_scale
    first = load_moment(first_ptr, first_absmax_ptr, index, block, mask, end, False)
    second = load_moment(second_ptr, second_absmax_ptr, index, block, mask, end, True)
    master = tl.load(weight_ptr + index, mask=mask, other=0)
    if remainder_ptr is not None:
        bits = (master.to(tl.int32) << 16) + tl.load(remainder_ptr + index, mask=mask, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)

    first += take1 * (grad - first)
    second = keep2 * second + take2 * grad * grad
    master *= tl.where(index < num_decayed, decay, 1.0)
    master -= tl.div_rn(rate * first, tl.sqrt_rn(second * inv_bias2) + eps)

    noise = noise_of(index, key)  # the compiler drops it where nothing is rounded
    store_moment(first_ptr, first_absmax_ptr, first, noise & 0xFFFF, index, block, mask, end, False)
    store_moment(second_ptr, second_absmax_ptr, second, noise >> 16, index, block, mask, end, True)
    if remainder_ptr is not None:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16  # the nearest bf16, ties away from zero
        tl.store(weight_ptr + index, high.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + index, (bits - (high << 16)).to(tl.int16), mask=mask)
    else:
        tl.store(weight_ptr + index, master, mask=mask)
    tl.store(grad_ptr + index, tl.zeros((ROWS, BLOCK), tl.float32), mask=index < size)


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
    """One step in place; it uses up the gradient.

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
    size, (beta1, beta2) = grad.numel(), betas
    num_blocks = triton.cdiv(size, BLOCK.value)
    flat = {"weight": weight, "remainder": remainder, "grad": grad, "first": first, "second": second}
    scales = {"first_absmax": first_absmax, "second_absmax": second_absmax}
    for length, tensors in ((size, flat), (num_blocks, scales)):
        for name, tensor in tensors.items():
            if tensor is not None and not (tensor.shape == (length,) and tensor.is_contiguous()):
                raise ValueError(f"{name}: expected shape [{length}], contiguous, got {list(tensor.shape)}")
    kinds = first.dtype, second.dtype, first_absmax is None, second_absmax is None
    if kinds not in KINDS:
        raise ValueError(f"first, second: expected fp32, bf16, or int8 and uint8 with scales, got {kinds}")
    if size:
        rows = ROWS[first.dtype]
        adamw_kernel[(triton.cdiv(num_blocks, rows),)](
            _bits(weight), remainder, grad, _bits(first), _bits(second), grad_scale, first_absmax, second_absmax,
            size, num_decayed, _int32(step * 0x9E3779B9),
            rate=lr / (1 - beta1**step), decay=1 - lr * weight_decay, eps=eps,
            take1=1 - beta1, keep2=beta2, take2=1 - beta2, inv_bias2=1 / (1 - beta2**step),
            ROWS=rows, num_warps=NUM_WARPS,
        )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    """bf16 as the int16 of its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _int32(word: int) -> int:
    """The low 32 bits as a signed number: one type for all steps, hence one compiled kernel."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
