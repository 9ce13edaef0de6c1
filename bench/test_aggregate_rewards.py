"""Rewards of 256 groups of 8 traces: one launch beside PyTorch group by group, and beside PyTorch on padded answers."""

from itertools import accumulate

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference.rewards import MIN_LOG_B, aggregate_rewards

NUM_PROMPTS, NUM_TRACES, MEAN_TOKENS = 256, 8, 400
TINY = torch.finfo(torch.float32).tiny
CHOICES = {  # reward, scale, clip, advantage, answer weight, std floor, drop cut traces, format
    "nrt-ws": ("ws_log", "length", "zero", "grpo", "fixed", 0.002, False, 0.0),
    "nrt-derived": ("ws_log", "length", "zero", "grpo", "derived", 0.002, False, 0.0),
    "r3": ("r3", "length", "none", "grpo", "derived", 0.002, False, 0.0),
}


@pytest.fixture
def scores(device):
    """Answers of 1 to 800 tokens."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = torch.randint(1, 2 * MEAN_TOKENS, (NUM_PROMPTS,), generator=generator).tolist()

    def offsets(sizes):
        return torch.tensor([0, *accumulate(sizes)], device=device)

    def logprobs(size):
        return (-8 * torch.rand(size, generator=generator) ** 3).to(device)

    num_scores = [NUM_TRACES * size for size in num_tokens]
    closed = torch.ones(NUM_PROMPTS * NUM_TRACES, dtype=torch.bool, device=device)
    sizes = num_tokens, [NUM_TRACES] * NUM_PROMPTS, num_scores
    return logprobs(sum(num_scores)), logprobs(sum(num_tokens)), closed, *map(offsets, sizes)


class Padded:
    """The same by PyTorch on [P, G, longest answer], groups of one size; padding and its indices are made once."""

    def __init__(self, logc_C, logb_A, _, cu_answers, __, cu_scores):
        lengths_P = cu_answers.diff()
        token = torch.arange(int(lengths_P.max()), device=logc_C.device)
        self.length_P1 = lengths_P[:, None]
        self.inside_PA = token < self.length_P1
        trace = torch.arange(NUM_TRACES, device=logc_C.device)[:, None]
        self.inside_PGA = self.inside_PA[:, None].expand(-1, NUM_TRACES, -1)
        self.places_PA = (cu_answers[:-1, None] + token).where(self.inside_PA, 0)
        places_PGA = cu_scores[:-1, None, None] + trace * lengths_P[:, None, None] + token
        self.places_PGA = places_PGA.where(self.inside_PGA, 0)

    def __call__(self, logc_C, logb_A, _, __, ___, ____, reward, _____, clip, ______, answer_weight, floor, *_______):
        logc = logc_C[self.places_PGA].where(self.inside_PGA, 0.0)
        logb = logb_A[self.places_PA].clamp(MIN_LOG_B, 0.0).where(self.inside_PA, 0.0)
        if reward == "r3":
            spread = logc.std(dim=1)
            share = spread / spread.sum(1, keepdim=True).clamp(min=TINY) / self.length_P1
            weight = share[:, None].expand_as(logc)
            raw, base = ((logc - logb[:, None]) * weight).sum(2), torch.zeros_like(logb[:, 0])
        else:
            share = -logb / self.length_P1
            weight = logc.exp() * share[:, None]
            raw, base = weight.sum(2), (logb.exp() * share).sum(1)
        shaped = (raw - base[:, None]).clamp(min=0.0) if clip == "zero" else raw
        std, mean = torch.std_mean(shaped, dim=1, keepdim=True)
        signal = std > floor
        advantage = ((shaped - mean) / std).where(signal, 0.0)
        token_weight = weight[self.inside_PGA] if answer_weight == "derived" else torch.ones_like(logc_C)
        return raw.flatten(), base, shaped.flatten(), advantage.flatten(), signal.flatten(), token_weight


@pytest.mark.benchmark(group="aggregate_rewards, 256 groups of 8 traces")
@pytest.mark.parametrize("preset", CHOICES)
def test_aggregate_rewards(preset, scores, compare):
    arguments, padded = (*scores, *CHOICES[preset]), Padded(*scores)
    contenders = {
        "ours": lambda: ops.aggregate_rewards(*arguments),
        "PyTorch, padded": lambda: padded(*arguments),
        "PyTorch, group by group": lambda: aggregate_rewards(*arguments),
    }
    exact = aggregate_rewards(*(x.double() if x.is_floating_point() else x for x in scores), *CHOICES[preset])
    for contender in contenders.values():
        for ours, true in zip(contender(), exact, strict=True):
            torch.testing.assert_close(ours.to(true.dtype), true, rtol=1e-4, atol=1e-5)
    compare(contenders)
