"""What adapters of other trainers share: the reward by a server's log-probabilities of prompts, against the engine's.

Checks against the trainers themselves are in tests/compat.
"""

import asyncio
from typing import get_args

import pytest
import torch
from served_policy import DELIMITER_ID, ServedPolicy

from nrt_fast import rewards
from nrt_fast.adapters.completions import split_at_delimiter
from nrt_fast.adapters.prompt_logprobs import (
    _in_flight,
    delimiter_id,
    encode_answer,
    in_flight,
    score_trace,
    trace_objective,
)
from nrt_fast.config import Reward
from nrt_fast.starter import tasks
from nrt_fast.types import Traces, UserError

KINDS = [kind for kind in get_args(Reward) if kind != "r3"]
MAX_TRACE = 14  # some traces end before it and some do not


@pytest.fixture(scope="module")
def policy():
    return ServedPolicy()


@pytest.fixture
def ask(policy):
    async def prompt_logprobs(ids):
        await asyncio.sleep(0)
        return policy.prompt_logprobs(ids)

    policy.scored.clear()
    return prompt_logprobs


@pytest.fixture(scope="module")
def group(policy):
    """(prompt ids, what was sampled for it, answer ids): four traces, the empty one, and one that an EOS ended."""
    row = tasks.rows("train", 1, seed=3)[0]
    prompt = policy.prompt_ids(row["question"])
    sampled = [policy.sample(prompt, MAX_TRACE)[0] for _ in range(4)]
    sampled += [[DELIMITER_ID], [9, policy.tokenizer.eos_token_id]]
    return prompt, sampled, encode_answer(row["answer"], policy.tokenizer, "row 0")


def score_all(ask, group, objective):
    """Rewards of a group, its traces one by one and at the same time."""
    prompt, sampled, answer = group

    async def one(ids):
        with in_flight("prompt") as shared:
            return await score_trace(
                ask, prompt, ids, answer, delimiter_id=DELIMITER_ID, objective=objective, shared=shared, where="prompt"
            )

    async def all_of_them():
        return await asyncio.gather(*map(one, sampled))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("clip", ["zero", "unit", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_equals_the_engines(policy, ask, group, kind, clip):
    objective = trace_objective(kind, clip)
    ours = score_all(ask, group, objective)
    prompt, sampled, answer = group
    split = [split_at_delimiter(ids, DELIMITER_ID) for ids in sampled]
    scores = policy.engine.score([prompt], [[trace for trace, _ in split]], [answer])
    ends = [[0.0 if closed else None for _, closed in split]]
    expected = rewards.reward(scores, Traces([], [], ends), objective, noise=0.0, names=["prompt"]).shaped[0]
    torch.testing.assert_close(torch.tensor([one.reward for one in ours]), expected, rtol=1e-4, atol=1e-5)
    gains = torch.stack([(log_c - scores.baseline_logprobs[0]).mean() for log_c in scores.logprobs[0]])
    torch.testing.assert_close(torch.tensor([one.gain for one in ours]), gains, rtol=0, atol=1e-5)
    assert [one.closed for one in ours] == [closed for _, closed in split]
    assert len({one.closed for one in ours}) == 2, "traces of both kinds are needed"
    assert float(expected.max()) > float(expected.min())


def test_an_empty_trace_earns_what_its_baseline_does(ask, group):
    empty = score_all(ask, group, trace_objective("ws_log", "zero"))[-2]
    assert empty.reward == empty.gain == 0.0
    assert empty.metrics == {"nrt/gain": 0.0, "nrt/delimiter_rate": 1.0}


def test_a_group_asks_for_its_baseline_once(policy, ask, group):
    prompt, sampled, answer = group
    objective = trace_objective("ws_log", "zero")
    score_all(ask, group, objective)
    empty = [*prompt, DELIMITER_ID, *answer]
    others = [ids for ids in policy.scored if ids != empty]
    assert len(policy.scored) == len(sampled) + 1  # one of the traces is the empty one
    assert sorted(others) == sorted(
        [*prompt, *split_at_delimiter(ids, DELIMITER_ID)[0], *empty[len(prompt) :]]
        for ids in sampled
        if ids != [DELIMITER_ID]
    )
    score_all(ask, group, objective)
    assert policy.scored.count(empty) == 4, "the weights may have changed: a later group asks again"
    assert not _in_flight


def test_a_failing_baseline_fails_every_trace_and_is_forgotten(ask, group):
    async def broken(ids):
        raise ConnectionError("the server is gone")

    objective = trace_objective("ws_log", "zero")
    with pytest.raises(ConnectionError):
        score_all(broken, group, objective)
    assert not _in_flight
    assert score_all(ask, group, objective)[-2].reward == 0.0


def test_what_is_in_flight_is_shared_by_key_and_dropped_with_the_last():
    with in_flight("a") as first, in_flight("b") as other, in_flight("a") as second:
        first["x"] = 1
        assert second is first
        assert other == {}
    with in_flight("a") as later:
        assert later == {}


@pytest.mark.parametrize(
    ("reward", "clip", "said"),
    [
        ("r3", "zero", "whole group"),
        ("ws", "zero", "'ws' is none here; valid: logp, prob, am, gm, ws_inv, ws_log$"),
        ("gm", "one", "reward_clip: 'one' is none here; valid: none, zero, unit$"),
    ],
)
def test_choices_that_cannot_be_are_refused(reward, clip, said):
    with pytest.raises(UserError, match=said):
        trace_objective(reward, clip)


def test_bad_answers_and_delimiters_are_refused(policy):
    with pytest.raises(UserError, match="row 7: the reference answer is NoneType; valid: text"):
        encode_answer(None, policy.tokenizer, "row 7")
    with pytest.raises(UserError, match="empty after tokenisation"):
        encode_answer("", policy.tokenizer, "row 7")
    with pytest.raises(UserError, match="one token is needed"):
        delimiter_id(policy.tokenizer, "the answer is")
    assert delimiter_id(policy.tokenizer, "</think>") == DELIMITER_ID


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        (lambda told: told[:-1], ValueError, r"told \d+ log-probabilities of a prompt's ids, expected \d+"),
        (lambda told: [*told[:-1], float("nan")], UserError, "prompt: a log-probability of its answer is NaN"),
        (lambda told: [*told[:-1], 0.5], UserError, "above 0"),
    ],
)
def test_what_a_server_cannot_mean_is_refused(ask, group, broken, error, said):
    async def strange(ids):
        return broken(await ask(ids))

    with pytest.raises(error, match=said):
        score_all(strange, group, trace_objective("gm", "zero"))
