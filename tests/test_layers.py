"""The element-wise ops of a decoder layer: kernels and references against fp64, forward and every gradient."""

from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nrt_fast import Model, ops

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
NATIVE_DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(ops.missing("native") is not None, reason=str(ops.missing("native")))


class Lane(NamedTuple):
    """Where a kernel runs, and in which dtype; the C++ ops run on a CPU, whatever else is here."""

    backend: str
    dtype: torch.dtype
    device: str


@pytest.fixture(params=[*(("triton", x) for x in DTYPES), *(("native", x) for x in NATIVE_DTYPES)], ids=str)
def lane(request, device):
    backend, dtype = request.param
    if reason := ops.missing(backend):
        pytest.skip(reason)
    return Lane(backend, dtype, "cpu" if backend == "native" else device)


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request):
    if reason := ops.missing(request.param) if request.param == "native" else None:
        pytest.skip(reason)
    with ops.use(request.param):
        yield request.param


@pytest.fixture
def device(request, device):
    native = "backend" in request.fixturenames and request.getfixturevalue("backend") == "native"
    return "cpu" if native else device


triton_and_reference = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape)))


def outlier_rows(T, D):
    """Rows of unit size, one of them tiny, one huge, one zero, and a column of outliers."""
    x = randn(T, D)
    if T > 3:
        x[0] *= 1e-4
        x[1] *= 1e2
        x[2] = 0.0
    x[:, D // 2] *= 30
    return x


def angles(T, F):
    turns = 100 * randn(T, F)
    return turns.cos(), turns.sin()


def rms_norm_case(T, D):
    return lambda x, weight: ops.rms_norm(x, weight, EPS), (outlier_rows(T, D), 1 + randn(D)), ()


def add_rms_norm_case(T, D):
    residual = 3 * outlier_rows(T, D).flip(0)
    return lambda x, r, weight: ops.add_rms_norm(x, r, weight, EPS), (outlier_rows(T, D), residual, 1 + randn(D)), ()


def swiglu_case(T, F):
    return ops.swiglu, (randn(T, 2, F, scale=4),), ()


def rotate_case(T, E, heads=(9, 2)):
    H, K = heads
    return ops.rotate, (randn(T, H, E), randn(T, K, E)), angles(T, E // 2)


def outputs_and_gradients(case, dtype, device, leaves_like=lambda x: x):
    """Outputs of the case's function and the gradients of a weighted sum of them, in the order of its arguments."""
    function, inputs, constants = case
    inputs = [leaves_like(x.to(device, dtype)).requires_grad_() for x in inputs]
    outputs = function(*inputs, *(x.to(device, dtype) for x in constants))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [randn(*x.shape, seed=index + 1).to(x) for index, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def in_half(case, dtype):
    """The case with its numbers rounded to a dtype, so that fp64 sees the same ones."""
    function, inputs, constants = case
    return function, [x.to(dtype) for x in inputs], [x.to(dtype) for x in constants]


def assert_error_is_that_of_pytorch(case, lane):
    case = in_half(case, lane.dtype)
    with ops.use(lane.backend):
        ours = outputs_and_gradients(case, lane.dtype, lane.device)
    with ops.use("reference"):
        plain = outputs_and_gradients(case, lane.dtype, lane.device)
        exact = outputs_and_gradients(case, torch.float64, lane.device)
    for our, their, true in zip(ours, plain, exact, strict=True):
        assert our.dtype == lane.dtype and our.shape == true.shape
        if true.numel():
            scale = true.abs().clamp(min=1)
            # An element's own rounding is luck; what a dtype costs is the largest error of the tensor.
            allowed = 2 * ((their.double() - true) / scale).abs().max() + 1e-5
            assert ((our.double() - true) / scale).abs().max() <= allowed


@pytest.mark.parametrize(
    ("T", "D"), [(0, 64), (1, 1), (1, 257), (7, 1), (7, 361), (7, 2048), (129, 64), (129, 257), (127, 1000)]
)
@pytest.mark.parametrize("make_case", [rms_norm_case, add_rms_norm_case])
def test_norms_err_like_pytorch(make_case, T, D, lane):
    assert_error_is_that_of_pytorch(make_case(T, D), lane)


@pytest.mark.parametrize("D", [8192, 9001])
def test_norms_of_rows_longer_than_a_tile(D, lane):
    assert_error_is_that_of_pytorch(add_rms_norm_case(5, D), lane)


@pytest.mark.parametrize(("T", "F"), [(0, 8), (1, 1), (7, 361), (129, 257), (3, 1024), (2, 2500)])
def test_swiglu_errs_like_pytorch(T, F, lane):
    assert_error_is_that_of_pytorch(swiglu_case(T, F), lane)


@pytest.mark.parametrize("heads", [(9, 2), (32, 8), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(("T", "E"), [(0, 64), (1, 64), (5, 80), (3, 96), (5, 128), (2, 6)])
def test_rotate_errs_like_pytorch(T, E, heads, lane):
    assert_error_is_that_of_pytorch(rotate_case(T, E, heads), lane)


CASES = {
    "rms_norm": rms_norm_case(3, 12),
    "add_rms_norm": add_rms_norm_case(3, 12),
    "swiglu": swiglu_case(3, 7),
    "rotate": rotate_case(3, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_references_by_finite_differences(name):
    function, inputs, constants = CASES[name]
    constants = [x.double() for x in constants]
    with ops.use("reference"):
        leaves = [x.double().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: function(*x, *constants), leaves)


STRIDED = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]],
    "rows-of-a-wider-tensor": lambda x: torch.stack([x, x + 1], dim=1)[:, 0],
    "reversed-storage": lambda x: torch.cat([x + 1, x])[len(x) :],
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("name", CASES)
def test_strides_do_not_matter(name, layout, backend, device):
    dense = outputs_and_gradients(CASES[name], torch.float32, device)
    strided = outputs_and_gradients(
        CASES[name], torch.float32, device, lambda x: STRIDED[layout](x) if x.ndim > 1 else x
    )
    for our, true in zip(strided, dense, strict=True):
        torch.testing.assert_close(our, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strided", [0, 1])
@pytest.mark.parametrize("name", ["add_rms_norm", "rotate"])
def test_every_tensor_is_read_by_its_own_strides(name, strided, backend, device):
    """One input and the other upstream gradient are slices of something wider, the rest is dense."""
    function, inputs, constants = CASES[name]
    wider = STRIDED["rows-of-a-wider-tensor"]

    def run(dtype, layout):
        leaves = [x.to(device, dtype) for x in inputs]
        leaves[strided] = layout(leaves[strided])
        leaves = [x.requires_grad_() for x in leaves]
        outputs = function(*leaves, *(x.to(device, dtype) for x in constants))
        upstream = [randn(*x.shape, seed=index + 1).to(x) for index, x in enumerate(outputs)]
        upstream[1 - strided] = layout(upstream[1 - strided])
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    ours = run(torch.float32, wider)
    with ops.use("reference"):
        exact = run(torch.float64, lambda x: x)
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_expanded_inputs_and_upstream_gradients_are_read_by_their_strides(name, backend, device):
    """Trap: strided or expanded upstream gradients, silently wrong elsewhere."""
    function, inputs, constants = CASES[name]
    constants = [x.to(device) for x in constants]

    def gradients(upstream, dtype, copy):
        leaves = [x[:1].to(device, dtype).requires_grad_() for x in inputs]
        wide = [x.expand(3, *x.shape[1:]) if x.ndim > 1 else x.expand(12) for x in leaves]
        outputs = function(*(x.contiguous() if copy else x for x in wide), *(x.to(dtype) for x in constants))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [upstream(x) for x in outputs])

    upstreams = {
        "scalar": lambda x: torch.tensor(2.0, device=device).to(x).expand(x.shape),
        "row": lambda x: randn(*x.shape[1:]).to(x).expand(x.shape),
        "column": lambda x: randn(*x.shape[:-1], 1).to(x).expand(x.shape),
        "transposed": lambda x: randn(*x.shape[::-1]).to(x).permute(*reversed(range(x.ndim))),
    }
    for upstream in upstreams.values():
        ours = gradients(upstream, torch.float32, copy=False)
        with ops.use("reference"):
            exact = gradients(upstream, torch.float64, copy=True)
        for our, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(our.double(), true, rtol=2e-6, atol=2e-5)


def test_heads_are_normed_and_turned_inside_the_fused_projection(backend, device):
    """Queries and keys are slices of one tensor: no kernel may take their rows for dense."""
    T, H, K, E = 5, 4, 2, 16
    qkv, weight = randn(T, H + 2 * K, E).to(device), 1 + randn(E).to(device)
    cos, sin = (x.to(device) for x in angles(T, E // 2))

    def gradients(dtype):
        leaf = qkv.to(dtype).requires_grad_()
        q, k, v = leaf.split([H, K, K], dim=1)
        q, k = (ops.rms_norm(x, weight.to(dtype), EPS) for x in (q, k))
        q, k = ops.rotate(q, k, cos.to(dtype), sin.to(dtype))
        loss = (q * randn(T, H, E).to(q)).sum() + (k * randn(T, K, E).to(k)).sum() + v.sum()
        return q, k, *torch.autograd.grad(loss, leaf)

    ours = gradients(torch.float32)
    with ops.use("reference"):
        exact = gradients(torch.float64)
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=0, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["normed", "sum"])
def test_an_output_nobody_uses_has_no_gradient(used, backend, device):
    _, inputs, _ = add_rms_norm_case(4, 12)

    def gradients(dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = ops.add_rms_norm(*leaves, EPS)[used]
        return torch.autograd.grad(out, leaves, randn(*out.shape).to(out), allow_unused=True)

    ours = gradients(torch.float32)
    with ops.use("reference"):
        exact = gradients(torch.float64)
    for our, true in zip(ours, exact, strict=True):
        if true is None:
            assert our is None or not our.any()
        else:
            torch.testing.assert_close(our.double(), true, rtol=0, atol=2e-4)


def test_the_sum_is_rounded_before_it_is_normed(backend, device):
    """What the next layer adds to is what this layer has normed."""
    dtype = torch.bfloat16 if backend == "native" else torch.float16
    x, residual, weight = (x.to(device, dtype) for x in add_rms_norm_case(9, 257)[1])
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("lane", [("triton", torch.float16), ("native", torch.bfloat16)], ids=str, indirect=True)
def test_rounding_is_that_of_hugging_face(lane):
    """Rounded before the weight and again after it: rounding once differs, and so would log-probs on a cache."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = (x.to(lane.device, lane.dtype) for x in rms_norm_case(64, 257)[1])
    module = LlamaRMSNorm(257, EPS).to(lane.device, lane.dtype)
    module.weight.data.copy_(weight)
    with ops.use(lane.backend):
        ours = ops.rms_norm(x, weight, EPS)
    # The sums of squares run in another order, so a value now and then falls to the other side of a rounding.
    assert (ours != module(x)).float().mean() < 2e-3
    once = (weight.float() * torch.nn.functional.rms_norm(x.float(), (257,), eps=EPS)).to(lane.dtype)
    assert (ours != once).float().mean() > 0.05


def test_the_weights_gradient_is_the_same_every_time(device, monkeypatch):
    """More tiles than programs: each program sums several, in its own order, and the sums are added in a fixed one."""
    monkeypatch.setattr(import_module("nrt_fast.triton_kernels.add_rms_norm"), "NUM_PARTIALS", 3)
    function, inputs, _ = rms_norm_case(131, 257)
    leaves = [x.to(device).requires_grad_() for x in inputs]
    upstream = randn(131, 257, seed=1).to(device)
    with ops.use("triton"):
        first, again = (torch.autograd.grad(function(*leaves), leaves, upstream)[1] for _ in range(2))
    assert torch.equal(first, again)
    with ops.use("reference"):
        wide = [x.detach().double().requires_grad_() for x in leaves]
        exact = torch.autograd.grad(function(*wide), wide, upstream.double())[1]
    torch.testing.assert_close(first.double(), exact, rtol=1e-6, atol=1e-4)


@triton_and_reference
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E"), [(0, 64), (1, 64), (7, 80), (6, 96), (5, 128)])
def test_rotate_write(T, E, dtype, integer, backend, device):
    H, K, S, num_pages = 9, 3, 4, 5
    qkv = randn(T, H + 2 * K, E).to(device, dtype)
    q, k, v = qkv.split([H, K, K], dim=1)
    cos, sin = (x.to(device, dtype) for x in angles(T, E // 2))
    place = torch.randperm(num_pages * S, generator=torch.Generator().manual_seed(0))[:T].to(device)
    page, slot = place // S, place % S
    # Pages of one layer of a cache that holds several, beside values: strided, and bigger than a page.
    cache = randn(2, 2, num_pages, K, S, E, seed=7).to(device, dtype)
    before = cache.clone()
    out = ops.rotate_write(q, k, v, cos, sin, cache[0, 1], cache[1, 1], page.to(integer), slot.to(integer))
    expected_q, expected_k = ops.rotate(q, k, cos, sin)
    assert torch.equal(out, expected_q)
    before[0, 1][page, :, slot] = expected_k
    before[1, 1][page, :, slot] = v
    assert torch.equal(cache, before)


BAD = {
    "residual": (lambda: ops.add_rms_norm(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4), EPS), "residual_TD"),
    "weight": (lambda: ops.add_rms_norm(torch.ones(3, 4), torch.ones(3, 4), torch.ones(5), EPS), "weight_D"),
    "wide-weight": (lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(8), EPS), "weight_D: expected shape"),
    "weight-that-would-broadcast": (lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(1), EPS), r"weight_D: .*\[4\]"),
    "gate": (lambda: ops.swiglu(torch.ones(3, 8)), "gate_up_T2F"),
    "three-halves": (lambda: ops.swiglu(torch.ones(3, 3, 8)), r"gate_up_T2F: expected shape \[T=3, 2, F"),
    "tables": (
        lambda: ops.rotate(torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 8), torch.ones(3, 8)), "F=4",
    ),
    "tables-that-would-broadcast": (
        lambda: ops.rotate(torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 1), torch.ones(3, 1)), "F=4",
    ),
    "keys": (
        lambda: ops.rotate(torch.ones(3, 2, 8), torch.ones(3, 1, 6), torch.ones(3, 4), torch.ones(3, 4)), "k_TKE",
    ),
    "places": (
        lambda: ops.rotate_write(
            torch.ones(3, 2, 8), *[torch.ones(3, 1, 8)] * 2, *[torch.ones(3, 4)] * 2, *[torch.ones(2, 1, 4, 8)] * 2,
            torch.zeros(2), torch.zeros(3),
        ),
        "page_T",
    ),
}  # fmt: skip


@triton_and_reference
@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_refused(name, backend):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def native():
    """The twins in C++."""
    if reason := ops.missing("native"):
        pytest.skip(reason)
    with ops.use("native"):
        yield


CASE_MAKERS = {
    "rms_norm": rms_norm_case, "add_rms_norm": add_rms_norm_case, "swiglu": swiglu_case, "rotate": rotate_case,
}  # fmt: skip


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASE_MAKERS)
def test_native_is_the_same_on_any_number_of_threads(name, dtype, native):
    """Trap: a weight's gradient summed by whoever comes first."""
    case = CASE_MAKERS[name](1000, 130)
    alone = outputs_and_gradients(case, dtype, "cpu")
    try:
        torch.set_num_threads(3)
        shared = outputs_and_gradients(case, dtype, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(our, true) for our, true in zip(shared, alone, strict=True))
    assert_error_is_that_of_pytorch(case, Lane("native", dtype, "cpu"))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASE_MAKERS)
def test_native_rows_do_not_depend_on_their_neighbours(name, dtype, native):
    function, inputs, constants = CASE_MAKERS[name](300, 130)

    def rows(some):
        leaves = [(x[some] if x.ndim > 1 else x).to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, *(x[some].to(dtype) for x in constants))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [randn(300, *x.shape[1:], seed=index + 1)[some].to(dtype) for index, x in enumerate(outputs)]
        wide = [x for x in leaves if x.ndim > 1]
        return *outputs, *torch.autograd.grad(outputs, wide, upstream)

    for all_rows, some_rows in zip(rows(slice(0, 300)), rows(slice(130, 207)), strict=True):
        assert torch.equal(all_rows[130:207], some_rows)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASE_MAKERS)
def test_native_training_has_the_bits_of_sampling(name, dtype, native):
    function, inputs, constants = CASE_MAKERS[name](70, 130)
    leaves, constants = [x.to(dtype).requires_grad_() for x in inputs], [x.to(dtype) for x in constants]
    trained = function(*leaves, *constants)
    with torch.no_grad():
        sampled = function(*leaves, *constants)
    trained, sampled = (x if isinstance(x, tuple) else (x,) for x in (trained, sampled))
    assert all(x.requires_grad for x in trained) and not any(x.requires_grad for x in sampled)
    assert all(torch.equal(our, true) for our, true in zip(trained, sampled, strict=True))


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("name", CASES)
def test_native_reads_rows_wherever_they_lie(name, layout, native):
    def run(layout):
        return outputs_and_gradients(CASES[name], torch.float32, "cpu", lambda x: layout(x) if x.ndim > 1 else x)

    assert all(torch.equal(our, true) for our, true in zip(run(STRIDED[layout]), run(lambda x: x), strict=True))


def test_native_copies_nothing_and_makes_no_zeros(native):
    """Heads stand in the fused projection, gradients come transposed, expanded or not at all."""
    T, H, K, E = 6, 4, 2, 16
    q, k, _ = randn(T, H + 2 * K, E).requires_grad_().split([H, K, K], dim=1)
    gate_up = randn(T, 2 * E + 3).requires_grad_()[:, : 2 * E].unflatten(-1, (2, -1))
    x, residual, weight, table = randn(T, E, seed=1), randn(T, E, seed=2), randn(E), randn(T, E // 2)
    leaves = [x.requires_grad_() for x in (x, residual, weight)]
    row_TE = randn(E).expand(T, E)
    transposed = [randn(heads, T, E).transpose(0, 1) for heads in (H, K)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(ops.rms_norm(q, weight, EPS), (q, weight), transposed[0])
        torch.autograd.grad(ops.rotate(q, k, table, table), (q, k), transposed)
        torch.autograd.grad(ops.swiglu(gate_up), gate_up, row_TE)
        normed, total = ops.add_rms_norm(*leaves, EPS)
        torch.autograd.grad((normed, total), leaves, (row_TE, row_TE), retain_graph=True)
        torch.autograd.grad(normed, leaves, row_TE, retain_graph=True)
        torch.autograd.grad(total, leaves[:2], row_TE)
    names = {event.name for event in profile.events()}
    assert {"nrt_fast::rms_norm_backward", "nrt_fast::rotate_backward", "nrt_fast::swiglu_backward"} <= names
    assert not names & {"aten::clone", "aten::copy_", "aten::zeros", "aten::zero_", "aten::add", "aten::add_"}


@needs_extension
@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
def test_the_gradient_of_both_summands_is_nobodys_to_change(backend, device):
    """One tensor serves x and residual: what is done to one gradient must not show in the other."""
    x, residual, weight = (x.to(device).requires_grad_() for x in add_rms_norm_case(4, 12)[1])
    upstream = [randn(4, 12, seed=seed).to(device) for seed in (1, 2)]
    expected = torch.autograd.grad(ops.add_rms_norm(x, residual, weight, EPS), (x, weight), upstream)
    for _ in range(2):
        torch.autograd.backward(ops.add_rms_norm(x, residual, weight, EPS), upstream)
    torch.testing.assert_close((x.grad, residual.grad, weight.grad), (*(2 * g for g in (expected[0], *expected)),))
    x.grad.zero_()
    torch.testing.assert_close(residual.grad, 2 * expected[0])
    twice = torch.autograd.grad(ops.add_rms_norm(x, x, weight, EPS), x, upstream)[0]
    apart = torch.autograd.grad(ops.add_rms_norm(x, x.detach(), weight, EPS), x, upstream)[0]
    torch.testing.assert_close(twice, 2 * apart)


@needs_extension
@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_a_second_backward_is_refused(name, backend, device):
    function, inputs, constants = CASES[name]
    leaves = [x.to(device).requires_grad_() for x in inputs]
    outputs = function(*leaves, *(x.to(device) for x in constants))
    loss = sum(x.square().sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


def test_a_checkpointed_layer_has_the_same_gradients(backend, device):
    T, H, K, E = 9, 4, 2, 16
    x, residual = (randn(T, H * E, seed=seed).to(device).requires_grad_() for seed in (1, 2))
    weight, head_weight = (1 + randn(size, seed=3).to(device) for size in (H * E, E))
    parameters = [x, residual, *(w.requires_grad_() for w in (weight, head_weight))]
    cos, sin = (x.to(device) for x in angles(T, E // 2))

    def layer(x, residual):
        normed, total = ops.add_rms_norm(x, residual, weight, EPS)
        q, k = normed.view(T, H, E).split([H - K, K], dim=1)
        q, k = ops.rotate(ops.rms_norm(q, head_weight, EPS), k, cos, sin)
        inner = ops.swiglu(torch.stack([q.flatten(1), k.flatten(1)], dim=1))
        return torch.cat([inner, inner], dim=1) * total

    plain = torch.autograd.grad(layer(x, residual).sum(), parameters)
    again = torch.autograd.grad(checkpoint(layer, x, residual, use_reentrant=False).sum(), parameters)
    assert all(torch.equal(our, true) for our, true in zip(again, plain, strict=True))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 3, 2, 12), (0, 3, 12), (2, 0, 12)])
def test_native_norm_of_any_number_of_axes(shape, native):
    x, weight = randn(*shape), randn(12)
    ours = ops.rms_norm(x, weight, EPS)
    with ops.use("reference"):
        torch.testing.assert_close(ours, ops.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_norms_heads_inside_the_fused_projection(dtype, native):
    qkv, weight = randn(5, 8, 16).to(dtype), randn(16).to(dtype)
    for heads in qkv.split([4, 2, 2], dim=1):
        assert torch.equal(ops.rms_norm(heads, weight, EPS), ops.rms_norm(heads.contiguous(), weight, EPS))


def paged(T, E, dtype, heads=(9, 3), num_pages=5, page_size=4):
    """Arguments of rotate_write, and the cache: pages of one layer of several, keys beside values."""
    H, K = heads
    q, k, v = randn(T, H + 2 * K, E).to(dtype).split([H, K, K], dim=1)
    place = torch.randperm(num_pages * page_size, generator=torch.Generator().manual_seed(0))[:T]
    cache = randn(2, 2, num_pages, K, page_size, E, seed=7).to(dtype)
    angles_TF = [x.to(dtype) for x in angles(T, E // 2)]
    return (q, k, v, *angles_TF, cache[0, 1], cache[1, 1], place // page_size, place % page_size), cache


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E"), [(0, 64), (1, 64), (7, 80), (6, 96), (20, 128), (3, 2), (4, 6)])
@torch.no_grad()
def test_native_rotations_are_the_reference_bit_for_bit(T, E, dtype, integer, native):
    arguments, cache = paged(T, E, dtype)
    *tensors, page, slot = arguments
    ours, written = ops.rotate_write(*tensors, page.to(integer), slot.to(integer)), cache.clone()
    arguments, cache = paged(T, E, dtype)
    turned = ops.rotate(*arguments[:2], *arguments[3:5])
    with ops.use("reference"):
        assert torch.equal(ours, ops.rotate_write(*arguments))
        expected = ops.rotate(*arguments[:2], *arguments[3:5])
    assert all(torch.equal(our, true) for our, true in zip(turned, expected, strict=True))
    assert ours.is_contiguous() and torch.equal(written, cache)


@pytest.mark.parametrize("name", ["page_T", "slot_T"])
@pytest.mark.parametrize("outside", [-1, 5])
@torch.no_grad()
def test_native_places_outside_of_the_cache_are_refused(name, outside, native):
    arguments, cache = paged(7, 8, torch.float32)
    before, index = cache.clone(), arguments[-2 if name == "page_T" else -1]
    index[3] = outside
    with pytest.raises(ValueError, match=rf"{name}\[3\] = {outside}: expected 0 to"):
        ops.rotate_write(*arguments)
    assert torch.equal(cache, before)


def changed(position, value):
    return lambda: ops.rotate_write(
        *(value if i == position else x for i, x in enumerate(paged(3, 8, torch.float32)[0]))
    )


NATIVE_BAD = {
    "weight": (lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(8), EPS), "weight_D"),
    "weight-that-would-broadcast": (lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(1), EPS), "weight_D"),
    "dtype-of-the-weight": (lambda: ops.rms_norm(torch.ones(3, 4), torch.ones(4).bfloat16(), EPS), "weight_D"),
    "no-axis": (lambda: ops.rms_norm(torch.tensor(1.0), torch.ones(1), EPS), "x: expected"),
    "double": (lambda: ops.rms_norm(torch.ones(3, 4).double(), torch.ones(4).double(), EPS), "float32 or bfloat16"),
    "rows": (lambda: ops.add_rms_norm(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4), EPS), "residual_TD"),
    "residual": (
        lambda: ops.add_rms_norm(torch.ones(3, 4), torch.ones(3, 4).bfloat16(), torch.ones(4), EPS), "residual_TD"
    ),
    "gate": (lambda: ops.swiglu(torch.ones(3, 8)), "gate_up_T2F"),
    "three-halves": (lambda: ops.swiglu(torch.ones(3, 3, 8)), "gate_up_T2F"),
    "half": (lambda: ops.swiglu(torch.ones(3, 2, 8).half()), "gate_up_T2F: expected float32 or bfloat16"),
    "half-heads": (lambda: ops.rotate(*(torch.ones(3, 2, 8).half(),) * 2, *(torch.ones(3, 4).half(),) * 2), "q_THE"),
    "half-a-head": (lambda: ops.rotate(*(torch.ones(3, 2, 8),) * 2, *(torch.ones(3, 1),) * 2), "cos_TF: expected F=4"),
    "dtype-of-keys": (
        lambda: ops.rotate(torch.ones(3, 2, 8), torch.ones(3, 2, 8).bfloat16(), *(torch.ones(3, 4),) * 2), "k_TKE"
    ),
    "gradient-of-the-norm": (
        lambda: torch.ops.nrt_fast.rms_norm_backward(torch.ones(3, 4), torch.ones(4), EPS, torch.ones(3, 1)),
        "grad_normed: expected the dtype and the shape",
    ),
    "gradient-of-the-sum": (
        lambda: torch.ops.nrt_fast.rms_norm_backward(*(torch.ones(4),) * 2, EPS, torch.ones(4), torch.ones(4).half()),
        "grad_x_too: expected the dtype and the shape",
    ),
    "gradient-of-swiglu": (
        lambda: torch.ops.nrt_fast.swiglu_backward(torch.ones(3, 2, 4), torch.ones(3, 8)), "grad_TF: expected",
    ),
    "tables": (changed(3, torch.ones(3, 8)), "sin_TF|cos_TF"),
    "dtype-of-tables": (changed(4, torch.ones(3, 4).bfloat16()), "sin_TF"),
    "dtype-of-values": (changed(2, torch.ones(3, 3, 8).bfloat16()), "v_TKE"),
    "dtype-of-pages": (changed(5, torch.ones(5, 3, 4, 8).bfloat16()), "k_pages_NKSE"),
    "heads-of-pages": (changed(6, torch.ones(5, 2, 4, 8)), "v_pages_NKSE"),
    "scattered-pages": (changed(5, torch.ones(5, 3, 4, 16)[..., ::2]), "k_pages_NKSE: .* dense in its last axis"),
    "places": (changed(7, torch.zeros(3)), "page_T"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE_BAD)
@torch.no_grad()
def test_native_refuses_bad_arguments(name, native):
    call, message = NATIVE_BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_native_trains_and_samples(native):
    for name, (function, inputs, constants) in CASES.items():
        assert ops._choose(name, "cpu", None, True) == ops._choose(name, "cpu", None, False) == "native"
        out = function(*map(torch.nn.Parameter, inputs), *constants)
        assert (out[0] if isinstance(out, tuple) else out).requires_grad


def test_native_rotate_write_runs_only_where_gradients_are_off(native):
    assert ops._choose("rotate_write", "cpu", None, False) == "native"
    assert ops._choose("rotate_write", "cpu", None, True) == "reference"
    arguments, _ = paged(3, 8, torch.float32)
    with pytest.raises(LookupError, match="rotate_write on native: it has no backward"):
        ops.rotate_write(*arguments)
    with torch.no_grad():
        tensors = [x.clone().requires_grad_() for x in arguments[:5]]
        assert not ops.rotate_write(*tensors, *arguments[5:]).requires_grad


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_opcheck(dtype, native):
    ops_native, weight = torch.ops.nrt_fast, randn(12).to(dtype)
    x, heads, table = randn(3, 4, 12).to(dtype), randn(3, 9, 8).to(dtype), randn(3, 4).to(dtype)
    torch.library.opcheck(ops_native.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(ops_native.rms_norm_backward.default, (x, weight, EPS, x.flip(0), x[:1].expand(3, 4, 12)))
    torch.library.opcheck(ops_native.add_rms_norm.default, (x[0], x[:, 0][:1].expand(4, 12), weight, EPS))
    torch.library.opcheck(ops_native.swiglu.default, (x[:, :2],))
    torch.library.opcheck(ops_native.swiglu_backward.default, (x[:, :2], x[:, 2]))
    for rotate in (ops_native.rotate, ops_native.rotate_backward):
        torch.library.opcheck(rotate.default, (*heads.split([6, 3], dim=1), table, table))
    torch.library.opcheck(ops_native.rotate_write.default, paged(3, 8, dtype)[0])


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_on_the_kernels_is_the_model_on_the_references(family, backend, make_module, monkeypatch):
    """Hidden states of a cached and of a packed pass, and every parameter's gradient of the latter."""
    module = make_module(family, head_dim=16)
    model, parameters = Model.from_hf(module), list(module.parameters())
    lens, positions = [5, 3, 1, 2, 4], [0, 1, 2, 3, 4, 5, 6, 7, 5, 0, 1, 2, 3, 4, 5]
    tokens = torch.arange(len(positions)) * 7 % 67
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).int()
    batch = SimpleNamespace(
        tokens_T=tokens, positions_T=torch.tensor(positions), cu_seqlens=cu_seqlens, num_traces_M=torch.tensor([2, 1])
    )

    def run():
        hidden = model.packed(batch)
        # The head is no part of the pass.
        gradients = torch.autograd.grad((hidden * randn(*hidden.shape)).sum(), parameters, allow_unused=True)
        return [model.logits(tokens), hidden.detach(), *(x for x in gradients if x is not None)]

    def run_on(backend):
        kernels, choose = {"rms_norm", "add_rms_norm", "swiglu", "rotate", "rotate_write"}, ops._choose
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_choose", lambda op, *rest: backend if op in kernels else choose(op, *rest))
            ops._implementation.cache_clear()
            try:
                return run()
            finally:
                ops._implementation.cache_clear()

    expected, ours = run_on("reference"), run_on(backend)
    assert len(ours) > 10
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=2e-5 * their.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("make_case", [rms_norm_case, add_rms_norm_case, swiglu_case])
def test_bfloat16_errs_like_pytorch(make_case, device):
    assert_error_is_that_of_pytorch(make_case(4096, 4096), torch.bfloat16, device)


@pytest.mark.gpu
def test_offsets_are_64_bit(device):
    gate_up = torch.zeros(80_000, 2, 14_336, dtype=torch.bfloat16, device=device)
    gate_up[-1] = 2.0
    with ops.use("triton"):
        out = ops.swiglu(gate_up)
    assert out[-1].float().mean().item() == pytest.approx(4 * torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-2)
    assert not out[:-1].any()
