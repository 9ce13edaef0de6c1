"""Rewards of a group of traces from the probabilities of its answer: sections 2 and 3 of arXiv 2602.11549."""

import torch
from torch import Tensor


def trace_rewards(logc_GA: Tensor, logb_A: Tensor, kind: str, scale: str) -> tuple[Tensor, Tensor]:
    """R of each trace, and the weight alpha_i c_i of each answer token in its derived gradient.

    Everything stays in log space until the last exponential, in the dtype of the arguments.

    Args:
        logc_GA: [G, A] log-probabilities of the answer after each trace.
        logb_A: [A] the same after an empty trace, clamped from below by the caller.
        kind: logp, prob, am, gm, ws_inv, ws_log or r3.
        scale: length divides weighted rewards by A, weight by the sum of the weights.

    Returns:
        (reward_G, token_weights_GA).
    """
    num_tokens = logc_GA.shape[1]
    if kind == "logp":
        return logc_GA.sum(dim=1), torch.ones_like(logc_GA)
    if kind in ("prob", "gm"):
        share = 1.0 if kind == "prob" else 1.0 / num_tokens
        reward_G = (logc_GA.sum(dim=1) * share).exp()
        return reward_G, (reward_G * share)[:, None].expand_as(logc_GA)
    if kind == "r3":
        spread_A = (logc_GA - logc_GA[:1]).std(dim=0) if len(logc_GA) > 1 else torch.zeros_like(logb_A)
        weight_A = spread_A / spread_A.sum().clamp(min=torch.finfo(spread_A.dtype).tiny) / num_tokens
        return ((logc_GA - logb_A) * weight_A).sum(dim=1), weight_A.expand_as(logc_GA)
    weight_A = {"am": torch.ones_like, "ws_inv": lambda b: (-b).exp(), "ws_log": torch.neg}[kind](logb_A)
    total = num_tokens if scale == "length" else weight_A.sum().clamp(min=torch.finfo(weight_A.dtype).tiny)
    token_weights_GA = logc_GA.exp() * (weight_A / total)
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
