"""The element-wise ops of a decoder layer: kernels and references against fp64, forward and every gradient."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from nrt_fast import Model, ops

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.use(request.param):
        yield


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


def assert_error_is_that_of_pytorch(case, dtype, device):
    case = in_half(case, dtype)
    with ops.use("triton"):
        ours = outputs_and_gradients(case, dtype, device)
    with ops.use("reference"):
        plain = outputs_and_gradients(case, dtype, device)
        exact = outputs_and_gradients(case, torch.float64, device)
    for our, their, true in zip(ours, plain, exact, strict=True):
        assert our.dtype == dtype
        if true.numel():
            scale = true.abs().clamp(min=1)
            # An element's own rounding is luck; what a dtype costs is the largest error of the tensor.
            allowed = 2 * ((their.double() - true) / scale).abs().max() + 1e-5
            assert ((our.double() - true) / scale).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "D"), [(0, 64), (1, 1), (1, 257), (7, 1), (7, 361), (7, 2048), (129, 64), (129, 257), (127, 1000)]
)
@pytest.mark.parametrize("make_case", [rms_norm_case, add_rms_norm_case])
def test_norms_err_like_pytorch(make_case, T, D, dtype, device):
    assert_error_is_that_of_pytorch(make_case(T, D), dtype, device)


@pytest.mark.parametrize("D", [8192, 9001])
def test_norms_of_rows_longer_than_a_tile(D, device):
    assert_error_is_that_of_pytorch(add_rms_norm_case(5, D), torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "F"), [(0, 8), (1, 1), (7, 361), (129, 257), (3, 1024), (2, 2500)])
def test_swiglu_errs_like_pytorch(T, F, dtype, device):
    assert_error_is_that_of_pytorch(swiglu_case(T, F), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 2), (32, 8), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(("T", "E"), [(0, 64), (1, 64), (5, 80), (3, 96), (5, 128), (2, 6)])
def test_rotate_errs_like_pytorch(T, E, heads, dtype, device):
    assert_error_is_that_of_pytorch(rotate_case(T, E, heads), dtype, device)


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


def test_heads_are_normed_and_turned_inside_the_fused_projection(device):
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

    with ops.use("triton"):
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
    x, residual, weight = (x.half().to(device) for x in add_rms_norm_case(9, 257)[1])
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, EPS))


def test_rounding_is_that_of_hugging_face(device):
    """Rounded before the weight and again after it: rounding once differs, and so would log-probs on a cache."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = (x.half().to(device) for x in rms_norm_case(64, 257)[1])
    module = LlamaRMSNorm(257, EPS).half().to(device)
    module.weight.data.copy_(weight)
    with ops.use("triton"):
        ours = ops.rms_norm(x, weight, EPS)
    # The sums of squares run in another order, so a value now and then falls to the other side of a rounding.
    assert (ours != module(x)).float().mean() < 2e-3
    once = (weight.float() * torch.nn.functional.rms_norm(x.float(), (257,), eps=EPS)).half()
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


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_refused(name, backend):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def native():
    """The twins in C++, which have no backward."""
    if reason := ops.missing("native"):
        pytest.skip(reason)
    with torch.no_grad(), ops.use("native"):
        yield


NATIVE_DTYPES = [torch.float32, torch.bfloat16]


def results(case, dtype, layout=lambda x: x):
    function, inputs, _ = case
    out = function(*(layout(x.to(dtype)) if x.ndim > 1 else x.to(dtype) for x in inputs))
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(0, 64), (1, 1), (7, 1), (1, 257), (7, 361), (129, 64), (127, 1000), (3, 9001)])
@pytest.mark.parametrize("make_case", [rms_norm_case, add_rms_norm_case, swiglu_case])
def test_native_errs_like_pytorch(make_case, T, D, dtype, native):
    case = in_half(make_case(T, D), dtype)
    ours = results(case, dtype)
    with ops.use("reference"):
        plain, exact = results(case, dtype), results(case, torch.float64)
    for our, their, true in zip(ours, plain, exact, strict=True):
        assert our.dtype == dtype and our.shape == true.shape
        if true.numel():
            scale = true.abs().clamp(min=1)
            assert ((our - true) / scale).abs().max() <= 2 * ((their - true) / scale).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("make_case", [rms_norm_case, add_rms_norm_case, swiglu_case])
