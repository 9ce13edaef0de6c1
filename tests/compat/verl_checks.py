"""verl's own worker, registry and loss with our agent loop in them; run by peers.py with verl installed."""

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import verl
from hydra import compose, initialize_config_dir
from served_policy import DELIMITER_ID, STARTER, ServedPolicy
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker, _agent_loop_registry
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from nrt_fast.adapters import verl as adapter
from nrt_fast.config import Objective
from nrt_fast.reference.loss import cispo
from nrt_fast.starter import tasks
from nrt_fast.types import UserError

NUM_TRACES, MAX_PROMPT, MAX_TRACE = 4, 64, 14


class Client(LLMServerClient):
    """verl's client of its servers, without servers: the method that agent loops call answers by the starter model."""

    def __init__(self, config, policy):
        super().__init__(config)
        self.policy = policy

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs) -> TokenOutput:
        """As verl's vLLM server: ``prompt_logprobs`` in extra_fields, one list a position, padded by one at the end."""
        await asyncio.sleep(0)
        params = dict(sampling_params)
        if params.get("prompt_logprobs") is None:
            assert params["stop_token_ids"] == [DELIMITER_ID]
            ids, logprobs = self.policy.sample(prompt_ids, self.config.actor_rollout_ref.rollout.response_length)
            return TokenOutput(token_ids=ids, log_probs=logprobs, stop_reason="completed", extra_fields={"x": 1})
        assert params == {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        told = {"prompt_logprobs": [[logprob] for logprob in self.policy.prompt_logprobs(prompt_ids)] + [[0.0]]}
        return TokenOutput(token_ids=[0], log_probs=None, stop_reason="completed", extra_fields=told)


@pytest.fixture(scope="module")
def policy():
    return ServedPolicy()


@pytest.fixture
def config(policy):
    folder = Path(verl.__file__).parent / "trainer/config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=[
            f"actor_rollout_ref.model.path={STARTER}", "actor_rollout_ref.model.external_lib=nrt_fast.adapters.verl",
            "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.agent.default_agent_loop=nrt",
            f"actor_rollout_ref.rollout.prompt_length={MAX_PROMPT}",
            f"actor_rollout_ref.rollout.response_length={MAX_TRACE}",
            "actor_rollout_ref.rollout.calculate_log_probs=true", "actor_rollout_ref.rollout.max_model_len=4096",
            "actor_rollout_ref.actor.policy_loss.loss_mode=nrt", "actor_rollout_ref.actor.clip_ratio_high=0.28",
            "algorithm.adv_estimator=grpo", "algorithm.norm_adv_by_std_in_grpo=False", "trainer.v1.trainer_mode=sync",
        ])  # fmt: skip
    return config


@pytest.fixture
def batch():
    rows = [row for row in tasks.rows("train", 2, seed=3) for _ in range(NUM_TRACES)]
    columns = {
        "raw_prompt": [[{"role": "user", "content": row["question"]}] for row in rows],
        "reward_model": [{"style": "rule", "ground_truth": row["answer"]} for row in rows],
        "uid": [f"uid-{number // NUM_TRACES}" for number in range(len(rows))],
        "index": list(range(len(rows))),
    }
    arrays = {name: np.empty(len(rows), dtype=object) for name in columns}
    for name, values in columns.items():
        arrays[name][:] = values
    return DataProto.from_dict(tensors={}, non_tensors=arrays, meta_info={"global_steps": 1})


def generate(config, policy, batch, client=Client):
    worker = AgentLoopWorker(config, client(config, policy))
    return asyncio.run(worker.generate_sequences(batch))


def expected_rewards(policy, output, batch, objective):
    """By the engine, from the ids that verl will train."""
    rows = zip(output.batch["prompts"], output.batch["attention_mask"], output.batch["responses"],
               output.batch["response_mask"], batch.non_tensor_batch["reward_model"])  # fmt: skip
    return torch.tensor([
        policy.reward(
            prompt[mask[:MAX_PROMPT].bool()].tolist(), response[sampled.bool()].tolist(), row["ground_truth"], objective
        )
        for prompt, mask, response, sampled, row in rows
    ])  # fmt: skip


