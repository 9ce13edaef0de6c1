"""linear_logprob_loss with its gradients beside three bare matrix products and PyTorch's autograd."""

import pytest
import torch
from conftest import DEVICE
from linear_logprob_peers import DTYPES, make_inputs, peers

from nrt_fast import ops

OPTIONS = ("cispo", 0.8, 1.28, 0.0, 0.0, 1e-3)  # no KL, no entropy: what the peers compute, too


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, (hidden, weight))


def three_products(hidden, weight):
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    return run


def check(ours, hidden, weight, target, token_weight):
    """Against autograd in fp32, relative to the largest gradient."""
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    logprob = (wide[0] @ wide[1].T).log_softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    expected = gradients(-1e-3 * (token_weight * logprob).sum(), *wide)
    tolerance = 1e-5 if hidden.dtype == torch.float32 else 1e-2
    for our, true in zip(ours, expected, strict=True):
        assert (our.float() - true).abs().max() <= tolerance * true.abs().max()


@pytest.fixture(params=DTYPES[DEVICE], ids=str)
def inputs(request, device):
    hidden, weight, target = make_inputs(device, request.param)
    token_weight = torch.randn(len(target), generator=torch.Generator().manual_seed(1)).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), target, token_weight


def ours(inputs):
    """Gradients of the policy-gradient loss of on-policy tokens: those of the peers' weighted log-probabilities."""
    hidden, weight, target, token_weight = (x.detach() for x in inputs)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    policy = torch.ones_like(target, dtype=torch.bool)
    *_, grad_hidden = ops.linear_logprob_loss(
        hidden, weight, target, None, token_weight, policy, None, None, grad_weight, *OPTIONS
    )
    return grad_hidden, grad_weight


@pytest.mark.benchmark(group="linear_logprob_loss, forward and backward")
def test_linear_logprob_loss(inputs, compare):
    check(ours(inputs), *inputs)
    contenders = {"linear_logprob_loss": lambda: ours(inputs)}
    compare(contenders | {"three bare matrix products": three_products(*inputs[:2])})


@pytest.mark.benchmark(group="linear_logprob_loss, forward and backward, beside its peers")
def test_peers(inputs, compare):
    *arguments, token_weight = inputs

    def step(logprob):
        return lambda: gradients((token_weight * logprob()).sum(), *arguments[:2])

    theirs = {name: step(logprob) for name, logprob in peers(*arguments).items()}
    compare({"linear_logprob_loss": lambda: ours(inputs)} | theirs, rounds=5)
