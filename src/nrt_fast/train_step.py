"""One optimiser step over packed batches (method section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.config import Objective
from nrt_fast.model import Model
from nrt_fast.optim import AdamW
from nrt_fast.types import ANSWER, FORMAT, TRACE, LossTokens, PackedBatch, UserError

TRACE_LOSSES = {"cispo": ops.cispo, "ppo": ops.ppo, "reinforce": ops.reinforce}


@dataclass(frozen=True)
class TrainStats:
    """What an optimiser step measured.

    Attributes:
        logprobs_A, entropy_A: [A] fp32 on the CPU, the trainer's values of every packed loss token; NaN elsewhere.
        loss: by term: trace, answer, format, kl, entropy; and total, what was differentiated.
        grad_norm: before clipping.
    """

    logprobs_A: Tensor
    entropy_A: Tensor
    loss: dict[str, float]
    grad_norm: float


def train_step(
    model: Model,
    optimizer: AdamW,
    tokens: LossTokens,
    batches: list[PackedBatch],
    objective: Objective,
    lr: float,
    max_grad_norm: float,
    on_policy: bool,
    reference: Model | None,
) -> TrainStats:
    """Forward and backward of every batch, then one clipped AdamW step.

    Args:
        tokens: the step's loss tokens; the loss is their weighted sum over ``tokens.normalizer``.
        batches: packed from ``tokens``, in any cut: the result is the same up to rounding.
        on_policy: the first optimiser step since sampling when it is also the only one; the ratio is 1 by definition.
        reference: initial weights for the KL term, or None without one.

    Raises:
        UserError: the loss or the gradient is NaN or Inf; the weights are as before.
    """
    logprobs_A, entropy_A = torch.full((2, len(tokens.targets_A)), math.nan)
    sums: dict[str, float] = dict.fromkeys(("trace", "answer", "format", "kl", "entropy", "total"), 0.0)
    for batch in batches:
        logprob, entropy = _logprobs(model, tokens, batch)
        terms = _terms(logprob, entropy, tokens, batch, objective, on_policy, reference)
        total = sum(terms.values()) / tokens.normalizer
        total.backward()
        logprobs_A[batch.rows_A], entropy_A[batch.rows_A] = logprob.detach().cpu(), entropy.detach().cpu()
        for name, term in terms.items():
            sums[name] += float(term.detach()) / tokens.normalizer
        sums["total"] += float(total.detach())
    _check_finite("loss", sums["total"])
    grad_norm = optimizer.step(lr, max_grad_norm)
    _check_finite("gradient norm", grad_norm)
    return TrainStats(logprobs_A, entropy_A, sums, grad_norm)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"the {name} is {value}: the weights are as before this step; a lower learning rate may help")


def _logprobs(model: Model, tokens: LossTokens, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    hidden_TD = model.packed(batch)
    device = hidden_TD.device
    return ops.linear_logprob_stats(
        hidden_TD.index_select(0, batch.hidden_A),
        model.head,
        tokens.targets_A[batch.rows_A].to(device),
        tokens.inv_temperature_A[batch.rows_A].to(device),
    )


def _terms(
    logprob_A: Tensor, entropy_A: Tensor, tokens: LossTokens, batch: PackedBatch, objective: Objective,
    on_policy: bool, reference: Model | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Summed loss of each term."""
    device, rows = logprob_A.device, batch.rows_A
    kind_A = tokens.kind_A[rows].to(device)
    weight_A = tokens.weight_A[rows].to(device)
    counted_A = tokens.counted_A[rows].to(device)
    trace_A, answer_A, format_A = ((kind_A == kind) & counted_A for kind in (TRACE, ANSWER, FORMAT))
    terms = {
        "answer": -(weight_A[answer_A] * logprob_A[answer_A]).sum(),
        "format": -(weight_A[format_A] * logprob_A[format_A]).sum(),
    }
    if objective.trace_loss != "none":
        new = logprob_A[trace_A]
        old = new.detach() if on_policy else tokens.old_logprobs_A[rows].to(device)[trace_A]
        trace_loss = TRACE_LOSSES[objective.trace_loss]
        low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
        terms["trace"] = trace_loss(new, (new - old).exp(), weight_A[trace_A], low, high).sum()
    if reference is not None:
        with torch.no_grad():
            reference_A, _ = _logprobs(reference, tokens, batch)
        terms["kl"] = objective.beta * ops.kl_estimate(logprob_A[trace_A], reference_A[trace_A]).sum()
    if objective.entropy_coef:
        terms["entropy"] = -objective.entropy_coef * entropy_A[trace_A].sum()
    return terms
