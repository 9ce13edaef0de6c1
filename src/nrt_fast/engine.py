"""Rollout and scoring on lists of token ids: what the loop and other trainers build on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nrt_fast.evaluate import greedy_answers
from nrt_fast.model import Model
from nrt_fast.rollout import LiveRollout, Sampling, rollout
from nrt_fast.score import score
from nrt_fast.types import Scores, Traces, UserError

MAX_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Thoughts:
    """Traces with what was measured on their caches.

    Attributes:
        traces: [P][G].
        scores: log c and log b.
        answers: [P][G + 1] greedy answers, the last after an empty trace; empty where none were asked for.
    """

    traces: Traces
    scores: Scores
    answers: list[list[list[int]]]


class Engine:
    """Samples traces and scores answers with one model; prompts run once, and answers reuse the traces' cache.

    Args:
        model: ``Model.from_pretrained`` or ``Model.from_hf``; its weights may change between calls.
        delimiter_id: the one token that ends a trace.
        eos_id: id or ids that end a trace as well and stay part of it.
        max_cache_bytes: keys and values alive at one time; more prompts run in several waves, with the same result.
    """

    def __init__(
        self, model: Model, *, delimiter_id: int, eos_id: int | list[int] | tuple[int, ...],
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ):  # fmt: skip
        self.model = model
        self.delimiter_id = delimiter_id
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.max_cache_bytes = max_cache_bytes

    def rollout(
        self, prompts: list[list[int]], *, num_generations: int, max_trace_length: int, temperature: float = 1.0,
        seed: int = 0, uids: list[int] | None = None, step: int = 0,
    ) -> Traces:  # fmt: skip
        """Sample ``num_generations`` traces for each prompt.

        Args:
            prompts: P lists of ids, none empty.
            max_trace_length: ids sampled at most for one trace.
            temperature: 0 is greedy.
            seed, uids, step: key the noise; ``uids`` are the prompts' positions unless given.

        Returns:
            Traces: trace_ids and logprobs, nested lists [P][G], without the delimiter.

        Raises:
            ValueError: an empty prompt, or a prompt and trace over the model's context.
        """
        self._check_prompts(prompts, max_trace_length)
        sampling = self._sampling(num_generations, max_trace_length, temperature, seed)
        uids = list(range(len(prompts))) if uids is None else uids
        waves = [
            rollout(self.model, prompts[wave], uids[wave], sampling, step, 0).traces
            for wave in self._waves(prompts, num_generations + 1, max_trace_length)
        ]
        return _join_traces(waves)

    def score(self, prompts: list[list[int]], traces: list[list[list[int]]], answers: list[list[int]]) -> Scores:
        """Score each prompt's answer after each of its traces, and after an empty one.

        The delimiter is put after each trace here; exactly the given answer ids are scored (an EOS is the caller's).

        Args:
            prompts: P lists of ids, none empty.
            traces: [P][G] ids without the delimiter; an empty trace is legal, and G may differ.
            answers: P lists of ids, none empty.

        Returns:
            Scores: logprobs [P][G] and baseline_logprobs [P], fp32 tensors of each answer's length.

        Raises:
            ValueError: lists of different lengths, an empty prompt or answer, or a sequence over the model's context.
            UserError: a log-probability is NaN; names the prompt.
        """
        if not len(prompts) == len(traces) == len(answers):
            raise ValueError(f"{len(prompts)} prompts, {len(traces)} groups of traces, {len(answers)} answers")
        if not all(answers):
            raise ValueError("an answer is empty: at least one id is needed")
        num_rows = max((len(group) for group in traces), default=0)
        longest = max((len(ids) for group in traces for ids in group), default=0)
        slots = longest + 1 + max(map(len, answers), default=0)
        self._check_prompts(prompts, slots)
        parts = []
        for wave in self._waves(prompts, num_rows + 1, slots):
            cache, _ = self.model.prefill(prompts[wave], num_rows + 1, slots)
            # Smaller groups get empty rows in between; the last row is always the empty trace.
            pending = [group + [[]] * (num_rows + 1 - len(group)) for group in traces[wave]]
            parts.append(score(self.model, cache, pending, answers[wave], self.delimiter_id))
        scores = _join_scores(parts)
        for index, log_b in enumerate(scores.baseline_logprobs):
            if any(torch.isnan(row).any() for row in (*scores.logprobs[index], log_b)):
                raise UserError(f"prompt {index}: the model gives NaN for its answer; weights or activations overflow")
        rows = [group[: len(given)] for group, given in zip(scores.logprobs, traces, strict=True)]
        return Scores(rows, scores.baseline_logprobs)

    def think(
        self, prompts: list[list[int]], answers: list[list[int]], uids: list[int], *, num_generations: int,
        max_trace_length: int, temperature: float, seed: int, step: int, answer_greedily: bool = False,
        timed: Callable = lambda phase: nullcontext(),
    ) -> Thoughts:  # fmt: skip
        """Sample traces and score the reference answers on the cache that sampled them, wave by wave.

        Args:
            answers: the reference answers.
            answer_greedily: also decode an answer after each trace, up to the longest reference answer.
            timed: context manager factory called with "rollout" and "score" around those phases.
        """
        sampling = self._sampling(num_generations, max_trace_length, temperature, seed)
        max_answer_length = max(map(len, answers))
        traces, scores, greedy = [], [], []
        for wave in self._waves(prompts, num_generations + 1, max_trace_length + max_answer_length + 1):
            with timed("rollout"):
                live = rollout(self.model, prompts[wave], uids[wave], sampling, step, max_answer_length + 1)
            with timed("score"):
                scores.append(score(self.model, live.cache, live.pending, answers[wave], self.delimiter_id))
            traces.append(live.traces)
            greedy += self._answer(live, max_answer_length) if answer_greedily else [[] for _ in live.pending]
        return Thoughts(_join_traces(traces), _join_scores(scores), greedy)

    def _answer(self, live: LiveRollout, max_length: int) -> list[list[list[int]]]:
        return greedy_answers(self.model, live.cache, live.pending, self.delimiter_id, self.eos_ids[0], max_length)

    def _sampling(self, num_generations: int, max_trace_length: int, temperature: float, seed: int) -> Sampling:
        return Sampling(num_generations, max_trace_length, temperature, self.delimiter_id, self.eos_ids, seed)

    def _check_prompts(self, prompts: list[list[int]], own_slots: int) -> None:
        if not all(prompts):
            raise ValueError("a prompt is empty: at least one id is needed")
        longest, context = max(map(len, prompts), default=0) + own_slots, self.model.config.max_position_embeddings
        if longest > context:
            raise ValueError(f"a prompt and what follows it take {longest} tokens; the model's context is {context}")

    def _waves(self, prompts: list[list[int]], num_rows: int, own_slots: int) -> Iterator[slice]:
        """Prompts in order, as many at a time as the cache budget holds."""
        shape = self.model.config
        slots = max(map(len, prompts), default=0) + num_rows * own_slots
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * self.model.embed.element_size()
        width = max(1, self.max_cache_bytes // (token_bytes * slots))
        return (slice(start, start + width) for start in range(0, len(prompts), width))


def _join_traces(parts: list[Traces]) -> Traces:
    return Traces(
        [group for part in parts for group in part.trace_ids],
        [group for part in parts for group in part.logprobs],
        [group for part in parts for group in part.delimiter_logprobs],
    )


def _join_scores(parts: list[Scores]) -> Scores:
    return Scores(
        [group for part in parts for group in part.logprobs],
        [log_b for part in parts for log_b in part.baseline_logprobs],
    )


def noise_floor(
    engine: Engine, prompts: list[list[int]], answers: list[list[int]], reward: Callable[[Scores], list[Tensor]]
) -> float:
    """Standard deviation of a reward between two batch shapes: what rounding alone can do to it (method section 7).

    The empty trace of each prompt is scored together with all others, and alone.
    """
    together = reward(engine.score(prompts, [[[]] for _ in prompts], answers))
    alone = [reward(engine.score([p], [[[]]], [a]))[0] for p, a in zip(prompts, answers, strict=True)]
    return float((torch.cat(together) - torch.cat(alone)).square().mean().sqrt())
