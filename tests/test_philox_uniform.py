"""philox_uniform: Random123's vectors, the Triton kernel against the reference bit for bit, and uniformity."""

import pytest
import torch

from nrt_fast import ops

CHI_SQUARE_7 = 24.3  # exceeded once in a thousand at 7 degrees of freedom
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 0x299F31D0_A4093822]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if ops.missing(request.param):
        pytest.skip(ops.missing(request.param))
    with ops.use(request.param):
        yield


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


@pytest.mark.parametrize("step", [0, 1, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kernel_gives_the_references_bits(seed, step, device):
    generator = torch.Generator().manual_seed(0)
    counters = [torch.randint(0, 2**32, shape, generator=generator) for shape in ((4, 1, 1), (5, 1), (60,))]
    counters = [counter.to(device) for counter in counters]
    with ops.use("reference"):
        expected = ops.philox_uniform(seed, step, *counters)
    with ops.use("triton"):
        assert torch.equal(ops.philox_uniform(seed, step, *counters), expected)


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
