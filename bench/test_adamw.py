"""One AdamW step beside torch.optim's and a copy of as many bytes, and the gradient norm beside torch's."""

import pytest
import torch

from nrt_fast import ops

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BYTES_PER_WEIGHT = 32  # 16 read and 16 written, with either kind of master; torch, which clears no gradient: 28


def contender_of_torch(weight, grad, **how):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    return parameter, torch.optim.AdamW([parameter], **HYPER, **how).step


def check(step, state, grad):
    """The first step of ours equals the first one of torch."""
    weight, remainder, ours, *_ = state
    ours.copy_(grad)
    before = weight.float()
    parameter, torch_step = contender_of_torch(before, grad)
    torch_step()
    step()
    moved = weight.float() - before
    tolerance = 2**-8 * before.abs().max().item() if remainder is not None else 2e-6
    torch.testing.assert_close(moved, parameter.detach() - before, rtol=0, atol=tolerance)
    assert not ours.any()


@pytest.mark.benchmark(group="adamw")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw(dtype, device, compare):
    size = 2**29 if device == "cuda" else 2**23
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(size, generator=generator, device=device).to(dtype)
    grad = torch.randn(size, generator=generator, device=device)
    remainder = torch.zeros(size, dtype=torch.int16, device=device) if dtype == torch.bfloat16 else None
    state = [weight, remainder, *(torch.zeros_like(grad) for _ in range(3))]
    scale = torch.ones(1, device=device)

    def ours():
        ops.adamw(*state, *HYPER.values(), size, 1, scale)

    check(ours, state, grad)
    _, fused = contender_of_torch(weight.float(), grad, fused=True)
    _, foreach = contender_of_torch(weight.float(), grad, foreach=True)
    bytes_moved = torch.empty(2, size * BYTES_PER_WEIGHT // 2, dtype=torch.uint8, device=device)
    compare(
        {"ours": ours, "fused": fused, "foreach": foreach, "copy": lambda: bytes_moved[0].copy_(bytes_moved[1])},
        rounds=9,
    )


@pytest.mark.benchmark(group="grad_norm")
def test_grad_norm(device, compare):
    grad = torch.randn(2**29 if device == "cuda" else 2**23, device=device)
    exact = grad.double().norm()
    torch.testing.assert_close(ops.grad_norm(grad).double(), exact, rtol=1e-6, atol=0)
    compare({"ours": lambda: ops.grad_norm(grad), "vector_norm": lambda: torch.linalg.vector_norm(grad)})
