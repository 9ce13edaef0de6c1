"""linear_logprob and linear_logprob_stats on every backend against fp64."""

import math

import pytest
import torch
from linear_logprob_inputs import (
    BACKENDS,
    CASE_IDS,
    CASES,
    assert_error_is_that_of_pytorch,
    device_of,
    exact_stats,
    make_inputs,
    skip_unless_here,
)

from nrt_fast import ops
from nrt_fast.reference import logprob as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=CASES, ids=CASE_IDS)
def place(request):
    """(device, dtype) of a case; the ops run on its backend."""
    backend, dtype = request.param
    skip_unless_here(backend)
    with ops.use(backend):
        yield device_of(backend), dtype


@pytest.fixture(params=BACKENDS)
def device(request):
    skip_unless_here(request.param)
    with ops.use(request.param):
        yield device_of(request.param)


def assert_exact(ours, exact, tolerance=1e-5):
    for our, true in zip(ours, exact, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our.double(), true, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(("N", "V"), [(0, 257), (1, 1000), (7, 257), (7, 361), (7, 512), (127, 361), (129, 1000)])
def test_error_is_that_of_fp32_pytorch(N, V, place):
    """Also with 16-bit operands: their products are summed in fp32 and never rounded back."""
    device, dtype = place
    arguments = make_inputs(N, V, 72, dtype, device)
    hidden, weight, *rest = arguments
    fp32 = [x.float() for x in exact_stats(hidden.float(), weight.float(), *rest)]
    ours = ops.linear_logprob_stats(*arguments)
    assert torch.equal(ops.linear_logprob(*arguments), ours[0])
    for our, plain, exact in zip(ours, fp32, exact_stats(*arguments), strict=True):
        assert our.dtype == torch.float32
        assert_error_is_that_of_pytorch(our, plain, exact)


@pytest.mark.parametrize("V", [32_000, 32_768, 129_920])
def test_vocabularies_of_real_models(V, place):
    """The last column is the likeliest: one left out would show, and one too many, whose logit is 0, still more."""
    device, dtype = place
    hidden, weight = torch.zeros(2, 8, device=device, dtype=dtype), torch.zeros(V, 8, device=device, dtype=dtype)
    hidden[:, 0], weight[:, 0], weight[-1, 0] = 1, -20, -10
    target = torch.tensor([0, V - 1], device=device)
    assert_exact(ops.linear_logprob_stats(hidden, weight, target), exact_stats(hidden, weight, target), 1e-3)


def test_logits_are_not_rounded_to_the_operands_dtype(place):
    """bf16 logits around 20 are up to 0.06 off."""
    device, dtype = place
    hidden, weight, target, _ = make_inputs(40, 361, 64, dtype, device)
    hidden, ones = 4 * hidden, torch.ones(40, device=device)
    exact = exact_stats(hidden, weight, target)
    assert exact[1].max() > 20
    assert_exact(ops.linear_logprob_stats(hidden, weight, target, ones), exact, 2e-5)


def test_logits_around_10000_keep_their_differences(place):
    """Integers, so that the logits are exact; in one fp32 number their log-sum-exp would be 1e-3 off."""
    device, dtype = place
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (9, 16), generator=generator).to(device, dtype)
    weight = torch.randint(-2, 3, (300, 16), generator=generator).to(device, dtype)
    hidden[:, 0], weight[:, 0] = 100, 101
    target = torch.arange(9, device=device)
    exact_logprob, _, exact_entropy = exact_stats(hidden, weight, target)
    logprob, logsumexp, entropy = ops.linear_logprob_stats(hidden, weight, target)
    assert_exact((logprob, entropy), (exact_logprob, exact_entropy))
    assert ((logsumexp > 1e4) & (logsumexp < 1.1e4)).all()


def test_a_forbidden_column_has_probability_zero(place):
    device, dtype = place
    hidden, weight, target, inv_temperature = make_inputs(6, 300, 16, dtype, device)
    hidden[:, 0], weight[5], weight[:, 0] = 1, 0, 0
    weight[5, 0] = -math.inf
    target[4], target[3] = 5, 6
    exact = exact_stats(hidden, weight, target, inv_temperature)
    ours = ops.linear_logprob_stats(hidden, weight, target, inv_temperature)
    assert ours[0][4].item() == -math.inf
    assert_exact(ours, exact)


def test_a_target_in_any_column_is_found(place):
    """First and last of every tile among them."""
    device, dtype = place
    hidden, weight, _, _ = make_inputs(1, 600, 8, dtype, device)
    target = torch.tensor([0, 1, 127, 128, 255, 256, 257, 511, 512, 599], device=device)
    hidden = hidden.expand(len(target), 8)
    assert_exact([ops.linear_logprob(hidden, weight, target)], exact_stats(hidden, weight, target)[:1])


