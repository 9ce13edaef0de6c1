"""What scores say about a data set: whether thinking helps, how surely, and whether there is something to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.table import Table

from nrt_fast.evaluate import Estimate, clustered_mean, hard_positions
from nrt_fast.metrics import mean
from nrt_fast.rewards import Rewards
from nrt_fast.types import Example, Scores, Traces

MIN_ITEMS = 10  # fewer say nothing
DEFAULT_REWARD = "ws_log"


class ScoringCost(NamedTuple):
    """Tokens through the model to score the answers of one item.

    Attributes:
        forwarded_again: prompt, trace and answer for every trace, and the baseline as often.
        prompt_shared: the prompt once, then every trace with its answer, and the baseline.
        from_cache: the answers alone, on the cache of prompt and traces.
    """

    forwarded_again: int
    prompt_shared: int
    from_cache: int


def scoring_cost(num_prompt: int, trace_lengths: list[int], num_answer: int) -> ScoringCost:
    """What scoring one item takes in three ways."""
    G, num_trace = len(trace_lengths), sum(trace_lengths)
    return ScoringCost(
        2 * G * (num_prompt + num_answer) + num_trace,
        num_prompt + num_trace + (G + 1) * num_answer,
        (G + 1) * num_answer,
    )


@dataclass
class Scored:
    """Items with their traces, scores and rewards, as they come.

    Attributes:
        rewards: by kind.
    """

    examples: list[Example] = field(default_factory=list)
    traces: Traces = field(default_factory=lambda: Traces([], [], []))
    scores: Scores = field(default_factory=lambda: Scores([], []))
    rewards: dict[str, list[Rewards]] = field(default_factory=dict)

    def add(self, examples: list[Example], traces: Traces, scores: Scores, rewards: dict[str, Rewards]) -> None:
        """Take in the next items."""
        self.examples += examples
        for mine, new in ((self.traces, traces), (self.scores, scores)):
            for name, values in vars(new).items():
                getattr(mine, name).extend(values)
        for kind, new in rewards.items():
            self.rewards.setdefault(kind, []).append(new)


@dataclass(frozen=True)
class RewardFigures:
    """One kind of reward over all groups.

    Attributes:
        mean: R of the traces.
        base: R of the empty trace.
        std: unbiased, within a group, averaged over groups; NaN with one trace a group.
        signal: share of groups whose clipped reward varies by more than the floor and the noise.
    """

    mean: float
    base: float
    std: float
    signal: float


@dataclass(frozen=True)
class Summary:
    """Scores in figures.

    Attributes:
        num_items, num_traces: scored.
        gain: nats per answer token, log c - log b.
        hard_gain: the same over hard tokens: those the data declares, else the top tenth by -log b.
        helped: share of traces that raise the likelihood of their answer.
        trace_length: tokens, without the delimiter.
        delimiter_rate: share of traces that end with it.
        rewards: by kind.
        cost: tokens through the model to score all answers.
    """

    num_items: int
    num_traces: int
    gain: Estimate
    hard_gain: Estimate
    helped: float
    trace_length: float
    delimiter_rate: float
    rewards: dict[str, RewardFigures]
    cost: ScoringCost


def summarise(scored: Scored) -> Summary:
    """The figures of at least one item."""
    gains = [
        torch.stack(group) - log_b
        for group, log_b in zip(scored.scores.logprobs, scored.scores.baseline_logprobs, strict=True)
    ]
    hard = hard_positions(scored.examples, scored.scores.baseline_logprobs)
    trace_ids, ends = scored.traces.trace_ids, scored.traces.delimiter_logprobs
    costs = [
        scoring_cost(len(example.prompt_ids), list(map(len, group)), len(example.answer_ids))
        for example, group in zip(scored.examples, trace_ids, strict=True)
    ]
    return Summary(
        num_items=len(gains),
        num_traces=sum(map(len, gains)),
        gain=clustered_mean(gains),
        hard_gain=clustered_mean([gain_GA[:, hard_A] for gain_GA, hard_A in zip(gains, hard, strict=True)]),
        helped=float(torch.cat([gain_GA.sum(dim=1) > 0 for gain_GA in gains]).float().mean()),
        trace_length=mean([float(len(ids)) for group in trace_ids for ids in group]),
        delimiter_rate=mean([end is not None for group in ends for end in group]),
        rewards={kind: _reward_figures(parts) for kind, parts in scored.rewards.items()},
        cost=ScoringCost(*map(sum, zip(*costs, strict=True))),
    )


def _reward_figures(parts: list[Rewards]) -> RewardFigures:
    groups = [reward_G for part in parts for reward_G in part.reward]
    stds = [float(reward_G.std()) for reward_G in groups if len(reward_G) > 1]
    return RewardFigures(
        mean=float(torch.cat(groups).mean()),
        base=mean([float(base) for part in parts for base in part.base]),
        std=mean(stds) if stds else math.nan,
        signal=mean([signal for part in parts for signal in part.signal]),
    )


def tables(summary: Summary) -> list[Table]:
    """The figures for people."""
    title = f"{summary.num_items:,} items, {summary.num_traces:,} traces (± standard error over items)"
    figures = Table(title=title, title_justify="left", show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in (
        ("gain of thinking, nats a token", _with_error(summary.gain)),
        ("the same on hard tokens", _with_error(summary.hard_gain)),
        ("traces that help", f"{summary.helped:.1%}"),
        ("trace length, tokens", f"{summary.trace_length:.1f}"),
        ("traces closed by the delimiter", f"{summary.delimiter_rate:.1%}"),
    ):
        figures.add_row(name, value)
    rewards = Table(title="Every reward on the same traces", title_justify="left")
    for heading in ("reward", "mean", "without a trace", "std within a group", "groups with signal"):
        rewards.add_column(heading, justify="right" if heading != "reward" else "left")
    for kind, row in summary.rewards.items():
        rewards.add_row(kind, *(f"{x:.4g}" for x in (row.mean, row.base, row.std)), f"{row.signal:.1%}")
    return [figures, rewards]


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}"


def verdict(summary: Summary) -> str:
    """Whether thinking helps on these items, in words; twice the standard error is the margin."""
    gain, margin = summary.gain.mean, 2 * summary.gain.error
    size = f"{gain:+.3f} ± {margin:.3f} nats a token (95%)"
    if summary.num_items < MIN_ITEMS:
        return f"{summary.num_items} items are too few to tell whether thinking helps; score at least {MIN_ITEMS}."
    if abs(gain) <= margin:
        told = f"These items do not tell whether thinking helps: the answers' log-probabilities change by {size}."
    else:
        told = (
            f"On these items thinking {'helps' if gain > 0 else 'hurts'}: the reference answers' log-probabilities "
            f"change by {size}, and {summary.helped:.0%} of the traces raise them."
        )
    if summary.num_traces == summary.num_items:
        return told
    signal = summary.rewards[DEFAULT_REWARD].signal
    return f"{told} For training with {DEFAULT_REWARD}, {signal:.0%} of the groups carry a signal."


def cost_line(summary: Summary, num_forwarded: int) -> str:
    """What scoring took, against what it takes without the cache."""
    again, shared, _ = summary.cost
    times, times_shared = (num_tokens / max(1, num_forwarded) for num_tokens in (again, shared))
    return (
        f"scoring took {num_forwarded:,} tokens through the model, on the cache of the traces; forwarding prompts, "
        f"traces and answers again takes {again:,} ({times:.1f} times as many), with each prompt once {shared:,} "
        f"({times_shared:.1f} times)"
    )
