"""AdamW against PyTorch's, bf16 weights against their fp32 master, and the learning rate of each step."""

import math
from itertools import islice
from math import prod

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nrt_fast import ops
from nrt_fast.optim import AdamW, learning_rate
from nrt_fast.reference.adamw import join_master
from nrt_fast.types import UserError

HYPER = {"betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}
SIZE, NUM_DECAYED = 500, 300


def random_start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(SIZE, generator=generator)
    # Gradients of very different sizes, some of them 0.
    scale = 10.0 ** torch.linspace(-6, 1, SIZE)
    return weights, (torch.randn(SIZE, generator=generator) * scale * (torch.arange(SIZE) % 7 > 0) for _ in range(100))


def torch_adamw(weights, lr):
    parts = [weights[:NUM_DECAYED].clone().requires_grad_(), weights[NUM_DECAYED:].clone().requires_grad_()]
    groups = [{"params": parts[:1]}, {"params": parts[1:], "weight_decay": 0.0}]
    return parts, torch.optim.AdamW(groups, lr=lr, **HYPER)


@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.5])
def test_equals_torch_in_fp32(max_grad_norm):
    weights, gradients = random_start()
    flat = weights.clone()
    optimizer = AdamW(flat, (), NUM_DECAYED, **HYPER)
    parts, theirs = torch_adamw(weights, lr=1e-2)
    for step, gradient in enumerate(gradients, start=1):
        lr = 1e-2 / step
        optimizer.grad.copy_(gradient)
        norm = optimizer.step(lr, max_grad_norm)
        parts[0].grad, parts[1].grad = gradient[:NUM_DECAYED].clone(), gradient[NUM_DECAYED:].clone()
        their_norm = torch.nn.utils.clip_grad_norm_(parts, max_grad_norm)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        assert norm == pytest.approx(float(their_norm), rel=1e-6)
        assert not optimizer.grad.any()
    torch.testing.assert_close(flat, torch.cat(parts).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_state_never_move(dtype):
    """A captured CUDA graph reads the addresses it has seen: steps and checkpoints write in place."""
    weights, gradients = random_start()
    flat = weights.to(dtype, copy=True)
    optimizer = AdamW(flat, (), NUM_DECAYED, **HYPER)

    def addresses():
        tensors = {"weights": optimizer.flat, "grad": optimizer.grad, **optimizer.state()}
        return {name: tensor.data_ptr() for name, tensor in tensors.items() if name != "num_steps"}

    before = addresses()
    optimizer.grad.copy_(next(gradients))
    optimizer.step(1e-2, 1.0)
    optimizer.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    assert addresses() == before
    assert not torch.equal(flat, weights.to(dtype))


def test_bfloat16_follows_an_fp32_master_bit_for_bit():
    weights, gradients = random_start()
    master, half = weights.bfloat16().float(), weights.bfloat16()
    ours, theirs = AdamW(half, (), NUM_DECAYED, **HYPER), AdamW(master, (), NUM_DECAYED, **HYPER)
    for gradient in gradients:
        ours.grad.copy_(gradient)
        theirs.grad.copy_(gradient)
        assert ours.step(1e-3, 1.0) == theirs.step(1e-3, 1.0)
        assert torch.equal(join_master(half, ours.remainder).view(torch.int32), master.view(torch.int32))
        assert ((half.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()
    assert not torch.equal(half, weights.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [1e-6, 1e-3])
def test_a_thousand_steps_are_those_of_torch_in_fp32(lr, dtype):
    """Within 1e-6 of the weights, their norm, after each step; bf16 weights by their master."""
    generator = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(SIZE, generator=generator)).bfloat16().float()
    scale = 10.0 ** torch.linspace(-6, 1, SIZE)
    flat = weights.to(dtype, copy=True)
    ours, (parts, theirs) = AdamW(flat, (), NUM_DECAYED, **HYPER), torch_adamw(weights, lr)
    for _ in range(1000):
        gradient = scale * (torch.randn(SIZE, generator=generator) + 0.5)
        ours.grad.copy_(gradient)
        ours.step(lr, math.inf)
        parts[0].grad, parts[1].grad = gradient[:NUM_DECAYED].clone(), gradient[NUM_DECAYED:].clone()
        theirs.step()
        master, expected = flat if ours.remainder is None else join_master(flat, ours.remainder), torch.cat(parts)
        assert (master - expected).norm() <= 1e-6 * expected.norm()
    assert (expected - weights).abs().mean() > 100 * lr


def test_at_the_learning_rate_of_rl_plain_bfloat16_loses_the_updates_and_ours_does_not():
    generator = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(SIZE, generator=generator)).bfloat16()
    ours, plain, full = weights.clone(), weights.clone().requires_grad_(), weights.float().requires_grad_()
    hyper = HYPER | {"weight_decay": 0.0}
    optimizer = AdamW(ours, (), 0, **hyper)
    others = [torch.optim.AdamW([weight], lr=1e-6, **hyper) for weight in (plain, full)]
    for _ in range(500):
        optimizer.grad.copy_(torch.randn(SIZE, generator=generator) + 0.5)
        plain.grad, full.grad = optimizer.grad.bfloat16(), optimizer.grad.clone()
        optimizer.step(1e-6, math.inf)
        for other in others:
            other.step()
    moved = full.detach() - weights.float()
    assert (moved.abs() > 1e-4).float().mean() > 0.9
    assert (plain == weights).float().mean() > 0.9, "an update is a fraction of a spacing: the weights stay"
    assert (plain.detach().float() - full).norm() > 0.9 * moved.norm()
    assert (join_master(ours, optimizer.remainder) - full).norm() < 1e-4 * moved.norm()
    assert (ours == weights).float().mean() < 0.1


def test_small_steps_are_not_lost_in_bfloat16():
    """Steps of a thousandth of a bf16 spacing move the weight after enough of them."""
    half = torch.ones(1, dtype=torch.bfloat16)
    optimizer = AdamW(half, (), 0, (0.0, 0.0), 1e-15, 0.0)
    for _ in range(2000):
        optimizer.grad.fill_(1.0)
        optimizer.step(2.0**-18, math.inf)
    assert half.item() == pytest.approx(1 - 2000 * 2.0**-18, abs=2.0**-9)
    assert half.item() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_several_passes_add_up_in_fp32(dtype):
    flat = torch.zeros(6, dtype=dtype)
    leaves = [flat[:4].view(2, 2).requires_grad_(), flat[4:].view(2).requires_grad_()]
    optimizer = AdamW(flat, leaves, 4, **HYPER)
    for value in (256.0, 1.0, 1.0):
        (leaves[0].sum() * value).backward()
    (leaves[1] * torch.tensor([3, 4])).sum().backward()
    assert optimizer.grad.tolist() == [258.0] * 4 + [3.0, 4.0]  # bf16 would have said 256
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value, max_grad_norm):
    flat = torch.ones(3)
    optimizer = AdamW(flat, (), 3, **HYPER)
    optimizer.grad[1] = value
    assert not math.isfinite(optimizer.step(0.1, max_grad_norm))
    assert flat.tolist() == [1.0] * 3
    assert optimizer.num_steps == 0
    assert not optimizer.first.any()
    assert not optimizer.grad.any()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_state_goes_on_bit_for_bit(dtype, moments, tmp_path):
    weights, gradients = random_start()
    flat = weights.to(dtype)
    first = AdamW(flat, (), NUM_DECAYED, **HYPER, moments=moments)
    with ops.use("reference"):
        for step, gradient in enumerate(islice(gradients, 10)):
            if step == 5:
                copy = flat.clone()
                second = AdamW(copy, (), NUM_DECAYED, **HYPER, moments=moments)
                save_file(first.state(), tmp_path / "optimizer.safetensors")
                second.load_state(load_file(tmp_path / "optimizer.safetensors"))
            for optimizer in [first, second] if step >= 5 else [first]:
                optimizer.grad.copy_(gradient)
                optimizer.step(1e-3, 1.0)
    assert torch.equal(flat, copy)
    assert all(torch.equal(first.state()[name], tensor) for name, tensor in second.state().items())


