"""Scores to rewards, rewards to advantages (docs/method.md)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.config import Objective
from nrt_fast.types import Scores, Traces, UserError


@dataclass(frozen=True)
class Rewards:
    """What a step learns from.

    Attributes:
        reward: P tensors [G], raw R.
        base: P tensors [], R of the empty trace.
        shaped: P tensors [G], R after baseline, clip and format term; what advantages are made of.
        advantage: P tensors [G], 0 where the group has no signal.
        signal: P bools.
        answer_weights: ``[P][G]`` tensors [A_p], v_i of each answer token in the answer loss.
    """

    reward: list[Tensor]
    base: list[Tensor]
    shaped: list[Tensor]
    advantage: list[Tensor]
    signal: list[bool]
    answer_weights: list[list[Tensor]]


def reward(scores: Scores, traces: Traces, objective: Objective, noise: float, names: list[str]) -> Rewards:
    """Everything between the scores and the loss: R, baseline, clip, format term, advantage.

    Args:
        scores: log c and log b.
        traces: which traces ended with the delimiter.
        objective: the choices.
        noise: measured standard deviation of R under a change of batch shape, in R's own unit; a group whose spread is
            under three times of it carries no signal.
        names: what messages call the prompts.

    Raises:
        UserError: a log-probability is NaN, infinite or above 0; names the prompt.
        ValueError: shapes do not match.
    """
    return _aggregate(
        scores.logprobs,
        scores.baseline_logprobs,
        names,
        closed=[end is not None for group in traces.delimiter_logprobs for end in group],
        reward=objective.reward,
        reward_scale=objective.reward_scale,
        reward_clip=objective.reward_clip,
        advantage=objective.advantage,
        answer_weight=objective.answer_weight,
        std_floor=max(objective.std_floor, 3 * noise) if objective.std_floor else 0.0,
        drop_cut_reward=objective.drop_cut_reward,
        format_coef=objective.format_coef if objective.format_term == "reward" else 0.0,
    )


def aggregate(
    logprobs: list[list[Tensor]],
    baseline_logprobs: list[Tensor],
    kind: str = "ws_log",
    scale: str = "length",
    names: list[str] | None = None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Raw R of every trace, and the weight alpha_i c_i of every answer token (docs/method.md, Reward).

    Args:
        logprobs: ``[P][G]`` tensors [A_p] of log c, as ``Engine.score`` returns them.
        baseline_logprobs: P tensors [A_p] of log b; clamped from below at -20.
        kind: logp, prob, am, gm, ws_inv, ws_log or r3.
        scale: length divides weighted rewards by A_p, weight by the sum of the weights.
        names: what messages call the prompts; their positions by default.

    Returns:
        (reward, token_weights): P fp32 tensors [G], and ``[P][G]`` fp32 tensors [A_p].

    Raises:
        UserError: a log-probability is NaN, infinite or above 0; names the prompt.
        ValueError: shapes do not match, or there is no such kind or scale.
    """
    names = names or [f"prompt {index}" for index in range(len(logprobs))]
    rewards = _aggregate(logprobs, baseline_logprobs, names, reward=kind, reward_scale=scale, answer_weight="derived")
    return rewards.reward, rewards.answer_weights


def advantages(reward: list[Tensor], kind: str = "grpo", std_floor: float = 0.0) -> tuple[list[Tensor], list[bool]]:
    """Group-relative advantages.

    Args:
        reward: P fp32 tensors [G], already clipped.
        kind: grpo, dr_grpo or rloo.
        std_floor: groups whose unbiased std does not exceed it get advantage 0 and count as no signal.

    Returns:
        (P tensors [G], P bools: whether the group carries a signal).
    """
    # R is the log-probability itself where the answer is one token.
    flat_N = _joined(reward)
    rewards = _groups(flat_N, flat_N.new_zeros(len(reward)), [1] * len(reward), [len(reward_G) for reward_G in reward],
                      reward="logp", advantage=kind, std_floor=std_floor)  # fmt: skip
    return rewards.advantage, rewards.signal


def _aggregate(logprobs: list[list[Tensor]], baseline_logprobs: list[Tensor], names: list[str], **choices) -> Rewards:
    """Check the scores, and aggregate them as ``choices`` tell."""
    for name, group, log_b in zip(names, logprobs, baseline_logprobs, strict=True):
        if any(row.shape != log_b.shape for row in group):
            raise ValueError(f"{name}: every trace and the baseline need the answer's {list(log_b.shape)} tokens")
    logb_A, logc_C = _joined(baseline_logprobs), _joined([row for group in logprobs for row in group])
    # A rounding error above 0 is no error of the caller.
    if not all(bool(((x <= 1e-4) & x.isfinite()).all()) for x in (logb_A, logc_C)):
        _refuse(logprobs, baseline_logprobs, names)
    num_tokens, num_traces = [len(log_b) for log_b in baseline_logprobs], [len(group) for group in logprobs]
    return _groups(logc_C.clamp(max=0.0), logb_A.clamp(max=0.0), num_tokens, num_traces, **choices)


def _refuse(logprobs: list[list[Tensor]], baseline_logprobs: list[Tensor], names: list[str]) -> None:
    for name, group, log_b in zip(names, logprobs, baseline_logprobs, strict=True):
        both = torch.cat([log_b, *group])
        if not ((both <= 1e-4) & both.isfinite()).all():
            raise UserError(f"{name}: a log-probability of its answer is NaN, infinite or above 0")


def _groups(
    logc_C: Tensor, logb_A: Tensor, num_tokens: list[int], num_traces: list[int], *, reward: str,
    closed: list[bool] | None = None, reward_scale: str = "length", reward_clip: str = "none",
    advantage: str = "grpo", answer_weight: str = "fixed", std_floor: float = 0.0, drop_cut_reward: bool = False,
    format_coef: float = 0.0,
) -> Rewards:  # fmt: skip
    """``ops.aggregate_rewards`` on groups of ``num_traces`` traces and ``num_tokens`` answer tokens."""
    num_scores = [tokens * traces for tokens, traces in zip(num_tokens, num_traces, strict=True)]
    device = logc_C.device
    offsets = [torch.tensor([0, *accumulate(sizes)], device=device) for sizes in (num_tokens, num_traces, num_scores)]
    closed_N = torch.tensor([False] * sum(num_traces) if closed is None else closed, dtype=torch.bool, device=device)
    reward_N, base_P, shaped_N, advantage_N, signal_P, token_weight_C = ops.aggregate_rewards(
        logc_C, logb_A, closed_N, *offsets, reward, reward_scale, reward_clip, advantage, answer_weight, std_floor,
        drop_cut_reward, format_coef,
    )  # fmt: skip
    weights = zip(token_weight_C.split(num_scores), num_traces, num_tokens, strict=True)
    return Rewards(
        reward=list(reward_N.split(num_traces)),
        base=list(base_P),
        shaped=list(shaped_N.split(num_traces)),
        advantage=list(advantage_N.split(num_traces)),
        signal=signal_P.tolist(),
        answer_weights=[list(weight.view(traces, tokens)) for weight, traces, tokens in weights],
    )


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat([row.float() for row in rows]) if rows else torch.empty(0)
