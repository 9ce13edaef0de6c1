"""prime-rl's own traces, samples and loss with our algorithm in them; run by peers.py with a checkout of prime-rl."""

import asyncio

import pytest
import torch
import verifiers.v1 as vf
from prime_rl.configs.algorithm import GRPOAlgoConfig
from prime_rl.configs.trainer import CustomLossConfig
from prime_rl.orchestrator import algo
from prime_rl.orchestrator.trajectories import trace_to_samples
from prime_rl.trainer.rl.loss import compute_loss, setup_rl_loss_fn
from served_policy import DELIMITER_ID, STARTER, ServedPolicy
from verifiers.v1.graph import MessageNode

from nrt_fast.adapters.completions import split_at_delimiter
from nrt_fast.adapters.prime_rl import NRTAlgorithm
from nrt_fast.adapters.prompt_logprobs import encode_answer
from nrt_fast.config import Objective
from nrt_fast.reference.loss import cispo
from nrt_fast.starter import tasks
from nrt_fast.types import UserError

MAX_TRACE = 14


class QuestionData(vf.TaskData):
    answer: str | None = None


class Pool:
    """What algorithms see of prime-rl's InferencePool, answered by the starter model."""

    model_name = str(STARTER)

    def __init__(self, policy):
        self.policy = policy

    async def score(self, token_ids):
        await asyncio.sleep(0)
        return [0.0, *self.policy.prompt_logprobs(token_ids)]


@pytest.fixture(scope="module")
def policy():
    return ServedPolicy()


@pytest.fixture
def algorithm(policy):
    algorithm = NRTAlgorithm(GRPOAlgoConfig(), Pool(policy))
    asyncio.run(algorithm.setup())
    policy.scored.clear()
    return algorithm


def episode(policy, row, sampled=None):
    prompt = policy.prompt_ids(row["question"])
    ids, logprobs = policy.sample(prompt, MAX_TRACE) if sampled is None else (sampled, [-1.0] * len(sampled))
    *question, scaffold = prompt  # prime-rl's assistant node starts with the generation prompt
    nodes = [
        MessageNode(message=vf.UserMessage(content=row["question"]), token_ids=question, mask=[False] * len(question)),
        MessageNode(
            parent=0, message=vf.AssistantMessage(content="..."), sampled=True, token_ids=[scaffold, *ids],
            mask=[False] + [True] * len(ids), logprobs=logprobs,
        ),
    ]  # fmt: skip
    task = vf.TraceTask(type="Task", data=QuestionData(idx=7, answer=row["answer"]))
    trace = vf.Trace(task=task, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes, ok=True)
    return vf.Episode(env=vf.EnvInfo(id="e", name="e"), task=task, group=vf.GroupInfo(id="g"), traces=[trace])


@pytest.fixture
def group(policy):
    """Sampled traces, one that is cut, and the empty one."""
    row = tasks.rows("train", 1, seed=3)[0]
    return [episode(policy, row, sampled) for sampled in (None, None, None, [9, 10], [DELIMITER_ID])]


def test_traces_earn_our_reward_and_ship_the_answer_as_cross_entropy(policy, algorithm, group):
    asyncio.run(algorithm.finalize_group(group))
    traces = [one.traces[0] for one in group]
    samples = [trace_to_samples(trace)[0] for trace in traces]
    answer = encode_answer(traces[0].task.data.answer, policy.tokenizer, "")
    expected = []
    for sample in samples:
        start = sample.mask.index(True)
        end = start + sum(sample.mask)
        prompt, sampled = sample.token_ids[:start], sample.token_ids[start:end]
        expected.append(policy.reward(prompt, sampled, traces[0].task.data.answer, Objective()))
        trace, closed = split_at_delimiter(sampled, DELIMITER_ID)
        appended = [] if closed else [DELIMITER_ID]
        assert sample.token_ids == [*prompt, *trace, DELIMITER_ID, *answer]
        assert sample.token_ids[end:] == appended + answer
        assert sample.ce_weights == [0.0] * end + [0.3] * len(appended) + [1.0] * len(answer)
        assert sample.rl_weights is None and not any(sample.mask[end:])
    given, expected = torch.tensor([trace.reward for trace in traces]), torch.tensor(expected)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert given.max() > 0 and given[-1] == 0
    assert {trace.metrics["nrt/delimiter_rate"] for trace in traces} == {0.0, 1.0}
    for sample, advantage in zip(samples, given - given.mean()):
        assert sample.advantages == pytest.approx([float(advantage) * trains for trains in sample.mask], abs=1e-5)


