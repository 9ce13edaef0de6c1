"""adamw and grad_norm: every backend against fp64, exact masters, and the same bits from any division of the work."""

import math

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference.adamw import join_master, split_master

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, device):
    if ops.missing(request.param) or (request.param == "native" and device != "cpu"):
        pytest.skip(ops.missing(request.param) or "it runs on the CPU")
    with ops.use(request.param):
        yield request.param


native_only = pytest.mark.parametrize("backend", ["native"], indirect=True)


def random_state(size, has_remainder, device="cpu", seed=0):
    """Weight, remainder, gradient and moments; sizes differ widely, some gradients and moments are 0."""
    generator = torch.Generator().manual_seed(seed)
    master, grad, first = torch.randn(3, size, generator=generator)
    grad *= 10.0 ** (4 * torch.rand(size, generator=generator) - 3)
    first *= (torch.arange(size) % 5 > 0) * 0.1
    second = (first * 3) ** 2
    grad[::7] = 0.0
    weight, remainder = master.clone(), None
    if has_remainder:
        weight, remainder = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16)
        split_master(master, weight, remainder)
    return [None if x is None else x.to(device) for x in (weight, remainder, grad, first, second)]


def master_of(weight, remainder):
    return weight if remainder is None else join_master(weight, remainder)


def update(state, num_decayed, step, grad_scale=1.0, **changed):
    hyper = HYPER | changed
    scale = torch.tensor([grad_scale], dtype=torch.float32, device=state[0].device)
    ops.adamw(*state, *hyper.values(), num_decayed, step, scale)


def oracle(state, num_decayed, step, grad_scale):
    """Master and moments after the step in fp64."""
    master, grad, first, second = (x.double() for x in (master_of(*state[:2]), *state[2:]))
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    grad = grad * grad_scale
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad**2
    master = master.clone()
    master[:num_decayed] *= 1 - lr * HYPER["weight_decay"]
    update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + HYPER["eps"])
    return master - lr * update, first, second


@pytest.mark.parametrize("has_remainder", [False, True])
@pytest.mark.parametrize(
    ("size", "num_decayed"), [(1, 0), (1, 1), (15, 7), (257, 0), (257, 257), (1000, 361), (5000, 4097)]
)
def test_one_step_is_the_formulas(size, num_decayed, has_remainder, backend, device):
    state = random_state(size, has_remainder, device)
    largest = torch.maximum(state[2].abs() * 0.3, state[3].abs()).double()
    exact = oracle(state, num_decayed, 3, 0.3)
    update(state, num_decayed, 3, 0.3)
    ours = (master_of(*state[:2]), state[3], state[4])
    errors = [(our.double() - true).abs() for our, true in zip(ours, exact)]
    assert (errors[0] <= 2e-7 * exact[0].abs() + 1e-8).all()
    assert (errors[1] <= 2e-7 * largest).all()
    assert (errors[2] <= 4e-7 * exact[2]).all()
    assert not state[2].any()


def test_a_step_of_nothing(backend, device):
    update(random_state(0, True, device), 0, 1)


@pytest.mark.parametrize("has_remainder", [False, True])
def test_a_scale_of_nan_clears_the_gradient_alone(has_remainder, backend, device):
    state = random_state(1030, has_remainder, device)
    before = [None if x is None else x.clone() for x in state]
    update(state, 300, 1, math.nan)
    assert not state[2].any()
    for index in (0, 1, 3, 4):
        assert before[index] is None or torch.equal(state[index], before[index])


def test_two_halves_follow_an_fp32_master_bit_for_bit(backend, device):
    halves, whole = random_state(1100, True, device), random_state(1100, False, device)
    assert torch.equal(join_master(*halves[:2]), whole[0])
    for step in range(1, 8):
        for state in (halves, whole):
            state[2].copy_(random_state(1100, False, device, seed=step)[2])
            update(state, 700, step, 0.7)
        assert torch.equal(join_master(*halves[:2]).view(torch.int32), whole[0].view(torch.int32))
    half = halves[0].double()
    assert ((half - whole[0].double()).abs() <= (whole[0].bfloat16().double() - whole[0].double()).abs()).all()