def test_a_worker_returns_our_reward_for_what_it_sampled(config, policy, batch):
    output = generate(config, policy, batch)
    given = output.batch["rm_scores"].sum(dim=1)
    torch.testing.assert_close(given, expected_rewards(policy, output, batch, Objective()), rtol=1e-4, atol=1e-5)
    assert given.max() > 0
    last = output.batch["response_mask"].sum(dim=1) - 1
    assert (output.batch["rm_scores"].gather(1, last[:, None]).squeeze(1) == given).all(), "at the last sampled token"
    assert set(output.meta_info["reward_extra_keys"]) == {"nrt/gain", "nrt/delimiter_rate"}
    assert set(output.non_tensor_batch["nrt/delimiter_rate"]) == {0.0, 1.0}, "traces of both kinds are needed"


def test_a_group_asks_for_its_baseline_once(config, policy, batch):
    policy.scored.clear()
    generate(config, policy, batch)
    assert len(policy.scored) == 2 * (NUM_TRACES + 1)


def test_choices_come_from_the_agent_loop_file(config, policy, batch, tmp_path, monkeypatch):
    monkeypatch.setitem(_agent_loop_registry, "nrt", {})  # put back afterwards
    path = tmp_path / "nrt.yaml"
    path.write_text(
        "- name: nrt\n  _target_: nrt_fast.adapters.verl.NRTAgentLoop\n  reward: gm\n  reward_clip: none\n"
        "  delimiter: </think>\n"
    )
    config.actor_rollout_ref.rollout.agent.agent_loop_config_path = str(path)
    output = generate(config, policy, batch)
    expected = expected_rewards(policy, output, batch, Objective(reward="gm", reward_clip="none"))
    torch.testing.assert_close(output.batch["rm_scores"].sum(dim=1), expected, rtol=1e-4, atol=1e-6)
    path.write_text("- name: nrt\n  _target_: nrt_fast.adapters.verl.NRTAgentLoop\n  reward: r3\n")
    with pytest.raises(Exception, match="needs a whole group"):
        generate(config, policy, batch)


def test_a_client_that_drops_logprobs_is_refused(config, policy, batch):
    class Dropping(Client, FullyAsyncLLMServerClient):
        async def generate(self, request_id, **kwargs):
            output = await super().generate(request_id, **kwargs)
            output.extra_fields.pop("prompt_logprobs", None)
            return output

    with pytest.raises(UserError, match="Dropping gave no prompt_logprobs"):
        generate(config, policy, batch, Dropping)


def test_verls_own_asynchronous_client_drops_them():
    source = inspect.getsource(FullyAsyncLLMServerClient.generate)
    assert "final_output" in source and "prompt_logprobs" not in source


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_policy_loss_is_ours_under_verls_normaliser(mode):
    torch.manual_seed(0)
    old, advantages = -torch.rand(3, 5), torch.randn(3, 1).expand(3, 5)
    logprob = (old + 0.5 * torch.randn(3, 5)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    actor = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.28
    )
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=22, global_batch_size=3, loss_scale_factor=None)
    assert get_policy_loss_fn("nrt") is adapter.policy_loss
    loss, metrics = get_policy_loss_fn("nrt")(
        old_log_prob=old, log_prob=logprob, advantages=advantages, response_mask=mask, loss_agg_mode=mode, config=actor,
        rollout_is_weights=None,
    )  # fmt: skip
    ratio = (logprob.detach() - old).exp()
    tokens = cispo(logprob, ratio, advantages, 0.8, 1.28) * mask
    by_hand = tokens.sum() / 22 if mode == "token-mean" else (tokens.sum(1) / mask.sum(1)).sum() / 3
    torch.testing.assert_close(loss, by_hand)
    (given,) = torch.autograd.grad(loss, logprob)
    outside = (((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))) & mask
    assert outside.any() and not given[outside].any() and not given[~mask].any()
    assert given[mask & ~outside].all()
    share = (((ratio < 0.8) | (ratio > 1.28)) & mask).sum() / mask.sum()
    assert metrics == {"actor/pg_clipfrac": pytest.approx(float(share))}


@pytest.mark.parametrize("how", ["external_lib", "VERL_USE_EXTERNAL_MODULES"])
def test_verl_finds_both_by_name(how):
    environment = {} if how == "external_lib" else {how: "nrt_fast.adapters.verl"}
    load = f"HFModelConfig(path={str(STARTER)!r}, external_lib='nrt_fast.adapters.verl')" if not environment else "0"
    code = (
        "import verl\nfrom verl.workers.config import HFModelConfig\n"
        f"{load}\n"
        "from verl.experimental.agent_loop.agent_loop import _agent_loop_registry\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY\n"
        "print(_agent_loop_registry['nrt']['_target_'], POLICY_LOSS_REGISTRY['nrt'].__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.split()[-2:] == ["nrt_fast.adapters.verl.NRTAgentLoop", "policy_loss"], result.stderr