def test_a_group_asks_for_its_baseline_once(policy, algorithm, group):
    asyncio.run(algorithm.finalize_group(group))
    assert len(policy.scored) == len(group) + 1


def test_an_environments_own_rewards_stay(policy, algorithm, group):
    group[-1].traces[0].rewards["style"] = vf.Reward(score=0.5, weight=2.0)
    asyncio.run(algorithm.finalize_group(group))
    assert group[-1].traces[0].reward == 1.0


def test_several_turns_and_missing_answers_are_refused(policy, algorithm):
    row = tasks.rows("train", 1, seed=3)[0]
    two_turns = episode(policy, row)
    trace = two_turns.traces[0]
    trace.nodes.append(MessageNode(parent=1, message=vf.UserMessage(content="go on"), token_ids=[9], mask=[False]))
    with pytest.raises(UserError, match="task 7: a trace has several turns"):
        asyncio.run(algorithm.finalize_group([two_turns]))
    with pytest.raises(UserError, match="task 7: the reference answer is NoneType"):
        asyncio.run(algorithm.finalize_group([episode(policy, row | {"answer": None})]))


def test_it_stands_where_grpo_stands(policy, monkeypatch):
    """The one line that docs/embedding.md asks for."""
    monkeypatch.setitem(algo.ALGORITHM_CLASSES, "grpo", NRTAlgorithm)
    assert type(algo.build_algorithm(GRPOAlgoConfig(), Pool(policy))) is NRTAlgorithm


def test_the_custom_loss_adds_up_in_prime_rls(policy, algorithm, group):
    asyncio.run(algorithm.finalize_group(group))
    samples = [trace_to_samples(one.traces[0])[0] for one in group]
    torch.manual_seed(0)
    inference = [torch.tensor(sample.logprobs) for sample in samples]
    trainer = [(logprob - 0.3 * torch.randn(len(logprob)).abs()).requires_grad_() for logprob in inference]
    mask = [torch.tensor(sample.mask) for sample in samples]
    advantages = [torch.tensor(sample.advantages) * 10 for sample in samples]
    weights = [torch.tensor(sample.ce_weights) for sample in samples]
    config = CustomLossConfig(import_path="nrt_fast.adapters.prime_rl.cispo_loss", kwargs={"epsilon_high": 0.25})
    rl_scale, ce_scale = int(sum(m.sum() for m in mask)), int(sum((w != 0).sum() for w in weights))
    loss, metrics = compute_loss(
        trainer_logprobs=trainer, inference_logprobs=inference, ref_logprobs=None, advantages=advantages,
        loss_mask=mask, rl_weights=None, ce_weights=weights, ref_kl_weights=None, rl_loss_fn=setup_rl_loss_fn(config),
        rl_scale=rl_scale, ce_scale=ce_scale, ref_kl_scale=1,
    )  # fmt: skip
    by_hand = sum(
        cispo(t[m], (t[m] - i[m]).exp(), a[m], 0.8, 1.25).sum() / rl_scale - (w * t).sum() / ce_scale
        for t, i, a, m, w in zip(trainer, inference, advantages, mask, weights)
    )
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(t.grad[w != 0].all() and not t.grad[~m & (w == 0)].any() for t, m, w in zip(trainer, mask, weights))
    assert len(metrics["is_masked"]) == len(samples) and 0 < metrics["is_masked"].max() <= 1
