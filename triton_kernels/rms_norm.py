"""RMSNorm of the last axis: ``weight * (x / rms(x))``, by the kernels of add_rms_norm without their residual.

Per element of b bytes: forward reads b and writes b, backward reads 2 b and writes b. Queries and keys are normed where
they stand in the fused projection, without a copy.
"""

import torch
from nrt_fast.triton_kernels.add_rms_norm import add_rms_norm_bwd, add_rms_norm_fwd
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        normed, x, rstd = add_rms_norm_fwd(x, None, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *add_rms_norm_bwd(*ctx.saved_tensors, grad, None), None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis; see the reference.

    Args:
        x: [..., D] fp32, fp16 or bf16; any strides, a copy only where rows are not dense.
        weight_D: [D].

    Returns:
        [..., D], dense.
    """
    return _RmsNorm.apply(x, weight_D, eps)
