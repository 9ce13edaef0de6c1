"""One step in numbers: TRL's metric names where the meaning is TRL's, ``nrt/*`` for what only this method has."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from nrt_fast import distributed
from nrt_fast.config import Objective
from nrt_fast.evaluate import hard_positions
from nrt_fast.metrics import mean
from nrt_fast.rewards import Rewards
from nrt_fast.train_step import TrainStats
from nrt_fast.types import ANSWER, TRACE, Example, LossTokens, Scores, Traces

OVERLAP_NGRAM, REPETITION_NGRAM = 3, 4
LONG_ANSWER = 8  # tokens without EOS; a trace that reasons may well say a shorter one


def rollout_metrics(
    examples: list[Example], traces: Traces, scores: Scores, rewards: Rewards, objective: Objective
) -> dict[str, float]:
    """What was sampled and what it earned; ``scores`` are all of one set of weights, whatever the reward's baseline."""
    lengths = torch.tensor([float(len(ids)) for group in traces.trace_ids for ids in group])
    ends = [end is not None for group in traces.delimiter_logprobs for end in group]
    gains = [
        row - log_b for group, log_b in zip(scores.logprobs, scores.baseline_logprobs, strict=True) for row in group
    ]
    raw = torch.cat(rewards.reward)
    stds = torch.stack([r.std() if len(r) > 1 else torch.zeros(()) for r in rewards.shaped])
    pairs = [(ids, e.answer_ids) for e, group in zip(examples, traces.trace_ids, strict=True) for ids in group]
    return {
        "reward": float(raw.mean()),
        "reward_std": float(stds.mean()),
        "frac_reward_zero_std": float((stds == 0).float().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1.0 - mean(ends),
        "nrt/gain": float(torch.cat(gains).mean()),
        "nrt/hard_token_gain": _hard_gain(examples, gains, scores.baseline_logprobs),
        "nrt/answer_logp": float(torch.cat([row for group in scores.logprobs for row in group]).mean()),
        "nrt/logp_no_trace": float(torch.cat(scores.baseline_logprobs).mean()),
        "nrt/frac_no_signal": 1.0 - mean(rewards.signal),
        "nrt/frac_clipped": _frac_clipped(rewards, ends, objective),
        "nrt/delimiter_rate": mean(ends),
        "nrt/repetition": mean(distributed.each(lambda pair: repetition(pair[0]), pairs)),
        "nrt/answer_copied": mean(distributed.each(lambda pair: _copied(*pair), pairs)),
        "nrt/answer_overlap": mean(distributed.each(lambda pair: overlap(*pair), pairs)),
    }


def engine_metrics(counts: dict[str, int]) -> dict[str, float]:
    """What the engine did for one rollout, from the difference of its counters."""
    return {
        "nrt/rows_per_decode_step": counts["decode_tokens"] / max(counts["decode_steps"], 1),
        "nrt/paused": counts["num_paused"],
        "nrt/recomputed_tokens": counts["recomputed_tokens"],
        "nrt/score_tokens": counts["score_tokens"],
    }


def train_metrics(tokens: LossTokens, stats: TrainStats, objective: Objective, on_policy: bool) -> dict[str, float]:
    """What the optimiser step saw; sampler and scorer against trainer among it."""
    packed_A = ~torch.isnan(stats.logprobs_A)
    difference_A = stats.logprobs_A - tokens.old_logprobs_A
    trace_A, answer_A = ((tokens.kind_A == kind) & packed_A for kind in (TRACE, ANSWER))
    metrics = {
        "loss": stats.loss["total"],
        **{f"loss/{name}": value for name, value in stats.loss.items() if name != "total"},
        "grad_norm": stats.grad_norm,
    }
    if objective.answer_coef:  # else no answer runs through the trainer
        metrics |= {
            "nrt/grad_answer": _logit_gradient(tokens, stats, answer_A),
            "nrt/score_audit_mean": _tensor_mean(difference_A[answer_A].abs()),
            "nrt/score_audit_max": _tensor_max(difference_A[answer_A].abs()),
        }
    if objective.trace_loss == "none":
        return metrics
    # Groups without signal do not run through the trainer's head; the sampler knows their entropy.
    sampled_A = tokens.kind_A == TRACE
    metrics |= {
        "entropy": _tensor_mean(stats.entropy_A[trace_A] if trace_A.any() else -tokens.old_logprobs_A[sampled_A]),
        "nrt/grad_trace": _logit_gradient(tokens, stats, trace_A),
        "nrt/dlogp_mean": _tensor_mean(difference_A[trace_A].abs()),
        "nrt/dlogp_max": _tensor_max(difference_A[trace_A].abs()),
    }
    if objective.beta:
        metrics["kl"] = stats.loss["kl"] / objective.beta * tokens.normalizer / max(int(trace_A.sum()), 1)
    if objective.trace_loss in ("cispo", "ppo"):
        ratio_A = (difference_A * (not on_policy))[trace_A].exp()
        metrics |= _clip_ratios(ratio_A, tokens.weight_A[trace_A], objective)
    return metrics


def _clip_ratios(ratio_A: Tensor, advantage_A: Tensor, objective: Objective) -> dict[str, float]:
    """Share of trace tokens whose ratio left the range on the side that the advantage pushes to."""
    low = _tensor_mean(((ratio_A < 1 - objective.epsilon) & (advantage_A < 0)).float())
    high = _tensor_mean(((ratio_A > 1 + objective.epsilon_high) & (advantage_A > 0)).float())
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/low_min": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/high_max": high,
        "clip_ratio/region_mean": low + high,
    }


