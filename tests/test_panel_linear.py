"""Linear layers on packed weights: layout, error against fp64, and a row's independence of the rows beside it."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from nrt_fast import ops

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),  # torch's own, whenever a flag of oneDNN is set
]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 33), (65, 1), (65, 33), (128, 64), (192, 1360), (70, 2049), (63, 11008)]  # outputs, inputs
BACKENDS = ["reference", "native", "native-portable"]


@contextmanager
def running_on(name):
    """``native`` has the fastest product of this CPU, ``native-portable`` the one of any CPU."""
    backend, _, portable = name.partition("-")
    if ops.missing(backend):
        pytest.skip(ops.missing(backend))
    with ops.use(backend), torch.no_grad(), torch.backends.mkldnn.flags(enabled=not portable):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS[1:])
def native(request):
    with running_on(request.param):
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def packed(weights):
    num_outputs, num_inputs = sum(map(len, weights)), weights[0].shape[1]
    panels = torch.empty(ops.panel_shape(num_outputs, num_inputs, weights[0].dtype), dtype=weights[0].dtype)
    ops.pack_panels(weights, panels)
    return panels


def case(N, K, dtype, T=130):
    weight = (K**-0.5 * randn(N, K)).to(dtype)
    return randn(T, K, seed=1).to(dtype), weight, packed([weight]), randn(N, seed=2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_panels_hold_every_weight_once_and_zeros_beyond(N, K, dtype, backend):
    weight = randn(N, K).to(dtype)
    panels = packed([weight])
    num_panels, num_groups, width, group = panels.shape
    rows = torch.zeros(num_panels * width, num_groups * group, dtype=dtype)
    for p in range(num_panels):
        for g in range(group):
            rows[p * width : (p + 1) * width, g::group] = panels[p, :, :, g].T
    assert (width, group * dtype.itemsize) == (64, 4)
    assert torch.equal(rows[:N, :K], weight)
    assert rows[N:].eq(0).all() and rows[:, K:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_packed_one_after_another(dtype, backend):
    """Rows of several weights share a panel; a weight may be a slice of something wider, or transposed."""
    wide = randn(50, 80).to(dtype)
    weights = [randn(70, 33).to(dtype), wide[:, :33], wide[:1, 40:73], randn(33, 9).to(dtype).T, randn(0, 33).to(dtype)]
    assert torch.equal(packed(weights), packed([torch.cat(weights)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_both_pack_alike(dtype, threads):
    weights = [randn(300, 257).to(dtype), randn(129, 257).to(dtype)]
    torch.set_num_threads(threads)
    try:
        with running_on("native"):
            ours = packed(weights)
    finally:
        torch.set_num_threads(1)
    with running_on("reference"):
        assert torch.equal(ours, packed(weights))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_error_is_that_of_pytorch(N, K, dtype, with_bias, backend):
    x, weight, panels, bias = case(N, K, dtype)
    bias = bias if with_bias else None
    ours, plain = ops.panel_linear(x, panels, bias, N), F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_logits_are_not_rounded_to_the_operands_dtype(N, K, dtype, backend):
    x, weight, panels, _ = case(N, K, dtype)
    logits, exact = ops.panel_logits(x, panels, N), x.double() @ weight.double().T
    assert logits.dtype == torch.float32
    plain = x.float() @ weight.float().T
    assert (logits - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(65, 33), (192, 1360), (70, 2050)])
def test_a_row_does_not_depend_on_the_rows_beside_it(N, K, dtype, native):
    """Bit for bit, whatever their number and its place: rollouts do not depend on what they are batched with."""
    x, _, panels, bias = case(N, K, dtype, T=200)
    all_rows, all_logits = ops.panel_linear(x, panels, bias, N), ops.panel_logits(x, panels, N)
    for T in range(201):
        assert torch.equal(ops.panel_linear(x[:T], panels, bias, N), all_rows[:T]), T
        assert torch.equal(ops.panel_logits(x[200 - T :], panels, N), all_logits[200 - T :]), T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_number_of_threads(dtype, native):
    """Enough work for several threads."""
    N, K = 700, 512
    x, _, panels, bias = case(N, K, dtype, T=200)
    alone = ops.panel_linear(x, panels, bias, N)
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for T in (1, 7, 64, 200):
                assert torch.equal(ops.panel_linear(x[:T], panels, bias, N), alone[:T])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_anywhere(dtype, backend):
    N, K = 70, 34
    x, _, panels, bias = case(N, K, dtype, T=9)
    expected = ops.panel_linear(x, panels, bias, N)
    layouts = {
        "rows of something wider": torch.cat([x, x + 1], dim=1)[:, :K],
        "unaligned": F.pad(x, (1, 2))[:, 1:-2],
        "transposed": x.T.contiguous().T,
        "every second": torch.stack([x, x + 1], dim=2)[:, :, 0],
    }
    for name, rows in layouts.items():
        torch.testing.assert_close(ops.panel_linear(rows, panels, bias, N), expected, rtol=0, atol=1e-6, msg=name)
    for times in (1, 5):
        repeated = ops.panel_linear(x[0].expand(times, K), panels, bias, N)
        torch.testing.assert_close(repeated, expected[:1].expand(times, N), rtol=0, atol=1e-6)


def test_no_rows(backend):
    x, _, panels, _ = case(65, 33, torch.bfloat16)
    assert ops.panel_linear(x[:0], panels, None, 65).shape == ops.panel_logits(x[:0], panels, 65).shape == (0, 65)


def test_infinite_and_missing_numbers_stay_in_their_row_and_column(backend):
    x, weight, _, _ = case(70, 40, torch.float32)
    x[1, 3], x[2, 5], weight[7, 9] = torch.inf, torch.nan, -torch.inf
    out = ops.panel_linear(x, packed([weight]), None, 70)
    assert out[2].isnan().all() and out[1].isfinite().sum() == 0
    finite = out[[0, *range(3, 130)]].isfinite()
    assert not finite[:, 7].any() and finite.sum() == 128 * 69


def test_memory_of_panels_never_moves(backend):
    """Weights are packed anew in place before every rollout; nothing may keep old ones."""
    x, weight, panels, _ = case(70, 40, torch.float32)
    before = ops.panel_linear(x, panels, None, 70)
    address = panels.data_ptr()
    ops.pack_panels([2 * weight], panels)
    assert panels.data_ptr() == address
    torch.testing.assert_close(ops.panel_linear(x, panels, None, 70), 2 * before)


def test_parameters_can_be_packed_while_gradients_are_on():
    weight = torch.nn.Parameter(randn(70, 40))
    for backend in ("native", "reference"):
        with running_on(backend), torch.enable_grad():
            panels = packed([weight])
        assert not panels.requires_grad and torch.equal(panels[0, :, :, 0].T, weight[:64])


def test_there_is_no_silent_forward_without_gradients():
    x, _, panels, _ = case(65, 33, torch.float32)
    if reason := ops.missing("native"):
        pytest.skip(reason)
    with ops.use("native"), pytest.raises(LookupError, match="panel_linear on native: it has no backward"):
        ops.panel_linear(x, panels, None, 65)
    assert ops.backend()["panel_linear/cpu"] == "reference"
    with torch.no_grad():
        assert ops.backend()["panel_linear/cpu"] == "native"
    x.requires_grad_()
    assert torch.autograd.grad(ops.panel_linear(x, panels, None, 65).sum(), x)[0].shape == x.shape


def call(function, **changes):
    x, weight, panels, bias = case(65, 33, torch.float32)
    values = {"x": x, "weights": [weight], "panels": panels, "bias": bias, "N": 65} | changes
    if function == "pack_panels":
        return ops.pack_panels(values["weights"], values["panels"])
    if function == "panel_logits":
        return ops.panel_logits(values["x"], values["panels"], values["N"])
    return ops.panel_linear(values["x"], values["panels"], values["bias"], values["N"])


BAD = {
    "vector": ("panel_linear", {"x": torch.ones(33)}, "x_TK"),
    "inputs": ("panel_linear", {"x": torch.ones(3, 34)}, "panels"),
    "outputs": ("panel_linear", {"N": 129, "bias": None}, "panels"),
    "no-outputs": ("panel_linear", {"N": 0, "bias": None}, "num_outputs"),
    "fewer-outputs": ("panel_linear", {"N": -5, "bias": None}, "num_outputs"),
    "no-inputs": ("panel_logits", {"x": torch.ones(3, 0)}, "at least one input"),
    "bias": ("panel_linear", {"bias": torch.ones(64)}, "bias_N"),
    "bias-that-would-broadcast": ("panel_linear", {"bias": torch.ones(1)}, "bias_N"),
    "wide-bias": ("panel_linear", {"bias": torch.ones(1, 65)}, "bias_N"),
    "dtype-of-bias": ("panel_linear", {"bias": torch.ones(65).bfloat16()}, "bias_N"),
    "dtype": ("panel_linear", {"x": torch.ones(3, 33).bfloat16(), "bias": None}, "panels"),
    "dtype-of-logits": ("panel_logits", {"x": torch.ones(3, 33).bfloat16()}, "panels"),
    "flat-panels": ("panel_linear", {"panels": torch.ones(2 * 33 * 64)}, "panels"),
    "strided-panels": ("panel_logits", {"panels": torch.ones(2, 33, 64, 2)[..., :1]}, "panels"),
    "room": ("pack_panels", {"panels": torch.ones(1, 33, 64, 1)}, "panels"),
    "strided-room": ("pack_panels", {"panels": torch.ones(2, 33, 64, 2)[..., :1]}, "panels"),
    "no-weights": ("pack_panels", {"weights": []}, "weights"),
    "widths": ("pack_panels", {"weights": [torch.ones(60, 33), torch.ones(5, 32)]}, "weights"),
    "vector-of-weights": ("pack_panels", {"weights": [torch.ones(33)]}, "weights"),
    "dtype-of-weights": ("pack_panels", {"weights": [torch.ones(65, 33).bfloat16()]}, "weights"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_bad_arguments_are_refused(name, backend):
    function, changes, message = BAD[name]
    with running_on(backend), pytest.raises(ValueError, match=message):
        call(function, **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    if reason := ops.missing("native"):
        pytest.skip(reason)
    x, weight, panels, bias = case(65, 33, dtype, T=5)
    native = torch.ops.nrt_fast
    torch.library.opcheck(native.pack_panels.default, ([weight[:40], weight[40:]], panels))
    torch.library.opcheck(native.panel_linear.default, (x, panels, None, 65))
    torch.library.opcheck(native.panel_linear.default, (x, panels, bias, 65))
    torch.library.opcheck(native.panel_logits.default, (x, panels, 65))
