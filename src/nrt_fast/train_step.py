"""One optimiser step over packed batches (docs/method.md, Loss)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import distributed, ops
from nrt_fast.config import Objective
from nrt_fast.model import Model
from nrt_fast.optim import AdamW
from nrt_fast.types import ANSWER, FORMAT, TRACE, BatchTokens, LossTokens, PackedBatch, UserError

TERMS = ("trace", "answer", "format", "kl", "entropy", "total")
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
    recompute: str = "none",
) -> TrainStats:
    """Forward and backward of every batch, then one clipped AdamW step.

    Args:
        tokens: the step's loss tokens; the loss is their weighted sum over ``tokens.normalizer``.
        batches: packed from ``tokens``, in any cut: the result is the same up to rounding. Of several ranks each has
            its share of them; what is returned is of all.
        on_policy: the first optimiser step since sampling when it is also the only one; the ratio is 1 by definition.
        reference: initial weights for the KL term, or None without one.
        recompute: what the backward pass computes again (none, selective, full), with the same result.

    Raises:
        UserError: the loss or the gradient is NaN or Inf; the weights are as before.
    """
    scale, parts, terms = 1 / tokens.normalizer, [], []
    for batch in batches:
        old_A = None if on_policy else batch.loss.old_logprobs_A
        reference_A = None if reference is None else _reference_logprobs(reference, batch)
        # Straight into the fp32 sums: the vocabulary's gradients, the largest of all, are never stored by themselves.
        grad_embed_VD, grad_head_VD = (
            optimizer.gradient(weight_VD) if weight_VD.requires_grad else None
            for weight_VD in (model.embed, model.head)
        )
        hidden_AD = loss_rows(model.packed(batch, recompute, grad_embed_VD), batch)
        loss, logprob_B, entropy_B, grad_AD = _loss(
            hidden_AD, model.head, batch.loss, old_A, reference_A, grad_head_VD, objective, scale
        )
        hidden_AD.backward(grad_AD)
        parts.append(torch.stack([logprob_B, entropy_B]))
        measured = _terms(logprob_B, entropy_B, batch.loss, old_A, reference_A, objective)
        terms.append({"total": loss} | {name: scale * term for name, term in measured.items()})
    # Nothing is read before this point, so that the host can run ahead of a GPU.
    sums = {name: sum(float(part.get(name, 0.0)) for part in terms) for name in TERMS}
    sums = distributed.total(sums, "the loss")
    measured_2A = torch.full((2, len(tokens.targets_A)), math.nan)
    for batch, part_2B in zip(batches, parts, strict=True):
        measured_2A[:, batch.rows_A] = part_2B.cpu()
    logprobs_A, entropy_A = distributed.union(measured_2A, "the trainer's log-probabilities")
    _check_finite("loss", sums["total"])
    grad_norm = optimizer.step(lr, max_grad_norm)
    _check_finite("gradient norm", grad_norm)
    return TrainStats(logprobs_A, entropy_A, sums, grad_norm)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"the {name} is {value}: the weights are as before this step; a lower learning rate may help")


def loss_rows(hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
    """[A, D]: the hidden states that predict the loss tokens; a row's gradients are added in fp32, in their order."""
    hidden_T1D = hidden_TD.unsqueeze(1)
    return ops.gather_rows(hidden_T1D, batch.hidden_A, batch.copies_A, batch.cu_copies).squeeze(1)


@torch.no_grad()
def _reference_logprobs(reference: Model, batch: PackedBatch) -> Tensor:
    hidden_AD = reference.packed(batch)[batch.hidden_A]
    return ops.linear_logprob(hidden_AD, reference.head, batch.loss.targets_A, batch.loss.inv_temperature_A)


def _loss(
    hidden_AD: Tensor, head_VD: Tensor, tokens: BatchTokens, old_A: Tensor | None, reference_A: Tensor | None,
    grad_head_VD: Tensor | None, objective: Objective, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The batch's part of the step's loss; log-probability, entropy and gradient of the hidden state of its tokens."""
    trace_loss = objective.trace_loss
    return ops.linear_logprob_loss(
        hidden_AD.detach(),
        head_VD.detach(),
        tokens.targets_A,
        tokens.inv_temperature_A,
        tokens.weight_A,
        tokens.kind_A == TRACE,
        old_A,
        reference_A,
        grad_head_VD,
        "reinforce" if trace_loss == "none" else trace_loss,  # without a trace loss no token is under it
        1 - objective.epsilon,
        1 + objective.epsilon_high,
        objective.beta,
        objective.entropy_coef,
        scale,
    )


def _terms(
    logprob_A: Tensor, entropy_A: Tensor, tokens: BatchTokens, old_A: Tensor | None, reference_A: Tensor | None,
    objective: Objective,
) -> dict[str, Tensor]:  # fmt: skip
    """Summed loss of each term, to be reported."""
    answer_loss_A = -tokens.weight_A * logprob_A

    def total(kind: int, loss_A: Tensor) -> Tensor:
        return torch.where(tokens.kind_A == kind, loss_A, 0.0).sum()

    terms = {"answer": total(ANSWER, answer_loss_A), "format": total(FORMAT, answer_loss_A)}
    if objective.trace_loss != "none":
        ratio_A = torch.ones_like(logprob_A) if old_A is None else (logprob_A - old_A).exp()
        low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
        trace_loss = TRACE_LOSSES[objective.trace_loss]
        terms["trace"] = total(TRACE, trace_loss(logprob_A, ratio_A, tokens.weight_A, low, high))
    if reference_A is not None:
        terms["kl"] = total(TRACE, objective.beta * ops.kl_estimate(logprob_A, reference_A))
    if objective.entropy_coef:
        terms["entropy"] = total(TRACE, -objective.entropy_coef * entropy_A)
    return terms
