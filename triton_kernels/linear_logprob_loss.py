"""The training loss on ``hidden weight^T`` with its gradients, in three matrix products.

Per chunk of at least 4096 rows: fp32 logits by cuBLAS into one scratch; one kernel that reads a row twice, for its
statistics and, the token's loss being known then, for the gradient

    d loss / d logit_j = (a ([j is the target] - p_j) - e p_j (log p_j + H)) inv_temperature,

with a = d loss / d log-probability, e = d loss / d entropy H, computed in fp32 and rounded once to the operands' dtype;
then dH = G W and dW += G^T H, both summed in fp32. The 16-bit gradient takes the place of its row's fp32 logits, so its
rows lie 2 V elements apart.

FLOPs: 6 N V D. Bytes for each of N V logits: 4 written and 4 read by cuBLAS and the first pass, 4 read (less what L2
kept) and 2 written by the second, 2 read by each of two products. Scratch: 4 V bytes for each row of a chunk.
"""

import torch
import triton
import triton.language as tl
from nrt_fast.triton_kernels.linear_logprob import check_dtypes, chunks_of_rows, matmul_fp32
from nrt_fast.triton_kernels.logsoftmax_gather import NUM_WARPS, block_size, load_target, row_stats
from torch import Tensor

TRACE_LOSSES = ("cispo", "ppo", "reinforce")
MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)  # as in the reference


@triton.jit
def token_loss(
    logprob, weight, policy, old_logprob_ptr, reference_logprob_ptr, row, low, high, beta, TRACE_LOSS: tl.constexpr
):
    """A token's loss but for the entropy, and its derivative by the log-probability."""
    ratio = tl.full((), 1.0, tl.float32)
    if old_logprob_ptr is not None:
        log_ratio = logprob - tl.load(old_logprob_ptr + row)
        ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
    gone = ((weight > 0) & (ratio > high)) | ((weight < 0) & (ratio < low))
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    slope = -weight
    loss = slope * logprob
    if TRACE_LOSS == "cispo":
        slope = tl.where(policy & gone, 0.0, tl.where(policy, slope * clipped, slope))
        loss = slope * logprob
    elif TRACE_LOSS == "ppo":
        loss = tl.where(policy, slope * tl.where(gone, clipped, ratio), loss)
        slope = tl.where(policy & gone, 0.0, tl.where(policy, slope * ratio, slope))
    loss = tl.where(weight == 0.0, 0.0, loss)
    slope = tl.where(weight == 0.0, 0.0, slope)
    if reference_logprob_ptr is not None:
        difference = tl.load(reference_logprob_ptr + row) - logprob
        loss += tl.where(policy, beta * (tl.exp(difference) - difference - 1.0), 0.0)
        slope += tl.where(policy, beta * (1.0 - tl.exp(difference)), 0.0)
    return loss, slope


@triton.jit
def loss_rows_kernel(
    logits_ptr, grad_ptr, target_ptr, inv_temperature_ptr, weight_ptr, policy_ptr, old_logprob_ptr,
    reference_logprob_ptr, loss_ptr, logprob_ptr, entropy_ptr, V, low, high, beta, entropy_coef, scale,
    TRACE_LOSS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    grad_ptr += row * V * (4 // (grad_ptr.dtype.element_ty.primitive_bitwidth // 8))
    inv_temperature = tl.load(inv_temperature_ptr + row)
    peak, total, weighted = row_stats(logits_ptr, inv_temperature, V, BLOCK_V, ENTROPY=True)
    logsum = tl.log(total)
    entropy = logsum - weighted / total
    target = tl.load(target_ptr + row)
    logprob = (load_target(logits_ptr, target, inv_temperature, V) - peak) - logsum
    weight, policy = tl.load(weight_ptr + row), tl.load(policy_ptr + row) != 0
    loss, slope = token_loss(
        logprob, weight, policy, old_logprob_ptr, reference_logprob_ptr, row, low, high, beta, TRACE_LOSS
    )
    tl.store(loss_ptr + row, loss - tl.where(policy, entropy_coef * entropy, 0.0))
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)

    entropy_slope = tl.where(policy, -entropy_coef, 0.0)
    silent = (slope == 0.0) & (entropy_slope == 0.0)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + columns, mask=columns < V, other=0.0) * inv_temperature
        log_p = (x - peak) - logsum
        p = tl.exp(log_p)
        grad = slope * (tl.where(columns == target, 1.0, 0.0) - p)
        grad -= entropy_slope * p * (tl.maximum(log_p, -1e30) + entropy)  # at p = 0, 0 * -inf would be NaN
        grad = tl.where(silent, 0.0, grad * (scale * inv_temperature))
        # The gradient of columns [s, s + B) lies on the logits of [s / 2, (s + B) / 2): on those that all threads have
        # read once this block is read. The row has no other owner.
        tl.debug_barrier()
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=columns < V)


def linear_logprob_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    inv_temperature_N: Tensor | None,
    token_weight_N: Tensor,
    policy_N: Tensor,
    old_logprob_N: Tensor | None,
    reference_logprob_N: Tensor | None,
    grad_weight_VD: Tensor | None,
    trace_loss: str,
    low: float,
    high: float,
    beta: float,
    entropy_coef: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [] fp32, logprob_N fp32, entropy_N fp32, grad_hidden_ND), the head's gradient added to grad_weight_VD.

    Arguments are those of ``nrt_fast.reference.logprob.linear_logprob_loss``; hidden and weight are fp32, fp16 or bf16,
    of one dtype.
    """
    check_dtypes(hidden_ND, weight_VD)
    if trace_loss not in TRACE_LOSSES:
        raise ValueError(f"trace_loss {trace_loss!r}: expected cispo, ppo or reinforce")
    (N, D), V, device, dtype = hidden_ND.shape, len(weight_VD), hidden_ND.device, hidden_ND.dtype
    if inv_temperature_N is None:
        inv_temperature_N = torch.ones(N, device=device)
    rows_N = (
        None if x is None else x.contiguous()
        for x in (target_N, inv_temperature_N, token_weight_N, policy_N, old_logprob_N, reference_logprob_N)
    )  # fmt: skip
    results = loss_N, logprob_N, entropy_N = torch.empty(3, N, dtype=torch.float32, device=device).unbind()
    tokens = (*rows_N, *results)
    grad_hidden_ND, chunks = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format), chunks_of_rows(N)
    max_rows = max(rows.stop - rows.start for rows in chunks)
    logits_NV = torch.empty(max_rows, V, dtype=torch.float32, device=device)
    grad_NV = logits_NV.view(dtype)[:, :V]
    product_ND = torch.empty(max_rows, D, dtype=torch.float32, device=device)
    for rows in chunks if N else []:
        n, hidden = rows.stop - rows.start, hidden_ND[rows]
        matmul_fp32(hidden, weight_VD.T, logits_NV[:n])
        loss_rows_kernel[(n,)](
            logits_NV, grad_NV, *(None if x is None else x[rows] for x in tokens),
            V, low, high, beta, entropy_coef, scale,
            TRACE_LOSS=trace_loss, BLOCK_V=block_size(V), num_warps=NUM_WARPS,
        )  # fmt: skip
        matmul_fp32(grad_NV[:n], weight_VD, product_ND[:n])
        grad_hidden_ND[rows] = product_ND[:n]
        if grad_weight_VD is not None:
            matmul_fp32(grad_NV[:n].T, hidden, grad_weight_VD, accumulate=True)
    return loss_N.sum() * scale, logprob_N, entropy_N, grad_hidden_ND
