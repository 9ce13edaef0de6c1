"""OpenRLHF's own rollout actor with our executor in it; run by peers.py with openrlhf installed, and without vLLM.

vLLM needs a GPU's worth of packages. What OpenRLHF takes from it is replaced: an engine that the starter model answers,
and SamplingParams with the rules of vLLM's that matter here.
"""

import asyncio
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from served_policy import DELIMITER_ID, ServedPolicy

from nrt_fast.adapters.prompt_logprobs import encode_answer
from nrt_fast.config import Objective
from nrt_fast.starter import tasks
from nrt_fast.types import UserError

NUM_TRACES, MAX_TRACE, MAX_LENGTH = 8, 14, 120


@dataclass
class SamplingParams:
    """vLLM's fields of the same names; it decides about the prefix cache when it is made, not later."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool = field(init=False)

    def __post_init__(self):
        self.stop_token_ids = self.stop_token_ids or []
        self.skip_reading_prefix_cache = self.prompt_logprobs is not None


class AsyncLLMEngine:
    """``generate`` as vLLM's: an asynchronous generator whose last item is the whole output."""

    def __init__(self, policy):
        self.policy = policy

    async def generate(self, prompt, sampling_params, request_id):
        await asyncio.sleep(0)
        ids, params = prompt["prompt_token_ids"], sampling_params
        assert len(ids) + params.max_tokens <= MAX_LENGTH, "longer than max_model_len"
        told = None
        if params.prompt_logprobs is not None:
            assert params.skip_reading_prefix_cache, "cached blocks would have no log-probabilities"
            assert (params.temperature, params.max_tokens, params.stop_token_ids) == (1.0, 1, [])
            others = {1: SimpleNamespace(logprob=-99.0)}  # more candidates than were asked for do no harm
            told = [None] + [
                {token: SimpleNamespace(logprob=logprob)} | (others if token != 1 else {})
                for token, logprob in zip(ids[1:], self.policy.prompt_logprobs(ids), strict=True)
            ]
            sampled, logprobs = [0], [0.0]
        else:
            assert params.stop_token_ids == [DELIMITER_ID]
            sampled, logprobs = self.policy.sample(ids, params.max_tokens)
        reason = "length" if len(sampled) == params.max_tokens and sampled[-1] != DELIMITER_ID else "stop"
        steps = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in zip(sampled, logprobs)]
        output = SimpleNamespace(token_ids=sampled, text="", finish_reason=reason, logprobs=steps)
        yield SimpleNamespace(outputs=[], prompt_logprobs=None)
        yield SimpleNamespace(outputs=[output], prompt_logprobs=told)


@pytest.fixture(scope="module")
def policy():
    return ServedPolicy()


@pytest.fixture(scope="module", autouse=True)
def vllm():
    """The names that OpenRLHF imports from vLLM."""
    inputs, utils = types.ModuleType("vllm.inputs"), types.ModuleType("vllm.utils")
    inputs.TokensPrompt, utils.random_uuid = dict, lambda: "0"
    module = types.ModuleType("vllm")
    module.SamplingParams, module.inputs, module.utils = SamplingParams, inputs, utils
    sys.modules |= {"vllm": module, "vllm.inputs": inputs, "vllm.utils": utils}
    yield
    for name in ("vllm", "vllm.inputs", "vllm.utils"):
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def file(body=""):
        path = tmp_path / "agent.py"
        path.write_text(
            "from nrt_fast.adapters import openrlhf\n\n"
            f"class AgentExecutor(openrlhf.AgentExecutor):\n    {body or 'pass'}\n"
        )
        return str(path)

    return file


@pytest.fixture
def respond(policy):
    """OpenRLHF's actor, without Ray and without its constructor, which starts vLLM."""
    from openrlhf.trainer.ray import vllm_engine

    def responses(path, row, max_length=MAX_LENGTH, **params):
        actor_class = vllm_engine.RolloutRayActor.__ray_metadata__.modified_class
        actor = object.__new__(actor_class)
        actor.executor = vllm_engine._load_agent_executor(path)
        actor.llm, actor._mm_pad_token_ids = AsyncLLMEngine(policy), None
        prompt = policy.tokenizer.decode(policy.prompt_ids(row["question"]))
        params = {"max_tokens": MAX_TRACE, "min_tokens": 1, "logprobs": 1} | params
        return asyncio.run(
            actor.generate_responses(
                prompt, row["answer"], SamplingParams(**params), max_length, policy.tokenizer, NUM_TRACES
            )
        )

    return responses


@pytest.fixture
def row():
    return tasks.rows("train", 1, seed=3)[0]


@pytest.mark.parametrize(
    ("body", "objective"),
    [("", Objective()), ("reward, reward_clip = 'gm', 'none'", Objective(reward="gm", reward_clip="none"))],
)
def test_the_actor_returns_our_reward_for_what_it_sampled(policy, write, respond, row, body, objective):
    responses = respond(write(body), row)
    given = torch.tensor([response["reward"] for response in responses])
    expected = [
        policy.reward(response["observation_tokens"][:start], response["observation_tokens"][start:end], row["answer"],
                      objective)
        for response in responses for start, end in response["action_ranges"]
    ]  # fmt: skip
    torch.testing.assert_close(given, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert given.max() > given.min()
    assert {response["extra_logs"]["nrt/delimiter_rate"] for response in responses} == {0.0, 1.0}
    assert [response["scores"] for response in responses] == [
        float(response["extra_logs"]["nrt/gain"] > 0) for response in responses
    ]
    assert [response["truncated"] for response in responses] == [
        response["extra_logs"]["nrt/delimiter_rate"] == 0 for response in responses
    ]


def test_openrlhf_makes_an_experience_of_it(write, respond, row):
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    generator = SamplesGenerator.__new__(SamplesGenerator)
    for response in respond(write(), row):
        experience = generator._process_response_into_experience(response, max_len=MAX_LENGTH)
        ((start, end),) = response["action_ranges"]
        assert experience.rewards.item() == pytest.approx(response["reward"])
        assert experience.action_mask.sum() == end - start, "trace and sampled delimiter are trained, and no more"
        assert experience.rollout_log_probs.shape == experience.action_mask.shape
        assert experience.info["nrt/gain"].item() == pytest.approx(response["extra_logs"]["nrt/gain"])


def test_a_group_asks_for_its_baseline_once(policy, write, respond, row):
    policy.scored.clear()
    respond(write(), row)
    assert len(policy.scored) == NUM_TRACES + 1


def test_a_trace_leaves_room_for_the_answer(policy, write, respond, row):
    """max_tokens None is OpenRLHF's default: as long as max_len allows. The engine above refuses what is longer."""
    for response in respond(write(), row, max_length=60, max_tokens=None):
        answer = encode_answer(row["answer"], policy.tokenizer, "")
        assert len(response["observation_tokens"]) + len(answer) + 2 <= 60 + 1  # the delimiter may be among them
    with pytest.raises(UserError, match=r"no room for a trace; valid: a longer --data\.max_len"):
        respond(write(), row, max_length=20)


def test_bad_choices_are_refused(write, respond, row):
    with pytest.raises(UserError, match="needs a whole group"):
        respond(write("reward = 'r3'"), row)
    with pytest.raises(UserError, match="one token is needed"):
        respond(write("delimiter = 'the answer'"), row)
    with pytest.raises(UserError, match="the reference answer is NoneType"):
        respond(write(), row | {"answer": None})
