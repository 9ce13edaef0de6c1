"""``nrt-fast score``: sample traces on a data set and score its reference answers; nothing is trained."""

from __future__ import annotations

from itertools import islice
from typing import Any, get_args

from rich.console import Console
from torch import Tensor

from nrt_fast.config import STD_FLOOR, Objective, Reward, ScoreConfig
from nrt_fast.data import Limits, load_heldout
from nrt_fast.engine import Engine, Thoughts, noise_floor
from nrt_fast.json_lines import JsonLines, how_ended
from nrt_fast.resolve import resolve_lengths
from nrt_fast.rewards import Rewards, aggregate, reward
from nrt_fast.score_report import Scored, Summary, cost_line, summarise, tables, verdict
from nrt_fast.signals import stop_requested
from nrt_fast.source import choose_scale, open_source
from nrt_fast.types import Example, Scores

KINDS = get_args(Reward)
WEIGHTED = ("am", "ws_inv", "ws_log", "r3")  # whose answer tokens differ in weight
TRACES_AT_A_TIME = 256
NOISE_PROMPTS = 8


def score_dataset(config: ScoreConfig) -> Summary:
    """Score as configured: one line of output_file for each item, and what they say altogether on the console.

    Raises:
        UserError: bad input, told in one line; what was written before is whole.
    """
    config.check()
    console = Console(highlight=False, soft_wrap=True)
    source = open_source(config)
    scale = choose_scale(config, source.device)
    config = resolve_lengths(config, scale, source.shape.max_position_embeddings)
    limits = Limits(
        config.max_prompt_length, config.max_answer_length, config.overlong_prompts, config.overlong_answers
    )
    examples, lines = load_heldout(config, source.tokenizer, limits, config.num_prompts or scale.heldout)
    plan = source.plan(config)
    for line in (*lines, str(plan)):
        console.print(line, markup=False)
    with JsonLines(config.output_file) as file, stop_requested() as stop:
        engine = source.engine(config, plan.cache_bytes)
        noise = measure_noise(engine, list(islice(examples, NOISE_PROMPTS)))
        scored, before = Scored(), engine.counters.score_tokens
        for part in _parts(examples, max(1, TRACES_AT_A_TIME // config.num_generations)):
            thoughts = _think(engine, part, config)
            rewards = all_rewards(thoughts, noise, [example.where for example in part])
            for index, example in enumerate(part):
                file.write(item_row(example, index, thoughts, rewards, source.tokenizer, config, engine.eos_ids))
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


def _parts(examples, size: int):
    rest = iter(examples)
    return iter(lambda: list(islice(rest, size)), [])


def _think(engine: Engine, examples: list[Example], config: ScoreConfig) -> Thoughts:
    return engine.think(
        [example.prompt_ids for example in examples],
        [example.answer_ids for example in examples],
        [example.uid for example in examples],
        num_generations=config.num_generations,
        max_trace_length=config.max_trace_length,
        temperature=config.temperature,
        seed=config.seed,
        step=0,
    )


def measure_noise(engine: Engine, examples: list[Example]) -> dict[str, float]:
    """Noise of each kind of reward, as a run measures that of its own."""
    prompts, answers = [e.prompt_ids for e in examples], [e.answer_ids for e in examples]

    def own(kind: str):
        def rewards(scores: Scores) -> list[Tensor]:
            return aggregate(scores.logprobs, scores.baseline_logprobs, kind)[0]

        return rewards

    return {kind: noise_floor(engine, prompts, answers, own(kind)) for kind in KINDS}


def all_rewards(thoughts: Thoughts, noise: dict[str, float], names: list[str]) -> dict[str, Rewards]:
    """Every kind of reward of the same traces, with the clip that its preset has."""
    rewards = {}
    for kind in KINDS:
        clip = "none" if kind == "r3" else "zero"
        objective = Objective(kind, reward_clip=clip, answer_weight="derived", std_floor=STD_FLOOR[kind])
        rewards[kind] = reward(thoughts.scores, thoughts.traces, objective, noise[kind], names)
    return rewards


def item_row(
    example: Example, index: int, thoughts: Thoughts, rewards: dict[str, Rewards], tokenizer, config: ScoreConfig,
    eos_ids: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    """An item's line: the answer's tokens with log b, and each trace with log c, its token weights and its rewards."""
    traces, scores = thoughts.traces, thoughts.scores
    return {
        "uid": example.uid,
        "where": example.where,
        "question": example.question,
        "answer": example.answer,
        "prompt_ids": example.prompt_ids,
        "answer_ids": example.answer_ids,
        "answer_tokens": [tokenizer.decode([token]) for token in example.answer_ids],
        "hard_positions": example.hard_positions,
        "baseline_logprobs": _numbers(scores.baseline_logprobs[index]),
        "baseline_rewards": {kind: _number(rewards[kind].base[index]) for kind in KINDS},
        "traces": [
            {
                "trace_ids": ids,
                "trace": tokenizer.decode(ids),
                "ended": how_ended(ids, end, eos_ids, config.max_trace_length),
                "logprobs": [_number(logprob) for logprob in logprobs],
                "delimiter_logprob": None if end is None else _number(end),
                "answer_logprobs": _numbers(scores.logprobs[index][number]),
                "answer_weights": {
                    kind: _numbers(rewards[kind].answer_weights[index][number]) for kind in WEIGHTED
                },
                "rewards": {kind: _number(rewards[kind].reward[index][number]) for kind in KINDS},
            }
            for number, (ids, logprobs, end) in enumerate(zip(
                traces.trace_ids[index], traces.logprobs[index], traces.delimiter_logprobs[index], strict=True
            ))
        ],
    }  # fmt: skip


def _numbers(values: Tensor) -> list[float]:
    return [_number(value) for value in values.tolist()]


def _number(value: float | Tensor) -> float:
    """Seven digits, as fp32 has; 0 without a sign."""
    return float(f"{float(value):.7g}") + 0.0
