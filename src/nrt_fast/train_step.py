"""One optimiser step over packed batches (method section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.config import Objective
from nrt_fast.fused_loss import linear_logprob_loss
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
        rows = _Rows.of(batch, on_policy)
        reference_A = None if reference is None else _reference_logprobs(reference, rows, batch)
        loss, logprob, entropy = _loss(model, rows, batch, reference_A, objective, 1 / tokens.normalizer)
        loss.backward()
        logprobs_A[batch.rows_A], entropy_A[batch.rows_A] = logprob.cpu(), entropy.cpu()
        for name, term in _terms(logprob, entropy, rows, reference_A, objective).items():
            sums[name] += float(term) / tokens.normalizer
        sums["total"] += float(loss.detach())
    _check_finite("loss", sums["total"])
    grad_norm = optimizer.step(lr, max_grad_norm)
    _check_finite("gradient norm", grad_norm)
    return TrainStats(logprobs_A, entropy_A, sums, grad_norm)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"the {name} is {value}: the weights are as before this step; a lower learning rate may help")


@dataclass(frozen=True)
class _Rows:
    """A batch's loss tokens as the loss reads them; an uncounted token has weight 0 and no policy.

    Attributes:
        policy_A: [A] bool, under the trace loss.
        old_A: None where the ratio is 1 by definition.
    """

    target_A: Tensor
    inv_temperature_A: Tensor
    kind_A: Tensor
    weight_A: Tensor
    policy_A: Tensor
    old_A: Tensor | None

    @classmethod
    def of(cls, batch: PackedBatch, on_policy: bool) -> _Rows:
        tokens = batch.loss
        return cls(
            tokens.targets_A,
            tokens.inv_temperature_A,
            tokens.kind_A,
            torch.where(tokens.counted_A, tokens.weight_A, 0.0),
            (tokens.kind_A == TRACE) & tokens.counted_A,
            None if on_policy else tokens.old_logprobs_A,
        )


@torch.no_grad()
def _reference_logprobs(reference: Model, rows: _Rows, batch: PackedBatch) -> Tensor:
    hidden_AD = reference.packed(batch)[batch.hidden_A]
    return ops.linear_logprob(hidden_AD, reference.head, rows.target_A, rows.inv_temperature_A)


def _loss(
    model: Model, rows: _Rows, batch: PackedBatch, reference_A: Tensor | None, objective: Objective, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's part of the step's loss, what is differentiated; log-probability and entropy of its tokens."""
    trace_loss = objective.trace_loss
    return linear_logprob_loss(
        model.packed(batch).index_select(0, batch.hidden_A),
        model.head,
        rows.target_A,
        rows.inv_temperature_A,
        rows.weight_A,
        rows.policy_A,
        rows.old_A,
        reference_A,
        "reinforce" if trace_loss == "none" else trace_loss,  # without a trace loss no token is under it
        1 - objective.epsilon,
        1 + objective.epsilon_high,
        objective.beta,
        objective.entropy_coef,
        scale,
    )


def _terms(
    logprob_A: Tensor, entropy_A: Tensor, rows: _Rows, reference_A: Tensor | None, objective: Objective
) -> dict[str, Tensor]:
    """Summed loss of each term, to be reported."""
    weighted_A = -rows.weight_A * logprob_A
    terms = {"answer": weighted_A[rows.kind_A == ANSWER].sum(), "format": weighted_A[rows.kind_A == FORMAT].sum()}
    trace_A = rows.policy_A
    if objective.trace_loss != "none":
        new = logprob_A[trace_A]
        ratio = torch.ones_like(new) if rows.old_A is None else (new - rows.old_A[trace_A]).exp()
        low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
        terms["trace"] = TRACE_LOSSES[objective.trace_loss](new, ratio, rows.weight_A[trace_A], low, high).sum()
    if reference_A is not None:
        terms["kl"] = objective.beta * ops.kl_estimate(logprob_A[trace_A], reference_A[trace_A]).sum()
    if objective.entropy_coef:
        terms["entropy"] = -objective.entropy_coef * entropy_A[trace_A].sum()
    return terms
