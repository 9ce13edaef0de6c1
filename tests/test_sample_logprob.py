"""sample_logprob on every backend against the distribution it draws from, and its truncation by a floor."""

import pytest
import torch

from nrt_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
JUST_UNDER_1 = 1 - 2.0**-53
CHI_SQUARE_7 = 24.3  # exceeded once in a thousand at 7 degrees of freedom
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, device):
    if ops.missing(request.param) or (request.param == "native" and device != "cpu"):
        pytest.skip(ops.missing(request.param) or "it runs on the CPU")
    with ops.use(request.param):
        yield request.param


not_interpreted = pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
native_only = pytest.mark.parametrize("backend", ["native"], indirect=True)
triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def random_rows(N, V, dtype, device="cpu"):
    """Rows with an outlier each, among them: a certain id, -inf columns, logits around 1e4."""
    generator = torch.Generator().manual_seed(N * V)
    logits = 3 * torch.randn(N, V, generator=generator)
    logits[:, 7] *= 3
    if N > 3:
        logits[0, 11] = 60.0
        logits[1, : V // 2] = -INF
        logits[2] += 1e4
    uniform = torch.rand(N, generator=generator, dtype=torch.float64)
    return logits.to(dtype).to(device), uniform.to(device)


def oracle(logits, temperature):
    """Log-probabilities in fp64."""
    return (logits.double() / (temperature or 1.0)).log_softmax(dim=-1)


def assert_inverts(ids, uniform, probabilities):
    """The uniform lies in the id's interval of the cumulative distribution, to the rounding of fp32 masses."""
    through = probabilities.cumsum(dim=1)
    chosen = probabilities.gather(1, ids[:, None]).squeeze(1)
    through = through.gather(1, ids[:, None]).squeeze(1)
    assert (chosen > 0).all()
    assert (through > uniform - 1e-6).all()
    assert (through - chosen <= uniform + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "V"), [(0, 257), (1, 361), (13, 257), (7, 512), (7, 1000), (6, 4099), (4, 9001)])
def test_the_draw_and_its_log_probability(N, V, dtype, backend, device):
    logits, uniform = random_rows(N, V, dtype, device)
    for temperature in (1.0, 0.7):
        ids, logprob = ops.sample_logprob(logits, uniform, temperature)
        assert (ids.shape, ids.dtype, logprob.shape, logprob.dtype) == ((N,), torch.int64, (N,), torch.float32)
        exact = oracle(logits, temperature)
        assert_inverts(ids, uniform, exact.exp())
        torch.testing.assert_close(logprob.double(), exact.gather(1, ids[:, None]).squeeze(1), rtol=0, atol=2e-5)


@not_interpreted
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_draws_follow_the_probabilities(temperature, backend):
    logits = torch.tensor([0.3, -1.0, 1.7, 0.0, -2.2, 0.9, -0.4, 1.1])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, _ = ops.sample_logprob(logits.expand(40_000, -1), uniform, temperature)
    expected = 40_000 * oracle(logits, temperature).exp()
    assert ((ids.bincount(minlength=8) - expected) ** 2 / expected).sum() < CHI_SQUARE_7


def test_draws_are_the_references(backend, device):
    N = 60 if backend == "triton" and device == "cpu" else 20_000
    logits, uniform = random_rows(N, 700, torch.float32, device)
    ids, _ = ops.sample_logprob(logits, uniform, 0.9)
    with ops.use("reference"):
        expected, _ = ops.sample_logprob(logits, uniform, 0.9)
    assert (ids != expected).sum() <= N // 1000


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (JUST_UNDER_1, 5)])
def test_impossible_ids_are_not_drawn_at_the_edges(uniform, expected, scale, backend, device):
    """At scale 1000, blocks with and without possible ids take turns."""
    logits = torch.full((7, 9 * scale), -INF)
    logits[:, 2 * scale : 6 * scale : scale] = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    ids, logprob = ops.sample_logprob(logits.to(device), torch.full((7,), uniform, device=device).double(), 1.0)
    assert (ids == expected * scale).all()
    assert logprob.isfinite().all()


