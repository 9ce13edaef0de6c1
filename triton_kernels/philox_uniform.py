"""Uniform numbers in [0, 1) with 53 bits from Philox4x32-10 (Salmon et al., SC 2011), keyed by what a token is.

One launch reads the three counters by their strides, so that broadcasting costs no memory, and writes 8 bytes a number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def multiply(word, by: tl.constexpr):
    """Low and high half of the 64-bit product of two 32-bit words that are held in 64 bits."""
    product = word * tl.full((), by, tl.uint64)
    return product & 0xFFFFFFFF, product >> 32


@triton.jit
def counter(ptr, i, j, k, stride_i, stride_j, stride_k, mask):
    value = tl.load(ptr + i * stride_i + j * stride_j + k * stride_k, mask=mask, other=0)
    return value.to(tl.uint64) & 0xFFFFFFFF


@triton.jit(do_not_specialize=["key0", "key1", "step"])
def philox_uniform_kernel(
    prompt_ptr, trace_ptr, position_ptr, uniform_ptr, key0, key1, step, size, size_j, size_k,
    prompt_i, prompt_j, prompt_k, trace_i, trace_j, trace_k, position_i, position_j, position_k, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    k = index % size_k
    j = (index // size_k) % size_j
    i = index // size_k // size_j
    c0 = counter(position_ptr, i, j, k, position_i, position_j, position_k, mask)
    c1 = counter(trace_ptr, i, j, k, trace_i, trace_j, trace_k, mask)
    c2 = counter(prompt_ptr, i, j, k, prompt_i, prompt_j, prompt_k, mask)
    c3 = tl.zeros((BLOCK,), tl.uint64) + (step.to(tl.uint64) & 0xFFFFFFFF)
    k0, k1 = key0.to(tl.uint64) & 0xFFFFFFFF, key1.to(tl.uint64) & 0xFFFFFFFF
    for _ in tl.static_range(10):
        low0, high0 = multiply(c0, 0xD2511F53)
        low1, high1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    bits = ((c0 >> 5) << 26) | (c1 >> 6)
    tl.store(uniform_ptr + index, bits.to(tl.int64).to(tl.float64) * tl.full((), 2.0**-53, tl.float64), mask=mask)


def philox_uniform(seed: int, step: int, prompt: Tensor, trace: Tensor, position: Tensor) -> Tensor:
    """Uniform numbers keyed by their five arguments, bit for bit those of the reference.

    Args:
        seed: 64-bit key.
        step, prompt, trace, position: 32-bit counters; the tensors are int64 and broadcast together.

    Returns:
        fp64 tensor of the broadcast shape.
    """
    shape = torch.broadcast_shapes(prompt.shape, trace.shape, position.shape)
    prompt, trace, position = (c.broadcast_to((1, 1, 1, *shape)).flatten(0, -3) for c in (prompt, trace, position))
    uniform = torch.empty(shape, dtype=torch.float64, device=prompt.device)
    size = uniform.numel()
    if size:
        philox_uniform_kernel[(triton.cdiv(size, BLOCK),)](
            prompt, trace, position, uniform, _int32(seed), _int32(seed >> 32), _int32(step), size, *prompt.shape[1:],
            *prompt.stride(), *trace.stride(), *position.stride(), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return uniform


def _int32(word: int) -> int:
    """The low 32 bits as a signed number: one type for all seeds, hence one compiled kernel."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
