"""Log-probability of one target per row of logits: ``x[target] - log sum exp(x)``, where x = inv_temperature logits.

Forward reads each logit once (online log-sum-exp), backward reads it once and writes its gradient in its place,
``grad inv_temperature (onehot(target) - softmax(x))``. Per row of V logits of b bytes: V b forward, 2 V b backward. All
arithmetic is fp32, with one rounding to the logits' dtype. The log-sum-exp stays in two parts, the row's peak and the
log of the rest: in one number, logits around 1e4 would cost 1e-3 nats. Offsets are 64-bit, for N V exceeds int32 from
N = 16,745 at V = 128,256. A target outside [0, V) gives NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK_V = 4096
NUM_WARPS = 8


@triton.jit
def row_stats(logits_ptr, inv_temperature, V, BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr):
    """Of a row x: its peak, sum exp(x - peak) and, for the entropy, sum exp(x - peak) (x - peak)."""
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32) * inv_temperature
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be NaN
        drop = tl.maximum(peak - shift, -1e30)
        x -= shift
        if ENTROPY:
            weighted = tl.exp(drop) * (weighted + drop * total)
            weighted += tl.sum(tl.exp(x) * tl.maximum(x, -1e30), axis=0)  # exp(-inf) * -inf would be NaN
        total = total * tl.exp(drop) + tl.sum(tl.exp(x), axis=0)
        peak = new_peak
    return peak, total, weighted


@triton.jit
def load_target(logits_ptr, target, inv_temperature, V):
    """The target's x; NaN if there is no such column."""
    valid = (target >= 0) & (target < V)
    return tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32) * inv_temperature


@triton.jit
def logsoftmax_gather_fwd_kernel(
    logits_ptr, target_ptr, inv_temperature_ptr, logprob_ptr, peak_ptr, logsum_ptr, stride_n, V, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    inv_temperature = tl.load(inv_temperature_ptr + row)
    peak, total, _ = row_stats(logits_ptr, inv_temperature, V, BLOCK_V, ENTROPY=False)
    logsum = tl.log(total)
    x_target = load_target(logits_ptr, tl.load(target_ptr + row), inv_temperature, V)
    tl.store(logprob_ptr + row, (x_target - peak) - logsum)
    tl.store(peak_ptr + row, peak)
    tl.store(logsum_ptr + row, logsum)


@triton.jit
def logsoftmax_gather_bwd_kernel(
    logits_ptr, target_ptr, inv_temperature_ptr, peak_ptr, logsum_ptr, grad_ptr, stride_n, V, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target = tl.load(target_ptr + row)
    peak = tl.load(peak_ptr + row)
    logsum = tl.load(logsum_ptr + row)
    scale = tl.load(grad_ptr + row) * inv_temperature
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32) * inv_temperature
        onehot = tl.where(columns == target, 1.0, 0.0)
        tl.store(logits_ptr + columns, scale * (onehot - tl.exp((x - peak) - logsum)), mask=columns < V)


def logsoftmax_gather_fwd(
    logits_NV: Tensor, target_N: Tensor, inv_temperature_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, and peak and logsum whose sum is the row's log-sum-exp, all [N] fp32."""
    N, V = logits_NV.shape
    logprob_N, peak_N, logsum_N = torch.empty(3, N, dtype=torch.float32, device=logits_NV.device)
    if N:
        logsoftmax_gather_fwd_kernel[(N,)](
            logits_NV, target_N, inv_temperature_N, logprob_N, peak_N, logsum_N, logits_NV.stride(0), V,
            BLOCK_V=block_size(V), num_warps=NUM_WARPS,
        )  # fmt: skip
    return logprob_N, peak_N, logsum_N


def logsoftmax_gather_bwd_(
    logits_NV: Tensor, target_N: Tensor, inv_temperature_N: Tensor, peak_N: Tensor, logsum_N: Tensor, grad_N: Tensor
) -> None:
    """Overwrite logits_NV with their gradient, given that of the log-probabilities, [N] fp32."""
    N, V = logits_NV.shape
    if N:
        logsoftmax_gather_bwd_kernel[(N,)](
            logits_NV, target_N, inv_temperature_N, peak_N, logsum_N, grad_N, logits_NV.stride(0), V,
            BLOCK_V=block_size(V), num_warps=NUM_WARPS,
        )  # fmt: skip


def block_size(V: int) -> int:
    return min(triton.next_power_of_2(V), MAX_BLOCK_V)


class _LogsoftmaxGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, target_N, inv_temperature_N):
        logprob_N, peak_N, logsum_N = logsoftmax_gather_fwd(logits_NV, target_N, inv_temperature_N)
        ctx.save_for_backward(logits_NV, target_N, inv_temperature_N, peak_N, logsum_N)
        return logprob_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        logits_NV, *saved = ctx.saved_tensors
        logsoftmax_gather_bwd_(logits_NV, *saved, grad_N.contiguous())
        torch.autograd.graph.increment_version(logits_NV)  # a second backward raises instead of reading gradients
        return logits_NV, None, None


def logsoftmax_gather(logits_NV: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None) -> Tensor:
    """``log softmax(inv_temperature * logits)[target]`` of every row; backward overwrites the logits.

    Args:
        logits_NV: [N, V] fp32, fp16 or bf16; copied if its rows are not dense.
        target_N: [N] int64.
        inv_temperature_N: [N] fp32; 1 if absent.

    Returns:
        logprob_N: [N] fp32 natural logs.
    """
    if logits_NV.stride(1) != 1 or logits_NV.stride(0) < logits_NV.shape[1]:
        logits_NV = logits_NV.contiguous()
    if inv_temperature_N is None:
        inv_temperature_N = torch.ones(len(logits_NV), device=logits_NV.device)
    return _LogsoftmaxGather.apply(logits_NV, target_N.contiguous(), inv_temperature_N.contiguous())
