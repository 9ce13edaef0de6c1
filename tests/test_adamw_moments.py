"""AdamW's moments in bf16 and in 8 bits: rounded without a bias, never to a 0 that blows up, alike by every backend."""

import math

import pytest
import torch

from nrt_fast import ops
from nrt_fast.reference.adamw import BLOCK, join_master, load_moment, rounding_noise, split_master, store_moment

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = {"bfloat16": (torch.bfloat16, torch.bfloat16), "int8": (torch.int8, torch.uint8)}
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}


@pytest.fixture(params=["reference", "triton"])
def backend(request, device):
    if ops.missing(request.param):
        pytest.skip(ops.missing(request.param))
    with ops.use(request.param):
        yield request.param


def empty_moment(size, dtype, device="cpu"):
    """Storage and scales of a moment that is 0."""
    coded = dtype in (torch.int8, torch.uint8)
    absmax = torch.zeros(-(-size // BLOCK), device=device) if coded else None
    return torch.zeros(size, dtype=dtype, device=device), absmax


class State:
    """A flat bf16 weight with its remainder, and moments of a kind."""

    def __init__(self, size, kind, device="cpu", seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.size, self.device = size, device
        master = torch.randn(size, generator=self.generator)
        self.weight, self.remainder = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16)
        split_master(master, self.weight, self.remainder)
        self.weight, self.remainder = self.weight.to(device), self.remainder.to(device)
        self.grad = torch.zeros(size, device=device)
        (self.first, self.first_absmax), (self.second, self.second_absmax) = (
            empty_moment(size, dtype, device) for dtype in KINDS[kind]
        )

    def random_grad(self):
        """Sizes differ by four decades, some are 0."""
        grad = torch.randn(self.size, generator=self.generator)
        grad *= 10.0 ** (4 * torch.rand(self.size, generator=self.generator) - 3)
        return grad * (torch.arange(self.size) % 7 > 0)

    def tensors(self):
        names = ("weight", "remainder", "grad", "first", "second", "first_absmax", "second_absmax")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def moments(self):
        return load_moment(self.first, self.first_absmax), load_moment(self.second, self.second_absmax)

    def step(self, step, grad, scale=1.0, num_decayed=0, **changed):
        self.grad.copy_(grad)
        hyper = HYPER | changed
        grad_scale = torch.tensor([scale], device=self.device)
        ops.adamw(
            self.weight, self.remainder, self.grad, self.first, self.second, *hyper.values(), num_decayed, step,
            grad_scale, self.first_absmax, self.second_absmax,
        )  # fmt: skip


def spacing(moment, dtype, absmax):
    """Distance of the two values around each number that a dtype has."""
    magnitude = moment.abs()
    if dtype == torch.bfloat16:
        return 2.0 ** (torch.floor(torch.log2(magnitude.clamp(min=1e-38))) - 7)
    most, exponent = (127, 2) if dtype == torch.int8 else (255, 4)
    low = (magnitude / absmax * most**exponent).pow(1 / exponent).floor()
    return absmax * ((low + 1) ** exponent - low**exponent) / most**exponent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 255, 257, 1000, 2053])
