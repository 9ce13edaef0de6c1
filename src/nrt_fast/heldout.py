"""What score and eval share: a model and the items held out for it, thought about some at a time; an item as a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from nrt_fast.config import HeldoutFields
from nrt_fast.data import Examples, Limits, load_heldout
from nrt_fast.engine import Engine, Thoughts
from nrt_fast.json_lines import how_ended
from nrt_fast.plan import MemoryPlan
from nrt_fast.resolve import resolve_lengths
from nrt_fast.source import Source, choose_scale, open_source
from nrt_fast.types import Example

TRACES_AT_A_TIME = 256


@dataclass(frozen=True)
class HeldoutItems:
    """A model whose weights are not read yet, and the items to measure it on.

    Attributes:
        config: with resolved lengths.
    """

    config: HeldoutFields
    source: Source
    examples: Examples
    plan: MemoryPlan

    def engine(self) -> Engine:
        """Read the weights."""
        return self.source.engine(self.config, self.plan.cache_bytes)


def open_heldout(config: HeldoutFields, say: Callable[[str], None]) -> HeldoutItems:
    """Read and check everything but the weights; says what the data held and what memory it takes.

    Raises:
        UserError: bad input, told in one line.
    """
    source = open_source(config)
    scale = choose_scale(config, source.device)
    config = resolve_lengths(config, scale, source.shape.max_position_embeddings)
    limits = Limits(
        config.max_prompt_length, config.max_answer_length, config.overlong_prompts, config.overlong_answers
    )
    examples, lines = load_heldout(config, source.tokenizer, limits, scale.heldout)
    plan = source.plan(config)
    for line in (*lines, str(plan)):
        say(line)
    return HeldoutItems(config, source, examples, plan)


def think_in_parts(
    engine: Engine, examples: Examples, config: HeldoutFields, answer_greedily: bool = False
) -> Iterator[tuple[list[Example], Thoughts]]:
    """Traces and scores of some items at a time; their noise is that of a run's own evaluation, which is step 0."""
    rest, size = iter(examples), max(1, TRACES_AT_A_TIME // config.num_generations)
    while part := list(islice(rest, size)):
        thoughts = engine.think(
            [example.prompt_ids for example in part],
            [example.answer_ids for example in part],
            [example.uid for example in part],
            num_generations=config.num_generations,
            max_trace_length=config.max_trace_length,
            temperature=config.temperature,
            seed=config.seed,
            step=0,
            answer_greedily=answer_greedily,
            max_answer_length=config.max_answer_length if answer_greedily else None,
        )
        yield part, thoughts


def item_fields(example: Example, log_b: Tensor, tokenizer) -> dict[str, Any]:
    """An item in a row: what it is, and its answer's tokens with log b."""
    return {
        "uid": example.uid,
        "where": example.where,
        "question": example.question,
        "answer": example.answer,
        "prompt_ids": example.prompt_ids,
        "answer_ids": example.answer_ids,
        "answer_tokens": [tokenizer.decode([token]) for token in example.answer_ids],
        "hard_positions": example.hard_positions,
        "baseline_logprobs": numbers(log_b),
    }


def trace_fields(
    thoughts: Thoughts, index: int, tokenizer, config: HeldoutFields, eos_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """An item's traces in a row: ids, text, log-probabilities, how each ended, and log c."""
    traces = thoughts.traces
    columns = (traces.trace_ids, traces.logprobs, traces.delimiter_logprobs, thoughts.scores.logprobs)
    return [
        {
            "trace_ids": ids,
            "trace": tokenizer.decode(ids),
            "ended": how_ended(ids, end, eos_ids, config.max_trace_length),
            "logprobs": [number(logprob) for logprob in logprobs],
            "delimiter_logprob": None if end is None else number(end),
            "answer_logprobs": numbers(log_c),
        }
        for ids, logprobs, end, log_c in zip(*(column[index] for column in columns), strict=True)
    ]


def numbers(values: Tensor) -> list[float]:
    """The values of a tensor [A], each as ``number`` gives it."""
    return [number(value) for value in values.tolist()]


def number(value: float | Tensor) -> float:
    """Seven digits, as fp32 has; 0 without a sign."""
    return float(f"{float(value):.7g}") + 0.0
