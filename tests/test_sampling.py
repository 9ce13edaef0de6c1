"""Counter-based noise against Random123's vectors, and draws against the distribution they come from."""

import pytest
import torch

from nrt_fast import ops

JUST_UNDER_1 = 1 - 2.0**-53
CHI_SQUARE_7 = 24.3  # exceeded once in a thousand at 7 degrees of freedom


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822, (0xD16CFE09, 0x94FDCCEB)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, output):
    """philox4x32-10 in tests/kat_vectors of Random123 1.14; a number is made of the first two words."""
    position, trace, prompt, step = counter
    uniform = ops.philox_uniform(key, step, int64(prompt), int64(trace), int64(position))
    expected = ((output[0] >> 5) * 2**26 + (output[1] >> 6)) / 2**53
    assert uniform.dtype == torch.float64
    assert uniform.item() == expected


def test_a_number_depends_on_its_own_key_only():
    prompt, trace, position = torch.arange(4)[:, None, None], torch.arange(5)[:, None], torch.arange(6)
    grid = ops.philox_uniform(7, 2, prompt, trace, position)
    assert grid.shape == (4, 5, 6)
    assert grid.unique().numel() == 120
    assert grid[3, 1, 4] == ops.philox_uniform(7, 2, int64(3), int64(1), int64(4))


def test_numbers_are_uniform():
    uniform = ops.philox_uniform(0, 0, int64(0), int64(0), torch.arange(80_000))
    counts = torch.histc(uniform, bins=8, min=0, max=1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < CHI_SQUARE_7
    assert ((uniform[1:] - 0.5) * (uniform[:-1] - 0.5)).mean().abs() < 5 / 12 / 80_000**0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_draws_follow_the_probabilities(temperature):
    logits = torch.tensor([0.3, -1.0, 1.7, 0.0, -2.2, 0.9, -0.4, 1.1])
    uniform = ops.philox_uniform(1, 0, int64(0), torch.arange(40_000), int64(0))
    ids, logprobs = ops.sample_logprob(logits.expand(40_000, -1), uniform, temperature)
    probabilities = (logits.double() / temperature).softmax(dim=0)
    expected = 40_000 * probabilities
    assert ((ids.bincount(minlength=8) - expected) ** 2 / expected).sum() < CHI_SQUARE_7
    torch.testing.assert_close(logprobs.double(), probabilities.log()[ids], rtol=0, atol=1e-6)


def test_a_draw_inverts_the_cumulative_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 300, generator=generator)
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    ids, _ = ops.sample_logprob(logits, uniform, 0.9)
    below = (logits.double() / 0.9).softmax(dim=1).cumsum(dim=1)
    rows = torch.arange(500)
    assert (below[rows, ids] > uniform - 1e-6).all()
    assert (torch.where(ids > 0, below[rows, ids - 1], 0.0) <= uniform + 1e-6).all()


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (JUST_UNDER_1, 5)])
def test_impossible_ids_are_not_drawn_at_the_edges(uniform, expected):
    logits = torch.full((100, 9), -torch.inf)
    logits[:, 2:6] = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    ids, logprobs = ops.sample_logprob(logits, torch.full((100,), uniform, dtype=torch.float64), 1.0)
    assert (ids == expected).all()
    assert logprobs.isfinite().all()


def test_a_wide_vocabulary_has_a_last_id():
    """Rounding of 128,256 sums leaves the total off 1; the last id is still drawn, and no id behind it."""
    ids, _ = ops.sample_logprob(torch.zeros(2, 128_256), torch.tensor([JUST_UNDER_1, 0.0]).double(), 1.0)
    assert ids.tolist() == [128_255, 0]


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    ids, logprobs = ops.sample_logprob(logits, torch.rand(50, dtype=torch.float64), 0.0)
    assert torch.equal(ids, logits.argmax(dim=1))
    assert torch.equal(logprobs, logits.log_softmax(dim=1).max(dim=1).values)
