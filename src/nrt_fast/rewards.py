"""Scores to rewards, rewards to advantages (method sections 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast import ops
from nrt_fast.config import Objective
from nrt_fast.types import Scores, Traces, UserError

MIN_LOG_B = -20.0  # keeps 1/b finite: an answer token under 2e-9 weighs no more than one of 2e-9


@dataclass(frozen=True)
class Rewards:
    """What a step learns from.

    Attributes:
        reward: P tensors [G], raw R.
        base: P tensors [], R of the empty trace.
        shaped: P tensors [G], R after baseline, clip and format term; what advantages are made of.
        advantage: P tensors [G], 0 where the group has no signal.
        signal: P bools.
        answer_weights: [P][G] tensors [A_p], v_i of each answer token in the answer loss (method section 4).
    """

    reward: list[Tensor]
    base: list[Tensor]
    shaped: list[Tensor]
    advantage: list[Tensor]
    signal: list[bool]
    answer_weights: list[list[Tensor]]


def aggregate(
    logprobs: list[list[Tensor]],
    baseline_logprobs: list[Tensor],
    kind: str = "ws_log",
    scale: str = "length",
    names: list[str] | None = None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Raw R of every trace, and the weight alpha_i c_i of every answer token (method section 2).

    Args:
        logprobs: [P][G] tensors [A_p] of log c, as ``Engine.score`` returns them.
        baseline_logprobs: P tensors [A_p] of log b; clamped from below at -20.
        kind: logp, prob, am, gm, ws_inv, ws_log or r3.
        scale: length divides weighted rewards by A_p, weight by the sum of the weights.
        names: what messages call the prompts; their positions by default.

    Returns:
        (reward, token_weights): P fp32 tensors [G], and [P][G] fp32 tensors [A_p].

    Raises:
        UserError: a log-probability is NaN, infinite or above 0; names the prompt.
        ValueError: shapes do not match.
    """
    rewards, weights = [], []
    names = names or [f"prompt {index}" for index in range(len(logprobs))]
    for name, group, log_b in zip(names, logprobs, baseline_logprobs, strict=True):
        logc_GA, logb_A = _checked(name, group, log_b)
        reward_G, weights_GA = ops.trace_rewards(logc_GA, logb_A.clamp(min=MIN_LOG_B), kind, scale)
        rewards.append(reward_G)
        weights.append(list(weights_GA))
    return rewards, weights


def _checked(name: str, group: list[Tensor], log_b: Tensor) -> tuple[Tensor, Tensor]:
    if any(row.shape != log_b.shape for row in group):
        raise ValueError(f"{name}: every trace and the baseline need the answer's {list(log_b.shape)} tokens")
    logb_A = log_b.float()
    logc_GA = torch.stack([row.float() for row in group]) if group else logb_A.new_zeros(0, len(logb_A))
    both = torch.cat([logc_GA, logb_A[None]])
    # A rounding error above 0 is no error of the caller.
    if not torch.isfinite(both).all() or (both > 1e-4).any():
        raise UserError(f"{name}: a log-probability of its answer is NaN, infinite or above 0")
    return logc_GA.clamp(max=0.0), logb_A.clamp(max=0.0)


def reward(scores: Scores, traces: Traces, objective: Objective, noise: float, names: list[str]) -> Rewards:
    """Everything between the scores and the loss: R, baseline, clip, format term, advantage.

    Args:
        scores: log c and log b.
        traces: which traces ended with the delimiter.
        objective: the choices.
        noise: measured standard deviation of R under a change of batch shape, in R's own unit; a group whose spread is
            under three times of it carries no signal.
        names: what messages call the prompts.
    """
    raw, token_weights = aggregate(
        scores.logprobs, scores.baseline_logprobs, objective.reward, objective.reward_scale, names
    )
    base = base_rewards(scores.baseline_logprobs, objective)
    shaped = [
        _shape(reward_G, base_p, ends, objective)
        for reward_G, base_p, ends in zip(raw, base, traces.delimiter_logprobs, strict=True)
    ]
    floor = max(objective.std_floor, 3 * noise) if objective.std_floor else 0.0
    advantage, signal = advantages(shaped, objective.advantage, floor)
    return Rewards(raw, base, shaped, advantage, signal, _answer_weights(raw, token_weights, objective))


def _answer_weights(raw: list[Tensor], token_weights: list[list[Tensor]], objective: Objective) -> list[list[Tensor]]:
    choose = {
        "fixed": lambda weight_A, _: torch.ones_like(weight_A),
        "derived": lambda weight_A, _: weight_A,
        "reward": lambda weight_A, value: value.expand_as(weight_A),
    }[objective.answer_weight]
    return [
        [choose(weight_A, value) for weight_A, value in zip(group, reward_G, strict=True)]
        for group, reward_G in zip(token_weights, raw, strict=True)
    ]


def base_rewards(baseline_logprobs: list[Tensor], objective: Objective) -> list[Tensor]:
    """R of the empty trace: the same formula with c := b."""
    empty = [[log_b] for log_b in baseline_logprobs]
    rewards, _ = aggregate(empty, baseline_logprobs, objective.reward, objective.reward_scale)
    return [reward_1.squeeze(0) for reward_1 in rewards]


def _shape(reward_G: Tensor, base: Tensor, ends: list[float | None], objective: Objective) -> Tensor:
    closed_G = torch.tensor([end is not None for end in ends], dtype=torch.bool)
    if objective.drop_cut_reward:
        reward_G = torch.where(closed_G, reward_G, base)
    shaped_G = ops.clip_reward(reward_G, base, objective.reward_clip)
    if objective.format_term == "reward":
        shaped_G = (1 - objective.format_coef) * shaped_G + objective.format_coef * closed_G.float()
    return shaped_G


def advantages(reward: list[Tensor], kind: str = "grpo", std_floor: float = 0.0) -> tuple[list[Tensor], list[bool]]:
    """Group-relative advantages (method section 3).

    Args:
        reward: P fp32 tensors [G], already clipped.
        kind: grpo, dr_grpo or rloo.
        std_floor: groups whose unbiased std does not exceed it get advantage 0 and count as no signal.

    Returns:
        (P tensors [G], P bools: whether the group carries a signal).
    """
    pairs = [ops.group_advantages(reward_G, kind, std_floor) for reward_G in reward]
    return [advantage_G for advantage_G, _ in pairs], [signal for _, signal in pairs]
