"""The element-wise pieces of a decoder layer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean and the division in fp32 (arXiv 1910.07467).

    Args:
        x: [..., D].

    Returns:
        [..., D]. Rounded to x's dtype before the weight and after it, as in Hugging Face's Llama.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"weight_D: expected shape [{x.shape[-1]}], the last axis of x, got {list(weight_D.shape)}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight_D * normed.to(x.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream's step: (rms_norm(x + residual), x + residual), both [T, D]; the sum is rounded first."""
    sum_TD = x_TD + residual_TD
    return rms_norm(sum_TD, weight_D, eps), sum_TD


def rotate(q_THE: Tensor, k_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, halves paired as in Hugging Face checkpoints (arXiv 2104.09864).

    Args:
        q_THE, k_TKE: [T, H, E] queries, [T, K, E] keys.
        cos_TF, sin_TF: [T, E / 2], of each token's angles.

    Returns:
        [T, H, E], [T, K, E].
    """
    return _turn(q_THE, cos_TF, sin_TF), _turn(k_TKE, cos_TF, sin_TF)


def _turn(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    if x_THE.shape[2] != 2 * cos_TF.shape[1]:
        raise ValueError(f"cos_TF: expected F={x_THE.shape[2] / 2:g}, half a head, got {cos_TF.shape[1]}")
    first, second = x_THE.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_write(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TF: Tensor, sin_TF: Tensor, k_pages_NKSE: Tensor,
    v_pages_NKSE: Tensor, page_T: Tensor, slot_T: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate q and k and write k and v into a layer's paged cache, in place.

    Args:
        q_THE, k_TKE, v_TKE, cos_TF, sin_TF: as in ``rotate``; [T, K, E] values.
        k_pages_NKSE, v_pages_NKSE: [N, K, S, E], pages of S slots.
        page_T, slot_T: [T] int32 or int64, where each token goes; no place twice.

    Returns:
        [T, H, E] rotated queries.
    """
    q_THE, k_TKE = rotate(q_THE, k_TKE, cos_TF, sin_TF)
    k_pages_NKSE[page_T.long(), :, slot_T.long()] = k_TKE
    v_pages_NKSE[page_T.long(), :, slot_T.long()] = v_TKE
    return q_THE


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2, F], gate first: [T, F] (arXiv 2002.05202)."""
    gate_TF, up_TF = gate_up_T2F.unbind(1)
    return F.silu(gate_TF) * up_TF