def over_minibatches(rows: list[dict[str, float]]) -> dict[str, float]:
    """One row for several optimiser steps on one rollout: extremes of names that say so, means of the others.

    Sampler and trainer have the same weights at the first of them only, so that one alone tells how far they differ.
    """
    extreme = {"max": max, "min": min}
    merged = {name: extreme.get(name.rsplit("_", 1)[-1], fmean)([row[name] for row in rows]) for name in rows[0]}
    return merged | {name: rows[0][name] for name in rows[0] if name.startswith(("nrt/dlogp", "nrt/score_audit"))}


def count_tokens(examples: list[Example], traces: Traces, num_generations: int) -> dict[str, int]:
    """Tokens through the model by phase: sampled; scored, the empty trace included; trained, the prompt once."""
    trace_ids = [ids for group in traces.trace_ids for ids in group]
    num_delimiters = sum(end is not None for group in traces.delimiter_logprobs for end in group)
    num_trace_tokens = sum(map(len, trace_ids))
    num_answer_tokens = sum(len(example.answer_ids) for example in examples)
    num_prompt_tokens = sum(len(example.prompt_ids) for example in examples)
    return {
        "rollout": num_trace_tokens + num_delimiters,
        "score": (num_generations + 1) * num_answer_tokens,
        "train": num_prompt_tokens + num_trace_tokens + len(trace_ids) // len(examples) * num_answer_tokens,
    }


def overlap(trace_ids: list[int], answer_ids: list[int], n: int = OVERLAP_NGRAM) -> float:
    """Share of the answer's n-grams that the trace holds: how much of it was copied, or said before."""
    answer_ids = answer_ids[:-1]  # EOS
    n = min(n, len(answer_ids))
    said = {tuple(trace_ids[i : i + n]) for i in range(len(trace_ids) - n + 1)}
    grams = [tuple(answer_ids[i : i + n]) for i in range(len(answer_ids) - n + 1)]
    return mean([gram in said for gram in grams]) if n else 0.0


def _copied(trace_ids: list[int], answer_ids: list[int]) -> float:
    """1 where the trace holds all of a long answer."""
    return overlap(trace_ids, answer_ids, len(answer_ids) - 1) if len(answer_ids) > LONG_ANSWER else 0.0


def repetition(trace_ids: list[int], n: int = REPETITION_NGRAM) -> float:
    """Share of the trace's n-grams that stood in it before; 0 where there are fewer than two."""
    grams = [tuple(trace_ids[i : i + n]) for i in range(len(trace_ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _logit_gradient(tokens: LossTokens, stats: TrainStats, kind_A: Tensor) -> float:
    """Norm of a term's gradient with respect to the chosen tokens' own logits, w (1 - p) each.

    Stands for the term's gradient norm, which would take a backward pass of its own.
    """
    return float((tokens.weight_A * -torch.expm1(stats.logprobs_A))[kind_A].norm()) / tokens.normalizer


def _frac_clipped(rewards: Rewards, ends: list[bool], objective: Objective) -> float:
    """Share of traces that earn no more than the empty one; the shaped reward may hold a format term beside it."""
    if objective.reward_clip == "none":
        return 0.0
    clipped_N = torch.cat([reward_G <= base for reward_G, base in zip(rewards.reward, rewards.base, strict=True)])
    if objective.drop_cut_reward:
        clipped_N |= ~torch.tensor(ends, device=clipped_N.device)
    return float(clipped_N.float().mean())


def _hard_gain(examples: list[Example], gains: list[Tensor], baseline_logprobs: list[Tensor]) -> float:
    num_traces = len(gains) // len(examples)
    hard = hard_positions(examples, baseline_logprobs)
    return _tensor_mean(torch.cat([row[hard[index // num_traces]] for index, row in enumerate(gains)]))


def _tensor_mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def _tensor_max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
