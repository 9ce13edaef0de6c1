"""prefix_attention: reference, C++ and Triton against one query at a time in fp64, over pages, windows and lengths."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from nrt_fast import ops

BACKENDS = ["reference", "native", "triton"]
FP32 = 2e-6  # error allowed to fp32 arithmetic on values around 1


@pytest.fixture(params=BACKENDS)
def backend(request):
    if ops.missing(request.param):
        pytest.skip(f"no {request.param} here")
    if request.param == "native" and torch.cuda.is_available():
        pytest.skip("the C++ op is for CPU tensors")
    with ops.use(request.param):
        yield request.param


@dataclass(frozen=True)
class Case:
    """Groups as (prefix length, [(own length, queries) of each row]), and how they lie in memory."""

    groups: list
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    prefix_page: int = 16
    own_page: int = 16
    window: int | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    prefix_columns: int = 0  # more columns than the lengths need
    own_columns: int = 0
    keys: list = field(default_factory=list)  # one per row if the rows' tensors are not to depend on their places

    def sequences(self):
        """Per group (q, k, v of the prefix; per row q, k, v of own keys): fp32 values rounded to the dtype."""
        for index, (prefix_len, rows) in enumerate(self.groups):
            seed = self.keys[index] if self.keys else index
            yield (
                self._randn(seed, 0, prefix_len),
                [
                    (self._randn(seed, 1 + place, own_len + num_q), own_len, num_q)
                    for place, (own_len, num_q) in enumerate(rows)
                ],
            )

    def _randn(self, seed, place, length):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        heads = self.num_heads + 2 * self.num_kv_heads
        x = torch.randn(length, heads, self.head_dim, generator=generator).to(self.dtype)
        return x.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def expected(self):
        """[T, H, E] fp64: softmax over the keys that each query sees, gathered for it."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        out = [torch.empty(0, self.num_heads, self.head_dim, dtype=torch.float64)]
        for (_, prefix_k, prefix_v), rows in self.sequences():
            for (q, own_k, own_v), own_len, num_q in rows:
                k, v = (torch.cat(pair).double() for pair in ((prefix_k, own_k), (prefix_v, own_v)))
                k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
                for i in range(num_q):
                    end = len(prefix_k) + own_len + i + 1
                    seen = slice(max(0, end - (self.window or end)), end)
                    scores = scale * torch.einsum("he,she->hs", q[own_len + i].double(), k[seen])
                    out.append(torch.einsum("hs,she->he", scores.softmax(dim=1), v[seen])[None])
        return torch.cat(out)

    def arguments(self, device="cpu"):
        """The op's arguments: pages in shuffled order, among pages that belong to nobody."""
        sequences = list(self.sequences())
        prefix = self._paged([prefix[1:] for prefix, _ in sequences], self.prefix_page, 0)
        own = self._paged([own[1:] for _, rows in sequences for own, _, _ in rows], self.own_page, 1)
        rows = [row for _, rows in sequences for row in rows]
        q = torch.cat([own[0][:0] for own, _, _ in rows] + [own[0][own_len:] for own, own_len, _ in rows])
        num_q, num_rows = [row[2] for row in rows], [len(group[1]) for group in self.groups]
        tensors = (
            q, *prefix, int32([group[0] for group in self.groups]), *own, int32([row[1] for row in rows]),
            int32([0, *num_q]).cumsum(0).int(), int32([0, *num_rows]).cumsum(0).int(),
        )  # fmt: skip
        limits = max(num_q), max(num_rows), self.window, self.scale
        return *(x.to(device) for x in tensors), *limits

    def _paged(self, sequences, page, seed):
        columns = max((math.ceil(len(k) / page) for k, _ in sequences), default=0)
        columns = max(columns, (self.prefix_columns, self.own_columns)[seed])
        num_pages = 3 + sum(math.ceil(len(k) / page) for k, _ in sequences)
        order = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
        shape = num_pages, self.num_kv_heads, page, self.head_dim
        caches = [torch.full(shape, math.nan, dtype=self.dtype) for _ in range(2)]  # NaN where nobody writes
        table = torch.full((len(sequences), columns), -7, dtype=torch.int32)  # no page of this number exists
        for row, (k, v) in zip(table, sequences, strict=True):
            for column, start in enumerate(range(0, len(k), page)):
                row[column] = next(order)
                for cache, x in zip(caches, (k, v), strict=True):
                    part = x[start : start + page].transpose(0, 1)
                    cache[row[column], :, : part.shape[1]] = part
        return *caches, table


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def assert_fp32_error(case, device):
    out = ops.prefix_attention(*case.arguments(device))
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double().cpu(), case.expected(), rtol=0, atol=FP32)