def test_native_rows_do_not_depend_on_their_neighbours_or_threads(make_case, dtype, native):
    function, inputs, _ = make_case(300, 361)
    inputs = [x.to(dtype) for x in inputs]
    some = [x[130:207] if x.ndim > 1 else x for x in inputs]
    whole, alone = function(*inputs), function(*some)
    try:
        torch.set_num_threads(3)
        shared = function(*inputs)
    finally:
        torch.set_num_threads(1)
    if not isinstance(whole, tuple):
        whole, alone, shared = (whole,), (alone,), (shared,)
    for all_rows, some_rows, on_threads in zip(whole, alone, shared, strict=True):
        assert torch.equal(all_rows[130:207], some_rows)
        assert torch.equal(all_rows, on_threads)


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu"])
def test_native_reads_rows_wherever_they_lie(name, layout, native):
    dense, strided = (results(CASES[name], torch.float32, f) for f in (lambda x: x, STRIDED[layout]))
    assert all(torch.equal(our, true) for our, true in zip(strided, dense, strict=True))


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
def test_native_rotate_write_is_the_reference_bit_for_bit(T, E, dtype, integer, native):
    arguments, cache = paged(T, E, dtype)
    *tensors, page, slot = arguments
    ours, written = ops.rotate_write(*tensors, page.to(integer), slot.to(integer)), cache.clone()
    arguments, cache = paged(T, E, dtype)
    with ops.use("reference"):
        assert torch.equal(ours, ops.rotate_write(*arguments))
    assert ours.is_contiguous() and torch.equal(written, cache)


@pytest.mark.parametrize("name", ["page_T", "slot_T"])
@pytest.mark.parametrize("outside", [-1, 5])
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
    "tables": (changed(3, torch.ones(3, 8)), "sin_TF|cos_TF"),
    "dtype-of-tables": (changed(4, torch.ones(3, 4).bfloat16()), "sin_TF"),
    "dtype-of-values": (changed(2, torch.ones(3, 3, 8).bfloat16()), "v_TKE"),
    "dtype-of-pages": (changed(5, torch.ones(5, 3, 4, 8).bfloat16()), "k_pages_NKSE"),
    "heads-of-pages": (changed(6, torch.ones(5, 2, 4, 8)), "v_pages_NKSE"),
    "scattered-pages": (changed(5, torch.ones(5, 3, 4, 16)[..., ::2]), "k_pages_NKSE: .* dense in its last axis"),
    "places": (changed(7, torch.zeros(3)), "page_T"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE_BAD)
def test_native_refuses_bad_arguments(name, native):
    call, message = NATIVE_BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "rotate_write"])
def test_native_runs_only_where_gradients_are_off(name, native):
    assert ops._choose(name, "cpu", None, False) == "native"
    assert ops._choose(name, "cpu", None, True) == "reference"
    assert ops.backend()[f"{name}/cpu"] == "native"
    function, inputs, _ = CASES.get(name) or (ops.rotate_write, paged(3, 8, torch.float32)[0], ())
    with torch.enable_grad(), pytest.raises(LookupError, match=f"{name} on native: it has no backward"):
        function(*inputs)
    inputs = [torch.nn.Parameter(x) if x.is_floating_point() and "write" not in name else x for x in inputs]
    out = function(*inputs)
    assert not (out[0] if isinstance(out, tuple) else out).requires_grad


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_opcheck(dtype, native):
    ops_native, weight = torch.ops.nrt_fast, randn(12).to(dtype)
    x = randn(3, 4, 12).to(dtype)
    torch.library.opcheck(ops_native.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(ops_native.add_rms_norm.default, (x[0], x[:, 0][:1].expand(4, 12), weight, EPS))
    torch.library.opcheck(ops_native.swiglu.default, (x[:, :2],))
    torch.library.opcheck(ops_native.rotate_write.default, paged(3, 8, dtype)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_on_the_kernels_is_the_model_on_the_references(family, make_module, monkeypatch):
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

    expected, kernels = run(), {"rms_norm", "add_rms_norm", "swiglu", "rotate", "rotate_write"}
    choose = ops._choose
    monkeypatch.setattr(ops, "_choose", lambda op, *rest: "triton" if op in kernels else choose(op, *rest))
    ops._implementation.cache_clear()
    try:
        ours = run()
    finally:
        monkeypatch.undo()
        ops._implementation.cache_clear()
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
