"""The one bridge from the training loss, which computes its own gradients, to autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nrt_fast import ops


def linear_logprob_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    inv_temperature_N: Tensor | None,
    token_weight_N: Tensor,
    policy_N: Tensor,
    old_logprob_N: Tensor | None,
    reference_logprob_N: Tensor | None,
    trace_loss: str,
    low: float,
    high: float,
    beta: float,
    entropy_coef: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.linear_logprob_loss``, differentiable in hidden_ND and weight_VD; see there for the arguments.

    Returns:
        (loss [] fp32, logprob_N [N] fp32, entropy_N [N] fp32); only the loss has a gradient.
    """
    return _LinearLogprobLoss.apply(
        hidden_ND, weight_VD, target_N, inv_temperature_N, token_weight_N, policy_N, old_logprob_N,
        reference_logprob_N, trace_loss, low, high, beta, entropy_coef, scale,
    )  # fmt: skip


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, inv_temperature_N, token_weight_N, policy_N, old_N, reference_N,
                *options):  # fmt: skip
        grad_weight_VD = None  # a constant head needs none
        if ctx.needs_input_grad[1]:
            grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        loss, logprob_N, entropy_N, grad_hidden_ND = ops.linear_logprob_loss(
            hidden_ND, weight_VD, target_N, inv_temperature_N, token_weight_N, policy_N, old_N, reference_N,
            grad_weight_VD, *options,
        )  # fmt: skip
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss, logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _logprob, _entropy):
        if grad.ndim:
            raise ValueError(f"upstream gradient of the loss: expected a scalar, got {list(grad.shape)}")
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        if grad_weight_VD is None:
            return grad_hidden_ND * grad, *[None] * 13
        # The product is rounded once, on its way out: no fp32 temporary of the head's size.
        scaled_VD = torch.empty_like(grad_weight_VD, dtype=ctx.weight_dtype)
        torch.mul(grad_weight_VD, grad, out=scaled_VD)
        return grad_hidden_ND * grad, scaled_VD, *[None] * 12