DECODE = [(20, [(5, 1), (0, 1), (17, 1)]), (33, [(40, 1), (15, 1)])]
SCORE = [(20, [(5, 3), (17, 9)]), (3, [(40, 0), (15, 2), (31, 1)])]
CASES = {
    "decode": Case(DECODE),
    "score": Case(SCORE),
    "prefill": Case([(0, [(0, 9)]), (0, [(0, 37)]), (0, [(0, 1)])]),
    "prefill-without-table": Case([(0, [(0, 9)]), (0, [(0, 3)])], prefix_page=1),
    "extend-in-two-pieces": Case([(0, [(13, 9)]), (0, [(16, 5)])]),
    "empty-and-full-prefixes": Case([(0, [(3, 1), (0, 2)]), (48, [(0, 1)]), (1, [(0, 1), (15, 1)])]),
    "group-without-rows": Case([(5, []), (7, [(2, 1)]), (0, []), (9, [(0, 2)])]),
    "rows-without-queries": Case([(5, [(3, 0), (2, 0)]), (7, [(2, 1), (4, 0)])]),
    "multi-head": Case(SCORE, num_heads=3, num_kv_heads=3),
    "4-queries-a-key": Case(SCORE, num_heads=8, num_kv_heads=2),
    "8-queries-a-key": Case(SCORE, num_heads=8, num_kv_heads=1),
    "5-queries-a-key": Case(DECODE, num_heads=5, num_kv_heads=1),
    "window": Case(SCORE, window=7),
    "window-of-1": Case(SCORE, window=1),
    "window-over-all": Case(SCORE, window=1000),
    "window-in-decode": Case(DECODE, window=19),
    "window-cuts-the-prefix-for-some": Case([(20, [(0, 1), (6, 1), (12, 3), (30, 1)])], window=12),
    "scale": Case(SCORE, scale=0.7),
    "pages-as-long-as-rows": Case(SCORE, prefix_page=21, own_page=53),
    "pages-of-1": Case(SCORE, prefix_page=1, own_page=1),
    "pages-of-64": Case(SCORE, prefix_page=64, own_page=64),
    "spare-columns": Case(DECODE, prefix_columns=5, own_columns=7),
    "E=64": Case(DECODE, head_dim=64),
    "E=80": Case(DECODE, head_dim=80),
    "E=96": Case(DECODE, head_dim=96, num_heads=2),
    "E=128": Case(DECODE, head_dim=128, num_heads=2),
    "E=256": Case(DECODE, head_dim=256, num_heads=2),
    "E=12": Case(SCORE, head_dim=12),
}
LONG = {  # over the chunks of 256 keys, and the blocks of 128 of the C++
    "decode": Case([(300, [(255, 1), (256, 1)]), (256, [(530, 1)])], num_heads=2, num_kv_heads=1),
    "score": Case([(300, [(250, 9), (3, 2)])], num_heads=2, num_kv_heads=1),
    "score-few": Case([(130, [(254, 4), (126, 3)])], num_heads=2, num_kv_heads=1, own_page=64),
    "window": Case([(300, [(255, 1), (10, 1)]), (600, [(20, 2)])], num_heads=2, num_kv_heads=1, window=290),
    "window-within-a-chunk": Case([(300, [(400, 1), (299, 3)])], num_heads=2, num_kv_heads=1, window=20),
    "prefill": Case([(0, [(0, 270)])], num_heads=2, num_kv_heads=1, own_page=64),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_that_of_one_query_at_a_time(case, backend, device):
    assert_fp32_error(case, device)


@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_keys_of_several_chunks(case, backend, device):
    assert_fp32_error(case, device)


def test_the_reference_computes_in_fp64(device):
    case = replace(CASES["score"], dtype=torch.float64)
    with ops.use("reference"):
        out = ops.prefix_attention(*case.arguments(device))
    torch.testing.assert_close(out.cpu(), case.expected(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["decode", "window"])
@pytest.mark.parametrize(
    ("backend_name", "dtype"),
    [
        ("reference", torch.bfloat16),
        ("native", torch.bfloat16),
        ("reference", torch.float16),
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_error_of_16_bits_is_that_of_pytorch(name, backend_name, dtype, device):
    case = replace(CASES[name], dtype=dtype)
    expected, plain = case.expected(), same_dtype_attention(case)
    with ops.use(backend_name):
        out = ops.prefix_attention(*case.arguments(device)).cpu()
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + 1e-5


def same_dtype_attention(case):
    """What a plain expression makes of 16-bit tensors."""
    out = []
    for (_, prefix_k, prefix_v), rows in case.sequences():
        for (q, own_k, own_v), own_len, num_q in rows:
            k, v = (torch.cat(pair) for pair in ((prefix_k, own_k), (prefix_v, own_v)))
            k, v = (x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=1) for x in (k, v))
            for i in range(num_q):
                end = len(prefix_k) + own_len + i + 1
                seen = slice(max(0, end - (case.window or end)), end)
                scores = torch.einsum("he,she->hs", q[own_len + i] * case.head_dim**-0.5, k[seen])
                out.append(torch.einsum("hs,she->he", scores.softmax(dim=1), v[seen]))
    return torch.stack(out)


def test_native_bfloat16_is_fp32_arithmetic_rounded_once():
    if ops.missing("native"):
        pytest.skip("no native here")
    case = replace(CASES["score"], dtype=torch.bfloat16)
    half = case.arguments()
    whole = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in half]
    with ops.use("native"):
        assert torch.equal(ops.prefix_attention(*half), ops.prefix_attention(*whole).bfloat16())


@pytest.mark.parametrize("case", [CASES["decode"], CASES["score"], CASES["window"], LONG["decode"]])
def test_a_page_may_belong_to_many(case, backend, device):
    """Prefix and own keys in one storage of equal pages, and two groups on the same prefix pages."""
    case = replace(case, groups=[case.groups[0], case.groups[0]], keys=[5, 5])
    q, prefix_k, prefix_v, prefix_pages, prefix_lens, own_k, own_v, own_pages, *rest = case.arguments(device)
    prefix_pages[1] = prefix_pages[0]
    own_pages = own_pages + len(prefix_k)
    k, v = torch.cat([prefix_k, own_k]), torch.cat([prefix_v, own_v])
    out = ops.prefix_attention(q, k, v, prefix_pages, prefix_lens, k, v, own_pages, *rest)
    torch.testing.assert_close(out.double().cpu(), case.expected(), rtol=0, atol=FP32)


@pytest.mark.parametrize("name", ["decode", "window"])
def test_a_row_does_not_depend_on_the_batch(name, backend, device):
    """Bit by bit, whatever the other rows of its group and the other groups are, and wherever its pages lie."""
    if backend == "reference":
        pytest.skip("matrix products of torch depend on their shapes")
    whole = replace(CASES[name], own_columns=6, keys=list(range(len(CASES[name].groups))))
    max_q = max(num_q for _, group in whole.groups for _, num_q in group)
    out = ops.prefix_attention(*whole.arguments(device))
    start = 0
    for key, group in zip(whole.keys, whole.groups, strict=True):
        for count in {1, len(group[1])}:
            num_tokens = sum(num_q for _, num_q in group[1][:count])
            if num_tokens:
                part = replace(whole, groups=[(group[0], group[1][:count])], keys=[key], own_columns=4)
                arguments = list(part.arguments(device))
                arguments[11] = max_q  # what sizes the tiles is the same for all batches of a captured graph
                arguments[12] = whole.arguments()[12]
                assert torch.equal(ops.prefix_attention(*arguments), out[start : start + num_tokens])
        start += sum(num_q for _, num_q in group[1])
    assert start == len(out)


def test_threads_do_not_change_a_bit():
    if ops.missing("native"):
        pytest.skip("no native here")
    arguments = LONG["score"].arguments()
    with ops.use("native"):
        one = ops.prefix_attention(*arguments)
        torch.set_num_threads(2)
        try:
            assert torch.equal(ops.prefix_attention(*arguments), one)
        finally:
            torch.set_num_threads(1)


def test_later_values_are_not_read(device):
    """A NaN in the value of a row's last token reaches no other query, in the C++ even within a tile of queries."""
    if ops.missing("native"):
        pytest.skip("no native here")
    case = Case([(20, [(30, 6), (3, 2)])], prefix_page=32, own_page=64)
    arguments = case.arguments()
    own_v, own_pages = arguments[6], arguments[7]
    own_v[own_pages[0, 0], :, 35] = math.nan
    with ops.use("native"):
        out = ops.prefix_attention(*arguments)
    assert out[5].isnan().all()
    assert not out[[0, 1, 2, 3, 4, 6, 7]].isnan().any()


def test_nan_and_overflow_reach_the_result(backend, device):
    case = Case([(4, [(3, 1), (3, 1)])])
    q, *rest = case.arguments(device)
    q[0, 1] = math.nan
    q[0, 2] = math.inf
    out = ops.prefix_attention(q, *rest)
    assert out[0, 1:3].isnan().all()
    assert not out[0, 0].isnan().any()
    assert not out[1].isnan().any()


def test_large_scores(backend, device):
    """Scores around 1e4, and one that takes all the weight."""
    case = Case([(40, [(30, 2), (3, 1)])], scale=3e3)
    out = ops.prefix_attention(*case.arguments(device))
    torch.testing.assert_close(out.double().cpu(), case.expected(), rtol=0, atol=2e-2)


def test_unaligned_rows(backend, device):
    """Rows of 24 bytes at an odd address: others read garbage there."""
    case = Case(SCORE, head_dim=6)
    q, prefix_k, *rest = case.arguments(device)
    storage = torch.empty(prefix_k.numel() + 1, device=device)
    storage[1:] = prefix_k.flatten()
    heads = torch.cat([q, q[:, :1]], dim=1)[:, : q.shape[1]]  # strided as a slice of qkv is
    out = ops.prefix_attention(heads, storage[1:].view_as(prefix_k), *rest)
    torch.testing.assert_close(out.double().cpu(), case.expected(), rtol=0, atol=FP32)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_no_tokens(num_rows, backend, device):
    arguments = list(Case([(5, [(3, 1)])]).arguments(device))
    arguments[0] = arguments[0][:0]
    arguments[7], arguments[8] = arguments[7][:num_rows], arguments[8][:num_rows]
    arguments[9], arguments[10] = int32([0] * (num_rows + 1)).to(device), int32([0, num_rows]).to(device)
    assert ops.prefix_attention(*arguments).shape == (0, 4, 16)


BAD = {  # argument, what to make of it, message, backends that look
    "key-dtype": (5, lambda x: x.half(), "expected", ["native", "triton"]),
    "lens-dtype": (8, lambda x: x.long(), "own_lens_B: expected .* of torch.int32", BACKENDS),
    "head-width": (5, lambda x: x[..., :8].contiguous(), "own_k_MKZE: expected shape", BACKENDS),
    "table-rows": (7, lambda x: x[:1], "own_lens_B: expected shape", BACKENDS),
    "offsets": (9, lambda x: x[:-1], "cu_q", BACKENDS),
    "group-offsets": (10, lambda x: x[:-1], "cu_rows", BACKENDS),
    "heads": (0, lambda x: x[:, :3], "heads", BACKENDS),
    "window": (13, lambda x: 0, "window", BACKENDS),
    "strided-cache": (6, lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2], "contiguous", ["native", "triton"]),
    "page": (7, lambda x: x + 1000, r"own_pages\[\d+\] = \d+: expected 0 <= page", ["native"]),
    "room": (8, lambda x: x + 1000, r"own_lens\[0\] = \d+ and \d+ new: expected 0 to \d+", ["native"]),
    "decreasing": (9, lambda x: x.flip(0), r"cu_q\[0\] = \d+: expected 0", ["native"]),
    "max_q": (11, lambda x: x - 1, "expected at most max_q", ["native"]),
    "max_rows": (12, lambda x: x - 1, "expected at most max_rows", ["native"]),
}


@pytest.mark.parametrize(("backend_name", "name"), [(backend, name) for name, bad in BAD.items() for backend in bad[3]])
def test_bad_input_is_refused(backend_name, name, device):
    if ops.missing(backend_name) or (backend_name == "native" and device != "cpu"):
        pytest.skip(f"no {backend_name} here")
    index, change, message, _ = BAD[name]
    arguments = list(CASES["score"].arguments(device))
    arguments[index] = change(arguments[index])
    with ops.use(backend_name), pytest.raises(ValueError, match=message):
        ops.prefix_attention(*arguments)


@pytest.mark.skipif(ops.missing("native") is not None, reason="no native here")
def test_opcheck():
    torch.library.opcheck(torch.ops.nrt_fast.prefix_attention.default, CASES["window"].arguments())