def test_moments_of_another_dtype_are_refused():
    saved = AdamW(torch.ones(300).bfloat16(), (), 0, **HYPER, moments=torch.int8).state()
    optimizer = AdamW(torch.ones(300).bfloat16(), (), 0, **HYPER)
    with pytest.raises(UserError, match="the checkpoint's moments are int8, this run's float32; adam_moments_dtype"):
        optimizer.load_state(saved)


def trained_loss(moments, beta2, order=0):
    """Of a small classifier, in bf16, that learns the classes of another one from inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 24, generator=generator) * 10 ** torch.linspace(-2, 0.5, 24)
    teacher, classes = torch.randn(24, 32, generator=generator), torch.randn(32, 6, generator=generator)
    targets = ((inputs @ teacher).tanh() @ classes).argmax(1)
    shapes = [(24, 48), (48, 48), (48, 6)]
    flat = (0.15 * torch.randn(sum(map(prod, shapes)), generator=generator)).bfloat16()
    leaves = [part.view(shape).requires_grad_() for part, shape in zip(flat.split([*map(prod, shapes)]), shapes)]
    optimizer = AdamW(flat, leaves, len(flat), (0.9, beta2), 1e-15, 0.01, moments)

    def loss(rows):
        first, second, last = (leaf.float() for leaf in leaves)
        return F.cross_entropy(((inputs[rows] @ first).tanh() @ second).tanh() @ last, targets[rows])

    draw = torch.Generator().manual_seed(1 + order)
    with ops.use("reference"):
        for _ in range(300):
            loss(torch.randint(1024, (64,), generator=draw)).backward()
            optimizer.step(3e-3, 1.0)
    return loss(slice(None)).item()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_moments_of_fewer_bits_train_as_well(beta2):
    """Within half a percent of the loss: another order of the data changes it more."""
    full = trained_loss(torch.float32, beta2)
    assert full < 0.7 < math.log(6), "something is learnt"
    assert abs(trained_loss(torch.float32, beta2, order=1) - full) > 0.005 * full
    assert trained_loss(torch.bfloat16, beta2) == pytest.approx(full, rel=0.005)
    assert trained_loss(torch.int8, beta2) == pytest.approx(full, rel=0.005)


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1]),
        ("constant", 0.4, [0.5, 1, 1, 1, 1]),
        ("constant", 10, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 1, [1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
def test_learning_rate(kind, warmup_steps, expected):
    rates = [learning_rate(step, 5, 3e-4, kind, warmup_steps) for step in range(1, 6)]
    assert rates == pytest.approx([3e-4 * share for share in expected])
