"""Rewards of groups of traces from the probabilities of their answers: sections 2 and 3 of arXiv 2602.11549."""

import torch
from torch import Tensor

MIN_LOG_B = -20.0  # keeps 1/b finite: an answer token under 2e-9 weighs no more than one of 2e-9
CHOICES = {
    "reward": ("logp", "prob", "am", "gm", "ws_inv", "ws_log", "r3"),
    "reward_scale": ("length", "weight"),
    "reward_clip": ("none", "zero", "unit"),
    "advantage": ("grpo", "dr_grpo", "rloo"),
    "answer_weight": ("fixed", "derived", "reward"),
}


def aggregate_rewards(
    logc_C: Tensor,
    logb_A: Tensor,
    closed_N: Tensor,
    cu_answers: Tensor,
    cu_groups: Tensor,
    cu_scores: Tensor,
    reward: str,
    reward_scale: str,
    reward_clip: str,
    advantage: str,
    answer_weight: str,
    std_floor: float,
    drop_cut_reward: bool,
    format_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything between the log-probabilities of the answers and the weights of the loss.

    Sums run in a fixed order. A group may be of any size, an answer too; one of no tokens has sums of 0. What is NaN in
    a log-probability is NaN in the reward.

    Args:
        logc_C: [C] fp32 log c of the answer's tokens, prompt after prompt, its traces one after another.
        logb_A: [A] fp32 log b of the answer's tokens, prompt after prompt. As the c of the empty trace it is taken as
            it is, as a weight it is clamped to [-20, 0].
        closed_N: [N] bool, the trace ended with the delimiter.
        cu_answers, cu_groups, cu_scores: [P + 1] int64 prefix sums from 0 of each prompt's answer tokens, of its
            traces, and of their product: where it lies in logb_A, in closed_N and in logc_C.
        reward: logp, prob, am, gm, ws_inv, ws_log or r3.
        reward_scale: length divides weighted rewards by the number of tokens, weight by the sum of the weights.
        reward_clip: zero is max(0, R - R_base), unit also cuts at 1, none leaves R.
        advantage: grpo, dr_grpo or rloo.
        answer_weight: fixed is 1, derived alpha_i c_i, reward R.
        std_floor: a group whose unbiased standard deviation does not exceed it carries no signal.
        drop_cut_reward: traces that are not closed earn the reward of the empty one.
        format_coef: share of the format term in the shaped reward; 0 unless format is a reward.

    Returns:
        reward_N: [N] raw R.
        base_P: [P] R of the empty trace.
        shaped_N: [N] R after baseline, clip and format term.
        advantage_N: [N], 0 in groups without signal.
        signal_P: [P] bool.
        token_weight_C: [C] weight of each answer token in the answer loss.
    """
    _check(cu_answers, cu_groups, cu_scores, reward, reward_scale, reward_clip, advantage, answer_weight)
    num_prompts = len(cu_groups) - 1
    reward_N, shaped_N, advantage_N = (torch.empty_like(closed_N, dtype=logc_C.dtype) for _ in range(3))
    base_P, signal_P = logc_C.new_empty(num_prompts), closed_N.new_empty(num_prompts)
    token_weight_C = torch.empty_like(logc_C)
    for p in range(num_prompts):
        answer, group, scores = (slice(cu[p], cu[p + 1]) for cu in (cu_answers, cu_groups, cu_scores))
        logb_p, closed_G = logb_A[answer], closed_N[group]
        logc_GA, clamped_A = logc_C[scores].view(len(closed_G), len(logb_p)), logb_p.clamp(MIN_LOG_B, 0.0)
        reward_G, derived_GA = trace_rewards(logc_GA, clamped_A, reward, reward_scale)
        base = trace_rewards(logb_p[None], clamped_A, reward, reward_scale)[0].squeeze(0)
        kept_G = torch.where(closed_G, reward_G, base) if drop_cut_reward else reward_G
        shaped_G = (1 - format_coef) * clip_reward(kept_G, base, reward_clip) + format_coef * closed_G
        weight_GA = {
            "fixed": torch.ones_like(derived_GA),
            "derived": derived_GA,
            "reward": reward_G[:, None].expand_as(derived_GA),
        }[answer_weight]
        reward_N[group], base_P[p], shaped_N[group] = reward_G, base, shaped_G
        advantage_N[group], signal_P[p] = group_advantages(shaped_G, advantage, std_floor)
        token_weight_C[scores] = weight_GA.flatten()
    return reward_N, base_P, shaped_N, advantage_N, signal_P, token_weight_C


def _check(cu_answers: Tensor, cu_groups: Tensor, cu_scores: Tensor, *choices: str) -> None:
    lengths = [len(cu) for cu in (cu_answers, cu_groups, cu_scores)]
    if len(set(lengths)) > 1:
        raise ValueError(f"cu_answers, cu_groups and cu_scores: expected one length, got {lengths}")
    for (name, allowed), choice in zip(CHOICES.items(), choices, strict=True):
        if choice not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {choice}")


def trace_rewards(logc_GA: Tensor, logb_A: Tensor, kind: str, scale: str) -> tuple[Tensor, Tensor]:
    """R of each trace [G], and the weight alpha_i c_i of each answer token in its derived gradient [G, A].

    Everything stays in log space until the last exponential, in the dtype of the arguments; logb_A is clamped.
    """
    length = max(logc_GA.shape[1], 1)
    tiny = torch.finfo(logc_GA.dtype).tiny
    if kind == "logp":
        return logc_GA.sum(dim=1), torch.ones_like(logc_GA)
    if kind in ("prob", "gm"):
        share = 1.0 if kind == "prob" else 1.0 / length
        reward_G = (logc_GA.sum(dim=1) * share).exp()
        return reward_G, (reward_G * share)[:, None].expand_as(logc_GA)
    if kind == "r3":
        # Measured from the first trace, equal ones spread by exactly 0; a rounded mean would make it a little more.
        spread_A = (logc_GA - logc_GA[:1]).std(dim=0) if logc_GA.numel() > logb_A.numel() else torch.zeros_like(logb_A)
        weight_A = spread_A / spread_A.sum().clamp(min=tiny) / length
        return ((logc_GA - logb_A) * weight_A).sum(dim=1), weight_A.expand_as(logc_GA)
    ones_A = torch.ones_like(logb_A)
    weight_A = {"am": ones_A, "ws_inv": (-logb_A).exp(), "ws_log": -logb_A}[kind]
    total = length if scale == "length" else weight_A.sum().clamp(min=tiny)
    share_A, shift_A = (ones_A, logb_A) if kind == "ws_inv" else (weight_A, 0.0)
    token_weights_GA = (logc_GA - shift_A).exp() * (share_A / total)
    return token_weights_GA.sum(dim=1), token_weights_GA


def clip_reward(reward_G: Tensor, base: Tensor, clip: str) -> Tensor:
    """zero: max(0, R - R_base); unit: R - R_base clipped to [0, 1]; none: R."""
    if clip == "none":
        return reward_G
    return (reward_G - base).clamp(min=0.0, max=1.0 if clip == "unit" else None)


def group_advantages(reward_G: Tensor, kind: str, std_floor: float) -> tuple[Tensor, bool]:
    """Advantage of each trace over its group, and whether the group carries a signal.

    grpo: (R - mean) / std, std unbiased; dr_grpo: R - mean; rloo: G / (G - 1) (R - mean). A group whose std is zero or
    under the floor carries none, and its advantages are 0.
    """
    num_traces = len(reward_G)
    # Measured from the first, equal rewards spread by exactly 0; a rounded mean would make it a little more.
    offset_G = reward_G - reward_G[:1]
    std = offset_G.std() if num_traces > 1 else torch.zeros(())
    if not std > max(std_floor, 0.0):
        return torch.zeros_like(reward_G), False
    centred_G = offset_G - offset_G.mean()
    scale = {"grpo": 1.0 / std, "dr_grpo": 1.0, "rloo": num_traces / (num_traces - 1)}[kind]
    return centred_G * scale, True
