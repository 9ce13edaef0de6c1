"""The reward where sampling is left to a server of its own: the answer is scored as part of a prompt.

vLLM and SGLang tell the log-probability of every id of a prompt. Such a request reads no prefix cache, so that prompt
and trace go through the model again: G (P + Z + A + 1) + (P + A + 1) ids a prompt, where our engine needs (G + 1) A.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from nrt_fast import rewards
from nrt_fast.adapters.completions import as_traces
from nrt_fast.config import Objective, Reward, RewardClip
from nrt_fast.data.render import encode_answers
from nrt_fast.data.schema import Pair
from nrt_fast.data.tokenizer import END_OF_THINKING, choose_delimiter
from nrt_fast.types import Scores, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ask = Callable[[list[int]], Awaitable[list[float]]]
"""Sends ids as a prompt; gives the log-probability of each but the first, natural logs at temperature 1."""

_in_flight: dict[Hashable, tuple[dict, int]] = {}


class TraceChoices:
    """What a subclass of an adapter may change.

    Attributes:
        delimiter: the one token that ends a trace.
        reward: logp, prob, am, gm, ws_inv or ws_log.
        reward_clip: zero, unit or none.
    """

    delimiter: str = END_OF_THINKING
    reward: Reward = "ws_log"
    reward_clip: RewardClip = "zero"


@dataclass(frozen=True)
class TraceReward:
    """What one trace earned.

    Attributes:
        reward: R after baseline and clip.
        gain: mean of log c - log b over the answer, nats a token.
        closed: the trace ended with the delimiter.
    """

    reward: float
    gain: float
    closed: bool

    @property
    def metrics(self) -> dict[str, float]:
        """The names of nrt-fast's own runs."""
        return {"nrt/gain": self.gain, "nrt/delimiter_rate": float(self.closed)}


def trace_objective(reward: Reward, reward_clip: RewardClip) -> Objective:
    """The choices of a reward that traces earn one by one.

    Raises:
        UserError: there is no such reward or clip, or the reward compares the traces of a group.
    """
    valid = {"reward": [kind for kind in get_args(Reward) if kind != "r3"], "reward_clip": get_args(RewardClip)}
    for (name, values), value in zip(valid.items(), (reward, reward_clip), strict=True):
        if value not in values:
            why = "; r3 needs a whole group at once, which comes in pieces here" if value == "r3" else ""
            raise UserError(f"{name}: {value!r} is none here; valid: {', '.join(values)}{why}")
    return Objective(reward=reward, reward_clip=reward_clip)


@lru_cache(maxsize=1)
def delimiter_id(tokenizer: PreTrainedTokenizerBase, delimiter: str) -> int:
    """Id of the one token that ends a trace; UserError where it is none of the vocabulary."""
    return choose_delimiter(tokenizer, delimiter, may_add=False).id  # kept: it reads the whole vocabulary


def encode_answer(answer: object, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Ids of a reference answer, closed by EOS; UserError where it is no text, or empty."""
    if not isinstance(answer, str):
        raise UserError(f"{where}: the reference answer is {type(answer).__name__}; valid: text")
    return encode_answers([Pair([], answer, None, where)], tokenizer)[0][0]


@contextmanager
def in_flight(key: Hashable) -> Iterator[dict]:
    """One dict for everything that is inside with the same key at the same time; forgotten with the last to leave.

    The traces of a prompt are sampled together, between two updates of the weights: what they share is as old as they.
    """
    shared, inside = _in_flight.get(key, ({}, 0))
    _in_flight[key] = shared, inside + 1
    try:
        yield shared
    finally:
        shared, inside = _in_flight.pop(key)
        if inside > 1:
            _in_flight[key] = shared, inside - 1


async def score_trace(
    ask: Ask, prompt_ids: list[int], sampled_ids: list[int], answer_ids: list[int], *, delimiter_id: int,
    objective: Objective, shared: dict, where: str,
) -> TraceReward:  # fmt: skip
    """R of one sampled trace: one request with it, and one without, which the traces of a prompt share.

    Args:
        ask: the server.
        prompt_ids: ids of the prompt, not empty.
        sampled_ids: all that was sampled, with the delimiter or cut.
        answer_ids: ids of the reference answer, closed by EOS.
        shared: the same dict for all traces of this prompt and answer, empty at first.
        where: what messages call the prompt.

    Raises:
        UserError: a log-probability is NaN, infinite or above 0.
        ValueError: the server does not tell one for each id.
    """
    traces = as_traces([[sampled_ids]], delimiter_id)
    ((trace,),), ((end,),) = traces.trace_ids, traces.delimiter_logprobs
    if "log_b" not in shared:
        shared["log_b"] = asyncio.ensure_future(_answer_logprobs(ask, [*prompt_ids, delimiter_id], answer_ids))
    log_c, log_b = await asyncio.gather(
        _answer_logprobs(ask, [*prompt_ids, *trace, delimiter_id], answer_ids),
        asyncio.shield(shared["log_b"]),  # others wait for it too
    )
    scored = rewards.reward(Scores([[log_c]], [log_b]), traces, objective, noise=0.0, names=[where])
    return TraceReward(float(scored.shaped[0]), float((log_c - log_b).mean()), end is not None)


async def _answer_logprobs(ask: Ask, context: list[int], answer_ids: list[int]) -> Tensor:
    """log pi(answer | context), [A] fp32."""
    logprobs = await ask([*context, *answer_ids])
    expected = len(context) + len(answer_ids) - 1
    if len(logprobs) != expected:
        raise ValueError(f"the server told {len(logprobs)} log-probabilities of a prompt's ids, expected {expected}")
    return torch.tensor(logprobs[-len(answer_ids) :])
