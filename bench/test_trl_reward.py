"""The reward through TRL's own call beside a reward function as one would write it: a forward pass a completion.

The trainer is a stand-in with what the adapter asks of one, so that nothing but the rewards is timed.
"""

import pytest
import torch
from engine_peers import DTYPES, NEW, PROMPT, SHAPES, G, P, make_ids, make_module, small_llama
from train_peers import geometric_lengths
from trl_stand_in import DELIMITER, EOS, TrainerStandIn, naive_logprobs, word_tokenizer

from nrt_fast.adapters.trl import NRTReward

ANSWER = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of a reward


def naive_reward(module, prompts, completion_ids, answers):
    """mean of c (-log b) over the answer, minus that of an empty trace, clipped at 0: two forward passes a row."""
    rewards = []
    for prompt, ids, answer in zip(prompts, completion_ids, answers, strict=True):
        contexts = [*prompt, *ids, DELIMITER], [*prompt, DELIMITER]
        log_c, log_b = (torch.tensor(naive_logprobs(module, context, answer)) for context in contexts)
        rewards.append(float(((log_c.exp() - log_b.exp()) * -log_b).mean().clamp(min=0)))
    return rewards


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu_suite.py has the sizes of a GPU")
@pytest.mark.benchmark(group="reward through TRL")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_trl_reward(dtype, compare):
    shape = SHAPES["256-6-4096"][0]
    module, vocabulary = make_module(small_llama(*shape), dtype, context=512), shape[2]

    def ids(*size, seed):
        return (make_ids(vocabulary - 1, *size, seed=seed) + 1).tolist()  # without the delimiter

    prompts, answers = ids(P, PROMPT, seed=0), [[*answer, EOS] for answer in ids(P, ANSWER - 1, seed=1)]
    traces = [ids(size, seed=n) for n, size in enumerate(geometric_lengths(NEW))]
    tokenizer, rows = word_tokenizer("</think>", size=vocabulary), [row // G for row in range(P * G)]
    trainer, reward = TrainerStandIn(module, tokenizer), NRTReward()
    columns = {
        "prompts": tokenizer.batch_decode([prompts[p] for p in rows]), "completions": [""] * len(rows),
        "completion_ids": [[*trace, DELIMITER] for trace in traces],
        "answer": tokenizer.batch_decode([answers[p][:-1] for p in rows]),
    }  # fmt: skip

    def ours():
        return reward.bind(trainer)(**columns)

    def naive():
        return naive_reward(module, [prompts[p] for p in rows], traces, [answers[p] for p in rows])

    assert ours() == pytest.approx(naive(), abs=TOLERANCE[dtype])
    compare({"NRTReward": ours, "a forward pass a completion": naive}, rounds=3, warmup_rounds=0)