def test_temperature_is_one_unless_given(place):
    device, dtype = place
    hidden, weight, target, _ = make_inputs(6, 257, 16, dtype, device)
    ones = torch.ones(6, device=device)
    for op in (ops.linear_logprob, lambda *arguments: torch.stack(ops.linear_logprob_stats(*arguments))):
        assert torch.equal(op(hidden, weight, target), op(hidden, weight, target, ones))


def unaligned(x):
    """A view one element into its storage."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "odd width", "unaligned"])
def test_strides_do_not_matter(layout, place):
    device, dtype = place
    hidden, weight, target, inv_temperature = make_inputs(5, 257, 24, dtype, device)
    twice = inv_temperature.repeat_interleave(2)[::2]
    hidden, weight = {
        "transposed": lambda: (hidden.T.contiguous().T, weight.T.contiguous().T),
        "expanded": lambda: (hidden[:1].expand(5, 24), weight[:1].expand(257, 24)),
        "sliced": lambda: (torch.cat([hidden, hidden[:, :3]], dim=1)[:, :24], torch.cat([weight] * 2)[::2]),
        "odd width": lambda: (hidden[:, :23], weight[:, :23]),
        "unaligned": lambda: (unaligned(hidden), unaligned(weight)),
    }[layout]()
    exact = exact_stats(hidden, weight, target, inv_temperature)
    assert_exact(ops.linear_logprob_stats(hidden, weight, target, twice), exact)


def test_a_row_does_not_depend_on_its_neighbours(place):
    """Bit by bit on Triton: tiles and the order of their merge depend on V alone."""
    device, dtype = place
    arguments = make_inputs(132, 600, 72, dtype, device)
    whole = torch.stack(ops.linear_logprob_stats(*arguments))
    hidden, weight, target, inv_temperature = arguments
    for rows in (slice(3, 4), slice(126, 131)):
        part = ops.linear_logprob_stats(hidden[rows], weight, target[rows], inv_temperature[rows])
        tolerance = 0 if ops._forced == "triton" and dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(torch.stack(part), whole[:, rows], rtol=0, atol=tolerance)


@pytest.mark.parametrize("target", [-1, 257, 2**40])
@pytest.mark.parametrize("dtype", BACKENDS["triton"], ids=str)
def test_a_target_outside_the_vocabulary_shows_as_nan(target, dtype):
    skip_unless_here("triton")
    device = device_of("triton")
    hidden, weight, _, _ = make_inputs(1, 257, 16, dtype, device)
    with ops.use("triton"):
        assert ops.linear_logprob(hidden, weight, torch.tensor([target], device=device)).isnan().all()


def test_the_references_chunks_do_not_show(monkeypatch):
    """Logits of one chunk at a time."""
    arguments = make_inputs(23, 257, 8, torch.float32, "cpu")
    exact = exact_stats(*arguments)
    for chunk_bytes in (64 << 20, 4 * 257 * 5, 1):
        monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        assert_exact(reference.linear_logprob_stats(*arguments), exact)


def test_nothing_is_differentiable(device):
    """The training loss is linear_logprob_loss; a log-probability that silently had no gradient would be a trap."""
    hidden, weight, target, _ = make_inputs(3, 257, 16, torch.float32, device)
    logprob = ops.linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert not logprob.requires_grad


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((3, 8), (5, 9), (3,), (3,)), {}, r"weight_VD: expected shape \[V=5, D=8\]"),
        (((3, 8), (5, 8), (4,), (3,)), {}, r"target_N: expected shape \[N=3\]"),
        (((3, 8), (5, 8), (3,), (1,)), {}, r"inv_temperature_N: expected shape \[N=3\]"),
        (((3, 8), (5, 8), (3,), (3,)), {2: torch.int32}, "target_N: .* of torch.int64, got .* of torch.int32"),
        (((3, 8), (5, 8), (3,), (3,)), {3: torch.float64}, "inv_temperature_N: .* of torch.float32"),
        (((24,), (5, 8), (3,), (3,)), {}, r"hidden_ND: expected shape \[N=24, D"),
    ],
)
def test_bad_input_is_refused(shapes, dtypes, message, device):
    defaults = {0: torch.float32, 1: torch.float32, 2: torch.int64, 3: torch.float32} | dtypes
    arguments = [torch.zeros(shape, dtype=defaults[i], device=device) for i, shape in enumerate(shapes)]
    for op in (ops.linear_logprob, ops.linear_logprob_stats):
        with pytest.raises(ValueError, match=message):
            op(*arguments)
