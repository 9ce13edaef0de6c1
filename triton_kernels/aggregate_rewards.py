"""From the log-probabilities of the answers to rewards, advantages and the weights of answer tokens, in one launch.

One program a prompt reads its group's log c and writes the token weights, in tiles of BLOCK_G traces and BLOCK_A
tokens: 8 C bytes, and 4 C once more, from a cache, where the weights are derived. At 256 prompts of 8 traces and 400
tokens 8 C is 6.6 MB, under 2 us at 4 TB/s, so the launch and a program's own latency are what it costs.

Sizes are read on the device, no program depends on another, and the order of every sum depends on the group's shape
alone. Arithmetic is fp32: elements of a tile are summed separately over the tiles, and as a tree at the end; spreads
are measured from the first value and in units of the largest, so that equal values spread by exactly 0, and neither a
common offset nor a square that underflows changes them. Where NaN goes in, NaN comes out: tl.minimum and tl.maximum
would drop it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_G = 8
BLOCK_A = 256
BLOCK_N = 128
NUM_WARPS = 8  # at most 128 registers: two programs fit a multiprocessor, 256 groups run in one wave
CHOICES = {
    "reward": ("logp", "prob", "am", "gm", "ws_inv", "ws_log", "r3"),
    "reward_scale": ("length", "weight"),
    "reward_clip": ("none", "zero", "unit"),
    "advantage": ("grpo", "dr_grpo", "rloo"),
    "answer_weight": ("fixed", "derived", "reward"),
}
MIN_LOG_B = tl.constexpr(-20.0)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def clamped(logb):
    return tl.where(logb > 0.0, 0.0, tl.where(logb < MIN_LOG_B, MIN_LOG_B, logb))


@triton.jit
def importance(logb, sigma, REWARD: tl.constexpr):
    """What a token counts, before any scale."""
    if REWARD == "ws_inv":
        weight = tl.exp(-logb)
    elif REWARD == "ws_log":
        weight = -logb
    elif REWARD == "r3":
        weight = sigma
    else:
        weight = tl.full(logb.shape, 1.0, tl.float32)
    return weight


@triton.jit
def token_term(logc, logb, sigma, REWARD: tl.constexpr):
    """What a token adds to its trace's sum."""
    if REWARD == "am":
        term = tl.exp(logc)
    elif REWARD == "ws_inv":
        term = tl.exp(logc - logb)
    elif REWARD == "ws_log":
        term = tl.exp(logc) * -logb
    elif REWARD == "r3":
        term = sigma * (logc - logb)
    else:
        term = logc
    return term


@triton.jit
def reward_of(total, scale, length, REWARD: tl.constexpr):
    if REWARD == "logp":
        reward = total
    elif REWARD == "prob":
        reward = tl.exp(total)
    elif REWARD == "gm":
        reward = tl.exp(total / length)
    else:
        reward = total * scale
    return reward


@triton.jit
def write_spreads(logc_ptr, sigma_ptr, G, A, BLOCK_A: tl.constexpr):
    """Unbiased standard deviation over the group of each token's log c."""
    for start in range(0, A, BLOCK_A):
        tokens = start + tl.arange(0, BLOCK_A)
        inside = tokens < A
        first = tl.load(logc_ptr + tokens, mask=inside & (G > 0), other=0.0)
        total = tl.zeros([BLOCK_A], tl.float32)
        row_ptr = logc_ptr + tokens
        for _ in range(1, G):
            row_ptr += A
            total += tl.load(row_ptr, mask=inside, other=0.0) - first
        mean = total / tl.maximum(G, 1).to(tl.float32)
        squares = mean * mean
        row_ptr = logc_ptr + tokens
        for _ in range(1, G):
            row_ptr += A
            centred = tl.load(row_ptr, mask=inside, other=0.0) - first - mean
            squares += centred * centred
        tl.store(sigma_ptr + tokens, tl.sqrt(squares / tl.maximum(G - 1, 1).to(tl.float32)), mask=inside)
    tl.debug_barrier()


