"""The C++ ops that have a backward, in autograd: one call forward, one back. A function has its op's name."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_native = torch.ops.nrt_fast  # its ops are looked up when they are called: the extension may be loaded later


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return _native.rms_norm.default(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_native.rms_norm_backward.default(*ctx.saved_tensors, ctx.eps, grad), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, residual_TD, weight_D, eps):
        normed_TD, sum_TD = _native.add_rms_norm.default(x_TD, residual_TD, weight_D, eps)
        ctx.save_for_backward(sum_TD, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed_TD, sum_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_normed_TD, grad_sum_TD):
        if grad_normed_TD is None:
            return grad_sum_TD, grad_sum_TD, None, None
        grad_TD, grad_weight_D = _native.rms_norm_backward.default(
            *ctx.saved_tensors, ctx.eps, grad_normed_TD, grad_sum_TD
        )
        # Autograd adds to a gradient in place only where nobody else holds it, so both inputs may have the same one.
        return grad_TD, grad_TD, grad_weight_D, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F):
        ctx.save_for_backward(gate_up_T2F)
        return _native.swiglu.default(gate_up_T2F)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TF):
        return _native.swiglu_backward.default(*ctx.saved_tensors, grad_TF)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THE, k_TKE, cos_TF, sin_TF):
        ctx.save_for_backward(cos_TF, sin_TF)
        return _native.rotate.default(q_THE, k_TKE, cos_TF, sin_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q_THE, grad_k_TKE):
        return *_native.rotate_backward.default(grad_q_THE, grad_k_TKE, *ctx.saved_tensors), None, None


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THE, k_TKE, v_TKE, starts_S, lens_S, root_S, window):
        out_THE, stats_2HT = _native.packed_attention.default(q_THE, k_TKE, v_TKE, starts_S, lens_S, root_S, window)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, out_THE, stats_2HT, starts_S, lens_S, root_S)
        ctx.window = window
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THE):
        *saved, starts_S, lens_S, root_S = ctx.saved_tensors
        grads = _native.packed_attention_backward.default(*saved, grad_THE, starts_S, lens_S, root_S, ctx.window)
        return *grads, None, None, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See the reference; keeps x, sums 1 / rms again on the way back."""
    return _RmsNorm.apply(x, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference; keeps the sum, which is a result, and takes both upstream gradients in one pass."""
    return _AddRmsNorm.apply(x_TD, residual_TD, weight_D, eps)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """See the reference; keeps gate and up alone."""
    return _Swiglu.apply(gate_up_T2F)


def rotate(q_THE: Tensor, k_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference; keeps the tables, which get no gradient."""
    return _Rotate.apply(q_THE, k_TKE, cos_TF, sin_TF)


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, lens_S: Tensor, root_S: Tensor, window: int | None
) -> Tensor:
    """See the room of that name; keeps its operands, the result, and two numbers of each softmax."""
    return _PackedAttention.apply(q_THE, k_TKE, v_TKE, starts_S, lens_S, root_S, window)