def hostile_values():
    """fp32 of all kinds: ties between two bf16, denormals, both zeros, both signs, the largest finite, random bits."""
    bits = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x0080_0000, 0x3F80_8000, 0x3F81_8000, 0x3F80_7FFF, 0x7F7F_FFFF, 0x7F7F_8000]
    random = torch.randint(0, 0x7F80_0000, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    positive = torch.cat([torch.tensor(bits, dtype=torch.int32), random])
    return torch.cat([positive, positive + torch.iinfo(torch.int32).min]).view(torch.float32)


def test_master_splits_and_joins_exactly():
    master = hostile_values()
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master(master.clone(), weight, remainder)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    finite = weight.isfinite()
    error, least = (weight.double() - master.double()).abs(), (master.bfloat16().double() - master.double()).abs()
    assert torch.equal(error[finite], least[finite])
    assert (master[~finite].abs() > torch.finfo(torch.bfloat16).max).all()


def test_a_step_of_zero_keeps_every_master(backend, device):
    master = hostile_values()[:2200].to(device)
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master(master.clone(), weight, remainder)
    before = weight.clone(), remainder.clone()
    update([weight, remainder, *torch.zeros(3, 2200, device=device)], 1100, 1, lr=0.0)
    assert torch.equal(weight.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(remainder, before[1])


@pytest.mark.parametrize("has_remainder", [False, True])
def test_pieces_of_the_tensor_give_the_bits_of_the_whole(has_remainder, backend, device):
    whole, pieces = (random_state(3000, has_remainder, device) for _ in range(2))
    update(whole, 1500, 5, 0.5)
    for start, end in ((0, 3), (3, 1500), (1500, 1501), (1501, 3000)):
        update([None if x is None else x[start:end] for x in pieces], max(0, min(end, 1500) - start), 5, 0.5)
    for together, apart in zip(whole, pieces):
        assert together is None or torch.equal(together, apart)


@native_only
def test_threads_change_nothing(backend):
    one, three = (random_state(100_000, True) for _ in range(2))
    norms = [ops.grad_norm(one[2])]
    update(one, 70_000, 2)
    torch.set_num_threads(3)
    try:
        norms.append(ops.grad_norm(three[2]))
        update(three, 70_000, 2)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*norms)
    assert all(map(torch.equal, one, three))


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
@pytest.mark.parametrize(("index", "name"), [*enumerate(["weight", "remainder", "grad", "first", "second"])])
def test_bad_input_is_refused(index, name, backend):
    for change in (lambda x: x.repeat_interleave(2)[::2], lambda x: x[:-1]):
        state = random_state(20, True)
        state[index] = change(state[index])
        with pytest.raises(ValueError, match="expected"):
            update(state, 10, 1)
    if backend == "native":
        state = random_state(20, True)
        state[index] = state[index].double()
        with pytest.raises(ValueError, match=f"{name}: expected"):
            update(state, 10, 1)


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("size", [0, 1, 15, 1000, 100_003])
def test_the_norm(size, backend):
    grad = random_state(size, False)[2]
    norm = ops.grad_norm(grad)
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    error = 1e-7 if backend == "native" else 1e-4  # torch adds the squares up in fp32
    assert norm.item() == pytest.approx(grad.double().norm().item(), rel=error)
    assert ops.grad_norm(grad.repeat_interleave(2)[::2]).item() == pytest.approx(norm.item(), rel=error)


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_norm_of_what_is_not_finite_is_not(value, backend):
    grad = torch.zeros(1000)
    grad[777] = value
    assert not ops.grad_norm(grad).isfinite()


@native_only
def test_squares_beyond_fp32_still_have_a_norm(backend):
    assert ops.grad_norm(torch.full((4,), 1e30)).item() == pytest.approx(2e30)


@native_only
def test_opcheck(backend):
    checks = ("test_schema", "test_faketensor")
    for has_remainder in (False, True):
        arguments = (*random_state(40, has_remainder), 0.1, [0.9, 0.95], 1e-8, 0.1, 20, 3, torch.ones(1))
        torch.library.opcheck(torch.ops.nrt_fast.adamw.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.nrt_fast.grad_norm.default, (torch.ones(40),), test_utils=checks)


@pytest.mark.gpu
def test_offsets_are_64_bit(device):
    size = 2**31 + 4096
    weight, grad, first, second = (torch.zeros(size, device=device) for _ in range(4))
    grad[-1] = 1.0
    with ops.use("triton"):
        update([weight, None, grad, first, second], 0, 1)
    assert weight[-1].item() == pytest.approx(-HYPER["lr"])
    assert not weight[:-1].any()