def test_a_wide_vocabulary_has_a_last_id(backend, device):
    """Rounding of 128,256 sums leaves the total off 1; the last id is still drawn, and no id behind it."""
    uniform = torch.tensor([JUST_UNDER_1, 0.0], device=device).double()
    ids, _ = ops.sample_logprob(torch.zeros(2, 128_256, device=device), uniform, 1.0)
    assert ids.tolist() == [128_255, 0]


def test_ids_rarer_than_fp32_resolves_are_drawn(backend, device):
    """Behind an id of probability 1 - 1e-8, the uniform's bits under 2^-24 still tell the others apart."""
    logits = torch.zeros(3, 10_240, device=device)
    logits[:, 0], logits[:, 1:2048] = 27.6, -INF
    tail = oracle(logits[0], 1.0)[2048:].exp().sum()
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=device)
    ids, _ = ops.sample_logprob(logits, 1 - tail + tail * shares, 1.0)
    assert (ids - torch.tensor([4096, 6144, 8192], device=device)).abs().max() <= 2


@pytest.mark.parametrize("ties", [(3, 200, 255), (3000, 8000)])
def test_temperature_0_takes_the_lowest_of_the_likeliest(ties, backend, device):
    logits = torch.randn(5, max(ties) + 9, generator=torch.Generator().manual_seed(0)).to(device)
    logits[1:, list(ties)] = 9.0
    ids, logprob = ops.sample_logprob(logits, torch.rand(5, device=device).double(), 0.0)
    assert ids.tolist() == [int(logits[0].argmax())] + [ties[0]] * 4
    torch.testing.assert_close(logprob.double(), oracle(logits, 0).max(dim=1).values, rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("column", [0, 300, 2500])
def test_a_row_without_a_distribution_shows_as_nan(column, temperature, backend, device):
    logits, uniform = random_rows(5, 2600, torch.float32, device)
    logits[0, column] = NAN
    logits[1, column] = INF
    logits[2] = -INF
    logits[3] = NAN
    ids, logprob = ops.sample_logprob(logits, uniform, temperature)
    assert ids[:4].tolist() == [0] * 4
    assert logprob[:4].isnan().all()
    assert logprob[4].isfinite()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 100.0])
def test_extreme_temperatures(temperature, backend, device):
    logits, uniform = random_rows(5, 300, torch.float32, device)
    ids, logprob = ops.sample_logprob(logits, uniform, temperature)
    exact = oracle(logits, temperature)
    assert_inverts(ids, uniform, exact.exp())
    torch.testing.assert_close(logprob.double(), exact.gather(1, ids[:, None]).squeeze(1), rtol=0, atol=2e-5)


def test_a_row_is_drawn_alike_in_every_batch(backend, device):
    logits, uniform = random_rows(6, 3000, torch.float32, device)
    batch = ops.sample_logprob(logits, uniform, 0.8)
    alone = [ops.sample_logprob(logits[row : row + 1], uniform[row : row + 1], 0.8) for row in range(6)]
    for together, rows in zip(batch, zip(*alone)):
        assert torch.equal(together, torch.cat(rows))


@native_only
def test_threads_change_nothing(backend):
    logits, uniform = random_rows(200, 3000, torch.float32)
    one = ops.sample_logprob(logits, uniform, 0.8)
    torch.set_num_threads(3)
    try:
        three = ops.sample_logprob(logits, uniform, 0.8)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_strides_do_not_matter(layout, backend, device):
    dense, _ = random_rows(4, 300, torch.float32, device)
    views = {
        "transposed": lambda: dense.T.contiguous().T,
        "expanded": lambda: dense[3:].expand(4, 300),
        "sliced": lambda: torch.cat([dense, dense], dim=1)[:, :300],
    }
    logits, uniform = views[layout](), torch.rand(4, 9, device=device).double()[:, 5]
    ours = ops.sample_logprob(logits, uniform, 1.0)
    assert all(map(torch.equal, ours, ops.sample_logprob(logits.clone().contiguous(), uniform.clone(), 1.0)))


@pytest.mark.parametrize("V", [257, 4099])
def test_a_floor_truncates_the_draw_alone(V, backend, device):
    logits, uniform = random_rows(7, V, torch.float32, device)
    floor = logits.sort(dim=1, descending=True).values[:, 20].contiguous()
    uniform[-2], uniform[-1] = 0.0, JUST_UNDER_1
    ids, logprob = ops.sample_logprob(logits, uniform, 0.7, floor)
    exact = oracle(logits, 0.7)
    kept = exact.exp().where(logits >= floor[:, None], 0.0)
    assert_inverts(ids, uniform, kept / kept.sum(dim=1, keepdim=True))
    torch.testing.assert_close(logprob.double(), exact.gather(1, ids[:, None]).squeeze(1), rtol=0, atol=2e-5)


