"""``nrt-fast score``: sample traces on a data set and score its reference answers; nothing is trained."""

from __future__ import annotations

from itertools import islice
from typing import Any, get_args

from rich.console import Console

from nrt_fast.config import Objective, Reward, ScoreConfig
from nrt_fast.engine import Engine, Thoughts, noise_floor
from nrt_fast.heldout import item_fields, number, numbers, open_heldout, think_in_parts, trace_fields
from nrt_fast.json_lines import JsonLines
from nrt_fast.rewards import Rewards, reward
from nrt_fast.score_report import Scored, Summary, cost_line, summarise, tables, verdict
from nrt_fast.signals import stop_requested
from nrt_fast.types import Example

KINDS = get_args(Reward)
WEIGHTED = ("am", "ws_inv", "ws_log", "r3")  # whose answer tokens differ in weight
NOISE_PROMPTS = 8


def score_dataset(config: ScoreConfig) -> Summary:
    """Score as configured: one line of output_file for each item, and what they say altogether on the console.

    Raises:
        UserError: bad input, told in one line; what was written before is whole.
    """
    config.check()
    console = Console(highlight=False, soft_wrap=True)
    heldout = open_heldout(config, lambda line: console.print(line, markup=False))
    config, examples, tokenizer = heldout.config, heldout.examples, heldout.source.tokenizer
    with JsonLines(config.output_file) as file, stop_requested() as stop:
        engine = heldout.engine()
        noise = measure_noise(engine, list(islice(examples, NOISE_PROMPTS)))
        scored, before = Scored(), engine.counters.score_tokens
        for part, thoughts in think_in_parts(engine, examples, config):
            rewards = all_rewards(thoughts, noise, [example.where for example in part])
            for index, example in enumerate(part):
                file.write(item_row(example, index, thoughts, rewards, tokenizer, config, engine.eos_ids))
            scored.add(part, thoughts.traces, thoughts.scores, rewards)
            if stop:
                break
    summary = summarise(scored)
    if stop:
        console.print(f"stopped after {summary.num_items:,} of {len(examples):,} items")
    for table in tables(summary):
        console.print(table)
    console.print(cost_line(summary, engine.counters.score_tokens - before), markup=False)
    console.print(f"items, traces and scores are in {config.output_file}", markup=False)
    console.print(verdict(summary), markup=False, style="bold")
    return summary


def measure_noise(engine: Engine, examples: list[Example]) -> dict[str, float]:
    """Noise of each kind of reward, as a run measures that of its own."""
    prompts, answers = [e.prompt_ids for e in examples], [e.answer_ids for e in examples]
    return {kind: noise_floor(engine, prompts, answers, kind) for kind in KINDS}


def all_rewards(thoughts: Thoughts, noise: dict[str, float], names: list[str]) -> dict[str, Rewards]:
    """Every kind of reward of the same traces, with the clip that its preset has."""
    rewards = {}
    for kind in KINDS:
        clip = "none" if kind == "r3" else "zero"
        objective = Objective(kind, reward_clip=clip, answer_weight="derived")
        rewards[kind] = reward(thoughts.scores, thoughts.traces, objective, noise[kind], names)
    return rewards


def item_row(
    example: Example, index: int, thoughts: Thoughts, rewards: dict[str, Rewards], tokenizer, config: ScoreConfig,
    eos_ids: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    """An item's line: the answer's tokens with log b, and each trace with log c, its token weights and its rewards."""
    traces = trace_fields(thoughts, index, tokenizer, config, eos_ids)
    return {
        **item_fields(example, thoughts.scores.baseline_logprobs[index], tokenizer),
        "baseline_rewards": {kind: number(rewards[kind].base[index]) for kind in KINDS},
        "traces": [
            trace
            | {
                "answer_weights": {kind: numbers(rewards[kind].answer_weights[index][g]) for kind in WEIGHTED},
                "rewards": {kind: number(rewards[kind].reward[index][g]) for kind in KINDS},
            }
            for g, trace in enumerate(traces)
        ],
    }