def test_one_step_is_the_formulas(size, kind, backend, device):
    state = State(size, kind, device)
    state.step(1, state.random_grad())
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    master = join_master(state.weight, state.remainder).double()
    first, second = (moment.double() for moment in state.moments())
    grad = state.random_grad().to(device)
    state.step(2, grad, 0.3, num_decayed=size // 2)
    grad = grad.double() * 0.3
    first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
    master[: size // 2] *= 1 - lr * HYPER["weight_decay"]
    master -= lr * (first / (1 - beta1**2)) / ((second / (1 - beta2**2)).sqrt() + HYPER["eps"])
    ours = join_master(state.weight, state.remainder).double()
    assert ((ours - master).abs() <= 4e-7 * master.abs() + 4e-7 * lr * 8).all(), "the update itself is not rounded"
    assert not state.grad.any()
    for exact, dtype, stored in zip((first, second), KINDS[kind], state.moments()):
        largest = torch.nn.functional.pad(exact.abs(), (0, -size % BLOCK)).view(-1, BLOCK).amax(1)
        absmax = largest.clamp(min=1e-30).repeat_interleave(BLOCK)[:size]
        error = (stored.double() - exact).abs()
        assert (error <= 1.001 * spacing(exact, dtype, absmax) + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_rounds_as_the_reference(kind, device):
    """The same noise: a code differs only where fp32 rounding before it does."""
    if ops.missing("triton"):
        pytest.skip(ops.missing("triton"))
    states = {name: State(1500, kind, device) for name in ("reference", "triton")}
    for step in range(1, 6):
        for name, state in states.items():
            with ops.use(name):
                state.step(step, state.random_grad())
    ours, theirs = states["triton"], states["reference"]
    for name in ("first", "second"):
        different = getattr(ours, name).float() != getattr(theirs, name).float()
        assert different.float().mean() < 0.01
    torch.testing.assert_close(join_master(ours.weight, ours.remainder), join_master(theirs.weight, theirs.remainder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_step_gives_the_same_bits_and_another_step_other_noise(kind, backend, device):
    states, grad = [State(700, kind, device) for _ in range(3)], State(700, kind).random_grad()
    for state, step in zip(states, (4, 4, 5)):
        state.step(step, grad)
    for name, tensor in states[0].tensors().items():
        assert torch.equal(tensor, states[1].tensors()[name])
    assert not torch.equal(states[0].first, states[2].first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_nan_clears_the_gradient_alone(kind, backend, device):
    state = State(1030, kind, device)
    state.step(1, state.random_grad())
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    state.step(2, state.random_grad(), math.nan)
    assert not state.grad.any()
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name])


def test_noise_is_uniform_and_independent():
    noise = torch.stack([rounding_noise(1 << 14, step, "cpu") for step in range(1, 33)])
    for half in (noise & 0xFFFF, noise >> 16):
        uniform = (half.double() + 0.5) / 2**16
        assert uniform.mean().item() == pytest.approx(0.5, abs=4 * (12 * uniform.numel()) ** -0.5)
        counts = torch.histc(uniform, 64, 0, 1)
        expected = uniform.numel() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
        centred = uniform - 0.5
        for other in (centred.roll(1, 0), centred.roll(1, 1)):  # the next step's, the neighbour's
            assert abs((centred * other).mean().item()) < 5 / 12 * uniform.numel() ** -0.5
    low, high = ((half.double() + 0.5) / 2**16 - 0.5 for half in (noise & 0xFFFF, noise >> 16))
    assert abs((low * high).mean().item()) < 5 / 12 * noise.numel() ** -0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.3, 1e-2, 1e-4, 1e-5])
def test_rounding_has_no_bias(share, dtype):
    """The mean of many roundings of a number is the number, within five standard errors."""
    size, value = 1 << 16, 0.7 * share
    moment = torch.full((size,), value)
    moment[::BLOCK] = 0.7  # the largest of each block
    stored, absmax = empty_moment(size, dtype)
    rounded = []
    for step in range(1, 9):
        store_moment(moment, stored, absmax, rounding_noise(size, step, "cpu") & 0xFFFF)
        rounded.append(load_moment(stored, absmax).view(-1, BLOCK)[:, 1:].double())
    rounded = torch.stack(rounded)
    step = spacing(moment[1], dtype, torch.tensor(0.7)).item()
    assert len(rounded.unique()) <= 2
    assert (rounded.unique() - value).abs().max() <= 1.0001 * step
    assert rounded.mean().item() == pytest.approx(value, abs=2.5 * step * rounded.numel() ** -0.5 + 1e-6 * value)


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 0.01), ("int8", 0.04)])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_updates_of_the_second_moment_are_not_lost(kind, tolerance, beta2):
    """Its decay by a thousandth is a fraction of a spacing. Rounded to the nearest, it would stay where it is."""
    steps, size = round(1 / (1 - beta2)), 1 << 14
    state = State(size, kind)
    grad = torch.ones(size) * (torch.arange(size) % 2 * 0.9 + 0.1)
    with ops.use("reference"):
        state.step(1, grad, betas=(0.9, 0.0))  # the second moment is the gradient's square
        for step in range(2, steps + 2):
            state.step(step, torch.zeros(size), betas=(0.9, beta2))
    for part in (slice(0, None, 2), slice(1, None, 2)):
        expected = grad[part].double().square().mean().item() * beta2**steps
        assert state.moments()[1][part].double().mean().item() == pytest.approx(expected, rel=tolerance)
    if kind == "bfloat16" and beta2 == 0.999:
        stuck = torch.ones(()).bfloat16()
        for _ in range(steps):
            stuck = (stuck.float() * beta2).bfloat16()
        assert stuck == 1


def test_a_small_second_moment_is_never_zero(backend, device):
    """Beside a gradient a million times as large; at 0 the next update would be divided by epsilon."""
    state = State(512, "int8", device)
    grad = torch.full((512,), 1e-6)
    grad[100] = 1.0
    for step in range(1, 30):
        before = join_master(state.weight, state.remainder)
        state.step(step, grad)
        assert (state.second != 0).all()
        moved = (join_master(state.weight, state.remainder) - before).abs()
        assert (moved <= 5 * HYPER["lr"]).all(), "bounded, as in fp32 where it is at most lr here"


def test_a_moment_of_zero_stays_zero(backend, device):
    for kind in KINDS:
        state = State(600, kind, device)
        grad = torch.zeros(600)
        grad[:3] = 1.0
        for step in range(1, 4):
            state.step(step, grad)
        assert not state.first[3:].any() and not state.second[3:].any()


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e-42])
def test_sizes_at_the_ends_of_fp32(size):
    for dtype in (torch.int8, torch.uint8):
        moment = torch.linspace(0, 1, 300) * size
        stored, absmax = empty_moment(300, dtype)
        store_moment(moment, stored, absmax, rounding_noise(300, 1, "cpu") & 0xFFFF)
        loaded = load_moment(stored, absmax)
        assert loaded.isfinite().all()
        assert (loaded <= absmax.max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_moments_are_refused(kind):
    if ops.missing("triton"):
        pytest.skip(ops.missing("triton"))
    with ops.use("triton"):
        state = State(600, kind)
        state.first = state.first.float()
        with pytest.raises(ValueError, match="expected fp32, bf16, or int8 and uint8 with scales"):
            state.step(1, torch.zeros(600))
        state = State(600, kind)
        state.second = state.second[:-1]
        with pytest.raises(ValueError, match="second: expected shape"):
            state.step(1, torch.zeros(600))
        state = State(600, "int8")
        state.first_absmax = torch.zeros(2)
        with pytest.raises(ValueError, match=r"first_absmax: expected shape \[3\]"):
            state.step(1, torch.zeros(600))
    with pytest.raises(ValueError, match="first: expected"):
        State(600, kind).step(1, torch.zeros(600))  # the C++ has fp32 only
