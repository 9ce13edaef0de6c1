"""The NRT reward as a TRL reward function: the answer's likelihood under the live policy, with and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import torch

from nrt_fast.adapters.completions import as_traces
from nrt_fast.adapters.live import parts_that_fit, score_in_parts
from nrt_fast.adapters.trl.groups import Groups, check_whole_groups, group_rows
from nrt_fast.adapters.trl.live import choose_live_delimiter, live_engine, prompt_ids, tokenizer_of
from nrt_fast.adapters.trl.rollout import check_sampling, inputs_of
from nrt_fast.config import PRESETS, Objective, Preset
from nrt_fast.diagnostics import rollout_metrics
from nrt_fast.engine import MAX_CACHE_BYTES, Engine
from nrt_fast.rewards import Rewards, reward
from nrt_fast.types import Scores, Traces, UserError

WITH_TRACE, WITHOUT = "answer_logprobs", "baseline_logprobs"
"""Columns of the log-probabilities that a rollout brings along, a list of floats for each row."""


@dataclass(frozen=True)
class Judged:
    """What the reward made of a batch, scores of the live weights; the NRT loss is made of it."""

    groups: Groups
    traces: Traces
    scores: Scores
    rewards: Rewards


@dataclass
class Policy:
    """A trainer's model as the reward uses it.

    Attributes:
        engine: on the live weights.
        frozen: on the initial ones, where the objective asks for them.
        judged: the last batch, None where no row of it had an answer.
    """

    engine: Engine
    frozen: Engine | None
    judged: Judged | None = None


class NRTReward:
    """R of every completion, minus the baseline and clipped as the objective says; TRL standardises over the group.

    The data set has its reference in the column ``answer``: text, or None for a row that other rewards judge. The
    trace is what stands before a completion's first delimiter; a completion without one is scored with it appended.

    Args:
        objective: a preset's name, or an Objective; its loss counts for ``LossMixin`` alone.
        delimiter: the one token that ends a trace; </think> or a reserved token if absent.
        max_cache_bytes: keys and values; what does not fit is scored in several passes, with the same result.
    """

    __name__ = "nrt_reward"  # TRL names metrics and columns after it

    def __init__(
        self, objective: Preset | Objective = "nrt-ws", *, delimiter: str | None = None,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ):  # fmt: skip
        self.objective = _checked(objective)
        self.delimiter, self.max_cache_bytes = delimiter, max_cache_bytes
        self._policies: WeakKeyDictionary[Any, Policy] = WeakKeyDictionary()
        self._bound: Any = None

    def bind(self, trainer: Any) -> NRTReward:
        """Name the trainer: TRL before 1.0 does not tell its reward functions who calls."""
        self._bound = trainer
        return self

    def policy(self, trainer: Any) -> Policy:
        """The trainer's model, found at the first call.

        Raises:
            UserError: there is no delimiter, or the model is none that this engine reads in place.
        """
        if trainer not in self._policies:
            delimiter = choose_live_delimiter(trainer, self.delimiter)
            engine = live_engine(trainer, delimiter, self.max_cache_bytes)
            frozen = _frozen(engine, trainer) if self.objective.baseline == "frozen" else None
            self._policies[trainer] = Policy(engine, frozen)
        return self._policies[trainer]

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None = None, log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """TRL's call: one reward for each row, None where there is no answer.

        Raises:
            UserError: no column ``answer``, no trainer (TRL before 1.0 without ``bind``), groups over several ranks for
                the reward r3, a trace that the cache does not hold, or what ``policy`` refuses.
        """
        trainer = self._bound if log_metric is None else log_metric.__self__
        if trainer is None:
            raise UserError("this TRL does not tell a reward function its trainer: call nrt_reward.bind(trainer) first")
        if self.objective.reward == "r3":
            check_whole_groups(trainer, trainer.model.training, "the reward r3")
        policy = self.policy(trainer)
        groups = self._groups(trainer, prompts, columns)
        policy.judged = None
        if not groups.rows:
            return groups.spread([])
        traces = as_traces(groups.take(completion_ids), policy.engine.delimiter_id)
        names = [example.where for example in groups.examples]
        if WITH_TRACE in columns:
            scores = _given(groups, columns)
        else:
            scores = score_in_parts(policy.engine, groups.prompts, traces.trace_ids, groups.answers, names)
        rewards = reward(_with_baseline(policy, groups, scores), traces, self.objective, 0.0, names)
        policy.judged = Judged(groups, traces, scores, rewards)
        if log_metric is not None:
            metrics = rollout_metrics(groups.examples, traces, scores, rewards, self.objective)
            for name, value in metrics.items():
                if name.startswith("nrt/"):
                    log_metric(name, value)
            means = [[float(row.mean()) for row in group] for group in scores.logprobs]
            log_extra("answer_logp", groups.spread(means))
        return groups.spread([shaped.tolist() for shaped in rewards.shaped])

    def rollout(self, prompts: list, trainer: Any) -> dict[str, list]:
        """TRL's ``rollout_func``: our engine samples each group from one prompt, and scores on the cache of that.

        A completion is the trace and the delimiter that ended it; ``RolloutMixin`` brings the answers.

        Raises:
            UserError: the trainer is no RolloutMixin, a row has no answer, TRL is to sample otherwise than by
                temperature, or the cache does not hold a trace of the longest kind.
        """
        check_sampling(trainer)
        policy, inputs = self.policy(trainer), inputs_of(trainer)
        groups = self._groups(trainer, prompts, {"answer": [row.get("answer") for row in inputs]})
        if sum(map(len, groups.rows)) < len(prompts):
            raise UserError("a row of the batch has no answer: the engine samples traces for answers")
        groups = groups.cut(_sampled_together(policy.engine, groups, trainer.max_completion_length))
        thoughts = policy.engine.think(
            groups.prompts, groups.answers, list(range(len(groups.rows))), num_generations=len(groups.rows[0]),
            max_trace_length=trainer.max_completion_length - 1, temperature=trainer.temperature,
            seed=int(torch.randint(2**62, ())), step=0,
        )  # fmt: skip
        delimiter, traces, scores = policy.engine.delimiter_id, thoughts.traces, thoughts.scores
        ends = traces.delimiter_logprobs
        completions = _joined(traces.trace_ids, [[[] if end is None else [delimiter] for end in g] for g in ends])
        logprobs = _joined(traces.logprobs, [[[] if end is None else [end] for end in group] for group in ends])
        sizes = map(len, groups.rows)
        baselines = [[b.tolist()] * size for b, size in zip(scores.baseline_logprobs, sizes, strict=True)]
        return {
            "prompt_ids": groups.spread([[ids] * len(rows) for ids, rows in zip(groups.prompts, groups.rows)]),
            "completion_ids": groups.spread(completions),
            "logprobs": groups.spread(logprobs),
            WITH_TRACE: groups.spread([[row.tolist() for row in group] for group in scores.logprobs]),
            WITHOUT: groups.spread(baselines),
        }

    def _groups(self, trainer: Any, prompts: list, columns: dict[str, Any]) -> Groups:
        if "answer" not in columns:
            raise UserError("the data set has no column answer, which holds the reference; its columns reach this "
                            f"function as {', '.join(sorted(columns))}")  # fmt: skip
        return group_rows(prompt_ids(trainer, prompts), prompts, columns["answer"], tokenizer_of(trainer))


def _checked(objective: Preset | Objective) -> Objective:
    """The objective, by name or itself; UserError where there is no such preset, or it has no reward of a trace."""
    if isinstance(objective, str):
        if objective not in PRESETS or objective == "sft":
            valid = ", ".join(name for name in PRESETS if name != "sft")
            raise UserError(f"objective {objective!r} is no reward; valid: {valid}, or an Objective")
        objective = PRESETS[objective]
    if objective.baseline == "ema":
        raise UserError("baseline 'ema' needs this engine's own optimiser; valid: current, frozen, none")
    return objective


def _sampled_together(engine: Engine, groups: Groups, max_completion_length: int) -> int:
    """Size of groups that divides all of theirs, with room in the cache for the longest completion of every row."""
    longest = 1 + max(map(len, groups.answers))
    size = gcd(*map(len, groups.rows))
    rows = [max_completion_length - 1 + longest] * size
    parts = [parts_that_fit(engine, e.prompt_ids, rows, longest, e.where)[0] for e in groups.examples]
    room = min(part.stop for part in parts)
    return max(divisor for divisor in range(1, room + 1) if size % divisor == 0)


def _frozen(engine: Engine, trainer: Any) -> Engine:
    """The weights before training: the model without an adapter that changes nothing yet, or a copy made now."""
    adapter = engine.model.adapter
    if adapter is not None and not adapter.changes:
        return engine.on(engine.model.without_adapter())
    if trainer.state.global_step:
        raise UserError(
            f"baseline 'frozen' copies the weights before training, and this run is at step {trainer.state.global_step}"
            "; valid: reward.policy(trainer) before trainer.train(resume_from_checkpoint=...), or baseline 'current'"
        )
    return engine.on(engine.model.clone())


def _with_baseline(policy: Policy, groups: Groups, scores: Scores) -> Scores:
    """The scores with b under the weights that the reward is measured against."""
    if policy.frozen is None:
        return scores
    frozen = policy.frozen.score(groups.prompts, [[] for _ in groups.prompts], groups.answers)
    return replace(scores, baseline_logprobs=frozen.baseline_logprobs)


def _given(groups: Groups, columns: dict[str, list]) -> Scores:
    """Scores that a rollout brought along."""
    logprobs, baselines = groups.take(columns[WITH_TRACE]), groups.take(columns[WITHOUT])
    return Scores([[torch.tensor(row) for row in group] for group in logprobs], [torch.tensor(b[0]) for b in baselines])


def _joined(first: list[list[list]], second: list[list[list]]) -> list[list[list]]:
    """[P][G] lists, each followed by the other's."""
    pairs = zip(first, second, strict=True)
    return [[[*a, *b] for a, b in zip(rows, ends, strict=True)] for rows, ends in pairs]