def test_a_floor_above_all_logits_leaves_id_0(backend, device):
    logits, uniform = random_rows(2, 257, torch.float32, device)
    ids, logprob = ops.sample_logprob(logits, uniform, 1.0, torch.full((2,), 1e9, device=device))
    assert ids.tolist() == [0, 0]
    torch.testing.assert_close(logprob.double(), oracle(logits, 1.0)[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.6), (5, 0.6), (0, 1e-9), (999, 0.9)])
def test_the_floor_of_top_k_and_top_p(top_k, top_p):
    logits, _ = random_rows(9, 257, torch.float32)
    floor = ops.sampling_floor(logits, 0.7, top_k, top_p)
    for row, lowest in zip(logits, floor.tolist()):
        order = row.argsort(descending=True)[: top_k or None].tolist()
        shares = (row[order].double() / 0.7).softmax(dim=0).tolist()
        count, mass = 0, 0.0
        while count < len(order) and mass < top_p:
            mass += shares[count]
            count += 1
        kept = {column for column in range(257) if row[column] >= lowest}
        least = set(order[:count])
        assert least <= kept
        if count < len(order) and mass > top_p + 1e-9:
            assert kept == least


def test_logits_equal_to_the_floor_are_kept():
    assert ops.sampling_floor(torch.tensor([[2.0, 5.0, 2.0, 1.0]]), 1.0, 2, 1.0).item() == 2.0


def test_a_row_without_a_distribution_has_a_floor():
    floor = ops.sampling_floor(torch.tensor([[-INF] * 3, [NAN] * 3]), 1.0, 2, 0.9)
    assert floor.shape == (2,)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (0, 0.0), (0, 1.5), (0, NAN)])
def test_a_bad_truncation_is_refused(top_k, top_p):
    with pytest.raises(ValueError, match="top_k >= 0 and 0 < top_p <= 1"):
        ops.sampling_floor(torch.zeros(1, 4), 1.0, top_k, top_p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(5)}, "logits_NV: expected shape"),
        ({"uniform_N": torch.zeros(4).double()}, r"uniform_N: expected shape \[N=3\]"),
        ({"uniform_N": torch.zeros(3)}, "uniform_N: .* of torch.float64"),
        ({"floor_N": torch.zeros(2)}, r"floor_N: expected shape \[N=3\]"),
        ({"floor_N": torch.zeros(3).double()}, "floor_N: .* of torch.float32"),
        ({"temperature": -1.0}, "temperature: expected a number from 0, got -1"),
        ({"temperature": NAN}, "temperature: expected a number from 0, got nan"),
    ],
    ids=str,
)
def test_bad_input_is_refused(change, message, backend):
    arguments = {"logits_NV": torch.zeros(3, 5), "uniform_N": torch.zeros(3).double(), "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        ops.sample_logprob(*(arguments | change).values())


@native_only
def test_opcheck(backend):
    logits, uniform = random_rows(3, 40, torch.float32)
    checks = ("test_schema", "test_faketensor")
    for floor in (None, torch.zeros(3)):
        torch.library.opcheck(
            torch.ops.nrt_fast.sample_logprob.default, (logits, uniform, 0.7, floor), test_utils=checks
        )


@pytest.mark.gpu
@triton_only
def test_a_graph_replays_with_new_logits(backend, device):
    logits, uniform = random_rows(64, 32_000, torch.float32, device)
    ops.sample_logprob(logits, uniform, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample_logprob(logits, uniform, 1.0)
    for seed in range(3):
        logits.copy_(torch.randn(64, 32_000, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(map(torch.equal, captured, ops.sample_logprob(logits, uniform, 1.0)))


@pytest.mark.gpu
@triton_only
def test_offsets_are_64_bit(backend, device):
    N, V = 17_000, 128_256
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    logits[-1, 77] = 60.0
    ids, _ = ops.sample_logprob(logits, torch.full((N,), 0.5, device=device).double(), 1.0)
    assert ids[-1] == 77
