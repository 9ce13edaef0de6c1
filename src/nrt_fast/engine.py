"""Rollout and scoring on lists of token ids: what the loop and other trainers build on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch

from nrt_fast.arena import Arena
from nrt_fast.decode import MAX_STEPS, Decoding, Sampling, StepGraphs, prefill
from nrt_fast.evaluate import greedy_answers
from nrt_fast.kv_cache import KVCache
from nrt_fast.model import Model
from nrt_fast.model.inference import Inference
from nrt_fast.rewards import aggregate
from nrt_fast.rollout import RolloutCounters, Room, rollout
from nrt_fast.score import score
from nrt_fast.streams import Group, Stream
from nrt_fast.types import Scores, Traces, UserError

MAX_CACHE_BYTES = 2 << 30
PAGE_SIZE = {"cuda": 256, "cpu": 32}
"""Tokens; on a CPU attention reads small pages as fast as long ones, and less of the last one is wasted."""
NUM_SLOTS = {"cuda": 256, "cpu": 128}
"""Traces decoded at a time: past it the products are bound by arithmetic, and more rows buy nothing."""


@dataclass(frozen=True)
class Thoughts:
    """Traces with what was measured on their caches.

    Attributes:
        traces: ``[P][G]``.
        scores: log c and log b.
        answers: ``[P][G + 1]`` greedy answers, the last after an empty trace; empty where none were asked for.
    """

    traces: Traces
    scores: Scores
    answers: list[list[list[int]]]


@dataclass(frozen=True)
class Generated:
    """Traces and the answers that follow them.

    Attributes:
        traces: ``[P][G]``.
        answers: ``[P][G]`` greedy answers, closed by EOS or cut.
    """

    traces: Traces
    answers: list[list[list[int]]]


@dataclass
class Counters(RolloutCounters):
    """Tokens through the model since the engine was made.

    Attributes:
        score_tokens: fed to score answers, prompts and traces that were given among them.
    """

    score_tokens: int = 0


class Engine:
    """Samples traces and scores answers with one model; prompts run once, and answers reuse the traces' cache.

    The cache is allocated at the first call, once.

    Args:
        model: ``Model.from_pretrained`` or ``Model.from_hf``; its weights may change between calls.
        delimiter_id: the one token that ends a trace.
        eos_id: id or ids that end a trace as well and stay part of it.
        max_cache_bytes: keys and values; traces that do not fit wait, with the same result.
        num_slots: traces decoded at a time, with the same result.
        page_size: tokens of a page of the cache.
        max_repeated: see ``Sampling``.
        arena: memory that the keys and values have in turn with something else, instead of ``max_cache_bytes``; every
            call takes it, none needs what an earlier one left there.
        beside: see ``Inference``.

    Attributes:
        counters: tokens through the model so far.
        trace_lengths: mean length of each uid's last traces, which are expected the next time.
    """

    def __init__(
        self, model: Model, *, delimiter_id: int, eos_id: int | list[int] | tuple[int, ...],
        max_cache_bytes: int = MAX_CACHE_BYTES, num_slots: int | None = None, page_size: int | None = None,
        max_repeated: int = 0, arena: Arena | None = None, beside: Inference | None = None,
    ):  # fmt: skip
        device = model.embed.device.type
        self.model = model
        self.delimiter_id = delimiter_id
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.arena, self.max_repeated = arena, max_repeated
        self.max_cache_bytes = arena.memory.nbytes if arena else max_cache_bytes
        self.num_slots = num_slots or NUM_SLOTS[device]
        self.page_size = page_size or PAGE_SIZE[device]
        self.counters = Counters()
        self._passes = Inference(model, beside)
        self._graphs: StepGraphs | None = None
        self._cache: KVCache | None = None
        self.trace_lengths: dict[int, float] = {}

    def on(self, model: Model) -> Engine:
        """An engine for other weights of the same shape, on the same cache."""
        other = Engine(
            model, delimiter_id=self.delimiter_id, eos_id=self.eos_ids, max_cache_bytes=self.max_cache_bytes,
            num_slots=self.num_slots, page_size=self.page_size, max_repeated=self.max_repeated, arena=self.arena,
            beside=self._passes,
        )  # fmt: skip
        other._cache = self.cache
        return other

    @property
    def cache(self) -> KVCache:
        """The keys and values, allocated when first asked for."""
        if self._cache is None:
            self._cache = self._passes.new_cache(self.max_cache_bytes, self.page_size, self.arena)
        return self._cache

    def rollout(
        self, prompts: list[list[int]], *, num_generations: int, max_trace_length: int, temperature: float = 1.0,
        seed: int = 0, uids: list[int] | None = None, step: int = 0,
    ) -> Traces:  # fmt: skip
        """Sample ``num_generations`` traces for each prompt.

        Args:
            prompts: P lists of ids, none empty.
            max_trace_length: ids sampled at most for one trace.
            temperature: 0 is greedy.
            seed: keys the noise, together with uid and step.
            uids: of the prompts; their positions unless given.
            step: of the run that samples.

        Returns:
            Traces: trace_ids and logprobs, nested lists ``[P][G]``, without the delimiter.

        Raises:
            ValueError: an empty prompt, or a prompt and trace over the model's context or the cache.
        """
        groups = _groups(prompts, range(len(prompts)) if uids is None else uids, num_generations)
        with closing(self._sampled(groups, self._sampling(max_trace_length, temperature, seed, step), 0)) as parts:
            for part in parts:
                for group in part:
                    group.release(self.cache)
        return _traces(groups)

    def score(self, prompts: list[list[int]], traces: list[list[list[int]]], answers: list[list[int]]) -> Scores:
        """Score each prompt's answer after each of its traces, and after an empty one.

        The delimiter is put after each trace here; exactly the given answer ids are scored (an EOS is the caller's).

        Args:
            prompts: P lists of ids, none empty.
            traces: ``[P][G]`` ids without the delimiter; an empty trace is legal, and G may differ.
            answers: P lists of ids, none empty.

        Returns:
            Scores: logprobs ``[P][G]`` and baseline_logprobs [P], fp32 tensors of each answer's length.

        Raises:
            ValueError: lists of different lengths, an empty prompt or answer, or a group over the model's context or
                the cache.
            UserError: a log-probability is NaN; names the prompt.
        """
        if not len(prompts) == len(traces) == len(answers):
            raise ValueError(f"{len(prompts)} prompts, {len(traces)} groups of traces, {len(answers)} answers")
        if not all(answers):
            raise ValueError("an answer is empty: at least one id is needed")
        groups = [
            Group(index, index, prompt, [Stream(number, list(ids)) for number, ids in enumerate(group)])
            for index, (prompt, group) in enumerate(zip(prompts, traces, strict=True))
        ]
        rows = [[len(ids) + 1 + len(a) for ids in [*group, []]] for group, a in zip(traces, answers, strict=True)]
        self._check(prompts, rows)
        self._take_weights()
        try:
            scores = _joined([
                self._score([groups[index] for index in part], [answers[index] for index in part])
                for part in self._fitting(prompts, rows)
            ])  # fmt: skip
        finally:
            for group in groups:
                group.release(self.cache)
        for index, (group, log_b) in enumerate(zip(scores.logprobs, scores.baseline_logprobs, strict=True)):
            if any(torch.isnan(row).any() for row in (*group, log_b)):
                raise UserError(f"prompt {index}: the model gives NaN for its answer; weights or activations overflow")
        return scores

    def think(
        self, prompts: list[list[int]], answers: list[list[int]], uids: list[int], *, num_generations: int,
        max_trace_length: int, temperature: float, seed: int, step: int, answer_greedily: bool = False,
        max_answer_length: int | None = None, timed: Callable = lambda phase: nullcontext(),
    ) -> Thoughts:  # fmt: skip
        """Sample traces and score the reference answers on the cache that sampled them, as the groups are complete.

        Args:
            answers: the reference answers.
            answer_greedily: also decode an answer after each trace.
            max_answer_length: longest of them; never under the longest reference answer, which it is if absent.
            timed: context manager factory called with "rollout" and "score" around those phases.
        """
        groups = _groups(prompts, uids, num_generations)
        max_answer_length = max([max_answer_length or 0, *map(len, answers)])
        sampling = self._sampling(max_trace_length, temperature, seed, step)
        scores, greedy = [None] * len(prompts), [[] for _ in prompts]
        with closing(self._sampled(groups, sampling, 1 + max_answer_length)) as parts:
            while True:
                with timed("rollout"):
                    part = next(parts, None)
                if part is None:
                    break
                with timed("score"):
                    scored = self._score(part, [answers[group.index] for group in part], release=not answer_greedily)
                for group, logc, logb in zip(part, scored.logprobs, scored.baseline_logprobs, strict=True):
                    scores[group.index] = logc, logb
                if answer_greedily:
                    for group, rows in zip(part, self._answer(part, max_answer_length), strict=True):
                        greedy[group.index] = rows
                        group.release(self.cache)
        return Thoughts(_traces(groups), Scores([logc for logc, _ in scores], [logb for _, logb in scores]), greedy)

    def generate(
        self, prompts: list[list[int]], *, num_generations: int = 1, max_trace_length: int, max_answer_length: int,
        temperature: float = 1.0, seed: int = 0,
    ) -> Generated:  # fmt: skip
        """Sample traces, and decode an answer greedily after each. Arguments as those of ``rollout``."""
        groups = _groups(prompts, range(len(prompts)), num_generations)
        answers, sampling = [[] for _ in prompts], self._sampling(max_trace_length, temperature, seed, 0)
        with closing(self._sampled(groups, sampling, 1 + max_answer_length)) as parts:
            for part in parts:
                for group, rows in zip(part, self._answer(part, max_answer_length), strict=True):
                    answers[group.index] = rows[:-1]
                    group.release(self.cache)
        return Generated(_traces(groups), answers)

    def stream(
        self, prompt: list[int], *, max_trace_length: int, max_answer_length: int, temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[tuple[str, int]]:  # fmt: skip
        """("trace", id) and then ("answer", id) one by one, as they are sampled; the same as ``generate`` gives."""
        (group,) = _groups([prompt], [0], 1)
        self._check([prompt], [[max_trace_length + 1 + max_answer_length]])
        self._take_weights()
        try:
            prefill(self._passes, self.cache, [group])
            for kind, sampling, given in (
                ("trace", self._sampling(max_trace_length, temperature, seed, 0), []),
                ("answer", self._answering(max_answer_length), [self.delimiter_id]),
            ):
                before = group.streams[0]
                stream = Stream(0, before.ids + given, len(before.ids + given), before.cached)
                group.streams[0] = stream
                for token in self._one_by_one(Decoding(self._passes, self.cache, sampling), group, stream):
                    yield kind, token
        finally:
            group.release(self.cache)

    def _one_by_one(self, decoding: Decoding, group: Group, stream: Stream) -> Iterator[int]:
        self.cache.require(stream.cached, len(stream.ids) + decoding.sampling.max_length)
        decoding.start([(group, [stream])])
        yield from stream.ids[stream.first :]
        while not stream.is_over:
            seen = len(stream.ids)
            decoding.run([(group, [stream])], 1)
            yield from stream.ids[seen:]

    def _sampled(self, groups: list[Group], sampling: Sampling, answer_length: int) -> Iterator[list[Group]]:
        """Complete groups as they come, with room behind each row for the delimiter and an answer."""
        self._check(
            [group.prompt_ids for group in groups],
            [[sampling.max_length + answer_length] * len(group.streams) + [answer_length] for group in groups],
        )
        self._take_weights()
        decoding = Decoding(self._passes, self.cache, sampling, self._graphs)
        room = Room(self.num_slots, answer_length)
        expected = sorted(groups, key=lambda group: -self.trace_lengths.get(group.uid, 0.0))
        try:
            for part in rollout(self._passes, decoding, expected, room, MAX_STEPS, self.counters):
                for group in part:
                    if group.streams:
                        self.trace_lengths[group.uid] = sum(len(s.ids) for s in group.streams) / len(group.streams)
                yield part
        finally:
            for group in groups:
                group.release(self.cache)

    def _score(self, groups: list[Group], answers: list[list[int]], release: bool = True) -> Scores:
        scores, num_tokens = score(self._passes, self.cache, groups, answers, self.delimiter_id)
        self.counters.score_tokens += num_tokens
        if release:
            for group in groups:
                group.release(self.cache)
        return scores

    def _answer(self, groups: list[Group], max_length: int) -> list[list[list[int]]]:
        decoding = Decoding(self._passes, self.cache, self._answering(max_length), self._graphs)
        return greedy_answers(decoding, groups, self.delimiter_id)

    def _sampling(self, max_trace_length: int, temperature: float, seed: int, step: int) -> Sampling:
        if max_trace_length < 1:
            raise ValueError(f"max_trace_length is {max_trace_length}: at least 1 is needed")
        return Sampling(max_trace_length, temperature, self.delimiter_id, self.eos_ids, self.max_repeated, seed, step)

    def _answering(self, max_length: int) -> Sampling:
        return Sampling(max_length, 0.0, None, self.eos_ids[:1])

    def _take_weights(self) -> None:
        if self.arena:
            self.arena.take("keys and values")
        self._passes.refresh()
        if self._graphs is None and self.model.embed.device.type == "cuda":
            self._graphs = StepGraphs(self._passes, self.cache)
        if self._graphs is not None:
            self._graphs.check()

    def _check(self, prompts: list[list[int]], rows: list[list[int]]) -> None:
        """Refuse what can never run: an empty prompt, a sequence over the context, a group over the cache."""
        context = self.model.config.max_position_embeddings
        for index, (prompt, own) in enumerate(zip(prompts, rows, strict=True)):
            if not prompt:
                raise ValueError("a prompt is empty: at least one id is needed")
            length = len(prompt) + max(own)
            if length > context:
                raise ValueError(f"a prompt and what follows it take {length} tokens; the model's context is {context}")
            pages = self._pages(prompt, own)
            if pages > self.cache.num_pages:
                raise ValueError(
                    f"prompt {index} with its {len(own)} rows takes {pages} pages of {self.page_size} tokens; the cache"
                    f" has {self.cache.num_pages}: more max_cache_bytes, fewer generations or shorter traces are needed"
                )

    def _pages(self, prompt: list[int], rows: list[int]) -> int:
        return sum(map(self.cache.pages_for, [len(prompt), *rows]))

    def _fitting(self, prompts: list[list[int]], rows: list[list[int]]) -> Iterator[list[int]]:
        """Positions of groups that are in the cache together, in order."""
        part, free = [], self.cache.num_free
        for index, (prompt, own) in enumerate(zip(prompts, rows, strict=True)):
            pages = self._pages(prompt, own)
            if pages > free:
                yield part
                part, free = [], self.cache.num_pages
            part.append(index)
            free -= pages
        if part:
            yield part


def _groups(prompts: list[list[int]], uids, num_generations: int) -> list[Group]:
    return [
        Group(index, uid, prompt, [Stream(number) for number in range(num_generations)])
        for index, (prompt, uid) in enumerate(zip(prompts, uids, strict=True))
    ]


def _traces(groups: list[Group]) -> Traces:
    return Traces(
        [[stream.ids for stream in group.streams] for group in groups],
        [[stream.logprobs for stream in group.streams] for group in groups],
        [[stream.end for stream in group.streams] for group in groups],
    )


def _joined(parts: list[Scores]) -> Scores:
    return Scores(
        [group for part in parts for group in part.logprobs],
        [log_b for part in parts for log_b in part.baseline_logprobs],
    )


def noise_floor(
    engine: Engine, prompts: list[list[int]], answers: list[list[int]], kind: str, scale: str = "length"
) -> float:
    """Standard deviation of a reward between two batch shapes: what rounding alone can do to it.

    The empty trace of each prompt is scored together with all others, and alone. r3 weighs tokens by their spread over
    a group, and a group of one has none: there both are a group, and its standard deviation counts.

    Args:
        kind, scale: of the reward, as ``aggregate`` takes them.
    """
    together = engine.score(prompts, [[[]] for _ in prompts], answers)
    alone = [engine.score([p], [[[]]], [a]) for p, a in zip(prompts, answers, strict=True)]
    if kind == "r3":
        pairs = [[*group, *scores.logprobs[0]] for group, scores in zip(together.logprobs, alone, strict=True)]
        return float(torch.stack(aggregate(pairs, together.baseline_logprobs, kind)[0]).var(dim=1).mean().sqrt())
    one, other = (
        torch.cat([R_G for s in parts for R_G in aggregate(s.logprobs, s.baseline_logprobs, kind, scale)[0]])
        for parts in ([together], alone)
    )
    return float((one - other).square().mean().sqrt())
