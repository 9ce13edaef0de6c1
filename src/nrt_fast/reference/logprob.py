"""Log-probabilities of given targets from hidden states, and the training loss on them; logits chunk by chunk.

Arithmetic is fp32 whatever the operands' dtype, and fp64 where they are fp64. Nothing here is differentiable: the loss
computes its gradients itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # fp32 logits alive at one time
MAX_LOG_RATIO = 20.0  # a ratio of 5e8: finite, so that inf never meets 0


def linear_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """fp32 logits [N, V]; the operands keep their values, and the logit is never rounded to their dtype."""
    if hidden_ND.is_cuda and hidden_ND.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)  # no fp32 copy of the head for every step
    return _wide(hidden_ND) @ _wide(weight_VD).T


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None
) -> Tensor:
    """``log softmax(inv_temperature * hidden weight^T)[target]`` of every row.

    Args:
        hidden_ND: [N, D] final hidden states.
        weight_VD: [V, D] head, of the same dtype.
        target_N: [N] int64 in [0, V).
        inv_temperature_N: [N] fp32 factor of each row's logits; 1 if absent.

    Returns:
        logprob_N: [N] fp32 natural logs, not differentiable.
    """
    return linear_logprob_stats(hidden_ND, weight_VD, target_N, inv_temperature_N)[0]


@torch.no_grad()
def linear_logprob_stats(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, inv_temperature_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, log-sum-exp of its row and entropy of its distribution; see linear_logprob.

    Returns:
        (logprob_N, logsumexp_N, entropy_N): [N] fp32, in nats, not differentiable.
    """
    chunks = _chunks(hidden_ND, _wide(weight_VD), inv_temperature_N)
    parts = [_row_stats(scaled_NV, target_N[rows]) for rows, _, scaled_NV in chunks]
    logprob_N, logsumexp_N, entropy_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprob_N, logsumexp_N, entropy_N


def _chunks(
    hidden_ND: Tensor, weight_VD: Tensor, inv_temperature_N: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their hidden states, their logits times the inverse temperature), at least one chunk."""
    N, num_rows = len(hidden_ND), max(1, CHUNK_BYTES // (4 * len(weight_VD)))
    for start in range(0, max(N, 1), num_rows):
        rows = slice(start, start + num_rows)
        hidden = _wide(hidden_ND[rows])
        scaled = hidden @ weight_VD.T
        if inv_temperature_N is not None:
            scaled *= inv_temperature_N[rows, None]
        yield rows, hidden, scaled


def _row_stats(scaled_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_NV = scaled_NV.log_softmax(dim=1)
    logsumexp_N = scaled_NV.amax(dim=1) - logprobs_NV.amax(dim=1)
    return logprobs_NV.gather(1, target_N[:, None]).squeeze(1), logsumexp_N, _entropy(logprobs_NV)


def _entropy(logprobs_NV: Tensor) -> Tensor:
    return -(logprobs_NV.exp() * _finite(logprobs_NV)).sum(dim=1)


def _finite(logprobs: Tensor) -> Tensor:
    """p log p is 0 at p = 0, and 0 * -inf is NaN."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min)


@torch.no_grad()
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
    """The summed loss of docs/method.md with its gradients; those of the head are added to ``grad_weight_VD``.

    A policy token loses trace_loss(logprob, exp(logprob - old), weight) + beta k3(logprob, reference)
    - entropy_coef entropy; any other token -weight logprob. With z the logits times the inverse temperature,
    p = softmax(z) and H its entropy, d logprob / dz_j = [j is the target] - p_j and dH / dz_j = -p_j (log p_j + H).

    Args:
        hidden_ND, weight_VD, target_N, inv_temperature_N: as in linear_logprob.
        token_weight_N: [N] fp32, the advantage of a policy token, the coefficient of any other. 0 is exactly no trace
            loss, and without policy no loss and no gradient, whatever else is known of the token.
        policy_N: [N] bool.
        old_logprob_N: [N] fp32, or None: the ratio is 1 by definition.
        reference_logprob_N: [N] fp32, or None: no KL term.
        grad_weight_VD: [V, D] fp32, added to in place; None: the head is constant, and its product is saved.
        trace_loss: cispo, ppo or reinforce, as in ``reference.loss``.
        low, high: clip range of the ratio.
        beta, entropy_coef: factors of the KL term and of the entropy bonus.
        scale: of the whole loss.

    Returns:
        (loss [] fp32, logprob_N fp32, entropy_N fp32, grad_hidden_ND in hidden_ND's dtype).
    """
    weight_VD, grad_hidden_ND, parts = _wide(weight_VD), torch.empty_like(hidden_ND), []
    for rows, hidden, scaled in _chunks(hidden_ND, weight_VD, inv_temperature_N):
        logprobs = scaled.log_softmax(dim=1)
        target, policy = target_N[rows, None], policy_N[rows]
        logprob, entropy = logprobs.gather(1, target).squeeze(1), _entropy(logprobs)
        old, reference = (None if x is None else x[rows] for x in (old_logprob_N, reference_logprob_N))
        loss, slope = _token_loss(logprob, token_weight_N[rows], policy, old, reference, trace_loss, low, high, beta)
        loss = loss - torch.where(policy, entropy_coef * entropy, 0.0)
        entropy_slope = -entropy_coef * policy[:, None].to(scaled.dtype)
        probs = logprobs.exp()
        grad = -slope[:, None] * probs - entropy_slope * probs * (_finite(logprobs) + entropy[:, None])
        grad.scatter_add_(1, target, slope[:, None])
        if inv_temperature_N is not None:
            grad *= inv_temperature_N[rows, None]
        grad = torch.where((slope == 0)[:, None] & (entropy_slope == 0), 0.0, scale * grad)
        grad_hidden_ND[rows] = (grad @ weight_VD).to(hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD += grad.T @ hidden
        parts.append((loss, logprob, entropy))
    loss_N, logprob_N, entropy_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return scale * loss_N.sum(), logprob_N, entropy_N, grad_hidden_ND


def _token_loss(
    logprob: Tensor, weight: Tensor, policy: Tensor, old: Tensor | None, reference: Tensor | None,
    trace_loss: str, low: float, high: float, beta: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each token's loss but for the entropy, and its derivative by the log-probability."""
    log_ratio = torch.zeros_like(logprob) if old is None else logprob - old
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gone = ((weight > 0) & (ratio > high)) | ((weight < 0) & (ratio < low))
    clipped = ratio.clamp(low, high)
    if trace_loss == "cispo":
        slope = -weight * torch.where(gone, 0.0, clipped)
        loss = slope * logprob
    elif trace_loss == "ppo":
        slope = -weight * torch.where(gone, 0.0, ratio)
        loss = -weight * torch.where(gone, clipped, ratio)
    elif trace_loss == "reinforce":
        slope = -weight
        loss = slope * logprob
    else:
        raise ValueError(f"trace_loss {trace_loss!r}: expected cispo, ppo or reinforce")
    loss, slope = torch.where(policy, loss, -weight * logprob), torch.where(policy, slope, -weight)
    loss, slope = (torch.where(weight == 0, 0.0, x) for x in (loss, slope))
    if reference is not None:
        difference = reference - logprob
        loss = loss + torch.where(policy, beta * (difference.exp() - difference - 1.0), 0.0)
        slope = slope + torch.where(policy, beta * (1.0 - difference.exp()), 0.0)
    return loss, slope
