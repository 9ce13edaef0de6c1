"""Linear layers on weights packed into panels beforehand, for decoding: weights stay as they are for many steps."""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64  # outputs of a panel


def panel_shape(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The shape of panels: [ceil(N / 64), ceil(K / group), 64, group], a group of inputs being 32 bits wide.

    Element [p, k, n, g] is the weight of output 64 p + n for input group k + g; what is beyond N and K is 0.
    """
    group = max(1, 4 // dtype.itemsize)
    return -(-num_outputs // PANEL), -(-num_inputs // group), PANEL, group


@torch.no_grad()
def pack_panels(weights: list[Tensor], panels: Tensor) -> None:
    """Pack the rows of several weights, one after another, in place.

    Args:
        weights: [N_i, K] each, of one dtype.
        panels: ``panel_shape(sum of N_i, K, dtype)``, contiguous, of the weights' dtype.
    """
    if not weights or any(w.ndim != 2 or w.shape[1] != weights[0].shape[-1] for w in weights):
        raise ValueError(f"weights: expected matrices of one width, got {[list(w.shape) for w in weights]}")
    if any(w.dtype != panels.dtype for w in weights):
        raise ValueError(f"weights: expected the panels' dtype {panels.dtype}, got {[w.dtype for w in weights]}")
    num_outputs, num_inputs = sum(len(w) for w in weights), weights[0].shape[1]
    _check_panels(panels, num_outputs, num_inputs)
    num_panels, num_groups, _, group = panels.shape
    rows = panels.new_zeros(num_panels * PANEL, num_groups * group)
    rows[:num_outputs, :num_inputs] = torch.cat(list(weights))
    panels.copy_(rows.view(num_panels, PANEL, num_groups, group).transpose(1, 2))


def panel_linear(x_TK: Tensor, panels: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    """x weight^T + bias, summed in fp32 and rounded once.

    Args:
        x_TK: [T, K].
        panels: from ``pack_panels``, of x's dtype.
        bias_N: [N] of x's dtype, or None.
        num_outputs: N.

    Returns:
        [T, N] of x's dtype. In C++ a row's bits depend on that row and on the weights alone.
    """
    return F.linear(x_TK, _unpacked(x_TK, panels, bias_N, num_outputs), bias_N)


def panel_logits(x_TK: Tensor, panels: Tensor, num_outputs: int) -> Tensor:
    """``panel_linear`` without a bias or a rounding: [T, N] fp32."""
    wide = torch.promote_types(x_TK.dtype, torch.float32)
    return F.linear(x_TK.to(wide), _unpacked(x_TK, panels, None, num_outputs).to(wide))


def _unpacked(x_TK: Tensor, panels: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
    num_inputs = x_TK.shape[1]
    if num_inputs < 1 or num_outputs < 1:
        raise ValueError("x_TK, num_outputs: expected at least one input and one output")
    if bias_N is not None and (bias_N.dtype != x_TK.dtype or bias_N.shape != (num_outputs,)):
        raise ValueError(f"bias_N: expected {[num_outputs]} of {x_TK.dtype}, got {[*bias_N.shape]} of {bias_N.dtype}")
    if panels.dtype != x_TK.dtype:
        raise ValueError(f"panels: expected {x_TK.dtype}, the dtype of x, got {panels.dtype}")
    _check_panels(panels, num_outputs, num_inputs)
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:num_outputs, :num_inputs]


def _check_panels(panels: Tensor, num_outputs: int, num_inputs: int) -> None:
    expected = panel_shape(num_outputs, num_inputs, panels.dtype)
    if panels.shape != expected or not panels.is_contiguous():
        raise ValueError(f"panels: expected contiguous memory of shape {list(expected)}, got {list(panels.shape)}")
