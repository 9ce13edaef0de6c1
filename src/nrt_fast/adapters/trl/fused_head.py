"""Our fused head in the place of TRL's chunked one (TRL 1.15): logits never exist at once, in either direction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nrt_fast import ops
from nrt_fast.adapters.live import DTYPES

OUTPUTS = {"log_probs", "entropy"}


@contextmanager
def our_logprob() -> Iterator[None]:
    """Within it TRL's forward passes take their log-probabilities from ``ops``; before TRL 1.15 they make logits."""
    utils = import_module("trl.trainer.utils")
    theirs = getattr(utils, "_ChunkedLogProbFunction", None)
    if theirs is None:
        yield
        return
    utils._ChunkedLogProbFunction = FusedLogProb(theirs)
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = theirs


class FusedLogProb:
    """Stands for TRL's autograd function; bias, soft caps, fp16 and other statistics are left to that."""

    def __init__(self, theirs: Any):
        self.theirs = theirs

    def apply(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, temperature: float,
        chunk_size: int, softcap: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy",),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """TRL's signature. (log-probability, entropy or None, None, None, None), [N] fp32."""
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        if bias_V is not None or softcap is not None or dtype not in DTYPES or not set(outputs) <= OUTPUTS:
            return self.theirs.apply(
                hidden_ND, weight_VD, bias_V, target_N, temperature, chunk_size, softcap, logit_scale, outputs
            )
        inv_temperature_N = torch.full(target_N.shape, logit_scale / temperature, device=hidden_ND.device)
        logprob_N, entropy_N = _LinearLogProb.apply(
            hidden_ND.to(dtype), weight_VD.to(dtype), target_N, inv_temperature_N
        )
        return logprob_N, entropy_N if "entropy" in outputs else None, None, None, None


class _LinearLogProb(torch.autograd.Function):
    """``ops.linear_logprob_stats`` forward; the way back is the op of the training step, logits computed again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, inv_temperature_N):
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, inv_temperature_N)
        ctx.set_materialize_grads(False)
        logprob_N, _, entropy_N = ops.linear_logprob_stats(hidden_ND, weight_VD, target_N, inv_temperature_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, inv_temperature_N = ctx.saved_tensors
        zeros_N = torch.zeros_like(inv_temperature_N)
        grad_logprob_N = zeros_N if grad_logprob_N is None else grad_logprob_N
        grad_weight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        # The op has one factor for all entropies: rows of one upstream gradient go together, and mostly all have one.
        factors_N = zeros_N if grad_entropy_N is None else grad_entropy_N
        for factor in factors_N.unique().tolist():
            rows = (factors_N == factor).nonzero().squeeze(1)
            *_, grad_hidden_ND[rows] = ops.linear_logprob_loss(
                hidden_ND[rows], weight_VD, target_N[rows], inv_temperature_N[rows], -grad_logprob_N[rows],
                torch.full(rows.shape, factor != 0, device=rows.device), None, None, grad_weight_VD, "reinforce",
                1.0, 1.0, 0.0, -factor, 1.0,
            )  # fmt: skip
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None
