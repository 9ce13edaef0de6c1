"""What the tests of the linear_logprob family share: backends with their dtypes, hostile inputs, fp64 oracles."""

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import ops
from nrt_fast.reference import loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no bf16 arithmetic
BACKENDS = {
    "reference": (torch.float32, torch.bfloat16),
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, HALF),
}
CASES = [(backend, dtype) for backend, dtypes in BACKENDS.items() for dtype in dtypes]
CASE_IDS = [f"{backend}-{dtype}".replace("torch.", "") for backend, dtype in CASES]
TRACE_LOSSES = {"cispo": loss.cispo, "ppo": loss.ppo, "reinforce": loss.reinforce}


def device_of(backend):
    return "cpu" if backend == "native" else DEVICE


def skip_unless_here(backend):
    """Skip, with the reason, where a backend cannot run the ops of this family."""
    for op in ("linear_logprob", "linear_logprob_stats", "linear_logprob_loss"):
        try:
            ops._choose(op, device_of(backend), backend)
        except LookupError as error:
            pytest.skip(str(error))


def make_inputs(N, V, D, dtype, device):
    """(hidden, weight, target, inverse temperature): some outliers, a certain target, a uniform distribution."""
    generator = torch.Generator().manual_seed(N * V + D)
    hidden = torch.randn(N, D, generator=generator)
    weight = 2.5 * D**-0.5 * torch.randn(V, D, generator=generator)
    weight[7] *= 6
    target = torch.randint(0, V, (N,), generator=generator)
    inv_temperature = 0.5 + torch.rand(N, generator=generator)
    if N > 3:
        hidden[0] = 25 * weight[target[0]] / weight[target[0]].square().sum()
        hidden[1] = 0
        target[2] = V - 1
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device), inv_temperature.to(device)


def exact_stats(hidden, weight, target, inv_temperature=None):
    """(log-probability, log-sum-exp, entropy) in fp64, differentiable."""
    logits = hidden.double() @ weight.double().T
    return stats_of(logits if inv_temperature is None else logits * inv_temperature.double()[:, None], target)


def plain_stats(hidden, weight, target, inv_temperature):
    """The same as PyTorch users write it, in the operands' dtype."""
    return stats_of(F.linear(hidden, weight).float() * inv_temperature[:, None], target)


def stats_of(logits, target):
    logprobs = logits.log_softmax(dim=1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(dim=1)
    return logprobs.gather(1, target[:, None]).squeeze(1), logits.logsumexp(dim=1), entropy


def assert_error_is_that_of_pytorch(ours, plain, exact):
    """At most twice PyTorch's largest error in the same dtype, plus 1e-5 of the value."""
    assert ours.shape == exact.shape
    if exact.numel():
        error, allowed = (ours.double() - exact).abs(), 2 * (plain.double() - exact).abs().max()
        assert (error <= allowed + 1e-5 * exact.abs().clamp(min=1)).all(), (error.max(), allowed)
