"""The reward through TRL's own call beside a reward function as one would write it: a forward pass a completion.

The trainer is a stand-in with what the adapter asks of one, so that nothing but the rewards is timed.
"""

from types import SimpleNamespace

import pytest
import torch
from engine_peers import DELIMITER, DTYPES, EOS, NEW, G, P, make_ids, make_setting
from tokenizers import Tokenizer, models, pre_tokenizers
from train_peers import geometric_lengths
from transformers import PreTrainedTokenizerFast

from nrt_fast.adapters.trl import NRTReward

ANSWER = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of a reward


def make_tokenizer(vocabulary):
    """Each id is a word; the special ones look otherwise, since they are found within words."""
    names = {EOS: "<eos>", DELIMITER: "</think>"}
    backend = Tokenizer(
        models.WordLevel({names.get(index, str(index)): index for index in range(vocabulary)}, unk_token="0")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


class StandIn:
    """A trainer of TRL 1.0 or later, as far as the reward looks."""

    def __init__(self, module, tokenizer):
        self.model, self.processing_class = module, tokenizer
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.state = SimpleNamespace(global_step=0)

    def _tokenize_prompts(self, prompts):
        return self.processing_class(prompts, add_special_tokens=False)["input_ids"], None, {}


def words(ids):
    return " ".join(map(str, ids))


@torch.inference_mode()
def logprobs(module, context, answer):
    logits = module(torch.tensor([context + answer]), use_cache=False).logits[0, len(context) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def naive_reward(module, prompts, completion_ids, answers):
    """mean of c (-log b) over the answer, minus that of an empty trace, clipped at 0: two forward passes a row."""
    rewards = []
    for prompt, ids, answer in zip(prompts, completion_ids, answers, strict=True):
        log_c = logprobs(module, [*prompt, *ids, DELIMITER], answer)
        log_b = logprobs(module, [*prompt, DELIMITER], answer)
        rewards.append(float(((log_c.exp() - log_b.exp()) * -log_b).mean().clamp(min=0)))
    return rewards


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu_suite.py has the sizes of a GPU")
@pytest.mark.benchmark(group="reward through TRL")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_trl_reward(dtype, compare):
    module, _, prompts = make_setting("256-6-4096", dtype, "cpu")
    vocabulary = module.config.vocab_size
    answers = [[*ids, EOS] for ids in make_ids(vocabulary, P, ANSWER - 1, seed=1).tolist()]
    traces = [make_ids(vocabulary, size, seed=n).tolist() for n, size in enumerate(geometric_lengths(NEW))]
    tokenizer = make_tokenizer(vocabulary)
    trainer, reward = StandIn(module, tokenizer), NRTReward()
    rows = [row // G for row in range(P * G)]
    columns = {
        "prompts": [words(prompts[p]) for p in rows], "completions": [""] * len(rows),
        "completion_ids": [[*ids, DELIMITER] for ids in traces],
        "answer": [words(answers[p][:-1]) for p in rows],
    }  # fmt: skip

    def ours():
        return reward.bind(trainer)(**columns)

    def naive():
        return naive_reward(module, [prompts[p] for p in rows], traces, [answers[p] for p in rows])

    assert ours() == pytest.approx(naive(), abs=TOLERANCE[dtype])
    compare({"NRTReward": ours, "a forward pass a completion": naive}, rounds=3, warmup_rounds=0)
