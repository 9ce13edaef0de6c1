"""One step of AdamW over one flat tensor, with an exact fp32 master of bf16 weights; clips and clears the gradient.

One launch, every element read and written once: per weight 16 + 12 B for bf16 with its 16-bit remainder and fp32
moments, counting 4 B for the cleared gradient (fp32 weights: the same). With g = grad_scale grad, b1 and b2 the betas:

    first  += (1 - b1) (g - first)
    second  = b2 second + (1 - b2) g g
    master  = master (1 - lr weight_decay) - lr / (1 - b1^step) first / (sqrt(second / (1 - b2^step)) + eps)

in fp32, with exact square root and division: both are free, memory is the limit. Everything that depends on the step
or the learning rate is an fp32 argument, so no value of them compiles anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def adamw_kernel(
    weight_ptr, remainder_ptr, grad_ptr, first_ptr, second_ptr, grad_scale_ptr, size, num_decayed,
    rate, decay, eps, take1, keep2, take2, inv_bias2, HAS_REMAINDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    grad_scale = tl.load(grad_scale_ptr)
    changes = index < tl.where(grad_scale == grad_scale, size, 0)  # none if it is NaN
    grad = tl.load(grad_ptr + index, mask=changes, other=0.0) * grad_scale
    first = tl.load(first_ptr + index, mask=changes, other=0.0)
    second = tl.load(second_ptr + index, mask=changes, other=0.0)
    master = tl.load(weight_ptr + index, mask=changes, other=0)
    if HAS_REMAINDER:
        bits = (master.to(tl.int32) << 16) + tl.load(remainder_ptr + index, mask=changes, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)

    first += take1 * (grad - first)
    second = keep2 * second + take2 * grad * grad
    master *= tl.where(index < num_decayed, decay, 1.0)
    master -= tl.div_rn(rate * first, tl.sqrt_rn(second * inv_bias2) + eps)

    tl.store(first_ptr + index, first, mask=changes)
    tl.store(second_ptr + index, second, mask=changes)
    if HAS_REMAINDER:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16  # the nearest bf16, ties away from zero
        tl.store(weight_ptr + index, high.to(tl.int16), mask=changes)
        tl.store(remainder_ptr + index, (bits - (high << 16)).to(tl.int16), mask=changes)
    else:
        tl.store(weight_ptr + index, master, mask=changes)
    tl.store(grad_ptr + index, tl.zeros((BLOCK,), tl.float32), mask=mask)


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
    """One step in place; it uses up the gradient.

    Args:
        weight: [n] fp32, or bf16 with a remainder.
        remainder: [n] int16, the low half of the fp32 master weight whose high half is ``weight``; None for fp32.
        grad: [n] fp32; 0 on return.
        first, second: [n] fp32.
        num_decayed: weights before this offset decay.
        step: counts from 1.
        grad_scale: [1] fp32, the factor of the gradient; if it is NaN, nothing but the gradient changes.
    """
    tensors = {"weight": weight, "remainder": remainder, "grad": grad, "first": first, "second": second}
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.shape == grad.shape and tensor.is_contiguous()):
            raise ValueError(f"{name}: expected shape {list(grad.shape)}, contiguous, got {list(tensor.shape)}")
    size, (beta1, beta2) = grad.numel(), betas
    if size:
        adamw_kernel[(triton.cdiv(size, BLOCK),)](
            weight if remainder is None else weight.view(torch.int16), remainder, grad, first, second, grad_scale,
            size, num_decayed,
            rate=lr / (1 - beta1**step), decay=1 - lr * weight_decay, eps=eps,
            take1=1 - beta1, keep2=beta2, take2=1 - beta2, inv_bias2=1 / (1 - beta2**step),
            HAS_REMAINDER=remainder is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