@triton.jit
def write_advantages(shaped_ptr, advantage_ptr, G, std_floor, ADVANTAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Advantages of one group; returns whether it carries a signal."""
    first = tl.load(shaped_ptr, mask=G > 0, other=0.0)
    total, peak = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, G, BLOCK_N):
        traces = start + tl.arange(0, BLOCK_N)
        offset = tl.load(shaped_ptr + traces, mask=traces < G, other=first) - first
        total += offset
        peak = tl.maximum(peak, tl.abs(offset))
    num_traces = tl.maximum(G, 1).to(tl.float32)
    mean, unit = tl.sum(total, axis=0) / num_traces, tl.max(peak, axis=0)
    unit = tl.where(unit > 0.0, unit, 1.0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, G, BLOCK_N):
        traces = start + tl.arange(0, BLOCK_N)
        centred = (tl.load(shaped_ptr + traces, mask=traces < G, other=first) - first - mean) / unit
        squares += tl.where(traces < G, centred * centred, 0.0)
    spread = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(num_traces - 1.0, 1.0))
    signal = unit * spread > tl.maximum(std_floor, 0.0)
    for start in range(0, G, BLOCK_N):
        traces = start + tl.arange(0, BLOCK_N)
        advantage = tl.load(shaped_ptr + traces, mask=traces < G, other=first) - first - mean
        if ADVANTAGE == "grpo":
            advantage = advantage / unit / tl.where(signal, spread, 1.0)
        elif ADVANTAGE == "rloo":
            advantage = advantage * (num_traces / tl.maximum(num_traces - 1.0, 1.0))
        tl.store(advantage_ptr + traces, tl.where(signal, advantage, 0.0), mask=traces < G)
    return signal


@triton.jit
def write_token_weights(
    logc_ptr, logb_ptr, sigma_ptr, token_weight_ptr, traces, G, A, reward, scale, length,
    REWARD: tl.constexpr, ANSWER_WEIGHT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Answer weights of one block of traces, whose rewards, scale and length are given."""
    for start in range(0, A, BLOCK_A):
        tokens = start + tl.arange(0, BLOCK_A)
        inside = (traces < G)[:, None] & (tokens < A)[None, :]
        places = traces.to(tl.int64)[:, None] * A + tokens[None, :]
        weight = tl.full([BLOCK_G, BLOCK_A], 1.0, tl.float32)
        if ANSWER_WEIGHT == "reward" or (ANSWER_WEIGHT == "derived" and REWARD == "prob"):
            weight *= reward[:, None]
        elif ANSWER_WEIGHT == "derived" and REWARD == "gm":
            weight *= (reward / length)[:, None]
        elif ANSWER_WEIGHT == "derived" and REWARD == "r3":
            weight *= scale * tl.load(sigma_ptr + tokens, mask=tokens < A, other=0.0)[None, :]
        elif ANSWER_WEIGHT == "derived" and REWARD != "logp":
            logb = clamped(tl.load(logb_ptr + tokens, mask=tokens < A, other=0.0))[None, :]
            weight = scale * token_term(tl.load(logc_ptr + places, mask=inside, other=0.0), logb, logb, REWARD)
        tl.store(token_weight_ptr + places, weight, mask=inside)


@triton.jit
def aggregate_rewards_kernel(
    logc_ptr, logb_ptr, closed_ptr, cu_answers_ptr, cu_groups_ptr, cu_scores_ptr, sigma_ptr,
    reward_ptr, base_ptr, shaped_ptr, advantage_ptr, signal_ptr, token_weight_ptr, std_floor, format_coef,
    REWARD: tl.constexpr, SCALE: tl.constexpr, CLIP: tl.constexpr, ADVANTAGE: tl.constexpr,
    ANSWER_WEIGHT: tl.constexpr, DROP_CUT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    first_answer, first_trace = tl.load(cu_answers_ptr + p), tl.load(cu_groups_ptr + p)
    A, G = tl.load(cu_answers_ptr + p + 1) - first_answer, tl.load(cu_groups_ptr + p + 1) - first_trace
    first_score = tl.load(cu_scores_ptr + p)
    logc_ptr += first_score
    token_weight_ptr += first_score
    logb_ptr += first_answer
    sigma_ptr += first_answer
    closed_ptr += first_trace
    reward_ptr += first_trace
    shaped_ptr += first_trace
    length = tl.maximum(A, 1).to(tl.float32)
    if REWARD == "r3":
        write_spreads(logc_ptr, sigma_ptr, G, A, BLOCK_A)

    for start_g in range(0, tl.maximum(G, 1), BLOCK_G):  # once for an empty group: R_base
        traces = start_g + tl.arange(0, BLOCK_G)
        total_GA = tl.zeros([BLOCK_G, BLOCK_A], tl.float32)
        base_A, weight_A = tl.zeros([BLOCK_A], tl.float32), tl.zeros([BLOCK_A], tl.float32)
        for start in range(0, A, BLOCK_A):
            tokens = start + tl.arange(0, BLOCK_A)
            logb = tl.load(logb_ptr + tokens, mask=tokens < A, other=0.0)
            sigma = logb
            if REWARD == "r3":
                sigma = tl.load(sigma_ptr + tokens, mask=tokens < A, other=0.0)
            inside = (traces < G)[:, None] & (tokens < A)[None, :]
            places = traces.to(tl.int64)[:, None] * A + tokens[None, :]
            logc = tl.load(logc_ptr + places, mask=inside, other=0.0)
            bounded = clamped(logb)
            total_GA += tl.where(inside, token_term(logc, bounded[None, :], sigma[None, :], REWARD), 0.0)
            base_A += tl.where(tokens < A, token_term(logb, bounded, sigma, REWARD), 0.0)
            weight_A += tl.where(tokens < A, importance(bounded, sigma, REWARD), 0.0)
        scale = 1.0 / length
        if REWARD == "r3":
            scale = scale / tl.maximum(tl.sum(weight_A, axis=0), TINY)
        elif SCALE == "weight":
            scale = 1.0 / tl.maximum(tl.sum(weight_A, axis=0), TINY)
        reward = reward_of(tl.sum(total_GA, axis=1), scale, length, REWARD)
        base = reward_of(tl.sum(base_A, axis=0), scale, length, REWARD)
        if REWARD == "r3":
            base = base * 0.0  # a group of the empty trace alone has no spread
        tl.store(reward_ptr + traces, reward, mask=traces < G)
        tl.store(base_ptr + p, base)

        closed = tl.load(closed_ptr + traces, mask=traces < G, other=0) != 0
        shaped = reward
        if DROP_CUT:
            shaped = tl.where(closed, reward, base)
        if CLIP != "none":
            shaped = tl.where(shaped < base, 0.0, shaped - base)
        if CLIP == "unit":
            shaped = tl.where(shaped > 1.0, 1.0, shaped)
        shaped = (1.0 - format_coef) * shaped + format_coef * closed.to(tl.float32)
        tl.store(shaped_ptr + traces, shaped, mask=traces < G)

        write_token_weights(
            logc_ptr, logb_ptr, sigma_ptr, token_weight_ptr, traces, G, A, reward, scale, length, REWARD, ANSWER_WEIGHT,
            BLOCK_G, BLOCK_A,
        )  # fmt: skip

    tl.debug_barrier()  # the traces' rewards, written by some threads, are read by others
    signal = write_advantages(shaped_ptr, advantage_ptr + first_trace, G, std_floor, ADVANTAGE, BLOCK_N)
    tl.store(signal_ptr + p, signal)


def aggregate_rewards(
    logc_C: Tensor, logb_A: Tensor, closed_N: Tensor, cu_answers: Tensor, cu_groups: Tensor, cu_scores: Tensor,
    reward: str, reward_scale: str, reward_clip: str, advantage: str, answer_weight: str, std_floor: float,
    drop_cut_reward: bool, format_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rewards, advantages and answer weights of all groups.

    Args:
        logc_C, logb_A: [C], [A] fp32 log c of every trace's answer, log b of every prompt's.
        closed_N: [N] bool, the trace ended with the delimiter.
        cu_answers, cu_groups, cu_scores: [P + 1] int64 prefix sums of answer tokens, of traces, of their product.
        reward, reward_scale, reward_clip, advantage, answer_weight: one of CHOICES each.
        std_floor: of a group that carries a signal the standard deviation is above it.
        drop_cut_reward: what is not closed earns R of the empty trace.
        format_coef: share of ``closed`` in the shaped reward.

    Returns:
        (reward_N, base_P, shaped_N, advantage_N, signal_P, token_weight_C), fp32, signal_P bool.
    """
    lengths = [len(cu) for cu in (cu_answers, cu_groups, cu_scores)]
    if len(set(lengths)) > 1:
        raise ValueError(f"cu_answers, cu_groups and cu_scores: expected one length, got {lengths}")
    for (name, allowed), choice in zip(
        CHOICES.items(), (reward, reward_scale, reward_clip, advantage, answer_weight), strict=True
    ):
        if choice not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {choice}")
    P, N, device = lengths[0] - 1, len(closed_N), logc_C.device
    reward_N, shaped_N, advantage_N = torch.empty(3, N, device=device)
    base_P, signal_P = torch.empty(P, device=device), torch.empty(P, dtype=torch.bool, device=device)
    token_weight_C = torch.empty_like(logc_C, memory_format=torch.contiguous_format)
    inputs = [x.contiguous() for x in (logc_C, logb_A, closed_N, cu_answers, cu_groups, cu_scores)]
    if P:
        aggregate_rewards_kernel[(P,)](
            *inputs, torch.empty_like(inputs[1]) if reward == "r3" else inputs[1], reward_N, base_P, shaped_N,
            advantage_N, signal_P, token_weight_C, float(std_floor), float(format_coef), REWARD=reward,
            SCALE=reward_scale, CLIP=reward_clip, ADVANTAGE=advantage, ANSWER_WEIGHT=answer_weight,
            DROP_CUT=drop_cut_reward, BLOCK_G=BLOCK_G, BLOCK_A=BLOCK_A, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
        )  # fmt: skip
    return reward_N, base_P, shaped_N, advantage_N, signal_P, token_weight_C
