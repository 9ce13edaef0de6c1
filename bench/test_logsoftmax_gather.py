"""logsoftmax_gather, forward and backward, beside the ways PyTorch offers; bf16 logits on a GPU, fp32 on a CPU."""

import functools

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import ops

V = 32_000


def gather(logits, target):
    return ops.logsoftmax_gather(logits, target)


def cross_entropy(logits, target):
    return -F.cross_entropy(logits.float(), target, reduction="none")


def logsumexp(logits, target):
    logits = logits.float()
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


CONTENDERS = (gather, cross_entropy, logsumexp)


@pytest.fixture
def inputs(device):
    generator = torch.Generator(device).manual_seed(0)
    N, dtype = (8192, torch.bfloat16) if device == "cuda" else (128, torch.float32)
    logits = torch.randn(N, V, generator=generator, device=device).to(dtype)
    return logits, torch.randint(0, V, (N,), generator=generator, device=device)


def check(function, logits, target):
    expected = logits.double().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(function(logits, target).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.benchmark(group="logsoftmax_gather, forward")
def test_forward(inputs, compare):
    for function in CONTENDERS:
        check(function, *inputs)
    with torch.no_grad():
        compare({function.__name__: functools.partial(function, *inputs) for function in CONTENDERS})


@pytest.mark.benchmark(group="logsoftmax_gather, forward and backward")
def test_forward_and_backward(inputs, compare):
    logits, target = inputs
    weight_N = torch.randn(len(target), device=logits.device)

    def step(function):
        # The copy is the matrix product's output in training: a kernel may overwrite it.
        leaf = logits.clone().requires_grad_()
        (function(leaf, target) * weight_N).sum().backward()

    compare({function.__name__: functools.partial(step, function) for function in CONTENDERS})
