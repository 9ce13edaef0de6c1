"""logsoftmax_gather: the Triton kernel and the reference against fp64."""

import pytest
import torch

from nrt_fast import ops

pytest.importorskip("triton", reason="the kernel needs triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use(request.param):
        yield


def make_inputs(N, V, dtype, device):
    """Random rows with an outlier each, among them: a certain target, -inf columns, logits around 1e4."""
    generator = torch.Generator().manual_seed(N * V)
    logits = 3 * torch.randn(N, V, generator=generator)
    logits[:, 7] *= 20
    target = torch.randint(0, V, (N,), generator=generator)
    inv_temperature = 0.5 + torch.rand(N, generator=generator)
    if N > 3:
        logits[0, target[0]] = 60.0
        logits[1, : V // 2] = float("-inf")
        target[1] = V - 1
        logits[2] = 1e4 + logits[2]
        inv_temperature[2] = 1.0
    return logits.to(dtype).to(device), target.to(device), inv_temperature.to(device)


def logprob_and_gradient(function, logits, target, inv_temperature):
    """Log-probabilities and the gradient of their sum, weighted by 1 - row / 7: signs and zero included."""
    leaf = logits.clone().requires_grad_()
    logprob = function(leaf * 1, target, inv_temperature)
    weight = 1 - torch.arange(len(logits), dtype=logprob.dtype, device=logits.device) / 7
    (logprob * weight).sum().backward()
    return logprob.detach(), leaf.grad


def oracle(logits, target, inv_temperature):
    scaled = logits.double() * inv_temperature.double()[:, None]
    return scaled.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [257, 361, 512, 1000])
@pytest.mark.parametrize("N", [0, 1, 7, 129])
def test_error_is_that_of_pytorch(N, V, dtype, device):
    arguments = make_inputs(N, V, dtype, device)
    with ops.use("triton"):
        ours = logprob_and_gradient(ops.logsoftmax_gather, *arguments)
    with ops.use("reference"):
        plain = logprob_and_gradient(ops.logsoftmax_gather, *arguments)
    exact = logprob_and_gradient(oracle, arguments[0].double(), *arguments[1:])
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for our, their, true in zip(ours, plain, exact, strict=True):
        assert ((our.double() - true).abs() <= 2 * (their.double() - true).abs() + 1e-5 * true.abs().clamp(min=1)).all()


def test_a_row_longer_than_a_block(device):
    arguments = make_inputs(5, 9001, torch.float32, device)
    with ops.use("triton"):
        logprob, gradient = logprob_and_gradient(ops.logsoftmax_gather, *arguments)
    true_logprob, true_gradient = logprob_and_gradient(oracle, arguments[0].double(), *arguments[1:])
    torch.testing.assert_close(logprob.double(), true_logprob, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("V", [32_000, 32_768, 128_256, 129_920, 151_936])
def test_vocabularies_of_real_models(V, device):
    """Most are no multiple of a block; a column too many or too few would move the log-probability."""
    logits, _, inv_temperature = make_inputs(2, V, torch.float32, device)
    arguments = (logits, torch.tensor([0, V - 1], device=device), inv_temperature)
    with ops.use("triton"):
        ours = logprob_and_gradient(ops.logsoftmax_gather, *arguments)
    exact = logprob_and_gradient(oracle, logits.double(), *arguments[1:])
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-6, atol=2e-5)


def test_temperature_is_one_unless_given(backend, device):
    logits, target, _ = make_inputs(6, 257, torch.float32, device)
    ones = torch.ones(6, device=device)
    assert torch.equal(ops.logsoftmax_gather(logits, target), ops.logsoftmax_gather(logits, target, ones))


def test_a_forbidden_target_has_probability_zero(backend, device):
    logits = torch.zeros(1, 257, device=device)
    logits[0, 5] = float("-inf")
    logprob = ops.logsoftmax_gather(logits, torch.tensor([5], device=device))
    assert logprob.item() == float("-inf")


@pytest.mark.parametrize("target", [-1, 257, 2**40])
def test_a_target_outside_the_vocabulary_shows_as_nan(target, device):
    with ops.use("triton"):
        logprob = ops.logsoftmax_gather(torch.zeros(1, 257, device=device), torch.tensor([target], device=device))
    assert logprob.isnan().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strides_do_not_matter(layout, backend, device):
    dense = torch.randn(4, 300, device=device, generator=torch.Generator(device).manual_seed(0))
    views = {
        "transposed": lambda: dense.T.contiguous().T,
        "expanded": lambda: dense[:1].expand(4, 300),
        "sliced": lambda: torch.cat([dense, dense], dim=1)[:, :300],
    }
    logits = views[layout]()
    arguments = (torch.arange(4, device=device), torch.ones(4, device=device))
    ours = logprob_and_gradient(ops.logsoftmax_gather, logits, *arguments)
    exact = logprob_and_gradient(oracle, logits.double(), *arguments)
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=0, atol=2e-5)


def test_an_expanded_gradient_is_read_by_its_strides(backend, device):
    logits, target, inv_temperature = make_inputs(7, 257, torch.float32, device)
    leaf = logits.clone().requires_grad_()
    ops.logsoftmax_gather(leaf * 1, target, inv_temperature).backward(torch.tensor(2.0, device=device).expand(7))
    exact = logits.double().requires_grad_()
    (2 * oracle(exact, target, inv_temperature).sum()).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=2e-5)


def test_the_backward_uses_up_the_logits(device):
    logits = torch.randn(3, 257, device=device, requires_grad=True)
    with ops.use("triton"):
        logprob = ops.logsoftmax_gather(logits * 1, torch.arange(3, device=device))
    logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((3, 5), (4,), (3,)), (torch.float32, torch.int64, torch.float32), r"target_N: expected shape \[N=3\]"),
        (((3, 5), (3,), (3,)), (torch.float32, torch.int32, torch.float32), "of torch.int64, got .* of torch.int32"),
        (((3, 5), (3,), (1,)), (torch.float32, torch.int64, torch.float32), r"inv_temperature_N: expected .*\[N=3\]"),
        (((3, 5), (3,), (3,)), (torch.float32, torch.int64, torch.float64), "inv_temperature_N: .* of torch.float32"),
        (((15,), (3,), (3,)), (torch.float32, torch.int64, torch.float32), r"logits_NV: expected shape \[N=15, V\]"),
    ],
)
def test_bad_input_is_refused(shapes, dtypes, message, backend, device):
    arguments = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        ops.logsoftmax_gather(*arguments)


@pytest.mark.gpu
def test_offsets_are_64_bit(device):
    N, V = 17_000, 128_256
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    logits[-1, 3] = 20.0
    target = torch.full((N,), 3, device=device)
    with ops.use("triton"):
        logprob = ops.logsoftmax_gather(logits, target)
    assert logprob[-1].item() == pytest.approx(-(V - 1) * 2.0611536e-9, rel=1e-3)
