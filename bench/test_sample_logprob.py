"""sample_logprob beside PyTorch's ways to draw an id and its log-probability, at decode sizes."""

import pytest
import torch

from nrt_fast import ops

TEMPERATURE = 0.8


def ours(logits, uniform):
    return ops.sample_logprob(logits, uniform, TEMPERATURE)


def multinomial(logits, _):
    probability = (logits / TEMPERATURE).softmax(dim=-1)
    ids = probability.multinomial(1)
    return ids.squeeze(1), probability.gather(1, ids).log_().squeeze(1)


def gumbel(logits, _):
    logprob = (logits / TEMPERATURE).log_softmax(dim=-1)
    ids = (logprob - torch.empty_like(logprob).exponential_().log_()).argmax(dim=-1, keepdim=True)
    return ids.squeeze(1), logprob.gather(1, ids).squeeze(1)


def reference(logits, uniform):
    with ops.use("reference"):
        return ours(logits, uniform)


def check(function, logits, uniform):
    ids, logprob = function(logits, uniform)
    expected = (logits.double() / TEMPERATURE).log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=2e-5 if function is ours else 1e-4)


@pytest.mark.benchmark(group="sample_logprob")
@pytest.mark.parametrize("V", [512, 4096, 32_000])
def test_sample_logprob(V, device, compare):
    N, V = (256, 128_256 if V == 32_000 else V) if device == "cuda" else (64, V)
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(N, V, generator=generator, device=device)
    uniform = torch.rand(N, generator=generator, device=device, dtype=torch.float64)
    contenders = (ours, multinomial, gumbel, reference)
    for contender in contenders:
        check(contender, logits, uniform)
    compare({contender.__name__: lambda contender=contender: contender(logits, uniform) for contender in contenders})
