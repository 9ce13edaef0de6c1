"""philox_uniform: Random123's vectors, its twins against the reference bit for bit, and uniformity."""

import pytest
import torch

from nrt_fast import ops

CHI_SQUARE_7 = 24.3  # exceeded once in a thousand at 7 degrees of freedom
SEEDS = [0, 1, -1, -(2**40), 2**31, 2**32 - 1, 2**63, 2**64 - 1, 0x299F31D0_A4093822]


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, device):
    if ops.missing(request.param) or (request.param == "native" and device != "cpu"):
        pytest.skip(ops.missing(request.param) or "it runs on the CPU")
    with ops.use(request.param):
        yield request.param


twins_only = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
native_only = pytest.mark.parametrize("backend", ["native"], indirect=True)


def assert_is_the_references(seed, step, *counters):
    """Bit for bit on the backend that is in use."""
    with ops.use("reference"):
        expected = ops.philox_uniform(seed, step, *counters)
    uniform = ops.philox_uniform(seed, step, *counters)
    assert uniform.dtype == torch.float64
    assert uniform.shape == expected.shape
    assert uniform.is_contiguous()
    assert torch.equal(uniform, expected)


def int64(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822, (0xD16CFE09, 0x94FDCCEB)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, output, backend, device):
    """philox4x32-10 in tests/kat_vectors of Random123 1.14; a number is made of the first two words."""
    position, trace, prompt, step = counter
    uniform = ops.philox_uniform(key, step, *(int64(word, device=device) for word in (prompt, trace, position)))
    expected = ((output[0] >> 5) * 2**26 + (output[1] >> 6)) / 2**53
    assert uniform.dtype == torch.float64
    assert uniform.item() == expected


@twins_only
@pytest.mark.parametrize("step", [0, 1, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_twin_gives_the_references_bits(seed, step, backend, device):
    generator = torch.Generator().manual_seed(0)
    counters = [torch.randint(0, 2**32, shape, generator=generator) for shape in ((4, 1, 1), (5, 1), (60,))]
    assert_is_the_references(seed, step, *(counter.to(device) for counter in counters))


@twins_only
@pytest.mark.parametrize("step", [-1, 2**32 + 7, 2**64 - 1])
def test_words_count_by_their_low_bits(step, backend, device):
    """A key has 64 bits, negative ones in two's complement; a counter has 32."""
    prompt, trace, position = int64(-1, 2**32 + 5, -(2**63)), int64(2**40, -7, 3), int64(2**63 - 1, -(2**31), 2**31)
    counters = [counter.to(device) for counter in (prompt, trace, position)]
    assert_is_the_references(-5, step, *counters)
    masked = [counter & 0xFFFFFFFF for counter in counters]
    uniform = ops.philox_uniform(2**64 - 5, step % 2**32, *masked)
    assert torch.equal(uniform, ops.philox_uniform(-5, step, *counters))


@native_only
@pytest.mark.parametrize(
    "shapes",
    [
        ((64, 1), (64, 1), (64, 8)),
        ((3, 1, 1), (5, 1), (301,)),
        ((2, 3, 4, 5), (1, 3, 1, 5), (4, 1)),
        ((513,), (1,), ()),
        ((257, 1), (), (257, 1)),
        ((40_000,), (), (1,)),  # two tasks
        ((), (), ()),
        ((0,), (1,), ()),
        ((3, 0), (1, 1), (3, 1)),
        ((2, 1, 0, 1), (5,), (3, 1, 1)),
    ],
    ids=str,
)
def test_broadcasting_by_strides_gives_the_references_bits(shapes, backend, device):
    generator = torch.Generator().manual_seed(0)
    assert_is_the_references(2**63 + 9, 3, *(torch.randint(-99, 2**33, shape, generator=generator) for shape in shapes))


@twins_only
def test_strided_and_expanded_counters(backend, device):
    numbers = torch.arange(1000, device=device)
    transposed, sliced = numbers[:35].view(7, 5).T, numbers[100:800:20].view(5, 7)
    expanded = numbers[3:8, None].expand(5, 7)
    assert_is_the_references(1, 2, transposed, sliced, expanded)
    assert_is_the_references(1, 2, expanded[:, :1], transposed[:1, ::2], sliced[::3, 1:2][:1])
    assert_is_the_references(1, 2, numbers[9].expand(5, 3), numbers[-1], transposed.unsqueeze(1)[:, :, ::3])


@native_only
def test_bad_counters_are_named(backend, device):
    good, deep = torch.arange(3), torch.arange(3).view(1, 1, 1, 1, 3)
    for counters, message in [
        ((good.int(), good, good), "prompt: expected int64 of at most 4 axes, got int32 of 1"),
        ((good, good, good.double()), "position: expected int64 of at most 4 axes, got float64 of 1"),
        ((good, deep, good), "trace: expected int64 of at most 4 axes, got int64 of 5"),
        ((good, torch.arange(4), good), "trace: expected a size of 1 or 3, .* got 4"),
        ((good[:0], good, good), "trace: expected a size of 1 or 0, .* got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.philox_uniform(0, 0, *counters)


@native_only
def test_opcheck(backend, device):
    for shapes in [((3, 1), (3, 1), (3, 8)), ((), (), ()), ((2, 1, 1), (0, 1), (4,))]:
        counters = (torch.randint(0, 99, shape) for shape in shapes)
        torch.library.opcheck(
            torch.ops.nrt_fast.philox_uniform.default, (-3, 5, *counters), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    "shapes",
    [((), (), ()), ((1,), (7,), ()), ((3, 1), (1, 4), ()), ((2, 1, 1, 1), (3, 1, 1), (4, 5)), ((0, 1), (3,), ())],
    ids=str,
)
def test_shapes_broadcast(shapes, backend, device):
    prompt, trace, position = (torch.randint(0, 99, shape, device=device) for shape in shapes)
    uniform = ops.philox_uniform(3, 1, prompt, trace, position)
    assert uniform.shape == torch.broadcast_shapes(*shapes)
    flat = [counter.broadcast_to(uniform.shape).flatten() for counter in (prompt, trace, position)]
    assert torch.equal(uniform.flatten(), ops.philox_uniform(3, 1, *flat))


def test_a_number_depends_on_its_own_key_only(backend, device):
    prompt, trace, position = (
        torch.arange(4, device=device)[:, None, None], torch.arange(5, device=device)[:, None],
        torch.arange(6, device=device),
    )  # fmt: skip
    grid = ops.philox_uniform(7, 2, prompt, trace, position)
    assert grid.shape == (4, 5, 6)
    assert grid.unique().numel() == 120
    assert grid[3, 1, 4] == ops.philox_uniform(7, 2, *(int64(word, device=device) for word in (3, 1, 4)))


def test_numbers_are_uniform():
    uniform = ops.philox_uniform(0, 0, int64(0), int64(0), torch.arange(80_000))
    counts = torch.histc(uniform, bins=8, min=0, max=1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < CHI_SQUARE_7
    assert ((uniform[1:] - 0.5) * (uniform[:-1] - 0.5)).mean().abs() < 5 / 12 / 80_000**0.5
